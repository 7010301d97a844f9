"""Images of stock models cached without training: what is answered from them is what the pictures give."""

from __future__ import annotations

import copy
import functools
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import GenerationConfig

import htc_vlm
from htc_vlm import CompressedImages, registry
from htc_vlm.compressors import COMPRESSORS
from htc_vlm.model.answering import Answerer
from htc_vlm.model.prefix_cache import split
from htc_vlm.model.stock_answering import StockAnswerer
from htc_vlm.testing.families import FAMILIES, PAD, START, tiny_model
from htc_vlm.testing.processor import TinyProcessor

QUESTIONS = ["what is it ?", "is there a cat at the top left ?"]
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "divprune": {"n_keep": 3},
    "random_drop": {"n_keep": 3},
    "tome": {"n_keep": 4, "place": "after_tower", "metric": "features"},
    "avg_pool": {"n_tokens": 4},
    "visionzip": {"n_dominant": 3, "n_contextual": 2},
}
QUICK = ("none", "divprune")
NO_GRID = ("llava_next", "llava_onevision")
CASES = [
    pytest.param(family, name, marks=() if name in QUICK else pytest.mark.slow)
    for family in FAMILIES for name in METHODS
    if not (name == "visionzip" and family != "llava") and not (name == "avg_pool" and family in NO_GRID)
]  # fmt: skip
OPTIONS: dict[str, Any] = {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}


def made(family: str) -> tuple[Any, Any]:
    return tiny_model(family)[0], TinyProcessor(family)


