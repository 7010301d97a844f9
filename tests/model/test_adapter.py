"""A compressor as an adapter: the base model's own answers stay bit for bit what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import htc_vlm
from htc_vlm.files import write_json
from htc_vlm.model import HtcVlmForConditionalGeneration, adapter
from htc_vlm.model.add_compressor import with_compressor
from htc_vlm.model.loading import without_compression
from htc_vlm.model.weights_digest import weights_digest
from htc_vlm.train.stages import freeze

from .. import tinies
from ..tinies import batch, image_ids, pixels, shared, text_logits

READERS = {"name": "readers", "n_readers": 2}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinies.save_llava(tmp_path_factory.mktemp("llava"))


def with_adapter(stock: Path, seed: int = 0) -> HtcVlmForConditionalGeneration:
    """An adapter that changes what is read: LoRA's second matrix is zero when it is new."""
    torch.manual_seed(seed)
    model, _ = with_compressor(stock, READERS, dtype=torch.float32)
    adapter.add(model, adapter.LoraSettings(rank=2, alpha=4))
    with torch.no_grad():
        for name, weight in adapter.weights(model).items():
            if ".lora_B." in name:
                weight.normal_(std=0.3)
    return model.eval()


@torch.no_grad()
def test_text_and_whole_images_get_the_base_s_logits(stock: Path) -> None:
    """One checkpoint in memory for all three uses: not a bit of the base's own answers may move."""
    base, model = LlavaForConditionalGeneration.from_pretrained(stock).eval(), with_adapter(stock)
    whole = batch([[*[tinies.IMAGE] * tinies.N_PATCHES, 5, 6, 7]])
    text = batch([[5, 6, 7], [8, 9]])
    model.compress(pixel_values=pixels(2))
    n = base.config.text_config.vocab_size
    assert model(**text).logits[..., :n].equal(base(**text).logits)
    twin = without_compression(model)
    assert twin(**whole, pixel_values=pixels(1)).logits[..., :n].equal(base(**whole, pixel_values=pixels(1)).logits)


@torch.no_grad()
def test_the_adapter_is_at_work_while_an_image_is_read(stock: Path) -> None:
    """LoRA that is never switched on trains nothing; one that stays on changes the text."""
    model, plain = with_adapter(stock), with_compressor(stock, READERS, dtype=torch.float32)[0].eval()
    for name, weight in plain.model.compressor.named_parameters():
        weight.copy_(model.model.compressor.get_parameter(name))
    kv = model.compress(pixel_values=pixels(1)).kv
    assert model.recipe().digest != plain.recipe().digest
    assert (kv - plain.compress(pixel_values=pixels(1)).kv).abs().max() > 0.01
    inputs = batch([[*image_ids(model), 5, 6]])
    one = text_logits(model, inputs, pixel_values=pixels(1))
    two = model(**inputs, compressed=model.compress(pixel_values=pixels(1))).logits
    tinies.assert_close([two[0]], one)


def test_only_the_adapter_and_the_compressor_learn(stock: Path) -> None:
    """A base that drifts, or a LoRA whose gradient is lost when the text runs without it."""
    model = with_adapter(stock)
    freeze(model, ("adapter", "model.compressor."))
    inputs = batch([[*image_ids(model), 5, 6, 7]])
    labels = inputs["input_ids"].masked_fill(~tinies.is_text(inputs), -100)
    model.train()
    model(**inputs, pixel_values=pixels(1), labels=labels).loss.backward()
    learned = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    wanted = set(adapter.weights(model))
    assert learned <= wanted
    assert {"model.compressor.embedding", "model.compressor.look_again.weight"} <= learned
    assert all(any(f"layers.{i}.self_attn.k_proj.lora_A" in name for name in learned) for i in range(tinies.N_LAYERS))


