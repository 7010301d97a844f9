"""`htc_vlm.apply`: what prompts may look like, and which models and features it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, MistralConfig, Qwen2Config

import htc_vlm
from htc_vlm import HtcVlmConfig, HtcVlmForConditionalGeneration

from .applying import BEFORE, TEXT, answer, applied, close, inside, traces


@inside
def test_right_padding_gives_what_the_samples_give(llava: Any, prompts: Any, case: str) -> None:
    """`apply` promises logits that are left-padded, however the prompts came."""
    longest = prompts.batch["input_ids"].shape[1]
    ids = torch.stack([torch.nn.functional.pad(ids, (0, longest - len(ids))) for ids in prompts.samples])
    mask = torch.stack([torch.arange(longest) < len(ids) for ids in prompts.samples]).long()
    with applied(llava, case):
        batch = llava(ids, attention_mask=mask, pixel_values=prompts.batch["pixel_values"]).logits
        for i in range(3):
            close(batch[i, -1], llava(**prompts.one(i)).logits[0, -1])


@inside
def test_several_new_tokens_at_once_continue_the_cache(llava: Any, prompts: Any, case: str) -> None:
    """The next turn of a conversation: its tokens see each other causally and what is left of the image."""
    inputs, more = prompts.one(0), torch.tensor([[5, 6, 7]])
    with applied(llava, case):
        first = llava(**inputs, use_cache=True)
        second = llava(more, past_key_values=first.past_key_values)
        ids = torch.cat((inputs["input_ids"], more), dim=1)
        whole = llava(ids, pixel_values=inputs["pixel_values"], prompt_length=ids.shape[1] - 3)
    close(second.logits[0], whole.logits[0, -3:])


@inside
def test_samples_without_an_image_are_left_alone(llava: Any, prompts: Any, case: str) -> None:
    """A batch may mix questions about pictures with others."""
    ids, mask = prompts.batch["input_ids"].clone(), prompts.batch["attention_mask"].clone()
    ids[1], mask[1] = 0, 0
    ids[1, -4:], mask[1, -4:] = torch.tensor([1, 20, 21, 22]), 1
    pixels = torch.cat((prompts.pixels[0], prompts.pixels[2]))
    plain = llava(ids[1:2, -4:]).logits[0, -1]
    with applied(llava, case):
        mixed = llava(ids, attention_mask=mask, pixel_values=pixels).logits
        alone = llava(ids[1:2, -4:]).logits[0, -1]
        with_image = llava(**prompts.one(0)).logits[0, -1]
    close(mixed[1, -1], plain)
    assert torch.equal(alone, plain)
    close(mixed[0, -1], with_image)


@pytest.mark.parametrize("case", BEFORE)
def test_prompts_come_back_as_they_were_given(llavas: Any, prompts: Any, case: str) -> None:
    """The stock processor makes 576 placeholders; who decodes the answer slices off that many."""
    without_ids = {name: value for name, value in prompts.batch.items() if name != "input_ids"}
    with applied(llavas["sdpa"], case):
        ids = llavas["sdpa"].generate(**prompts.batch, max_new_tokens=2, do_sample=False)
        by_length = llavas["sdpa"].generate(**prompts.batch, max_length=ids.shape[1], do_sample=False)
        config = GenerationConfig(**{**llavas["sdpa"].generation_config.to_dict(), "max_length": ids.shape[1]})
        by_config = llavas["sdpa"].generate(**prompts.batch, generation_config=config, do_sample=False)
        by_place = llavas["sdpa"].generate(prompts.batch["input_ids"], config, **without_ids, do_sample=False)
    assert torch.equal(ids[:, :-2], prompts.batch["input_ids"])
    assert torch.equal(ids, by_length) and torch.equal(ids, by_config) and torch.equal(ids, by_place)
    assert config.max_length == ids.shape[1]  # the caller's own stays as it was


@pytest.mark.parametrize("case", BEFORE)
def test_prompts_may_have_the_right_number_of_placeholders(llava: Any, prompts: Any, case: str) -> None:
    """A processor that knows the method makes C placeholders."""
    inputs = prompts.one(0)
    ids = inputs["input_ids"][0]
    with applied(llava, case) as run:
        n_keep = run.method.n_visual(16)
        first = int((ids == 50).nonzero()[0])
        short = torch.cat((ids[: first + n_keep], ids[first + 16 :]))[None]
        close(llava(short, pixel_values=inputs["pixel_values"]).logits, llava(**inputs).logits)
        with pytest.raises(ValueError, match="takes 16 for each"):
            llava(ids[ids != 50][None], pixel_values=inputs["pixel_values"])


def test_labels_follow_a_recut_prompt_and_are_refused_inside(llava: Any, prompts: Any) -> None:
    """A loss against labels that have slipped by 571 places."""
    ids = prompts.samples[0]
    labels = torch.where(torch.arange(len(ids)) >= len(ids) - 2, ids, -100)[None]
    with applied(llava, "random_drop"):
        out = llava(**prompts.one(0), labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[0, -3:-1], ids[-2:])
    close(out.loss, expected)
    with applied(llava, "fastv"), pytest.raises(ValueError, match="loss from the logits"):
        llava(**prompts.one(0), labels=labels)


@pytest.mark.parametrize("case", ["fastv", "pyramid_drop", "sparse_vlm", "divprune", "avg_pool"])
def test_our_own_model_works_too_with_features_computed_before(new_llava: Any, prompts: Any, case: str) -> None:
    """Evaluation runs the vision tower once per picture and hands over its features."""
    stock = new_llava()
    config = HtcVlmConfig(**{k: v for k, v in stock.config.to_dict().items() if k != "model_type"})
    model = HtcVlmForConditionalGeneration(config).eval()
    model.load_state_dict(stock.state_dict())
    model.generation_config = stock.generation_config
    with applied(stock, case):
        expected = answer(stock, prompts.batch)
    inputs = dict(prompts.batch)
    with applied(model, case):
        close(torch.stack(answer(model, inputs).logits), torch.stack(expected.logits))
        features = model.model.vision_features(pixel_values=inputs.pop("pixel_values"))
        out = answer(model, {**inputs, "patch_features": features})
    close(torch.stack(out.logits), torch.stack(expected.logits))
    assert torch.equal(out.sequences, expected.sequences)


@pytest.mark.parametrize("text", [MistralConfig(**TEXT, sliding_window=None), Qwen2Config(**TEXT)])
def test_other_decoders_of_llavas_work(new_llava: Any, prompts: Any, text: Any) -> None:
    """BakLLaVA is a Mistral, LLaVA-Interleave a Qwen2."""
    model = new_llava(text_config=text.to_dict())
    plain = answer(model, prompts.batch)
    with htc_vlm.apply(model, "fastv", n_keep=16, layer=2):
        close(torch.stack(answer(model, prompts.batch).logits), torch.stack(plain.logits))
    with applied(model, "pyramid_drop"):
        batch = answer(model, prompts.batch).logits[-1]
        close(batch[1], answer(model, prompts.one(1)).logits[-1][0])


@pytest.mark.parametrize("case", ["divprune", "tome", "fastv"])
def test_a_model_that_accelerate_offloads_gives_what_it_gives_at_home(
    new_llava: Any, prompts: Any, tmp_path: Path, case: str
) -> None:
    """Its hooks are a `forward` on the module, under which a change of class was not seen: the method did nothing."""
    from accelerate import cpu_offload, dispatch_model

    where = dict.fromkeys(("model.vision_tower", "model.multi_modal_projector", "lm_head"), "cpu")
    where["model.language_model"] = "disk"
    options = {"offload_dir": tmp_path, "main_device": "cpu", "force_hooks": True}
    home, away, on_cpu = new_llava(), dispatch_model(new_llava(), where, **options), cpu_offload(new_llava())
    assert "forward" in vars(away.get_decoder()) and "forward" in vars(on_cpu)
    before, held = away(**prompts.batch).logits, traces(away)
    with applied(home, case) as run:
        wanted, schedules = answer(home, prompts.batch).logits, run.schedules
    for model in (away, on_cpu):
        with applied(model, case) as run:
            close(answer(model, prompts.batch).logits, wanted)
            assert run.schedules == schedules
    assert traces(away) == held and away(**prompts.batch).logits.equal(before)
