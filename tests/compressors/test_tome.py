"""ToMe in the vision tower against a block written out by hand; after the tower; settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import htc_vlm
from htc_vlm import compressors


def merge_by_hand(x: Tensor, size: Tensor, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """x (N, width), size (N,), metric (N, M), class token first: official ToMe, one token at a time."""
    if r == 0:
        return x, size  # and in their order
    unit = normalize(metric, dim=-1)
    even, odd = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    best = {a: max((float(unit[a] @ unit[b]), -b) for b in odd) for a in even[1:]}
    merged = sorted(best, key=lambda a: -best[a][0])[:r]
    total, weight = {b: x[b] * size[b] for b in odd}, {b: size[b] for b in odd}
    for a in merged:
        b = -best[a][1]
        total[b], weight[b] = total[b] + x[a] * size[a], weight[b] + size[a]
    kept = [a for a in even if a not in merged]
    values = [x[a] for a in kept] + [total[b] / weight[b] for b in odd]
    return torch.stack(values), torch.stack([size[a] for a in kept] + [weight[b] for b in odd])


def tower_by_hand(model: Any, pixels: Tensor, merges: list[int]) -> Tensor:
    """One image (1, 3, h, w) through three blocks, with size-weighted attention -> (C, width), class token left out."""
    tower = model.model.vision_tower
    x = tower.pre_layrnorm(tower.embeddings(pixels))[0]
    size = torch.ones(len(x))
    for block, r in zip(tower.encoder.layers, merges, strict=False):
        attention, normed = block.self_attn, block.layer_norm1(x)
        q, k, v = (
            projection(normed).view(len(x), 2, -1).transpose(0, 1)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        weights = (q @ k.transpose(1, 2) * attention.scale + size.log()).softmax(dim=-1)
        x = x + attention.out_proj((weights @ v).transpose(0, 1).flatten(1))
        x, size = merge_by_hand(x, size, k.mean(dim=0), r)
        x = x + block.mlp(block.layer_norm2(x))
    return x[1:]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("merges", [[4, 3, 2], [0, 5, 1], [8, 4, 2]])
def test_merging_in_the_tower_is_tome_block_by_block(llavas: Any, prompts: Any, attention: str, merges: list[int]) -> None:
    """LightCompress's port forgets the sizes at every block: neither means nor attention are weighted."""
    model = llavas[attention]
    with htc_vlm.apply(model, "tome", merges=merges):
        given = model.model.get_image_features(pixel_values=prompts.pixels[1]).pooler_output
    for image, tokens in zip(prompts.pixels[1], given, strict=True):
        expected = model.model.multi_modal_projector(tower_by_hand(model, image[None], merges))
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("budget", "few", "more"), [(192, (16, 7), (17, 16)), (128, (19, 12), (20, 11)), (64, (22, 17), (23, 6))]
)
def test_tomes_budgets_are_exact_in_llavas_23_blocks(budget: int, few: tuple[int, int], more: tuple[int, int]) -> None:
    """Constant r gives 185 or 208, 116 or 139, 47 or 70: docs/specs/baselines.md section 4."""
    method = compressors.build("tome", n_keep=budget)
    merges = method.tower_merges(576, 23)
    assert sorted(merges) == [few[0]] * few[1] + [more[0]] * more[1]
    assert method.schedule(576, 32) == compressors.build("tome", merges=merges).schedule(576, 32) == [budget] * 32


def test_every_patch_is_in_exactly_one_token(llava: Any, prompts: Any) -> None:
    """Provenance pictures must cover the image once."""
    with htc_vlm.apply(llava, "tome", n_keep=5) as applied:
        llava(**prompts.batch)
    assert applied.source.shape == (4, 5, 16)
    assert torch.equal(applied.source.sum(dim=1), torch.ones(4, 16))


def test_raster_order_only_reorders(llava: Any, prompts: Any) -> None:
    """Merging scrambles tokens; the language model numbers them."""
    given, first = [], []
    for restore_order in (False, True):
        with htc_vlm.apply(llava, "tome", n_keep=6, restore_order=restore_order) as applied:
            given.append(llava.model.get_image_features(pixel_values=prompts.pixels[0]).pooler_output[0])
            first.append(applied.source[0].argmax(dim=-1))  # the first patch of each token
    torch.testing.assert_close(given[1], given[0][first[0].argsort()])
    assert first[1].equal(first[0].sort().values)


def test_after_the_tower_means_are_means_of_patches() -> None:
    """Two rounds of halving: the second must weigh by size, or the mean of four is not their mean."""
    features = torch.eye(3).repeat_interleave(torch.tensor([4, 2, 2]), dim=0)[None] + 0.001 * torch.arange(8.0)[:, None]
    images = compressors.ImageFeatures(features, project=lambda x: x)
    tome = compressors.build("tome", n_keep=3, place="after_tower", metric="features", restore_order=True)
    expected = torch.stack([part.mean(dim=0) for part in features[0].split([4, 2, 2])])
    torch.testing.assert_close(tome.before_llm(images)[0], expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merges": (4, 3)}, "each of the 3 blocks"),
        ({"merges": (9, 0, 0)}, "asked to merge 9 of 16"),
        ({"n_keep": 17}, "only 16"),
        ({"n_keep": 1}, "at least 2"),
        ({"n_keep": 4, "merges": (1, 1, 1)}, "give one"),
        ({"place": "before"}, "known: tower, after_tower"),
    ],
)
def test_merges_that_cannot_be_are_refused(llava: Any, settings: dict[str, Any], message: str) -> None:
    """The official code lowers r silently, and the budget is missed."""
    with pytest.raises(ValueError, match=message), htc_vlm.apply(llava, "tome", **settings):
        pass


def test_flash_attention_in_the_tower_is_refused(new_llava: Any) -> None:
    """It would ignore the sizes."""
    model = new_llava()
    model.model.vision_tower.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="adds a mask.*flash_attention_2"), htc_vlm.apply(model, "tome", n_keep=4):
        pass
