"""Reading LLaVA's conversation files, and building ids and labels from the same pieces."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from htc_vlm.data.conversations import (
    IGNORE,
    ConversationError,
    Encoded,
    Record,
    Turn,
    check_pictures,
    encode,
    encode_questions,
    load_conversations,
    pack,
)
from htc_vlm.data.prompts import TINY, VICUNA_V1, PromptStyle
from htc_vlm.ops import rope
from htc_vlm.tokens import TokenLayout

SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<voco>"]
WORDS = "what is it ? where top red house a left no . USER: ASSISTANT: Look at and".split()
IMAGE_TEXT = "<image><image><image><voco>"


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>", "bottleneck_token": "<voco>"},
    )


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """One id per word, as the tiny models have."""
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(tokenizer)


def trained(pre_tokenizer: Any, decoder: Any) -> PreTrainedTokenizerFast:
    """A small BPE, so that words are cut in pieces which depend on what stands around them."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet(), "▁"})
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([VICUNA_V1.system, " ".join(WORDS), " red house"] * 3, trainer)
    return wrapped(tokenizer)


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """Puts a space before every piece of text by itself, as Llama's and Vicuna's do."""
    return trained(pre_tokenizers.Metaspace(prepend_scheme="always"), decoders.Metaspace())


@pytest.fixture(scope="module")
def bytelevel() -> PreTrainedTokenizerFast:
    """Spaces belong to the word after them and come only from the text, as in GPT-2, Llama 3 and Qwen."""
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())


def chat(record: Record) -> list[dict[str, Any]]:
    """The same sample as chat messages with image parts."""
    messages: list[dict[str, Any]] = []
    for turn in record.turns:
        before, *after = turn.question.split("<image>")
        parts: list[dict[str, str]] = [{"type": "text", "text": before.strip()}] if before.strip() else []
        for text in after:
            parts += [{"type": "image"}, {"type": "text", "text": text.strip()}]
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return messages


TWO_TURNS = Record("two", (Turn("<image>\nwhat is it ?", "a red house"), Turn("where is it ?", "top left")))
NO_IMAGE = Record("text", (Turn("what is red ?", "a house"),))
LATE_IMAGE = Record("late", (Turn("<image>\nwhat is it ?", "red"), Turn("<image>\nwhat is it ?", "no")))


