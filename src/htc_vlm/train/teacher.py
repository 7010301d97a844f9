"""The uncompressed model whose answers a student is trained to follow.

Source:  ours; the loss is in train/loop.py.
Differs: nothing known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def logits_of_teacher(path: str, student: Any) -> Callable[[dict[str, Tensor]], Tensor]:
    """A function: a batch -> the teacher's logits at the supervised tokens, in the same order as the student's."""
    from htc_vlm.model.loading import load
    from htc_vlm.model.modeling import sizes_of

    teacher = load(path)[0].requires_grad_(False)
    if teacher.model.compressor.name != "none":
        raise ValueError(f"the teacher must be uncompressed, {path} uses {teacher.model.compressor.name!r}")
    image_id, bottleneck_id = student.config.image_token_id, student.config.bottleneck_token_id
    n_patches = sizes_of(teacher.config).n_patches
    if teacher.config.text_config.vocab_size != student.config.text_config.vocab_size:
        raise ValueError(f"the teacher {path} has another vocabulary than the student; distil from the same language model")

    @torch.no_grad()
    def teach(batch: dict[str, Tensor]) -> Tensor:
        ids, labels = batch["input_ids"], batch["labels"]
        teacher.to(ids.device)
        is_image = (ids == image_id) | (ids == bottleneck_id)
        n_image = student.model.compressor.n_visual(n_patches) + student.model.compressor.n_bottleneck
        if not bool((is_image[:, :n_image].all(1) & (is_image.sum(1) == n_image)).all()):
            raise ValueError("distillation needs exactly one image in front of each sample")
        prefix = ids.new_full((ids.shape[0], n_patches), image_id)

        def swap(tensor: Tensor, value: int) -> Tensor:
            return torch.cat((torch.full_like(prefix, value), tensor[:, n_image:]), dim=1)

        others: dict[str, Tensor] = {name: batch[name] for name in ("patch_features", "pixel_values") if name in batch}
        if "question_ids" in batch:
            others["question_ids"] = swap(batch["question_ids"], 0)
        out = teacher(
            input_ids=torch.cat((prefix, ids[:, n_image:]), dim=1),
            attention_mask=swap(batch["attention_mask"], 1),
            **others,
        )
        return out.logits[:, :-1][swap(labels, -100)[:, 1:] != -100]

    return teach
