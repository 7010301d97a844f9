"""HTC-VLM's anchors: Eq. 3 to 5 and the settings of the paper's Table 4, with a quantizer that says what it is asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from htc_vlm import compressors
from htc_vlm.compressors import Compressor, ImageFeatures, Sizes
from htc_vlm.compressors.htc import AnchorMLP
from htc_vlm.quantizers.mgvq import PRESETS

from ..tinies import TINY_CODE

SIZES = Sizes(n_patches=16, vision_width=6, llm_width=5)


def htc(**settings: Any) -> Compressor:
    torch.manual_seed(0)
    method = compressors.build("htc", quantizer=TINY_CODE, **settings)
    method.setup(SIZES)
    return method.eval()


def images(n: int = 2) -> ImageFeatures:
    generator = torch.Generator().manual_seed(1)
    project = nn.Linear(6, 5)
    with torch.no_grad():
        project.weight.fill_(0.1)
    return ImageFeatures(torch.randn(n, 16, 6, generator=generator), project, torch.rand(n, 3, 32, 32, generator=generator))


@torch.no_grad()
def test_equation_4_is_two_layers_each_with_a_gelu_and_without_bias() -> None:
    """GELU(W2 GELU(W1 q)): with W1 = W2 = 1 and q = 1, GELU(1) = 0.8413 and GELU(0.8413) = 0.8413 * 0.7999 = 0.6730."""
    mlp = AnchorMLP(1, 1, 1)
    mlp.w1.weight.fill_(1.0)
    mlp.w2.weight.fill_(1.0)
    assert mlp(torch.ones(1)).item() == pytest.approx(0.6730, abs=1e-4)
    assert [name for name, _ in mlp.named_parameters()] == ["w1.weight", "w2.weight"]


@torch.no_grad()
def test_anchors_stand_before_behind_or_inside_the_patches() -> None:
    """Table 4's fusion; all of them keep the patches themselves."""
    given = images()
    pre, post, mean = (htc(n_anchors=3, fusion=fusion).before_llm(given) for fusion in ("pre", "post", "mean"))
    assert pre.shape == post.shape == (2, 19, 5) and mean.shape == (2, 16, 5)
    assert pre[:, 3:].equal(given.patches) and post[:, :16].equal(given.patches)
    anchors = pre[:, :3]
    assert post[:, 16:].equal(anchors)
    torch.testing.assert_close(mean, (given.patches + anchors.mean(1, keepdim=True)) / 2)


@torch.no_grad()
def test_q_is_flattened_in_raster_order_with_channels_last() -> None:
    """The paper does not say; a checkpoint depends on it. The anchors of a code with a single 1 are one column of W1."""
    method = htc(n_anchors=2)
    code = torch.zeros(1, 8, 8, 8)
    code[0, 2, 3, 5] = 1.0  # row 2, column 3, channel 5
    out = method.before_llm(replace(images(1), codes=code))[:, :2].flatten()
    column = method.to_anchors.w1.weight[:, (2 * 8 + 3) * 8 + 5]
    expected = nn.functional.gelu(method.to_anchors.w2(nn.functional.gelu(column)))
    torch.testing.assert_close(out, expected)


@torch.no_grad()
def test_channels_leave_one_half_out() -> None:
    """Continuous only: the patches, no quantizer. Discrete only: one token per cell of the code, 8 x 8, no patches."""
    given = images()
    assert htc(channels="continuous").before_llm(given).equal(given.patches)
    assert not list(htc(channels="continuous").parameters())
    discrete = htc(channels="discrete")
    assert discrete.before_llm(given).shape == (2, 64, 5) and discrete.n_visual(16) == 64
    other = replace(given, features=given.features + 1)
    assert discrete.before_llm(other).equal(discrete.before_llm(given))


def test_the_papers_discrete_channel_has_441_tokens() -> None:
    """336 pixels at 16 a cell: 21 x 21."""
    assert compressors.build("htc", channels="discrete").n_visual(576) == 441


