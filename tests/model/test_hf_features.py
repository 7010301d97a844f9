"""What people expect of a Hugging Face model: stock LLaVA's answers, Auto classes, pipeline, Trainer, PEFT, generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Trainer,
    TrainingArguments,
    pipeline,
)

import htc_vlm
from htc_vlm.model import HtcVlmForConditionalGeneration, HtcVlmProcessor
from htc_vlm.model.add_compressor import with_compressor

from .. import tinies
from ..tinies import TINY_CODE, batch, image_ids, pictures, pixels, rows

HTC = {"name": "htc", "quantizer": TINY_CODE}
PROMPTS = ["<image> what is it ?", "how many red ? <image> and <image>"]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinies.save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def htc(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint with anchors and a bottleneck, saved."""
    folder = tmp_path_factory.mktemp("htc")
    torch.manual_seed(0)
    model, processor = with_compressor(stock, HTC, allow_untrained_quantizer=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


# -------------------------------------------------------------------------------------------------- equal to stock LLaVA
@torch.no_grad()
def test_none_gives_stock_llavas_logits_and_generations(stock: Path) -> None:
    """The upper bound of every table must be LLaVA itself, to the bit."""
    theirs = LlavaForConditionalGeneration.from_pretrained(stock).eval()
    ours = HtcVlmForConditionalGeneration.from_pretrained(stock).eval()
    inputs = LlavaProcessor.from_pretrained(stock)(text=PROMPTS, images=pictures(3), padding=True, return_tensors="pt")
    assert ours(**inputs).logits.equal(theirs(**inputs).logits)
    for options in ({"do_sample": False}, {"num_beams": 3}, {"do_sample": True}):
        outs = []
        for model in (theirs, ours):
            torch.manual_seed(5)
            outs.append(model.generate(**inputs, max_new_tokens=6, **options))
        assert outs[0].equal(outs[1]), options


def test_our_processor_gives_stock_llavas_inputs(stock: Path) -> None:
    """A picture resized otherwise, or one placeholder more, and the same weights answer otherwise."""
    stocks, ours = LlavaProcessor.from_pretrained(stock), HtcVlmProcessor.from_pretrained(stock)
    options: dict[str, Any] = {"text": PROMPTS, "images": pictures(3), "padding": True, "return_tensors": "pt"}
    theirs, mine = stocks(**options), ours(**options)
    assert theirs.keys() == mine.keys() and all(mine[key].equal(theirs[key]) for key in theirs)


def test_our_checkpoint_without_compressor_is_read_by_stock_llava(stock: Path, tmp_path: Path) -> None:
    """Names of weights that only we can read would lock people in."""
    HtcVlmForConditionalGeneration.from_pretrained(stock).save_pretrained(tmp_path)
    model, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    original = LlavaForConditionalGeneration.from_pretrained(stock)
    assert all(value.equal(original.state_dict()[name]) for name, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------------ Auto classes, pipeline
def test_auto_classes_load_from_disk(htc: Path) -> None:
    """`import htc_vlm` and nothing more must be enough; __init__ imports lazily."""
    assert htc_vlm.HtcVlmForConditionalGeneration is HtcVlmForConditionalGeneration
    model, processor = AutoModelForImageTextToText.from_pretrained(htc), AutoProcessor.from_pretrained(htc)
    assert type(model) is HtcVlmForConditionalGeneration and type(processor) is HtcVlmProcessor
    assert (processor.n_visual, processor.n_bottleneck) == (20, 1)


def test_the_pipeline_answers_about_a_picture(htc: Path) -> None:
    """The pipeline builds the processor itself and calls generate with whatever it gives."""
    ask = pipeline("image-text-to-text", model=str(htc), device="cpu")
    content = [{"type": "image", "image": pictures(1)[0]}, {"type": "text", "text": "what is it ?"}]
    options = {"max_new_tokens": 4, "do_sample": False}
    out = ask(text=[{"role": "user", "content": content}], generate_kwargs=options, return_full_text=False)
    model = HtcVlmForConditionalGeneration.from_pretrained(htc).eval()
    processor = HtcVlmProcessor.from_pretrained(htc)
    inputs = processor(text="<image> what is it ? ", images=pictures(1), return_tensors="pt")
    ids = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    answer = processor.tokenizer.decode(ids[0], skip_special_tokens=True).split()
    assert answer and out[0]["generated_text"].split() == answer


# -------------------------------------------------------------------------------------------------------------- training
def training_batch(model: HtcVlmForConditionalGeneration) -> dict[str, Tensor]:
    inputs = batch(rows(model))
    labels = inputs["input_ids"].masked_fill(~tinies.is_text(inputs), -100)
    return {**inputs, "labels": labels, "pixel_values": pixels(3)}


@pytest.mark.parametrize("compressor", [{"name": "none"}, {"name": "voco"}, HTC], ids=lambda value: value["name"])
def test_activation_checkpointing_gives_equal_loss_and_gradients(compressor: dict[str, Any]) -> None:
    """A layer recomputed without its mask has other gradients, and nothing says so."""
    found = []
    for checkpointing in (False, True):
        model = tinies.build(compressor).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(**training_batch(model)).loss
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
    (loss, grads), (loss_again, grads_again) = found
    assert loss.equal(loss_again) and grads.keys() == grads_again.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_again[name], atol=1e-6, rtol=1e-5)


def test_every_trained_part_of_htc_gets_a_gradient() -> None:
    """Anchors behind a no_grad, or a bottleneck embedding that the mask cuts off, never learn."""
    model = tinies.build(HTC).train()
    model(**training_batch(model)).loss.backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    for name in ("compressor.to_anchors.w1", "compressor.to_anchors.w2", "multi_modal_projector.linear_1"):
        assert f"model.{name}.weight" in grads
    embedding = model.get_input_embeddings().weight.grad
    assert embedding is not None and embedding[tinies.BOTTLENECK].abs().sum() > 0
    assert not any("quantizer" in name for name in grads)


class Rows(torch.utils.data.Dataset):
    def __init__(self, model: HtcVlmForConditionalGeneration) -> None:
        inputs = training_batch(model)
        image = [*image_ids(model), 5, 6, 7]
        self.row = {"input_ids": torch.tensor(image), "labels": torch.tensor([-100] * (len(image) - 3) + [5, 6, 7])}
        self.row["pixel_values"] = inputs["pixel_values"][0]

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.row


def train(model: Any, output: Path, base: HtcVlmForConditionalGeneration) -> float:
    arguments = TrainingArguments(
        str(output), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none", use_cpu=True,
        save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Rows(base)).train().training_loss


def test_trainer_takes_two_steps(tmp_path: Path) -> None:
    """Trainer inspects forward's signature and drops the columns that it does not find there."""
    model = tinies.build(HTC)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert train(model, tmp_path, model) > 0
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert "model.compressor.to_anchors.w2.weight" in moved and "lm_head.weight" in moved
    assert not any("compressor.quantizer" in name for name in moved)


def test_lora_with_a_trained_projector(tmp_path: Path) -> None:
    """PEFT wraps modules by name: the projector is called by the compressor too, and must be its trained copy."""
    from peft import LoraConfig, PeftModel, get_peft_model

    lora = LoraConfig(
        r=2, target_modules=r".*language_model.*(q_proj|v_proj)",
        modules_to_save=["multi_modal_projector", "to_anchors"],
    )  # fmt: skip
    base = tinies.build(HTC)
    model = get_peft_model(base, lora)
    assert train(model, tmp_path / "run", base) > 0
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tinies.build(HTC), tmp_path / "adapter").eval()
    inputs = batch(rows(base))
    expected = tinies.text_logits(model.eval(), inputs, pixel_values=pixels(3))
    untrained = tinies.text_logits(tinies.build(HTC), inputs, pixel_values=pixels(3))
    tinies.assert_close(tinies.text_logits(again, inputs, pixel_values=pixels(3)), expected, 1e-6)
    assert (expected[0] - untrained[0]).abs().max() > 1e-3
    merged = again.merge_and_unload()
    tinies.assert_close(tinies.text_logits(merged, inputs, pixel_values=pixels(3)), expected)


