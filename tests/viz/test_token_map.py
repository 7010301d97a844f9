"""Pictures of which patch went into which token: groups, colours and shade, and what the methods record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import htc_vlm
from htc_vlm.viz import token_map
from htc_vlm.viz.seen import seen_by_model
from htc_vlm.viz.token_map import SHADE, TINT, Stage, colour_of, groups, overlay, stages

from .. import tiny_runs as tiny
from ..compressors.conftest import make_llava, make_prompts

# Four patches: 0 and 3 merged into token 0, 1 alone in token 1, 2 dropped.
SOURCE = torch.tensor([[0.5, 0.0, 0.0, 0.5], [0.0, 1.0, 0.0, 0.0]])
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("random_drop", {"n_keep": 5}),
    ("avg_pool", {"n_tokens": 4}),
    ("divprune", {"n_keep": 5}),
    ("visionzip", {"n_dominant": 4, "n_contextual": 2}),
    ("tome", {"n_keep": 5}),
    ("tome", {"n_keep": 5, "restore_order": True}),
    ("tome", {"n_keep": 5, "place": "after_tower"}),
    ("fastv", {"n_keep": 5, "layer": 2}),
    ("pyramid_drop", {"stages": (1, 3), "ratio": 0.5}),
    ("sparse_vlm", {"layers": (1, 3), "keep": (7, 3)}),
]


def centre(picture: Image.Image, patch: int) -> np.ndarray[Any, Any]:
    """The colour in the middle of a patch of a 2 x 2 grid."""
    half = picture.width // 2
    return np.array(picture.getpixel((half // 2 + half * (patch % 2), half // 2 + half * (patch // 2))), dtype=float)


def test_merged_patches_share_a_colour_kept_ones_stay_and_dropped_ones_are_dark() -> None:
    """A colour of the wrong patch: the picture would show a provenance that never was."""
    drawn = overlay(Image.new("RGB", (40, 40), (200, 100, 50)), SOURCE, side_pixels=64)
    assert drawn.size == (64, 64)
    plain = np.array([200.0, 100.0, 50.0])
    assert centre(drawn, 1).tolist() == plain.tolist()
    merged = (1 - TINT) * plain + TINT * np.array(colour_of(0))
    assert np.abs(centre(drawn, 0) - merged).max() <= 1 and centre(drawn, 0).tolist() == centre(drawn, 3).tolist()
    dark = (1 - SHADE) * plain.mean() + SHADE * np.array(token_map.DARK)
    assert np.abs(centre(drawn, 2) - dark).max() <= 1


def test_a_patch_belongs_to_the_token_that_holds_most_of_it() -> None:
    """Shares of two tokens: by hand 0.4 against 0.6."""
    found = groups(torch.tensor([[0.4, 1.0], [0.6, 0.0]]))
    assert found.token.tolist() == [1, 0] and found.is_merged.tolist() == [False, False]


def test_neighbouring_numbers_have_different_colours() -> None:
    """192 tokens in one hue would be one blot."""
    colours = np.array([colour_of(i) for i in range(192)], dtype=float)
    assert len({tuple(colour) for colour in colours}) == 192
    assert np.abs(colours[1:] - colours[:-1]).max(axis=1).min() > 60


def test_patches_that_are_no_square_grid_are_refused() -> None:
    """A class token among the patches would move all others by one."""
    with pytest.raises(ValueError, match="5 patches are no square grid"):
        overlay(Image.new("RGB", (8, 8)), torch.eye(5))


def test_stages_reach_to_the_next_drop_and_the_last_layer() -> None:
    """Nothing recorded is refused; one picture of several is chosen."""
    sources = {0: torch.eye(4).expand(2, 4, 4), 3: torch.stack((torch.eye(4)[:2], torch.eye(4)[2:]))}
    first, second = stages(sources, n_layers=6, image=1)
    assert (first.first_layer, first.last_layer, second.first_layer, second.last_layer) == (0, 2, 3, 5)
    assert second.source.argmax(dim=1).tolist() == [2, 3]
    assert Stage(5, 5, SOURCE).title == "layer 5: 2 tokens from 3 patches"
    with pytest.raises(ValueError, match="no sources were recorded"):
        stages({}, n_layers=6)


@torch.no_grad()
@pytest.mark.parametrize(("name", "settings"), METHODS, ids=str)
def test_every_method_records_where_its_tokens_come_from(name: str, settings: dict[str, Any]) -> None:
    """The numbers are those of the schedule, no patch is in two tokens, and both pictures have their own."""
    llava, prompts = make_llava(), make_prompts()
    with htc_vlm.apply(llava, name, **settings) as applied:
        assert applied.sources == {} and applied.source is None
        llava(**prompts.one(1))
        found, schedule = applied.sources, applied.schedule
    assert schedule is not None
    assert {layer: source.shape for layer, source in found.items()} == {
        layer: (2, schedule[layer], 16) for layer in found if layer == 0 or schedule[layer] < schedule[layer - 1]
    }
    for source in found.values():
        assert ((source > 0).sum(dim=1) <= 1).all()
        rows = (source > 0).any(dim=2)
        assert bool(rows[:, name == "visionzip" :].all())  # its first token is the class token
    assert not torch.equal(*applied_last(found)) or name in ("random_drop", "avg_pool")


def applied_last(found: dict[int, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = found[max(found)]
    return first, second


@torch.no_grad()
def test_the_recorded_patches_make_the_tokens() -> None:
    """ToMe after the tower, by mean of the recorded patches; one round, so that sizes are one."""
    llava, prompts = make_llava(), make_prompts()
    inputs = prompts.one(0)
    plain = llava.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    settings = {"merges": (6,), "place": "after_tower", "metric": "features"}
    with htc_vlm.apply(llava, "tome", **settings) as applied:
        tokens = llava.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
        source = applied.source
    assert source is not None
    mean = (source[0] / source[0].sum(dim=1, keepdim=True)) @ plain[0]
    torch.testing.assert_close(tokens, llava.model.multi_modal_projector(mean), atol=1e-5, rtol=0)


def test_a_drawing_of_a_run(tmp_path: Path) -> None:
    """From a picture file's content to a PNG; the first panel of a method that drops later is left out."""
    model, processor = tiny.loaded(tiny.NONE)
    picture = tiny.noise(0, (60, 40))
    square = seen_by_model(model, processor, picture)
    assert square.size == (60, 60)
    found = token_map.record(model, processor, picture, tiny.QUESTIONS[0], "fastv", {"n_keep": 1, "layer": 1})
    assert [stage.source.shape[0] for stage in found] == [4, 1]
    token_map.draw(square, found, "fastv", tmp_path / "fastv.png")
    with Image.open(tmp_path / "fastv.png") as drawn:
        assert drawn.size == (620, 350)