def uncached(model: Any, processor: Any, picture: int, questions: list[str], name: str, **settings: Any) -> Any:
    """The pictures themselves, every time."""
    text = [processor.chat_template.replace("QUESTION", question) for question in questions]
    with torch.no_grad(), htc_vlm.apply(model, name, **settings):
        return model.generate(**processor([picture] * len(text), text), do_sample=False, **OPTIONS)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_answers_from_cached_images_are_those_of_the_pictures(family: str, name: str, tmp_path: Path) -> None:
    """Every step's logits to 1e-5 of their size; a shared image, questions of different lengths, from a file."""
    model, processor = made(family)
    htc_vlm.compress(model, processor, [0], name, **METHODS[name]).save(tmp_path / "one")
    kept = CompressedImages.load(tmp_path / "one")
    cached = htc_vlm.generate(model, processor, compressed=kept, text=QUESTIONS, **OPTIONS)
    expected = uncached(model, processor, 0, QUESTIONS, name, **METHODS[name])
    for ours, theirs in zip(cached.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_a_penalty_counts_the_words_before_a_cached_image() -> None:
    """What was said counts, the cached text too: that was not counted, and a filler was."""
    model, processor = made("qwen2_5_vl")
    options = {**OPTIONS, "output_scores": True, "max_new_tokens": 1, "repetition_penalty": 1.7}
    kept = htc_vlm.compress(model, processor, [0], "divprune", n_keep=3)
    cached = htc_vlm.generate(model, processor, compressed=kept, text=QUESTIONS, **options)
    text = [processor.chat_template.replace("QUESTION", question) for question in QUESTIONS]
    with torch.no_grad(), htc_vlm.apply(model, "divprune", n_keep=3):
        expected = model.generate(**processor([0, 0], text), do_sample=False, **options)
    # left padding and the processor's mark before the image, which nobody says, are penalised where the picture is given
    others = [i for i in range(cached.scores[0].shape[1]) if i not in (PAD, START)]
    torch.testing.assert_close(cached.scores[0][:, others], expected.scores[0][:, others], atol=2e-5, rtol=1e-5)
    assert not torch.equal(cached.scores[0], cached.logits[0])


@pytest.mark.parametrize("method", [{"name": "divprune", "n_keep": 3}, {"name": "fastv", "n_keep": 3, "layer": 1}])
@pytest.mark.parametrize("own", [{"num_return_sequences": 2, "num_beams": 2}, {"repetition_penalty": 30.0}])
def test_a_stock_checkpoint_s_generation_config_does_not_change_greedy_answers(
    own: dict[str, Any], method: dict[str, Any]
) -> None:
    """Qwen2.5-VL's penalises repetition; `num_return_sequences: 2` gave the second question the first one's other answer."""
    model, processor = made("qwen2_5_vl")
    answerer = StockAnswerer(model, processor, method)
    expected = answerer.answer("a", lambda: 0, QUESTIONS, 4)
    model.generation_config.update(**own)
    assert answerer.answer("b", lambda: 0, QUESTIONS, 4) == expected and any(expected)


@pytest.mark.parametrize("method", [{"name": "none"}, {"name": "fastv", "n_keep": 3, "layer": 1}])
def test_a_placeholder_in_a_question_is_refused(method: dict[str, Any]) -> None:
    """The question was taken for a whole prompt: it was read without the chat template, or refused for its beginning."""
    answerer = StockAnswerer(*made("llava"), method)
    with pytest.raises(ValueError, match="the question 'what is <image> .' contains <image>, .* leave it out"):
        answerer.answer("a", lambda: 0, ["what is <image> ?"], 1)


def test_beams_are_those_that_are_asked_for() -> None:
    """Each question has one answer, whatever a checkpoint says; a configuration given to the call counts, as an option does."""
    model, processor = made("llava")
    kept = htc_vlm.compress(model, processor, [0], "divprune", n_keep=3)
    ask = functools.partial(htc_vlm.generate, model, processor, compressed=kept, text=QUESTIONS, max_new_tokens=3)
    expected = ask()
    model.generation_config.update(num_beams=2, num_return_sequences=2)
    assert ask() == expected and len(expected) == 2
    beams = ask(num_beams=2, num_return_sequences=2)
    assert len(beams) == 4 and ask(generation_config=GenerationConfig(num_beams=2, num_return_sequences=2)) == beams
    with pytest.raises(ValueError, match="no question given"):
        htc_vlm.generate(model, processor, compressed=kept, text=[])


@pytest.mark.parametrize("images", [Image.new("RGB", (8, 8)), "cat.png", 3])
def test_pictures_are_a_list(images: Any) -> None:
    """A picture alone was a TypeError of Python; a path, a picture for each of its letters."""
    with pytest.raises(ValueError, match="images is .*; give a list of pictures"):
        htc_vlm.compress(*made("llava"), images)


def test_a_picture_of_several_tiles_is_one_entry() -> None:
    """SmolVLM's marks between tiles made a picture of each, so that n_keep=3 kept 9 tokens of 3 tiles."""
    model, processor = made("smolvlm")
    kept = htc_vlm.compress(model, processor, [1], "divprune", n_keep=3)
    assert len(kept) == 1 and kept.n_bottleneck == 3 + 3 * 2 + 3  # text, two marks before each tile, kept tokens
    cached = htc_vlm.generate(model, processor, compressed=kept, text=QUESTIONS[:1], **OPTIONS)
    expected = uncached(model, processor, 1, QUESTIONS[:1], "divprune", n_keep=3)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(expected.logits), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_each_question_reads_its_own_image(family: str) -> None:
    """With M-RoPE pictures of different sizes leave the text at different positions, though as many tokens are kept."""
    model, processor = made(family)
    kept = htc_vlm.compress(model, processor, [0, 1, 2], "divprune", n_keep=3)
    out = htc_vlm.generate(model, processor, compressed=kept, text=QUESTIONS, which=[2, 1], num_beams=2, **OPTIONS)
    assert len(out.sequences) == 2
    out = htc_vlm.generate(model, processor, compressed=kept, text=QUESTIONS, which=[2, 1], **OPTIONS)
    for row, picture in enumerate([2, 1]):
        expected = uncached(model, processor, picture, [QUESTIONS[row]], "divprune", n_keep=3)
        torch.testing.assert_close(out.logits[0][row], expected.logits[0][0], atol=2e-5, rtol=1e-5)


def test_a_package_that_cannot_be_imported_hides_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("broken", "no_such_module:X", COMPRESSORS.group or "")
    monkeypatch.setattr(registry, "entry_points", lambda group: (broken,))
    with pytest.raises(ValueError, match=r"fastv chooses by the question.*cache one of: avg_pool, divprune"):
        htc_vlm.compress(*made("llava"), [0], "fastv", n_keep=3, layer=1)


def test_an_offloaded_model_is_refused_by_name() -> None:
    """"Cannot copy out of meta tensor" said nothing of what to do."""
    model, processor = made("llava")
    with pytest.raises(ValueError, match="is offloaded .* load the model whole on a device"):
        htc_vlm.compress(cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu")), processor, [0])


def test_what_would_not_be_exact_is_refused_by_name() -> None:
    """An answer from another prefix, method, model or a second image would be silently another one."""
    model, processor = made("qwen2_5_vl")
    kept = htc_vlm.compress(model, processor, [0], "divprune", n_keep=3)

    def ask(text: str, images: CompressedImages = kept, by: Any = model) -> Any:
        return htc_vlm.generate(by, processor, compressed=images, text=[text])

    whole = "sys user <image> what ? answer"
    assert ask(whole) == ask("what ?")
    with pytest.raises(ValueError, match=r"compress them with prompt=\.\.\. that begins like this one"):
        ask("another sys user <image> what ? answer")
    with pytest.raises(ValueError, match="has one image, got 2.*model.generate with their pixels"):
        ask("sys user <image> <image> what ? answer")
    with pytest.raises(ValueError, match=r"fastv chooses by the question.*cache one of: avg_pool, divprune"):
        htc_vlm.compress(model, processor, [0], "fastv", n_keep=3, layer=1)
    with pytest.raises(ValueError, match="give 12, 20 entries"):
        htc_vlm.compress(model, processor, [0, 1])
    other = tiny_model("qwen2_5_vl")[0]
    with torch.no_grad():
        other.lm_head.weight += 1
    with pytest.raises(ValueError, match="another model or with other settings"):
        ask("what ?", by=other)
    plain = htc_vlm.compress(model, processor, [0])
    with pytest.raises(ValueError, match="cannot be put together"):
        CompressedImages.concat([kept, plain])
    again = htc_vlm.compress(model, processor, [0], "divprune", n_keep=3, prompt="another sys user <image> ? answer")
    assert ask("another sys user <image> what ? answer", again)


@pytest.mark.parametrize("how", ["argument", "config"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"prefill_chunk_size": 2}, "prefill_chunk_size=2 does not go"), ({"use_cache": False}, "use_cache=False does not go"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens=2 does not go"),
        ({"cache_implementation": "static"}, "'static'; over compressed images: 'dynamic'"),
        ({"max_length": 40}, "max_length=40 .* max_new_tokens"), ({"min_length": 40}, "min_length=40 .* min_new_tokens"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_options_that_half_work_over_cached_images_are_refused(option: dict[str, Any], message: str, how: str) -> None:
    """Errors about tensor sizes, lengths that were ignored or counted hidden entries."""
    model, processor = made("llava")
    kept = htc_vlm.compress(model, processor, [0], "divprune", n_keep=3)
    given = option if how == "argument" else {"generation_config": GenerationConfig(**option)}
    with pytest.raises(ValueError, match=message):
        htc_vlm.generate(model, processor, compressed=kept, text=QUESTIONS, **given)
    model.generation_config.update(**option)  # a checkpoint's own is not obeyed
    assert len(htc_vlm.generate(model, processor, compressed=kept, text=QUESTIONS, max_new_tokens=2)) == 2


def test_lengths_and_choices_are_the_call_s_and_not_the_checkpoint_s() -> None:
    """A given configuration's 8 tokens were 9 of the default 64; a checkpoint's min_new_tokens made greedy answers longer."""
    model, processor = made("llava")
    kept = htc_vlm.compress(model, processor, [0], "divprune", n_keep=3)
    ask = functools.partial(htc_vlm.generate, model, processor, compressed=kept, text=QUESTIONS, return_dict_in_generate=True)
    eight = GenerationConfig(max_new_tokens=8, min_new_tokens=8)
    assert ask(generation_config=eight).sequences.shape[1] == 8
    assert ask(generation_config=eight, max_new_tokens=9).sequences.shape[1] == 9
    assert ask(max_new_tokens=3, cache_implementation="dynamic").sequences.shape[1] <= 3
    model.generation_config.eos_token_id = ask(max_new_tokens=1).sequences[:, 0].tolist()
    assert ask().sequences.shape[1] == 1
    model.generation_config.update(min_new_tokens=5)
    assert ask().sequences.shape[1] == 1
    assert ask(generation_config=model.generation_config).sequences.shape[1] >= 5


def test_a_model_in_a_peft_wrapper_is_the_model_inside(tmp_path: Path) -> None:
    """Its attributes were looked for on the wrapper: errors about a missing compressor, or that there is no bottleneck."""
    picture, question = Image.new("RGB", (48, 48), "red"), ["what is it ?"]
    for name, method in (("tiny", {}), ("tiny-upper", {"method": "divprune", "n_keep": 9})):
        model, processor = htc_vlm.load(name)
        wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        kept = htc_vlm.compress(wrapped, processor, [picture], **method)
        expected = htc_vlm.compress(wrapped.get_base_model(), processor, [picture], **method)
        assert kept.kv.equal(expected.kv)
        assert len(htc_vlm.generate(wrapped, processor, compressed=kept, text=question, max_new_tokens=2)) == 1
        assert Answerer(wrapped, processor).answer("a", lambda: picture, question, 2)
        stored = {"name": "divprune", "n_keep": 9} if method else None
        htc_vlm.ImageStore.open(tmp_path / name, wrapped, processor, method=stored).close()
    with htc_vlm.apply(wrapped, "divprune", n_keep=9) as applied:
        wrapped(**processor(images=[picture], text=["<image>what is it ?"], return_tensors="pt"))
    assert applied.schedule is not None and applied.schedule[0] == 9


def test_a_question_past_the_context_of_a_growing_rotation_is_refused() -> None:
    """The image was cached at other frequencies than the whole prompt turns at: logits differed by an eighth of their size."""
    model, processor = made("llava")
    text = model.config.get_text_config()
    text.rope_parameters = {**text.rope_parameters, "rope_type": "dynamic", "factor": 4.0}
    kept = htc_vlm.compress(model, processor, [0], "divprune", n_keep=3)
    ask = functools.partial(htc_vlm.generate, model, processor, compressed=kept, max_new_tokens=1)
    text.max_position_embeddings = kept.n_visual[0] + 2
    kept = htc_vlm.compress(model, processor, [0], "divprune", n_keep=3)
    with pytest.raises(ValueError, match="'dynamic', whose frequencies change past .* positions"):
        ask(compressed=kept, text=QUESTIONS)


def test_a_template_s_bos_is_not_doubled() -> None:
    """A template that writes BOS and a tokenizer that adds it gave two; apply_chat_template(tokenize=True) gives one."""

    class Tokenizer:
        bos_token = "<s>"

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            words = text.replace("<s>", "<s> ").replace("<image>", " <image> ").split()
            return {"input_ids": [1] * add_special_tokens + [1 if word == "<s>" else 2 for word in words]}

    processor = SimpleNamespace(image_token="<image>", tokenizer=Tokenizer())
    assert split(processor, "<s>see <image> what").before == [1, 2]
    assert split(processor, "see <image> what").before == [1, 2]


def test_our_own_models_take_the_same_call() -> None:
    """With a bottleneck its entries are kept; without one the prefix."""
    picture = Image.new("RGB", (48, 48), "red")
    model, processor = htc_vlm.load("tiny")
    kept = htc_vlm.compress(model, processor, [picture])
    assert kept.n_bottleneck == model.model.compressor.n_bottleneck and kept.prompt is None
    assert len(htc_vlm.generate(model, processor, compressed=kept, text=["what is it ?"], max_new_tokens=2)) == 1
    upper, processor = htc_vlm.load("tiny-upper")
    kept = htc_vlm.compress(upper, processor, [picture], "divprune", n_keep=9)
    cached = htc_vlm.generate(upper, processor, compressed=kept, text=["what is at the top left ?"], **OPTIONS)
    ids = torch.tensor([processor.question_ids("what is at the top left ?")])
    pixels = processor(images=[picture], return_tensors="pt")["pixel_values"]
    with torch.no_grad(), htc_vlm.apply(upper, "divprune", n_keep=9):
        expected = upper.generate(input_ids=ids, pixel_values=pixels, do_sample=False, **OPTIONS)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(expected.logits), atol=2e-5, rtol=1e-5)
