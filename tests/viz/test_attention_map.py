"""The maps: shares that add up to 1, anchors where the method puts them, and nothing changed by asking."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from htc_vlm.applied import hf_compat
from htc_vlm.model.answering import Answerer
from htc_vlm.viz.attention_map import BottleneckMaps, Look, bottleneck_maps, draw, draw_rows, look, overlay, shares
from htc_vlm.viz.seen import seen_by_model

from .. import tiny_runs as tiny

METHODS = {
    "htc": (tiny.HTC, 2),
    "anchors after the patches": ({**tiny.HTC, "fusion": "post"}, 2),
    "mean fusion": ({**tiny.HTC, "fusion": "mean"}, 0),
    "three bottleneck tokens": ({**tiny.HTC, "n_bottleneck": 3, "visual_attention": "causal"}, 2),
    "voco": (tiny.VOCO, 0),
}  # fmt: skip


def pixels(compressor: dict[str, Any], n: int = 2) -> torch.Tensor:
    processor = tiny.loaded(compressor)[1]
    return processor(images=[tiny.noise(i) for i in range(n)], return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_anchors_patches_and_own_share_add_up_to_one(method: str) -> None:
    """A part counted twice, or left out, would make the bars lie."""
    compressor, n_anchors = METHODS[method]
    maps = bottleneck_maps(tiny.loaded(compressor)[0], pixels(compressor))
    assert maps.anchors.shape == (2, tiny.N_LAYERS, n_anchors)
    assert maps.patches.shape == (2, tiny.N_LAYERS, 2, 2) and maps.own.shape == (2, tiny.N_LAYERS)
    total = maps.anchors.sum(-1) + maps.patches.sum((-1, -2)) + maps.own
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)
    assert all((part >= 0).all() for part in (maps.anchors, maps.patches, maps.own))


def test_the_maps_are_the_attention_of_the_pass_that_compresses() -> None:
    """Eager attention of the language model over the same tokens is the reference, anchors first, then patches by rows."""
    model = tiny.loaded(tiny.HTC)[0]
    images = pixels(tiny.HTC)
    maps = bottleneck_maps(model, images)
    attention = model.bottleneck_attention(pixel_values=images)[:, :, :, 0].mean(dim=2)
    torch.testing.assert_close(maps.anchors, attention[..., :2])
    torch.testing.assert_close(maps.patches.flatten(-2), attention[..., 2:6])
    from htc_vlm import load

    eager = load(tiny.checkpoint(tiny.HTC), attn_implementation="eager")[0]
    with torch.no_grad():
        visual = eager.visual_tokens(images)
        embeds = torch.cat((visual, eager.get_input_embeddings().weight[eager.config.bottleneck_token_id].expand(2, 1, -1)), 1)
        see = torch.eye(7).bool()
        see[-1] = True
        mask = torch.where(see, 0.0, torch.finfo(torch.float32).min).expand(2, 1, 7, 7)
        out = eager.model.language_model(
            inputs_embeds=embeds, attention_mask=mask,
            position_ids=torch.arange(7).expand(2, -1), output_attentions=True,
        )  # fmt: skip
    reference = torch.stack([layer[:, :, -1].mean(dim=1) for layer in out.attentions], dim=1)
    torch.testing.assert_close(attention, reference, atol=1e-5, rtol=0)


def test_asking_for_the_maps_changes_nothing() -> None:
    """Hooks or another attention left behind would change the cells, and their recipe's promise."""
    model = tiny.loaded(tiny.HTC)[0]
    images = pixels(tiny.HTC)
    before = model.compress(pixel_values=images)
    bottleneck_maps(model, images)
    after = model.compress(pixel_values=images)
    assert torch.equal(before.kv, after.kv) and before.recipe == after.recipe


def test_the_maps_are_of_the_cells_that_questions_are_answered_from() -> None:
    """Maps of another pass than the evaluated one would explain a model that nobody asked."""
    model, processor = tiny.loaded(tiny.HTC)
    images = pixels(tiny.HTC)
    evaluated = model.compress(pixel_values=images)
    with torch.no_grad():
        run, _ = model.model.compress_pass(model.visual_tokens(images), output_hidden_states=True)  # what the maps read
    torch.testing.assert_close(hf_compat.kv_from_cache(run.past_key_values, 1), evaluated.kv, atol=1e-5, rtol=1e-4)
    answerer = Answerer(model, processor)
    before = answerer.answer("a", lambda: tiny.noise(0), tiny.QUESTIONS, 4)
    look("", model, processor, [tiny.noise(0)])
    assert Answerer(model, processor).answer("a", lambda: tiny.noise(0), tiny.QUESTIONS, 4) == before