# -------------------------------------------------------------------------------------------------------------- generate
@pytest.fixture(params=[{"name": "voco"}, {**HTC, "n_bottleneck": 3, "positions": "compact"}], ids=["voco", "htc-3"])
def model(request: pytest.FixtureRequest) -> HtcVlmForConditionalGeneration:
    return tinies.shared(request.param)


def alone(model: HtcVlmForConditionalGeneration, **options: Any) -> list[list[int]]:
    """What each prompt of `rows` gives when generated alone."""
    found, n_used = [], 0
    for row, n in zip(rows(model), tinies.N_IMAGES, strict=True):
        own = {"pixel_values": pixels(3)[n_used : n_used + n]} if n else {}
        out = model.generate(**batch([row]), **own, **options)
        found += [ids[len(row) :].tolist() for ids in out]
        n_used += n
    return found


def test_a_padded_batch_generates_what_its_prompts_give_alone(model: HtcVlmForConditionalGeneration) -> None:
    inputs = batch(rows(model))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    out = model.generate(**inputs, pixel_values=pixels(3), **options)
    assert out[:, inputs["input_ids"].shape[1] :].tolist() == alone(model, **options)


def test_beams_equal_runs_of_single_prompts(model: HtcVlmForConditionalGeneration) -> None:
    """generate copies its inputs per beam, but not a cache that it was given."""
    inputs = batch(rows(model))
    options: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    out = model.generate(**inputs, pixel_values=pixels(3), **options)
    assert out[:, inputs["input_ids"].shape[1] :].tolist() == alone(model, **options)