def test_checkpointed_layers_are_computed_again_with_the_adapter(stock: Path) -> None:
    """In the backward pass the text's layers are without it and the image's with it, as they were: else other gradients."""
    model, found = with_adapter(stock), []
    freeze(model, ("adapter", "model.compressor."))
    inputs = batch([[*image_ids(model), 5, 6, 7]])
    labels = inputs["input_ids"].masked_fill(~tinies.is_text(inputs), -100)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    model.train()
    for begin in (
        lambda: None,
        model.activation_checkpointing_enable,
        lambda: apply_activation_checkpointing(model, check_fn=lambda part: isinstance(part, LlamaDecoderLayer)),  # as FSDP
    ):
        begin()
        loss = model(**inputs, pixel_values=pixels(1), labels=labels).loss
        found.append(torch.autograd.grad(loss, weights, allow_unused=True))
        model.activation_checkpointing_disable()
    used = [[grad for grad in grads if grad is not None] for grads in found]
    assert any(grad.any() for grad in used[0])
    for again in used[1:]:
        torch.testing.assert_close(again, used[0], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_saved_adapter_gives_the_same_entries_and_is_small(stock: Path, tmp_path: Path) -> None:
    """A compressor that is passed on as a file, without the weights of the model it belongs to."""
    model = with_adapter(stock)
    model.save_adapter(tmp_path)
    again, processor = htc_vlm.load(stock, adapter=tmp_path)
    assert again.compress(pixel_values=pixels(2)).kv.equal(model.compress(pixel_values=pixels(2)).kv)
    assert again.recipe().parts["weights"] == model.recipe().parts["weights"] and processor.n_bottleneck == 1
    n_own = sum(weight.numel() for weight in adapter.weights(model).values())
    size = (tmp_path / adapter.WEIGHTS).stat().st_size
    assert size < 4 * n_own + 20_000


@pytest.fixture(scope="module")
def base(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a bottleneck token of its own, and other weights of a compressor."""
    torch.manual_seed(3)
    model, processor = with_compressor(stock, READERS, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_an_adapter_is_loaded_in_every_dtype_with_one_recipe(base: Path, tmp_path: Path) -> None:
    """float16 was told to be another base; and its rounded LoRA to be another adapter."""
    with_adapter(base).save_adapter(tmp_path)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    loads = [htc_vlm.load(base, adapter=tmp_path, dtype=dtype)[0] for dtype in dtypes]
    assert [next(one.parameters()).dtype for one in loads] == list(dtypes)
    first, *others = [one.recipe().parts["weights"] for one in loads]
    assert others == [first] * 2
    with torch.no_grad():
        next(weight for name, weight in loads[2].named_parameters() if ".lora_B." in name).view(-1)[0] += 0.5
    assert loads[2].recipe().parts["weights"] != first


def test_a_new_bottleneck_token_does_not_make_another_base(stock: Path, tmp_path: Path) -> None:
    """Its row is a mean, which each dtype rounds in its own way; adapters of before, whose digest has the row, are taken."""
    model = with_adapter(stock)
    model.save_adapter(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        assert htc_vlm.load(stock, adapter=tmp_path, dtype=dtype)[0].adapter["base"] == model.adapter["base"]
    about = adapter.read_about(tmp_path) | {"base": weights_digest(model.get_decoder())}
    write_json(tmp_path / adapter.ABOUT, about)
    assert htc_vlm.load(stock, adapter=tmp_path)[0].adapter["base"] == model.adapter["base"] != about["base"]


def test_another_base_is_refused(stock: Path, tmp_path: Path) -> None:
    """The entries of one model's adapter are noise to another model's text."""
    with_adapter(stock).save_adapter(tmp_path)
    other: Any = LlavaForConditionalGeneration.from_pretrained(stock)
    with torch.no_grad():
        other.model.language_model.layers[0].mlp.up_proj.weight.mul_(1.5)
    folder = tmp_path / "other"
    other.save_pretrained(folder)
    for file in stock.glob("*.json*"):
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="trained on a language model with digest"):
        htc_vlm.load(folder, adapter=tmp_path)


def test_methods_of_one_masked_pass_are_refused(stock: Path) -> None:
    """VoCo's rows and the text share each product: an adapter could not act on one of them alone."""
    with pytest.raises(ValueError, match="'voco' is trained in one pass with the text; use readers"):
        adapter.add(tinies.build({"name": "voco"}))
    with pytest.raises(ValueError, match="has no adapter"):
        adapter.save(shared({"name": "voco"}), stock)