def test_shares_are_means_over_pictures_and_sums_over_tokens() -> None:
    """By hand: two pictures, one layer; anchors 0.4 and 0.2, patches 0.4 and 0.6, itself 0.2 both."""
    maps = BottleneckMaps(
        anchors=torch.tensor([[[0.3, 0.1]], [[0.1, 0.1]]]),
        patches=torch.tensor([[[[0.1, 0.1], [0.1, 0.1]]], [[[0.3, 0.1], [0.1, 0.1]]]]), own=torch.full((2, 1), 0.2),
    )  # fmt: skip
    assert {name: pytest.approx(row) for name, row in shares(maps).items()} == {
        "anchors": [0.3], "patches": [0.5], "bottleneck": [0.2],
    }  # fmt: skip


def test_figure_3_has_a_panel_per_layer_and_model(tmp_path: Path) -> None:
    """And models of different depth have no layers to compare."""
    pictures = [tiny.noise(0), tiny.noise(1)]
    one = look("htc", *tiny.loaded(tiny.HTC), pictures)
    heights, widths = [], []
    for looks in ([one], [one, look("voco", *tiny.loaded(tiny.VOCO), pictures)]):
        draw_rows(looks, ["a", "b"], tmp_path / "rows.png")
        with Image.open(tmp_path / "rows.png") as drawn:
            widths.append(drawn.size[0])
            heights.append(drawn.size[1])
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.1) and heights[0] == heights[1]
    twice = [torch.cat((part, part), 1) for part in (one.maps.anchors, one.maps.patches, one.maps.own)]
    deeper = Look("deeper", BottleneckMaps(*twice))
    with pytest.raises(ValueError, match=r"\[2, 4\] layers"):
        draw_rows([one, deeper], ["a", "b"], tmp_path / "rows.png")


def test_the_overlay_lies_over_the_padded_picture() -> None:
    """A wide picture is padded above and below, as the model sees it; the brightest spot is where the weight is."""
    weights = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    drawn = overlay(seen_by_model(*tiny.loaded(tiny.HTC), Image.new("RGB", (80, 40), "black")), weights, side_pixels=64)
    assert drawn.size == (64, 64)
    light = drawn.convert("L")
    assert light.getpixel((52, 52)) > light.getpixel((12, 12)) + 50
    assert light.getpixel((12, 4)) > light.getpixel((12, 24))  # grey padding above the black picture


def test_the_overlay_lies_over_the_middle_where_the_processor_crops() -> None:
    """As the hub's llava-1.5-7b-hf does: of 600 x 200 pixels only the middle third was seen, and the map lay over all of it."""
    model, processor = tiny.loaded(tiny.HTC)
    crops, side = copy.deepcopy(processor), processor.image_processor.size["height"]
    own = crops.image_processor
    own.do_pad, own.do_center_crop = False, True
    own.size, own.crop_size = {"shortest_edge": side}, {"height": side, "width": side}
    picture = Image.new("RGB", (600, 200), "white")
    picture.paste("red", (200, 0, 400, 200))
    (seen,) = look("", model, crops, [picture]).seen
    assert seen.size == (side, side) and {seen.getpixel((x, side // 2)) for x in (3, side // 2, side - 4)} == {(255, 0, 0)}


def test_all_attention_on_nothing_is_no_division_by_zero() -> None:
    """A bottleneck that looks only at itself."""
    assert overlay(Image.new("RGB", (8, 8)), torch.zeros(2, 2), side_pixels=8).size == (8, 8)


def test_a_drawing_has_a_row_for_each_picture(tmp_path: Path) -> None:
    """Names and pictures of different number are a mistake, not a shorter drawing."""
    model, processor = tiny.loaded(tiny.HTC)
    pictures = [tiny.noise(0), tiny.noise(1, (10, 60))]
    draw(model, processor, pictures, ["a", "b"], tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as drawn:
        assert drawn.size[0] > drawn.size[1] > 300
    with pytest.raises(ValueError):
        draw(model, processor, pictures, ["a"], tmp_path / "map.png")


def test_visual_tokens_that_are_no_square_are_refused() -> None:
    """Two pooled tokens lie nowhere on the picture; a model without a bottleneck looked at nothing."""
    with pytest.raises(ValueError, match="no bottleneck"):
        bottleneck_maps(tiny.loaded(tiny.NONE)[0], pixels(tiny.NONE))