def test_beams_may_return_several_sequences(model: HtcVlmForConditionalGeneration) -> None:
    inputs = batch(rows(model))
    options: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    out = model.generate(**inputs, pixel_values=pixels(3), **options)
    assert out.shape[0] == 6 and out[::2, : inputs["input_ids"].shape[1]].equal(inputs["input_ids"])
    assert out[:, inputs["input_ids"].shape[1] :].tolist() == alone(model, **options)


def test_sampling_repeats_with_a_seed_and_returns_several(model: HtcVlmForConditionalGeneration) -> None:
    inputs = batch(rows(model))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 2, "temperature": 5.0}
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model.generate(**inputs, pixel_values=pixels(3), **options))
    assert outs[0].shape[0] == 6 and outs[0].equal(outs[1]) and not outs[0].equal(outs[2])


def test_placeholders_are_never_written(model: HtcVlmForConditionalGeneration) -> None:
    """<image> in an answer would be read as a picture in the next turn."""
    torch.manual_seed(0)
    inputs = batch(rows(model))
    out = model.generate(**inputs, pixel_values=pixels(3), max_new_tokens=40, do_sample=True, temperature=50.0)
    assert (out[:, inputs["input_ids"].shape[1] :] < tinies.IMAGE).all()


def test_one_compressed_image_serves_several_prompts(model: HtcVlmForConditionalGeneration) -> None:
    """Compress once, ask many: the same answers as giving the picture with every question."""
    prompts = [[*image_ids(model), 5, 6], [*image_ids(model), 7, 8, 9, 10]]
    kv = model.compress(pixel_values=pixels(1))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**batch(prompts), pixel_values=pixels(1).repeat(2, 1, 1, 1), **options)
    assert model.generate(**batch(prompts), compressed=kv, **options).equal(expected)
    questions = batch([[5, 6], [7, 8, 9, 10]])  # no placeholder at all: the image goes first
    short = model.generate(**questions, compressed=kv, **options)
    assert short[:, -5:].equal(expected[:, -5:])


def test_generate_returns_scores_with_the_prompt_in_front(model: HtcVlmForConditionalGeneration) -> None:
    inputs = batch(rows(model))
    out = model.generate(
        **inputs, pixel_values=pixels(3), max_new_tokens=3, do_sample=False, return_dict_in_generate=True,
        output_scores=True,
    )  # fmt: skip
    n_prompt = inputs["input_ids"].shape[1]
    assert out.sequences[:, :n_prompt].equal(inputs["input_ids"]) and len(out.scores) == 3
    assert torch.stack([s.argmax(-1) for s in out.scores], 1).equal(out.sequences[:, n_prompt:])
