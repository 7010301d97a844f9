"""The prompt that is trained is the prompt that is asked, on tokenizers of real models."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from htc_vlm import load
from htc_vlm.data.conversations import IGNORE
from htc_vlm.data.prompts import TINY, VICUNA_V1
from htc_vlm.model.add_compressor import with_compressor
from htc_vlm.model.answering import Answerer
from htc_vlm.train import setup
from htc_vlm.train.conversation_data import ConversationData

from .. import real_tokenizers as real
from .. import tinies

TURNS = [("what is at the top left?", "A red house."), ("is it (very) old?", "no"), ("Who says so?", "5 people")]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VOCO, NONE = {"name": "voco", "n_bottleneck": 2}, {"name": "none"}


def preset(folder: Path, *turns: tuple[str, str], **options: Any) -> dict[str, Any]:
    """Conversations about one picture, the image at the end of the first question, as LLaVA's files often have it."""
    tinies.pictures(1)[0].save(folder / "a.png")
    said = [part for q, a in turns for part in ({"from": "human", "value": q}, {"from": "gpt", "value": a})]
    said[0]["value"] += "\n<image>"
    (folder / "data.json").write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": said}] * 2))
    block = {"steps": 1, "images_per_step": 2, "compressor": VOCO}
    data = [{"task": "mine", "json": str(folder / "data.json")}]
    return {"name": "p", "data": data, "stages": {"compress": block}, **options}


@dataclass(frozen=True)
class Made:
    """A checkpoint's training data (all TURNS), and its model and processor as they come back from disk."""

    ids: list[int]
    answer_starts: list[int]
    model: Any
    processor: Any

    @property
    def is_image(self) -> int:
        return int(self.model.config.image_token_id)


NAMES = ("hf-sentencepiece", "hf-legacy", "hf-bytelevel", "original", "words")


def save_start(name: str, folder: Path) -> Path:
    """LLaVA checkpoints by name. `legacy` SentencePiece tokenizers put a space before every piece, also after an image."""
    if name == "original":
        return real.save_original_llava(folder)
    if name == "words":
        return tinies.save_llava(folder)
    if name == "hf-bytelevel":
        return real.save_hf_llava(folder, real.smollm2(), chat_template=None)
    return real.save_hf_llava(folder, real.sentencepiece(folder / "tokenizer", legacy=name == "hf-legacy"))


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return functools.cache(lambda name: save_start(name, tmp_path_factory.mktemp("starts") / name))


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest, starts: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Made]:
    folder = tmp_path_factory.mktemp("made")
    model, processor = with_compressor(starts(request.param), VOCO)
    encoded = ConversationData(preset(folder, *TURNS), processor)[0].encoded
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    answers = [i for i, label in enumerate(encoded.labels) if label != IGNORE]
    begins = [i for i in answers if i - 1 not in answers]
    return request.param, Made(encoded.input_ids, begins, *load(folder / "model"))


def test_training_ids_are_asking_ids(made: tuple[str, Made]) -> None:
    """A run with LLaVA-1.5's format was asked in its start checkpoint's: 14 of 40 training questions right instead of 40."""
    one = made[1]
    assert len(one.answer_starts) == len(TURNS)
    for turn, start in enumerate(one.answer_starts):
        asked = one.processor.question_ids(TURNS[turn][0], history=TURNS[:turn])
        assert asked == one.ids[:start]
        words = [i for i in asked if i != one.is_image]
        assert one.processor.question_ids(TURNS[turn][0], is_compressed=True, history=TURNS[:turn]) == words
    inputs = Answerer(one.model, one.processor).inputs(["what?", TURNS[0][0]], is_compressed=False)
    assert inputs["input_ids"][1].tolist() == one.ids[: one.answer_starts[0]]
    n_what = len(one.processor.question_ids("what?"))
    assert inputs["attention_mask"].sum(1).tolist() == [n_what, one.answer_starts[0]]
    assert inputs["input_ids"][0, -n_what:].tolist() == one.processor.question_ids("what?")


def test_one_begin_then_the_system_prompt_then_the_image_then_the_question(made: tuple[str, Made]) -> None:
    """Converted checkpoints were asked with two BOS, and with the picture before the system prompt."""
    name, one = made
    ids, tokenizer = one.ids, one.processor.tokenizer
    adds_bos = name in ("hf-sentencepiece", "hf-legacy", "original")
    assert (ids[0] == tokenizer.bos_token_id) == adds_bos and ids.count(tokenizer.bos_token_id) == int(adds_bos)
    image = ids.index(one.is_image)
    n_image = tinies.N_PATCHES + 2
    assert ids[image : image + n_image] == [one.is_image] * 16 + [one.model.config.bottleneck_token_id] * 2
    if name != "words":  # which has no capital letters
        before = tokenizer.decode(ids[:image], skip_special_tokens=True)
        assert before.strip() == f"{SYSTEM} USER:"
        after = tokenizer.decode(ids[image + n_image :], skip_special_tokens=False)
        end = tokenizer.eos_token
        assert after.replace(f"{end} USER", f"{end}USER").lstrip(" ") == (
            f"\n{TURNS[0][0]} ASSISTANT: {TURNS[0][1]}{end}USER: {TURNS[1][0]} ASSISTANT: {TURNS[1][1]}{end}"
            f"USER: {TURNS[2][0]} ASSISTANT: {TURNS[2][1]}{end}"
        )


def test_the_pieces_are_what_the_whole_text_gives(made: tuple[str, Made]) -> None:
    """Labels need pieces, a chat template gives a whole: SentencePiece cuts "USER" otherwise after an end than at a begin."""
    processor = made[1].processor
    style, end = processor.style, processor.tokenizer.eos_token
    assert style == VICUNA_V1
    text = style.prompt(f"<image>{TURNS[0][0]}", processor.image_text()) + f" {TURNS[0][1]}{end}"
    text += "".join(style.user(question) + f" {answer}{end}" for question, answer in TURNS[1:])
    assert processor.tokenizer.encode(text) == made[1].ids


