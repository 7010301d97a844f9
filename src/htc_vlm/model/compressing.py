"""Run [visual tokens; bottleneck] of images through a decoder and keep the bottleneck's keys and values.

Source:  HTC-VLM Algorithm 1; VoCo-LLaMA section 3.
Differs: any decoder that movable.py lets through; images of several sizes go in groups of one size, so that nothing is padded
         and a batch gives what its images give alone. With M-RoPE a visual token keeps its place in the picture, and the
         bottleneck has equal positions on all axes, so that one rotation moves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from htc_vlm.applied import hf_compat
from htc_vlm.compressors import Compressor
from htc_vlm.model import fast_prefill, reading
from htc_vlm.model.movable import check_movable
from htc_vlm.ops import rope
from htc_vlm.tokens import TokenLayout


@dataclass(frozen=True)
class Group:
    """Images of one size.

    numbers: which images of the batch; visual (N, C, D); positions (axes, C) with the bottleneck at 0, None: counted up to -1;
    deep (n, N, C, D): what the decoder adds to the visual tokens behind each of its first n layers (Qwen3-VL).
    """

    numbers: Sequence[int]
    visual: Tensor
    positions: Tensor | None = None
    deep: Tensor | None = None

    @property
    def place(self) -> Tensor:
        """(axes, C), counted ones too."""
        return rope.around_image(self.visual.shape[1], 0, self.positions, self.visual.device)

    @property
    def cost(self) -> int:
        """Positions that sequential numbering leaves free for an image."""
        return self.visual.shape[1] if self.positions is None else -int(self.positions.min())


def in_order(groups: Sequence[Group]) -> list[tuple[Group, int]]:
    """Each image of a batch: its group, and its row there."""
    places = {n: (group, row) for group in groups for row, n in enumerate(group.numbers)}
    return [places[n] for n in range(len(places))]


def compress_groups(
    decoder: Any, compressor: Compressor, groups: Sequence[Group], bottleneck: Tensor | None, path: str, n_entries: int | None
) -> Tensor:
    """Images of any sizes -> their kv (N, layers, 2, kv heads, K, head_dim), in the order of the batch."""
    parts = [compress(decoder, compressor, one.visual, bottleneck, path, n_entries, one.positions, one.deep) for one in groups]
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([n for group in groups for n in group.numbers], device=parts[0].device).argsort()
    return torch.cat(parts)[order]


def compress(
    decoder: Any,
    compressor: Compressor,
    visual: Tensor,
    bottleneck: Tensor | None,
    path: str = "auto",
    n_entries: int | None = None,
    positions: Tensor | None = None,
    deep: Tensor | None = None,
) -> Tensor:
    """(N, C, D) visual tokens and (K, D) bottleneck embeddings -> kv (N, layers, 2, kv heads, K, head_dim).

    bottleneck: None for compressors that `reads_apart`, which have rows of their own. path: "general" is the masked pass,
    "auto" takes the fast path of fast_prefill.py where it applies, "fast" refuses (ValueError) where it does not.
    positions, deep: see Group.
    """
    n_bottleneck = compressor.n_bottleneck
    check_movable(compressor.name, decoder, visual.shape[1] + n_bottleneck)
    if bottleneck is None:
        n_entries = n_bottleneck if n_entries is None else n_entries
        return reading.read(decoder, compressor, visual, n_entries, path, positions, deep)
    if fast_prefill.takes_fast_path(path, decoder, compressor, visual.shape[1] + n_bottleneck):
        return fast_prefill.compress(decoder, visual, bottleneck, positions, deep)
    out, _ = run(decoder, compressor, visual, bottleneck, positions, deep)
    return hf_compat.kv_from_cache(out.past_key_values, n_bottleneck)


def run(
    decoder: Any,
    compressor: Compressor,
    visual: Tensor,
    bottleneck: Tensor,
    positions: Tensor | None = None,
    deep: Tensor | None = None,
    output_hidden_states: bool = False,
) -> tuple[Any, Tensor]:
    """The output of a pass over [visual; bottleneck] with cache, and its position ids."""
    n_images, n_visual, _ = visual.shape
    n_bottleneck = bottleneck.shape[0]
    embeds = torch.cat((visual, bottleneck.expand(n_images, -1, -1)), dim=1)
    kinds = TokenLayout.from_string("v" * n_visual + "b" * n_bottleneck).kind.to(visual.device)
    layout = TokenLayout.from_kind(kinds.expand(n_images, -1))
    visible = mask_around(compressor, layout)
    position_ids = rope.for_rows(rope.around_image(n_visual, n_bottleneck, positions, visual.device), n_images)
    out = hf_compat.run_over_cache(
        decoder,
        DynamicCache(config=decoder.config),
        inputs_embeds=embeds,
        attention_mask=hf_compat.ready_mask(decoder.config, embeds, None, visible),
        position_ids=position_ids,
        output_hidden_states=output_hidden_states,
        **hf_compat.deep_features(layout.is_visual, deep),
    )
    return out, position_ids


def mask_around(compressor: Compressor, layout: TokenLayout) -> Tensor:
    """(B, L, L) who sees whom in the single pass; ValueError for a compressor that says nothing of it."""
    visible = compressor.visible(layout)
    if visible is None:
        raise ValueError(f"compressor {compressor.name!r} has bottleneck tokens but no mask around them")
    return visible


def mask_amid_text(
    model: Any,
    decoder: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    cache: Any,
    position_ids: Tensor | None,
    kv_positions: Tensor,
) -> Any:
    """The mask of text over images that stand amid it. ValueError without the text's positions."""
    if position_ids is None:
        raise ValueError("images amid the text need position_ids beside kv_positions; use compressed=...")
    like = model.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
    return hf_compat.mask_over_kv(decoder.config, like, attention_mask, cache, position_ids, kv_positions)