@pytest.mark.parametrize("record", [TWO_TURNS, NO_IMAGE, LATE_IMAGE], ids=lambda record: record.id)
@pytest.mark.parametrize(
    ("kind", "style"), [("words", TINY), ("sentencepiece", VICUNA_V1), ("bytelevel", VICUNA_V1)]
)
def test_ids_and_labels_are_those_of_the_chat_template(
    kind: str, style: PromptStyle, record: Record, request: pytest.FixtureRequest
) -> None:
    """LLaVA tokenises the whole, then counts the pieces: a disagreement of one token turns every label off (#779)."""
    tokenizer = request.getfixturevalue(kind)
    template = style.chat_template().replace("<image>", IMAGE_TEXT)
    rendered = tokenizer.apply_chat_template(
        chat(record),
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    encoded = encode(record, tokenizer, IMAGE_TEXT, style)
    assert encoded.input_ids == rendered["input_ids"]
    is_answer = [label != IGNORE for label in encoded.labels]
    assert is_answer == [bool(flag) for flag in rendered["assistant_masks"]]
    assert [label for label in encoded.labels if label != IGNORE] == [
        token for token, flag in zip(encoded.input_ids, is_answer, strict=True) if flag
    ]


@pytest.mark.parametrize(
    ("kind", "style"), [("words", TINY), ("sentencepiece", VICUNA_V1), ("bytelevel", VICUNA_V1)]
)
def test_training_sees_the_ids_that_asking_gives(
    kind: str, style: PromptStyle, request: pytest.FixtureRequest
) -> None:
    """A prompt that is tokenised in other pieces when asked is a prompt the model has never seen."""
    tokenizer = request.getfixturevalue(kind)
    encoded = encode(TWO_TURNS, tokenizer, IMAGE_TEXT, style)
    asked = tokenizer.apply_chat_template(
        chat(TWO_TURNS)[:1], chat_template=style.chat_template(), tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer.encode(asked.replace("<image>", IMAGE_TEXT), add_special_tokens=False)
    assert encoded.input_ids[: len(ids)] == ids
    assert encoded.labels[: len(ids)] == [IGNORE] * len(ids)
    assert encoded.labels[len(ids)] != IGNORE


def test_labels_are_the_answers_and_their_ends(words: PreTrainedTokenizerFast) -> None:
    encoded = encode(TWO_TURNS, words, IMAGE_TEXT)
    tokens = "<image> <image> <image> <voco> what is it ? a red house </s> where is it ? top left </s>".split()
    assert words.convert_ids_to_tokens(encoded.input_ids) == tokens
    supervised = [position for position, label in enumerate(encoded.labels) if label != IGNORE]
    assert supervised == [8, 9, 10, 11, 16, 17, 18]
    assert encoded.n_supervised == 7


@pytest.mark.parametrize("question", ["<image>\nWhat is it?", "What is it?\n<image>", "What is it? <image>"])
def test_vicuna_s_prompt_is_llava_s(question: str) -> None:
    """Written down from llava/conversation.py, conv_vicuna_v1, and preprocess_multimodal, which moves the image: any other
    format costs points silently. conv_llava_v1 has "human" for "user"; LLaVA-1.5 was not trained with that one."""
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    assert VICUNA_V1.prompt(question) == f"{system} USER: <image>\nWhat is it? ASSISTANT:"
    assert VICUNA_V1.user("And where?") == "USER: And where? ASSISTANT:"


def test_images_stay_in_the_question_when_the_style_says_so(words: PreTrainedTokenizerFast) -> None:
    style = replace(TINY, images_first=False)
    record = Record("x", (Turn("Look at <image> and <image> .", "no"),))
    tokens = words.convert_ids_to_tokens(encode(record, words, "<image><voco>", style).input_ids)
    assert tokens == "Look at <image> <voco> and <image> <voco> . no </s>".split()
    first = words.convert_ids_to_tokens(encode(record, words, "<image><voco>").input_ids)
    assert first == "<image> <voco> <image> <voco> Look at and . no </s>".split()


@pytest.mark.parametrize("images_first", [True, False])
def test_each_picture_has_its_own_tokens(words: PreTrainedTokenizerFast, images_first: bool) -> None:
    """Pictures of two sizes have different numbers of tokens: taken from the wrong one, a picture would end in the text."""
    record = Record("x", (Turn("Look at <image> and <image> .", "no"), Turn("<image> and where ?", "top")))
    texts = ["<image><image><voco>", "<image><voco>", "<image><image><image><voco>"]
    found = words.convert_ids_to_tokens(encode(record, words, texts, replace(TINY, images_first=images_first)).input_ids)
    one, two, three = (" ".join(["<image>"] * n) + " <voco>" for n in (2, 1, 3))
    wanted = f"{one} {two} {three} Look at and . no </s> and where ? top </s>"
    if not images_first:
        wanted = f"Look at {one} and {two} . no </s> {three} and where ? top </s>"
    assert found == wanted.split()
    with pytest.raises(ValueError, match="questions have 3 <image>, and 2 images were given"):
        encode(record, words, texts[:2])


def test_a_tokenizer_without_an_end_is_refused(words: PreTrainedTokenizerFast) -> None:
    """A model trained without it never stops."""

    class Endless:
        bos_token = eos_token = None
        encode = words.encode

    with pytest.raises(ValueError, match="has no eos_token"):
        encode(NO_IMAGE, Endless(), IMAGE_TEXT)


def test_a_tokenizer_that_joins_prompt_and_answer_is_refused() -> None:
    """Then no cut exists at which training and asking agree."""

    class Joining:
        bos_token, eos_token = None, "</s>"

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return [len(text)]

    with pytest.raises(ValueError, match="joins 'ASSISTANT:'"):
        encode(NO_IMAGE, Joining(), IMAGE_TEXT, VICUNA_V1)


@pytest.mark.parametrize("kind", ["words", "sentencepiece", "bytelevel"])
def test_a_packed_question_has_the_ids_it_has_alone(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    style = TINY if kind == "words" else replace(VICUNA_V1, images_first=True)
    turns = [Turn("what is it ?", "a red house"), Turn("where ?", "top"), Turn("is it red ?", "no")]
    packed = encode_questions("p", turns, tokenizer, IMAGE_TEXT, style)
    assert packed.question_ids is not None
    n_image = packed.question_ids.count(0)
    for number, turn in enumerate(turns, start=1):
        alone = encode(Record("p", (Turn("<image>\n" + turn.question, turn.answer),)), tokenizer, IMAGE_TEXT, style)
        block = [place for place, question in enumerate(packed.question_ids) if question in (0, number)]
        assert [packed.input_ids[place] for place in block] == alone.input_ids
        assert [packed.labels[place] for place in block] == alone.labels
        assert n_image == 4


@pytest.mark.parametrize(
    ("positions", "image", "first_block"), [("sequential", [0, 1, 2], [3, 4, 5]), ("compact", [-2, -1, 0], [1, 2, 3])]
)
def test_positions_restart_after_the_image_in_every_block(
    positions: str, image: list[int], first_block: list[int]
) -> None:
    """A second question further away from the image than when asked alone would be another question."""
    packed = pack("a", [3, 3, 4], [([5, 6], [7]), ([5], [7, 2])])
    ids, question = torch.tensor([packed.input_ids]), torch.tensor([packed.question_ids])
    layout = TokenLayout.from_input_ids(ids, None, image_token_id=3, bottleneck_token_id=4, question=question)
    assert rope.position_ids(layout, positions)[0].tolist() == [*image, *first_block, *first_block]


def test_packing_nothing_or_an_image_in_a_question_is_refused(words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="a: nothing to pack"):
        pack("a", [1], [])
    with pytest.raises(ValueError, match="a: a packed question contains <image>"):
        encode_questions("a", [Turn("<image> ?", "no")], words, IMAGE_TEXT)
    with pytest.raises(ValueError, match="images_first=True"):
        encode_questions("a", [Turn("?", "no")], words, IMAGE_TEXT, replace(TINY, images_first=False))


# Reading


def sample(**changes: Any) -> dict[str, Any]:
    plain = {
        "id": "s1",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}],
    }
    return {key: value for key, value in (plain | changes).items() if value is not ...}


def said(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": value} for role, value in pairs]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    return tmp_path


def written(folder: Path, *samples: Any, lines: bool = False) -> Path:
    text = "\n".join(map(json.dumps, samples)) if lines else json.dumps(list(samples), indent=1)
    (folder / "data.json").write_text(text, encoding="utf-8")
    return folder / "data.json"


@pytest.mark.parametrize("lines", [False, True])
def test_a_file_is_read_as_json_or_json_lines(folder: Path, lines: bool) -> None:
    text_only = sample(id=7, image=..., conversations=said(("human", "hi"), ("gpt", "yes")))
    talk = said(("human", "<image>\n<image>\nsame ?"), ("gpt", "no"), ("human", "sure ?"), ("gpt", "yes"))
    two = sample(id="s2", image=["a.png", "b.png"], conversations=talk)
    a, b = folder / "a.png", folder / "b.png"
    assert load_conversations(written(folder, sample(), text_only, two, lines=lines)) == [
        Record("s1", (Turn("<image>\nwhat ?", "red"),), (a,)),
        Record("7", (Turn("hi", "yes"),)),
        Record("s2", (Turn("<image>\n<image>\nsame ?", "no"), Turn("sure ?", "yes")), (a, b)),
    ]


def test_a_byte_order_mark_is_no_syntax_error(folder: Path) -> None:
    """Windows editors write one."""
    (folder / "bom.json").write_text("\ufeff" + json.dumps([sample()]), encoding="utf-8")
    assert len(load_conversations(folder / "bom.json")) == 1


def test_pictures_are_looked_for_in_the_image_folder(folder: Path) -> None:
    (folder / "json").mkdir()
    file = written(folder / "json", sample())
    assert load_conversations(file, image_folder=folder)[0].images == (folder / "a.png",)
    with pytest.raises(ConversationError, match="sample 's1': no picture .*json/a.png; check image_folder"):
        load_conversations(file)
    assert load_conversations(file, check_files=False)[0].id == "s1"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("text", "sample 1 is a string; expected an object"),
        (sample(id=...), "sample 1 has no id"),
        (sample(id=""), "sample 1 has no id"),
        (sample(conversations=...), r"sample 1 \(id 's1'\) has no conversations; it has id, image"),
        (sample(conversations=[]), r"\(id 's1'\) has no messages"),
        (sample(conversations={}), r"\(id 's1'\) has no messages"),
        (sample(conversations=["hello"]), "message 1 is a string"),
        (sample(conversations=[{"from": "human"}]), r"\(id 's1'\), message 1 has no value"),
        (sample(conversations=[{}]), "message 1 has no from and no value"),
        (sample(conversations=[{"from": "human", "value": 3}]), "message 1: value is a number"),
        (sample(conversations=said(("gpt", "hi"))), "message 1 is from 'gpt', expected 'human'"),
        (sample(conversations=said(("user", "hi"))), "message 1 is from 'user', expected 'human'; messages alternate"),
        (sample(conversations=said(("human", "<image>"), ("human", "?"))), "2 is from 'human', expected 'gpt'"),
        (sample(conversations=said(("human", "<image>"))), "ends with a question"),
        (sample(conversations=said(("human", "<image>"), ("gpt", " "))), "has an empty answer"),
        (sample(conversations=said(("human", "?"), ("gpt", "<image>"))), "has <image> in an answer"),
        (sample(conversations=said(("human", "?"), ("gpt", "no"))), "has 0 <image> in its questions and 1 images"),
        (sample(image=...), "has 1 <image> in its questions and 0 images"),
        (sample(image=["a.png", "b.png"]), "has 1 <image> in its questions and 2 images"),
        (sample(image=""), "image is ''"),
        (sample(image=3), "image is 3; expected a file name"),
        (sample(image="gone.png"), "sample 's1': no picture .*gone.png"),
    ],
)
def test_a_bad_sample_is_refused_by_name(bad: Any, message: str, folder: Path) -> None:
    """A KeyError in a data loader's worker tells neither the file nor the sample."""
    with pytest.raises(ConversationError, match=f"^{folder / 'data.json'}: .*{message}"):
        load_conversations(written(folder, bad))