def test_the_chat_template_of_the_saved_processor_gives_the_same_ids(made: tuple[str, Made]) -> None:
    """The way of transformers' documentation: apply_chat_template with pictures."""
    picture = {"type": "image", "image": tinies.pictures(1)[0]}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": TURNS[0][0]}, picture]},
        {"role": "assistant", "content": [{"type": "text", "text": TURNS[0][1]}]},
        {"role": "user", "content": [{"type": "text", "text": TURNS[1][0]}]},
    ]
    processor = made[1].processor
    out = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert out["input_ids"][0] == made[1].ids[: made[1].answer_starts[1]] and out["pixel_values"] is not None


def test_an_original_checkpoint_is_asked_with_the_ids_of_the_original_code(starts: Any) -> None:
    """llava/mm_utils.py, tokenizer_image_token, with the SentencePiece library itself. transformers' AutoTokenizer, left to
    itself, reads this folder with another class and begins with "A" instead of "▁A"."""
    model, processor = with_compressor(starts("original"), NONE)
    piece = sentencepiece.SentencePieceProcessor(model_file=str(real.SENTENCEPIECE))
    before, after = f"{SYSTEM} USER: <image>\n{TURNS[0][0]} ASSISTANT:".split("<image>")
    official = [1, *piece.encode(before), *[model.config.image_token_id] * tinies.N_PATCHES, *piece.encode(after)]
    assert processor.question_ids(TURNS[0][0]) == official
    assert Answerer(model, processor).inputs([TURNS[0][0]], is_compressed=False)["input_ids"][0].tolist() == official


def test_a_trained_model_is_asked_as_it_was_trained(starts: Any, tmp_path: Path) -> None:
    """From `train` to `ask`, through the files, with a start checkpoint that writes questions otherwise."""
    options = preset(tmp_path, *TURNS)
    before = with_compressor(starts("hf-legacy"), NONE)[1]
    assert before.style is None and before.question_ids("what?") != before.tokenizer.encode("what?")
    setup.train_stage(options, "compress", tmp_path / "run", start=str(starts("hf-legacy")))
    model, processor = load(tmp_path / "run" / "model")
    encoded = ConversationData(options, processor)[0].encoded
    first = encoded.labels.index(next(label for label in encoded.labels if label != IGNORE))
    asked = Answerer(model, processor).inputs([TURNS[0][0]], is_compressed=True)["input_ids"][0].tolist()
    assert asked == [i for i in encoded.input_ids[:first] if i != model.config.image_token_id]
    assert processor.style == VICUNA_V1 != TINY


def test_a_stock_checkpoint_is_asked_by_its_own_template(starts: Any) -> None:
    """One BOS, which the tokenizer adds; a template that writes BOS itself does not get a second one."""
    processor = load(starts("hf-legacy"))[1]
    text = f"USER: {'<image>' * tinies.N_PATCHES}\nwhat? ASSISTANT:"
    assert processor.question_ids("what?") == processor.tokenizer.encode(text)
    processor.chat_template = "{{ bos_token }}" + real.HUB_TEMPLATE
    assert processor.question_ids("what?") == processor.tokenizer.encode(text)
    assert processor.question_ids("what?").count(processor.tokenizer.bos_token_id) == 1


def test_training_goes_on_in_the_style_of_its_start_unless_the_preset_says_otherwise(tmp_path: Path) -> None:
    """The shipped models know questions without a system prompt."""
    processor = load("tiny-upper")[1]
    options = preset(tmp_path, ("what is at the top left ?", "cat"))
    assert processor.style == TINY and ConversationData(options, processor).style == TINY
    assert ConversationData(options | {"prompt": "vicuna_v1"}, processor).style == VICUNA_V1 == processor.style
    with pytest.raises(ValueError, match="prompt is 'vicuna'; known: tiny, vicuna_v1"):
        ConversationData(options | {"prompt": "vicuna"}, processor)


@pytest.mark.parametrize(("name", "image"), [("tiny", "<voco>"), ("tiny-upper", "<image>" * 36)])
def test_the_shipped_models_are_asked_as_before(name: str, image: str) -> None:
    """Their committed results hang on these ids: the image, the words of the question, nothing else."""
    model, processor = load(name)
    got = Answerer(model, processor).inputs(["what is at the top left ?", "is it up ?"], name == "tiny")
    wanted = processor.tokenizer(
        [f"{image}what is at the top left ? ", f"{image}is it up ? "], return_tensors="pt", padding=True, padding_side="left"
    )
    assert torch.equal(got["input_ids"], wanted["input_ids"])
    assert torch.equal(got["attention_mask"], wanted["attention_mask"])


def test_a_bottleneck_token_in_training_data_is_refused_with_its_sample(tmp_path: Path) -> None:
    """It was found in the middle of a run, as a picture too few."""
    with pytest.raises(ValueError, match="sample '1' contains <voco>.*remove it"):
        ConversationData(preset(tmp_path, ("what is <voco> ?", "cat")), load("tiny")[1])


@pytest.mark.parametrize("word", ["<image>", "<voco>"])
def test_a_placeholder_in_a_question_is_refused_by_its_name(word: str) -> None:
    """Typed by a user it became a second picture, or a bottleneck token without one."""
    model, processor = load("tiny")
    with pytest.raises(ValueError, match=f"'what is {word} .' contains {word}, which stands for a picture.*leave it out"):
        Answerer(model, processor).inputs([f"what is {word} ?"], is_compressed=True)