def attention(decoder: Any, compressor: Compressor, group: Group, bottleneck: Tensor | None) -> Tensor:
    """What each bottleneck token looked at: (N, layers, H, K, C + K), rows sum to 1."""
    if bottleneck is None:
        return reading.attention(decoder, compressor, group.visual, group.positions, group.deep)
    out, position_ids = run(
        decoder, compressor, group.visual, bottleneck, group.positions, group.deep, output_hidden_states=True
    )
    return hf_compat.attention_of_last_rows(
        decoder, out.hidden_states, out.past_key_values, position_ids, compressor.n_bottleneck
    )


def bottleneck_id(config: Any, compressor: Compressor) -> int:
    """The id of the bottleneck token; ValueError for a configuration without one."""
    if config.bottleneck_token_id is None:
        raise ValueError(
            f"compressor {compressor.name!r} needs config.bottleneck_token_id; htc_vlm.model.add_compressor adds it"
        )
    return int(config.bottleneck_token_id)


def bottleneck_embeds(model: Any, compressor: Compressor, like: Tensor) -> Tensor | None:
    """(K, D) from the model's input embeddings; None for a compressor with rows of its own."""
    if compressor.reads_apart:
        return None
    ids = torch.full((compressor.n_bottleneck,), bottleneck_id(model.config, compressor), device=like.device)
    return model.get_input_embeddings()(ids).to(like.dtype)


def check_has_image(layout: TokenLayout, has_image: bool) -> None:
    """ValueError for prompts with bottleneck tokens and no image."""
    if not has_image and bool(layout.is_bottleneck.any()):
        raise ValueError(
            "the prompt has bottleneck tokens and no image: they would be read as words; give compressed=... (what "
            "model.compress returned), or the image with its placeholders"
        )


def check_bottlenecks(layout: TokenLayout, compressor: Compressor) -> None:
    """ValueError for prompts whose images are not followed by their bottleneck tokens."""
    n_images = int(layout.image.max(dim=1).values.sum())
    n_bottleneck = int(layout.is_bottleneck.sum())
    if n_bottleneck != n_images * compressor.n_bottleneck:
        raise ValueError(
            f"{n_images} images need {compressor.n_bottleneck} bottleneck tokens each after their "
            f"placeholders, the prompts have {n_bottleneck}: text would not see the image. Use the processor that belongs to "
            "this model (htc_vlm.load gives both)"
        )