@torch.no_grad()
def test_anchors_come_from_pixels_or_from_codes_computed_before() -> None:
    method, given = htc(), images()
    assert given.pixels is not None
    codes = method.encode(given.pixels)
    assert codes.shape == (2, 8, 8, 8)
    expected = method.before_llm(given)
    torch.testing.assert_close(method.before_llm(replace(given, pixels=None, codes=codes)), expected)
    with pytest.raises(ValueError, match="htc needs the pixels"):
        method.before_llm(replace(given, pixels=None))


@torch.no_grad()
def test_anchor_sources_are_quantized_latents_or_another_images_code() -> None:
    """`shuffled` asks whether the anchors say anything about their own image."""
    given = images()
    assert given.pixels is not None
    quantized, latents = htc().encode(given.pixels), htc(anchor_source="latents").encode(given.pixels)
    assert not quantized.equal(latents)
    norm = quantized.unflatten(-1, (2, -1)).norm(dim=-1)  # 2 groups: codes of a cosine quantizer have length 1
    torch.testing.assert_close(norm, torch.ones_like(norm), atol=1e-4, rtol=0)
    shuffled = htc(anchor_source="shuffled").before_llm(given)
    assert shuffled[0, :4].equal(htc().before_llm(given)[1, :4])
    with pytest.raises(ValueError, match="at least two images"):
        htc(anchor_source="shuffled").before_llm(images(1))


def test_the_quantizer_is_frozen_and_has_no_decoder() -> None:
    """Half its weights would be shipped for nothing, or drift with weight decay."""
    method = htc()
    names = [name for name, _ in method.named_parameters() if name.startswith("quantizer.")]
    assert names and not any("decoder" in name or "post_quant" in name for name in names)
    assert {p.requires_grad for n, p in method.named_parameters() if n.startswith("quantizer.")} == {False}


def grads(method: Compressor, given: ImageFeatures) -> dict[str, Tensor | None]:
    method.before_llm(given).sum().backward()
    return {name: parameter.grad for name, parameter in method.named_parameters()}


@torch.enable_grad()  # off in this folder, see conftest.py
def test_the_anchors_mlp_learns_and_the_quantizer_does_not() -> None:
    found = grads(htc(), images())
    assert all((grad is None) == name.startswith("quantizer.") for name, grad in found.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_anchors": 0}, "htc: n_anchors is 0"),
        ({"fusion": "cross"}, "htc: fusion is 'cross'; known: pre, post, mean"),
        ({"channels": "both"}, "htc: channels is 'both'; known: hybrid, continuous, discrete"),
        ({"anchor_source": "pixels"}, "htc: anchor_source is 'pixels'"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compressors.build("htc", **settings)


def test_an_unknown_quantizer_preset_is_refused() -> None:
    method = compressors.build("htc", quantizer={"preset": "f8c4", "image_size": 336})
    with pytest.raises(ValueError, match="quantizer preset is 'f8c4'; known:.*f16c32g8"):
        method.setup(SIZES)


def test_the_papers_quantizer_is_the_default() -> None:
    """q = 21 x 21 x 32 = 14112."""
    settings = compressors.build("htc").settings.quantizer
    assert settings == {"preset": "f16c32g8", "image_size": 336}
    assert (336 // 2 ** (len(PRESETS["f16c32g8"]["widths"]) - 1)) ** 2 * PRESETS["f16c32g8"]["latent_channels"] == 14112


@torch.enable_grad()  # off in this folder, see conftest.py
def test_learnt_anchors_read_the_patches_and_all_of_them_learns() -> None:
    """A rounding without a straight-through gradient would leave queries and codes as they were drawn."""
    method = htc(n_anchors=2, anchor_source="learnt")
    assert not method.has_code and method.n_visual(16) == 18
    given = replace(images(), project=nn.Linear(6, 5))  # of full rank: other patches for another image
    tokens = method.before_llm(given)
    assert tokens.shape == (2, 18, 5) and tokens[:, 2:].equal(given.patches) and not tokens[0, :2].equal(tokens[1, :2])
    tokens[:, :2].square().sum().backward()
    unmoved = [name for name, weight in method.learnt.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert unmoved == []
    with pytest.raises(ValueError, match="give hybrid"):
        htc(channels="discrete", anchor_source="learnt")
