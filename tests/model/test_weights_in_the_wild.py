"""Weights that are quantised, offloaded, in another layout, or not there at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import htc_vlm
from htc_vlm import load
from htc_vlm.model import HtcVlmForConditionalGeneration
from htc_vlm.model.add_compressor import with_compressor

from .. import tinies
from ..tinies import BOTTLENECK, IMAGE, N_PATCHES, TINY_CODE, batch, build, pixels

HTC = {"name": "htc", "quantizer": TINY_CODE}
MINI = {"name": "llava_mini", "n_tokens": 4, "n_fusion": 2}
METHODS: list[dict[str, Any]] = [{"name": "voco"}, HTC, {"name": "qformer", "width": 16, "n_layers": 2, "n_heads": 2}, MINI]


# ----------------------------------------------------------------------------------------------------------- not there
@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What from_pretrained allocates for missing weights and unsaved buffers holds NaN, as memory well may."""
    empty_like = torch.empty_like

    def poisoned(like: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made = empty_like(like, *args, **kwargs)
        if made.device.type == "meta":
            return made
        with torch.no_grad():
            return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(113)

    monkeypatch.setattr(torch, "empty_like", poisoned)
    yield
    monkeypatch.undo()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("compressor", METHODS, ids=lambda value: value["name"])
def test_what_no_checkpoint_holds_is_initialised_and_the_same_each_time(
    compressor: dict[str, Any], tmp_path: Path, poisoned_memory: None
) -> None:
    """The codebook lay in memory as it was: two calls gave two models, often of NaN, and two empty answers are equal."""
    stock = tinies.save_llava(tmp_path / "llava")
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(with_compressor(stock, compressor, allow_untrained_quantizer=True)[0].eval())
    first, second = (tensors(model) for model in made)
    assert [name for name, value in first.items() if not value.isfinite().all()] == []
    assert [name for name, value in first.items() if not value.equal(second[name])] == []
    image = tinies.image_ids(made[0])
    with torch.no_grad():
        logits = made[0](**batch([[*image, 5, 6]]), pixel_values=pixels(1)).logits
    assert logits.isfinite().all()
    made[0].save_pretrained(tmp_path / "saved")
    again = HtcVlmForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    assert [name for name, value in tensors(again).items() if not value.equal(first[name])] == []


def test_an_untrained_codebook_has_distinct_codes(tmp_path: Path) -> None:
    """Zeros would be initialised, too, and every picture would get the same code."""
    stock = tinies.save_llava(tmp_path)
    model, _ = with_compressor(stock, HTC, allow_untrained_quantizer=True)
    codebooks = [value for name, value in model.named_buffers() if name.endswith("_codebook.embed")]
    assert codebooks and all(len(book.reshape(-1, book.shape[-1]).unique(dim=0)) > 8 for book in codebooks)


# ----------------------------------------------------------------------------------------------------------- quantised
class Int8Linear(nn.Module):
    """A linear layer as quantisers make them: `weight` is whole numbers, the rest computes in the input's dtype."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.scale, self.bias = scale, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        assert x.is_floating_point(), "features were cast to the dtype of quantised weights"
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def quantise(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        else:
            quantise(child)


@torch.no_grad()
def test_quantised_weights_compute_as_their_values_do() -> None:
    """bitsandbytes: features were cast to `linear_1.weight.dtype`, int8, before the projector."""
    for method in ({"name": "none"}, {"name": "voco"}):
        model, plain = build(method), build(method)
        for part in (model.model.language_model, model.model.multi_modal_projector):
            quantise(part)
        for name, module in model.named_modules():
            if isinstance(module, Int8Linear):
                plain.get_submodule(name).weight.copy_(module.weight * module.scale)
        prompt = batch([[*tinies.image_ids(model), 5, 6]])
        ways: list[dict[str, Any]] = [{"pixel_values": pixels(1)}, {"patch_features": plain.model.vision_features(pixels(1))}]
        for images in ways:
            torch.testing.assert_close(model(**prompt, **images).logits, plain(**prompt, **images).logits, atol=1e-4, rtol=0)
        if method["name"] == "voco":
            kept, wanted = model.compress(**ways[1]), plain.compress(**ways[1])
            torch.testing.assert_close(kept.kv, wanted.kv, atol=1e-4, rtol=0)
            asked = {"input_ids": torch.tensor([[BOTTLENECK, 5, 6]])}
            torch.testing.assert_close(
                model(**asked, compressed=kept).logits, plain(**asked, compressed=wanted).logits, atol=1e-4, rtol=0
            )
        else:
            for name, settings in (("divprune", {"n_keep": 8}), ("visionzip", {"n_dominant": 4, "n_contextual": 2})):
                outs = []
                for one in (model, plain):
                    with htc_vlm.apply(one, name, **settings):
                        outs.append(one(**prompt, pixel_values=pixels(1)).logits)
                torch.testing.assert_close(*outs, atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------------------------- elsewhere, or otherwise
def test_offloaded_weights_answer_without_a_bottleneck_and_are_refused_with_one(tmp_path: Path) -> None:
    """"Tensor on device meta" said nothing of what to do."""
    from accelerate import disk_offload

    model, plain = build({"name": "none"}), build({"name": "none"})
    disk_offload(model, tmp_path / "none", execution_device="cpu")
    prompt = {**batch([[*[IMAGE] * N_PATCHES, 5, 6]]), "pixel_values": pixels(1)}
    with torch.no_grad():
        torch.testing.assert_close(model(**prompt).logits, plain(**prompt).logits)
    voco = build({"name": "voco"})
    disk_offload(voco, tmp_path / "voco", execution_device="cpu")
    with pytest.raises(ValueError, match="is offloaded .* load the model whole on a device"):
        voco.compress(pixel_values=pixels(1))


def test_the_original_layout_is_refused_before_a_model_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random 7B was built first: 13.8 GB and a minute, then an error about weights."""
    (tmp_path / "config.json").write_text('{"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}')

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(HtcVlmForConditionalGeneration, "__init__", never)
    for attempt in (load, HtcVlmForConditionalGeneration.from_pretrained):
        with pytest.raises(ValueError, match=f"{tmp_path} is in the layout of the original LLaVA code; .*htc-vlm convert"):
            attempt(tmp_path)