def test_several_bad_samples_are_reported_at_once(folder: Path) -> None:
    """One error per start of a training run is no way to clean a data set."""
    bad = [sample(id=f"s{number}", image="gone.png") for number in range(8)]
    with pytest.raises(ConversationError, match="'s0'.*'s4'.*; and 3 more$"):
        load_conversations(written(folder, *bad, sample()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no samples"),
        ("[]", "holds no samples"),
        ("[{]", "is not JSON"),
        ("3", "is a number; expected a JSON array"),
        ('{"id": "a"}\n{oops', "line 2 is not JSON"),
        ('{\n "id": "a"\n}', "line 1 is not JSON: .* one sample per line"),
    ],
)
def test_a_file_that_is_no_list_of_samples_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConversationError, match=message):
        load_conversations(tmp_path / "x.json")


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes('[{"id": "ü"}]'.encode("latin-1"))
    with pytest.raises(ConversationError, match="is not UTF-8 text"):
        load_conversations(tmp_path / "x.json")


def test_every_unreadable_picture_is_listed_with_its_samples(folder: Path) -> None:
    """Nothing is lost: also the second sample that uses the same broken file is named."""
    (folder / "broken.png").write_text("not a picture")
    records = load_conversations(
        written(folder, sample(), sample(id="s2", image="broken.png"), sample(id="s3", image="broken.png"))
    )
    lines = check_pictures(records)
    assert [line.split(":")[0] for line in lines] == ["sample 's2'", "sample 's3'"]
    assert all("broken.png: is not a picture" in line for line in lines)


def test_supervised_tokens_are_counted_by_their_labels() -> None:
    assert Encoded("a", [1, 2, 3], [IGNORE, 0, 5]).n_supervised == 2
