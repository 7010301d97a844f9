"""A bottleneck in tiny random models of other families than LLaVA: what tests/contract asks of LLaVA's."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from htc_vlm.compressors import COMPRESSORS
from htc_vlm.model.add_to_family import put_in
from htc_vlm.model.bottlenecks import classes_of
from htc_vlm.model.movable import check_decoder
from htc_vlm.testing.families import (
    BOTTLENECK,
    IMAGE,
    PINPOINTS,
    TEXT,
    VISION,
    bottleneck_inputs,
    tiny_bottleneck,
    tiny_model,
)

FAMILIES = ("llava_next", "llava_onevision", "internvl", "smolvlm", "qwen2_5_vl", "qwen3_vl")
TINY: dict[str, Any] = COMPRESSORS.get("htc")._TINY
METHODS: dict[str, dict[str, Any]] = {
    "voco": {"name": "voco"},
    "htc": {"name": "htc", "quantizer": TINY, "n_anchors": 2, "n_bottleneck": 2},
    "htc, post, compact": {"name": "htc", "quantizer": TINY, "fusion": "post", "positions": "compact"},
    "voco, self": {"name": "voco", "visual_attention": "self", "n_bottleneck": 3},
    "readers": {"name": "readers", "n_readers": 2},
}
QUICK = [("voco", family) for family in FAMILIES]
QUICK += [("htc", "qwen3_vl"), ("readers", "qwen3_vl"), ("htc", "internvl")]
CASES = [
    pytest.param(family, name, marks=() if (name, family) in QUICK else pytest.mark.slow)
    for name in METHODS for family in FAMILIES
]  # fmt: skip
cases = pytest.mark.parametrize(("family", "name"), CASES)
families = pytest.mark.parametrize("family", FAMILIES)


def quick(*known: str) -> Any:
    """All families, the others marked slow."""
    marked = [pytest.param(one, marks=() if one in known else pytest.mark.slow) for one in FAMILIES]
    return pytest.mark.parametrize("family", marked)


PROMPTS = [[0], [1, 2], [], [2]]  # pictures of three sizes, two in one prompt, and a row of text only


@functools.cache
def model_of(family: str, name: str, attention: str = "sdpa") -> Any:
    return tiny_bottleneck(family, METHODS[name], attention)


def texts(logits: Tensor, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Of each row the logits of its text, where the logits are those of a whole prompt."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    is_text = real & (ids != IMAGE) & (ids != BOTTLENECK)
    return [row[mask] for row, mask in zip(logits, is_text, strict=True)]


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def pixels_of(family: str, model: Any, sizes: list[int]) -> dict[str, Any]:
    """What the processor returns of pictures without text."""
    inputs = bottleneck_inputs(family, model, [[size] for size in sizes])
    lengths = (inputs.pop("input_ids") == IMAGE).sum(dim=1) - (model.model.compressor.n_visual(1) - 1)
    return {name: one for name, one in inputs.items() if name != "attention_mask"} | {"image_lengths": lengths}


@cases
@torch.no_grad()
def test_one_masked_pass_equals_compress_then_text(family: str, name: str) -> None:
    """Training would teach one model, and inference run another."""
    model = model_of(family, name)
    inputs = bottleneck_inputs(family, model, PROMPTS)
    one = texts(model(**inputs).logits, inputs)
    kept = model.compress(**pixels_of(family, model, sum(PROMPTS, [])))
    two = model(**bottleneck_inputs(family, model, PROMPTS, is_compressed=True), compressed=kept).logits
    for whole, text in zip(one, two, strict=True):
        assert torch.isfinite(whole).all()
        close(text[-len(whole) :], whole)


@cases
@torch.no_grad()
def test_a_stored_picture_can_stand_anywhere(family: str, name: str) -> None:
    """Entries that depend on their place, or on the other pictures of their batch."""
    model = model_of(family, name)
    kept = model.compress(**pixels_of(family, model, [0, 1, 2]))
    for size in range(3):
        alone = model.compress(**pixels_of(family, model, [size]))
        close(alone.kv, kept[size].kv)
        assert alone.n_visual == kept[size].n_visual
    prompts = [[2, 0]]
    inputs = bottleneck_inputs(family, model, prompts)
    (one,) = texts(model(**inputs).logits, inputs)
    two = model(**bottleneck_inputs(family, model, prompts, is_compressed=True), compressed=kept[[2, 0]]).logits
    close(two[0], one)
    (other,) = texts(model(**bottleneck_inputs(family, model, [[1, 0]])).logits, bottleneck_inputs(family, model, [[1, 0]]))
    assert (other[-1] - one[-1]).abs().max() > 1e-3, "another picture must give other logits"


@families
@torch.no_grad()
def test_generation_over_pictures_continues_the_masked_pass(family: str) -> None:
    """Positions or masks that are right in the prefill and drift with every new token; rows that change each other."""
    model, n_new = model_of(family, "voco"), 3
    inputs = bottleneck_inputs(family, model, PROMPTS)
    options: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(**inputs, max_new_tokens=n_new, **options)
    n_prompt = inputs["input_ids"].shape[1]
    assert out.sequences[:, :n_prompt].equal(inputs["input_ids"])
    assert out.past_key_values.get_seq_length() < int((inputs["input_ids"] == IMAGE).sum(dim=1).max())
    for step in range(n_new):
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, step), value=1)
        again = model(**{**inputs, "input_ids": out.sequences[:, : n_prompt + step], "attention_mask": mask}).logits[:, -1]
        close(out.logits[step], again)


@quick("qwen3_vl", "llava_next")
@torch.no_grad()
def test_the_fast_prefill_gives_what_the_general_one_gives(family: str) -> None:
    """It skips the queries of visual tokens; with M-RoPE it must still turn by three positions, in Qwen3-VL normalise keys and
    add deep features."""
    for settings in (METHODS["voco, self"], {**METHODS["readers"], "visual_attention": "self"}):
        model = tiny_bottleneck(family, settings)
        pixels = pixels_of(family, model, [0, 2])
        close(model.compress(**pixels, path="fast").kv, model.compress(**pixels, path="general").kv)


@quick("qwen3_vl")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_beams_have_the_scores_of_the_masked_pass(family: str, cache: str) -> None:
    """Entries that do not follow their beam, or places of a static cache that are read before they are written."""
    model, n_new = model_of(family, "voco"), 3
    inputs = bottleneck_inputs(family, model, PROMPTS)
    options = {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.0, "max_new_tokens": n_new, "do_sample": False}
    reported = {"return_dict_in_generate": True, "output_scores": True}
    out = model.generate(**inputs, cache_implementation=cache, **options, **reported)
    n_prompt, mask = inputs["input_ids"].shape[1], torch.nn.functional.pad(inputs["attention_mask"], (0, n_new), value=1)
    for beam in range(2):
        ids = out.sequences[beam::2]
        logits = model(**{**inputs, "input_ids": ids, "attention_mask": mask}).logits[:, n_prompt - 1 : -1]
        close(logits.log_softmax(-1).gather(2, ids[:, n_prompt:, None]).sum(dim=(1, 2)), out.sequences_scores[beam::2])
    assert not out.sequences[::2].equal(out.sequences[1::2])


@quick("qwen3_vl")
@torch.no_grad()
def test_what_the_bottleneck_looked_at_is_the_attention_of_its_pass(family: str) -> None:
    """Queries that are not normalised, or turned by one of three positions: shares that nobody gave."""
    model = model_of(family, "voco", "eager")
    pixels, decoder, seen = pixels_of(family, model, [1]), model.get_decoder(), []
    hooks = [one.self_attn.register_forward_hook(lambda m, i, out: seen.append(out[1][:, :, -1:])) for one in decoder.layers]
    model.compress(**pixels)
    for hook in hooks:
        hook.remove()
    close(model.bottleneck_attention(**pixels), torch.stack(seen, dim=1))


@quick("qwen3_vl")
@torch.no_grad()
def test_bfloat16_compresses_stores_and_answers(family: str, tmp_path: Path) -> None:
    """A part that stays in float32, or pixels of another dtype, fail in the middle; the passes differ by rounding alone."""
    single, model = model_of(family, "voco"), tiny_bottleneck(family, METHODS["voco"]).to(torch.bfloat16)
    inputs = bottleneck_inputs(family, model, PROMPTS)
    kept = model.compress(**pixels_of(family, model, sum(PROMPTS, [])))
    assert kept.kv.dtype == torch.bfloat16
    kept.save(tmp_path / "kept")
    kept = type(kept).load(tmp_path / "kept")
    exact, one = (texts(m(**inputs).logits.float(), inputs) for m in (single, model))
    asked = bottleneck_inputs(family, model, PROMPTS, is_compressed=True)
    two = model(**asked, compressed=kept).logits.float()
    for whole, text, right in zip(one, two, exact, strict=True):
        scale = right.abs().max()  # another picture moves logits by a third of it or more
        assert (text[-len(whole) :] - whole).abs().max() < 0.1 * scale and (whole - right).abs().max() < 0.2 * scale
    said = model.generate(**asked, compressed=kept, max_new_tokens=2, do_sample=False)
    assert said.shape[1] == asked["input_ids"].shape[1] + 2


@quick("qwen3_vl")
@pytest.mark.parametrize("name", ["voco", "readers"])
def test_activation_checkpointing_gives_equal_loss_and_gradients(family: str, name: str) -> None:
    """A layer that is computed again without its mask, its cache or its deep features has other gradients."""
    model, found = tiny_bottleneck(family, METHODS[name]).train(), []
    inputs = bottleneck_inputs(family, model, PROMPTS)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] > 90, -100)
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-5, rtol=1e-4)


@quick("qwen2_5_vl", "internvl")
@torch.no_grad()
def test_sdpa_and_eager_agree(family: str) -> None:
    """A 4-D bool mask is obeyed by sdpa and nearly ignored by eager."""
    name = "htc" if family == "internvl" else "voco"
    logits = []
    for attention in ("sdpa", "eager"):
        model = model_of(family, name, attention)
        inputs = bottleneck_inputs(family, model, PROMPTS)
        logits.append(texts(model(**inputs).logits, inputs))
    close(*logits)


@quick("qwen3_vl", "smolvlm")
@torch.no_grad()
def test_a_saved_folder_gives_the_same_model(family: str, tmp_path: Path) -> None:
    """A setting or a weight that is not saved; a folder that transformers would load as the stock model."""
    from transformers import AutoModelForImageTextToText

    model = model_of(family, "htc" if family.startswith("qwen") else "voco")
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(again) is type(model) and again.config.compressor == model.config.compressor
    inputs = bottleneck_inputs(family, model, [[0, 1]])
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0)
    assert again.recipe().digest == model.recipe().digest


@cases
def test_every_weight_of_the_compressor_learns(family: str, name: str) -> None:
    """A layer that is detached is trained for nothing; the bottleneck's embedding learns too."""
    model = tiny_bottleneck(family, METHODS[name]).train()
    inputs = bottleneck_inputs(family, model, PROMPTS)
    ids = inputs["input_ids"]
    hidden = (ids == IMAGE) | (ids == BOTTLENECK) | (inputs["attention_mask"] == 0)
    model(**inputs, labels=ids.masked_fill(hidden, -100)).loss.backward()
    for weight_name, weight in model.model.compressor.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None and bool(weight.grad.ne(0).any()), weight_name
    if not model.model.compressor.reads_apart:
        assert bool(model.get_input_embeddings().weight.grad[BOTTLENECK].ne(0).any())


