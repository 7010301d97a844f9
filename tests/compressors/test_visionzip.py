"""VisionZip against the tower's own attention maps and the released loop, and its settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

import htc_vlm
from htc_vlm import compressors


def test_dominant_and_contextual_tokens_are_the_released_codes(llava: Any, prompts: Any) -> None:
    """Class row summed over heads, of the block whose output is read; contextual = target + mean of the assigned."""
    pixels = prompts.pixels[0]
    out = llava.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
    hidden, row = out.hidden_states[-2][0], out.attentions[-2][0][:, 0, 1:].sum(dim=0)
    block = llava.model.vision_tower.encoder.layers[-2]
    keys = block.self_attn.k_proj(block.layer_norm1(out.hidden_states[-3]))[0].view(17, 2, -1).mean(dim=1)
    dominant = row.topk(3).indices.sort().values + 1
    left = torch.tensor([i for i in range(1, 17) if i not in dominant.tolist()])  # 13 patches
    targets = left[[0, 6]]  # every 13 // 2 = 6th, the first two
    joins = [[t] for t in targets.tolist()]
    for i in left.tolist():
        if i not in targets.tolist():
            like = [float(normalize(keys[i], dim=0) @ normalize(keys[t], dim=0)) for t in targets.tolist()]
            joins[like.index(max(like))].append(i)
    contextual = torch.stack([hidden[first] + hidden[rest].mean(dim=0) for first, *rest in joins if rest])
    expected = llava.model.multi_modal_projector(torch.cat((hidden[:1], hidden[dominant], contextual)))
    with htc_vlm.apply(llava, "visionzip", n_dominant=4, n_contextual=2):
        given = llava.model.get_image_features(pixel_values=pixels).pooler_output[0]
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)


def test_the_tower_need_not_be_eager(llavas: Any, prompts: Any) -> None:
    """The released code reads attention maps, which sdpa does not give."""
    given = []
    for model in llavas.values():
        with htc_vlm.apply(model, "visionzip", n_dominant=4, n_contextual=2):
            given.append(torch.stack(model.model.get_image_features(pixel_values=prompts.pixels[1]).pooler_output))
    torch.testing.assert_close(*given, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("n_dominant", "n_contextual", "budget"), [(162, 30, 192), (108, 20, 128), (54, 10, 64)])
def test_visionzips_budgets_count_the_class_token(n_dominant: int, n_contextual: int, budget: int) -> None:
    """53 patches, the class token and 10 contextual ones are 64."""
    method = compressors.build("visionzip", n_dominant=n_dominant, n_contextual=n_contextual)
    assert method.schedule(576, 32) == [budget] * 32


def test_more_tokens_than_patches_are_refused() -> None:
    """Fifteen dominant patches and two contextual ones are one more than there are."""
    with pytest.raises(ValueError, match="need 17 patches; there are 16"):
        compressors.build("visionzip", n_dominant=16, n_contextual=2).schedule(16, 6)