@quick("qwen2_5_vl")
def test_lora_attaches_and_trains(family: str) -> None:
    """peft wraps the model and asks for its parts by name."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_bottleneck(family, METHODS["voco"]), LoraConfig(target_modules=["q_proj", "v_proj"]))
    inputs = bottleneck_inputs(family, model.base_model.model, [[0], [1]])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = [weight.grad for name, weight in model.named_parameters() if "lora_B" in name and ".self_attn." in name]
    assert any(grad is not None and bool(grad.ne(0).any()) for grad in grads)
    with torch.no_grad():
        assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2


def test_with_m_rope_a_picture_costs_its_longer_side() -> None:
    """Qwen2.5-VL numbers text after a picture by its longer side. Grids of 4 x 4, 2 x 4 and 4 x 6 tokens, by hand."""
    model = model_of("qwen2_5_vl", "voco")
    assert model.compress(**pixels_of("qwen2_5_vl", model, [0, 1, 2])).n_visual == (4, 4, 6)
    with_anchors = model_of("qwen2_5_vl", "htc")
    assert with_anchors.compress(**pixels_of("qwen2_5_vl", with_anchors, [0, 1, 2])).n_visual == (6, 6, 8)
    (group,) = model.image_groups(**pixels_of("qwen2_5_vl", model, [1]))
    assert group.positions.tolist() == [[-4] * 8, [-4] * 4 + [-3] * 4, [-4, -3, -2, -1] * 2]
    stock, inputs = tiny_model("qwen2_5_vl")  # the same picture, numbered by transformers
    positions, _ = stock.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"])
    visual = positions[:, 0, inputs["input_ids"][0] == IMAGE]
    (group,) = model.image_groups(**pixels_of("qwen2_5_vl", model, [0]))
    behind = positions[:, 0, int((inputs["input_ids"][0] == IMAGE).nonzero()[-1]) + 1]
    assert group.positions.equal(visual - behind[:, None])


def test_what_cannot_be_is_refused_in_one_line() -> None:
    """Unknown families, methods without a bottleneck, codes in the place of patches, pixels that tell no pictures, videos."""
    with pytest.raises(ValueError, match="'qwen2_vl'.*stand in prompts.*it can into llava, llava_next"):
        classes_of("qwen2_vl")
    assert classes_of("qwen3_vl") is classes_of("htc_vlm_qwen3_vl")  # made once, whichever was asked for first
    with pytest.raises(ValueError, match="avg_pool cannot be HtcVlmInternVL.*must be a bottleneck"):
        put_in(tiny_model("internvl")[0], {"name": "avg_pool", "n_tokens": 4})
    with pytest.raises(ValueError, match="all pictures must have one size"):
        put_in(tiny_model("internvl")[0], {"name": "htc", "channels": "discrete", "quantizer": TINY})
    model = model_of("internvl", "voco")
    pixels = pixels_of("internvl", model, [1])
    with pytest.raises(ValueError, match="do not tell which tiles are one picture; give image_lengths"):
        model.compress(pixel_values=pixels["pixel_values"])
    with pytest.raises(ValueError, match="48 visual tokens, and 16 were announced"):
        model.compress(pixel_values=pixels["pixel_values"], image_lengths=[16])
    with pytest.raises(ValueError, match="reads pictures, not videos"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), pixel_values_videos=torch.zeros(1))
    with pytest.raises(ValueError, match="bottleneck tokens and no image"):
        model(input_ids=torch.tensor([[1, BOTTLENECK, 5]]))


def refusal(text: Any) -> str:
    """What is said of a LLaVA-NeXT around such a decoder when a picture of 88 tokens is compressed."""
    vision = transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS
    )
    model = put_in(transformers.LlavaNextForConditionalGeneration(config).eval(), {"name": "voco"})
    model.config.bottleneck_token_id = BOTTLENECK
    told = "voco keeps images as keys and values that a rotation moves"
    if text.model_type in ("cohere", "phi"):  # at any length: a checkpoint is refused when it is loaded
        with pytest.raises(ValueError, match=told):
            check_decoder(model)
    with pytest.raises(ValueError, match=told) as refused:
        model.compress(**pixels_of("llava_next", model, [1]))
    return str(refused.value)


def test_decoders_whose_keys_no_rotation_moves_are_refused_by_name() -> None:
    """Two passes would silently differ from one: other pairs, parts of a head, frequencies that grow, short windows."""
    plain = {key: value for key, value in TEXT.items() if key != "head_dim"}
    growing = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    for text, reason in (
        (transformers.CohereConfig(**plain), "interleaved"),
        (transformers.PhiConfig(**plain), "rotates 4 of a head's 8"),
        (transformers.MistralConfig(**TEXT, sliding_window=8), "sliding window of 8"),
        (transformers.LlamaConfig(**{**TEXT, "max_position_embeddings": 16}, rope_parameters=growing), "'dynamic'"),
    ):
        assert reason in refusal(text)
