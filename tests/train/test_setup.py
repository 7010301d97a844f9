"""From preset to run: what a stage starts from, conversations with their pictures, teachers, curricula, rounded weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from htc_vlm.data.collate import Collator, Sample
from htc_vlm.data.conversations import ConversationError, Turn, encode_questions
from htc_vlm.data.prompts import STYLES
from htc_vlm.model.adapter import weights
from htc_vlm.model.loading import load, without_compression
from htc_vlm.tiny import pictograms
from htc_vlm.train import conversation_data, packed_data, presets, setup
from htc_vlm.train.conversation_data import ConversationData
from htc_vlm.train.saving import save_rounded
from htc_vlm.train.teacher import logits_of_teacher

from .. import tiny_runs as tiny

PICTURE = "what is at the top left ?"


def sample(name: str, images: list[str], *turns: tuple[str, str]) -> dict[str, Any]:
    messages = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    return {"id": name, "conversations": messages, **({"image": images} if images else {})}


GOOD = [
    sample("one", ["a.png"], (f"<image>\n{PICTURE}", "cat")),
    sample("turns", ["b.png"], (f"<image>\n{PICTURE}", "blue"), ("is there a mammal ?", "yes"), ("is there a cat ?", "no")),
    sample("two", ["a.png", "b.png"], (f"<image><image>\n{PICTURE}", "red")),
    sample("text", [], ("is a cat a mammal ?", "yes")),
]


def conversations(folder: Path, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A preset whose data are these samples, with pictures a.png and b.png beside them."""
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(("a.png", "b.png")):
        tiny.noise(i).save(folder / name)
    (folder / "samples.json").write_text(json.dumps(samples))
    data = [{"task": "llava", "json": str(folder / "samples.json")}]
    settings = {"steps": 2, "images_per_step": 4}
    return {"name": "talk", "prompt": "tiny", "data": data, "stages": {"compress": settings}}


@pytest.mark.parametrize("compressor", [tiny.HTC, tiny.VOCO], ids=["htc", "voco"])
def test_conversations_train_with_turns_two_images_and_text_alone(compressor: dict[str, Any], tmp_path: Path) -> None:
    """One batch holds samples with 2, 1 and 0 images; the pictures are found beside the JSON."""
    preset = conversations(tmp_path / "data", GOOD)
    preset["stages"]["compress"]["compressor"] = compressor
    options = {"mgvq": str(tiny.quantizer())} if compressor is tiny.HTC else {}
    report = setup.train_stage(preset, "compress", tmp_path / "run", start=str(tiny.checkpoint(tiny.NONE)), **options)
    assert report["steps"] == 2 and report["loss"] > 0
    before = load_file(tiny.checkpoint(tiny.NONE) / "model.safetensors")
    after = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    name = "model.multi_modal_projector.linear_1.weight"
    assert not torch.equal(before[name], after[name])


def test_an_adapter_trains_on_a_base_that_stays_as_it_is(tmp_path: Path) -> None:
    """`trains: adapter` that writes a whole model, moves the base, or cannot be loaded on it again."""
    preset = conversations(tmp_path / "data", GOOD)
    block = {"compressor": {"name": "readers", "n_readers": 2}, "trains": "adapter", "lora": {"rank": 2}, "learning_rate": 0.1}
    preset["stages"]["compress"] |= block
    base = tiny.checkpoint(tiny.NONE)
    setup.train_stage(preset, "compress", tmp_path / "run", start=str(base))
    assert not (tmp_path / "run" / "model").exists()
    model, _ = load(base, adapter=tmp_path / "run" / "adapter")
    before, after = load_file(base / "model.safetensors"), without_compression(model).state_dict()
    for name in ("model.multi_modal_projector.linear_1.weight", "model.language_model.layers.0.mlp.up_proj.weight"):
        now = after[name if name in after else name.replace(".weight", ".base_layer.weight")]
        assert now.equal(before[name].to(now.dtype)), name
    learned = [weight for name, weight in weights(model).items() if ".lora_B." in name]
    assert learned and all(weight.any() for weight in learned[:1])


def test_every_answer_and_nothing_else_is_supervised(tmp_path: Path) -> None:
    """Three turns: three answers, each with its end."""
    processor = tiny.loaded(tiny.VOCO)[1]
    data = ConversationData(conversations(tmp_path / "data", GOOD), processor)
    assert sorted(record.id for record in data.records) == ["one", "text", "turns", "two"]
    number = next(i for i, record in enumerate(data.records) if record.id == "turns")
    labels = [label for label in data[number].encoded.labels if label != -100]
    assert processor.tokenizer.decode(labels).split() == ["blue", "</s>", "yes", "</s>", "no", "</s>"]
    batch = Collator(0)([data[i] for i in range(4)])
    assert batch["pixel_values"].shape == (4, 3, 64, 64)
    bottleneck = processor.tokenizer.convert_tokens_to_ids("<voco>")
    assert int((batch["input_ids"] == bottleneck).sum()) == 4


def test_samples_come_shuffled_by_the_seed_alone(tmp_path: Path) -> None:
    """Files are often sorted by source; and a resumed run must find the same order."""
    preset = conversations(tmp_path / "data", [{**GOOD[3], "id": str(i)} for i in range(20)])
    orders = [[r.id for r in ConversationData(preset, tiny.loaded(tiny.NONE)[1], seed).records] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] != sorted(orders[2], key=int)


def test_all_broken_pictures_are_named_before_training(tmp_path: Path) -> None:
    """Met in the middle of an epoch, a broken picture ends a run after hours, and the next one the next run."""
    folder = tiny.hostile_folder(tmp_path / "wild")
    names = sorted({*tiny.GOOD, *tiny.BAD} - {"folder.png"})
    (folder / "s.json").write_text(json.dumps([sample(name, [name], (f"<image>{PICTURE}", "cat")) for name in names]))
    preset = {"data": [{"task": "llava", "json": str(folder / "s.json")}], "prompt": "tiny"}
    with pytest.raises(ValueError, match="4 of 9 pictures cannot be used") as refused:
        ConversationData(preset, tiny.loaded(tiny.VOCO)[1])
    named = {name for name in names if name in str(refused.value)}
    assert named == {*tiny.BAD} - {"folder.png"}
    good = [sample(name, [name], (f"<image>{PICTURE}", "cat")) for name in tiny.GOOD]
    (folder / "s.json").write_text(json.dumps(good))
    data = ConversationData(preset, tiny.loaded(tiny.VOCO)[1])
    assert {tuple(data[i].images["pixel_values"].shape) for i in range(len(data))} == {(1, 3, 64, 64)}
    (folder / "s.json").write_text(json.dumps([*good, sample("folder", ["folder.png"], (f"<image>{PICTURE}", "cat"))]))
    with pytest.raises(ConversationError, match="folder.png"):
        ConversationData(preset, tiny.loaded(tiny.VOCO)[1])


def test_pictures_are_checked_once_unless_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding 665 thousand pictures at each resume would take longer than the checkpoint saved."""
    preset, checked = conversations(tmp_path / "data", GOOD), tmp_path / "run" / "checked.json"
    opened: list[Path] = []
    original = conversation_data.load_for_model
    monkeypatch.setattr(conversation_data, "load_for_model", lambda path: opened.append(path) or original(path))
    ConversationData(preset, tiny.loaded(tiny.NONE)[1], checked=checked)
    assert [path.name for path in opened] == ["a.png", "b.png"]
    ConversationData(preset, tiny.loaded(tiny.NONE)[1], checked=checked)
    assert len(opened) == 2
    (tmp_path / "data" / "b.png").write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 2 pictures.*b.png"):
        ConversationData(preset, tiny.loaded(tiny.NONE)[1], checked=checked)


@pytest.mark.parametrize("given", [{"share": 0.0}, {"images": 2}, {"curriculum": [{"until": 1.0}]}])
def test_what_chooses_nothing_of_conversations_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    """All samples of a share of 0.0 were trained on."""
    preset = conversations(tmp_path / "data", GOOD)
    preset["data"][0] |= given
    with pytest.raises(ValueError, match=f"data: llava: `{next(iter(given))}` chooses nothing here, all conversations"):
        ConversationData(preset, tiny.loaded(tiny.NONE)[1])


def test_one_prefix_of_what_trains_may_stand_alone() -> None:
    """Its letters were prefixes of nearly all weights."""
    block: dict[str, Any] = {"trains": "model.compressor."}
    preset = {"stages": {"compress": block}}
    assert setup._stage(preset, "compress").trains == ("model.compressor.",)
    for wrong in ("", [], [1]):
        block["trains"] = wrong
        with pytest.raises(ValueError, match="stages.compress.trains"):
            setup._stage(preset, "compress")


def test_files_that_would_not_be_read_are_refused(tmp_path: Path) -> None:
    """They were ignored, or a traceback."""
    start = str(tiny.checkpoint(tiny.NONE))
    preset = tiny.preset(compress={"compressor": tiny.VOCO})
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("compress", {"start": start, "teacher": "/nowhere"}, "--teacher /nowhere would not be asked"),
        ("compress", {"start": start, "mgvq": str(tiny.quantizer())}, "'voco' reads no quantizer's code; leave out mgvq"),
        ("instruct", {"mgvq": "/nowhere"}, "--mgvq /nowhere would not be read: a new model is made"),
        ("instruct", {"vision": "/nowhere"}, "--vision /nowhere would not be read: a new model is made"),
    ]
    for stage, given, message in wrong:
        with pytest.raises(ValueError, match=message):
            setup.train_stage(preset, stage, tmp_path / "run", **given)
    talk = conversations(tmp_path / "data", GOOD)
    with pytest.raises(ValueError, match="--cache /nowhere would not be used: conversations"):
        setup.train_stage(talk, "compress", tmp_path / "run", start, cache=Path("/nowhere"))
    talk["stages"]["compress"]["curriculum"] = {"llava": [{"until": 1.0}]}
    with pytest.raises(ValueError, match="stages.compress.curriculum chooses nothing of conversations"):
        setup.train_stage(talk, "compress", tmp_path / "run", start)
    assert not (tmp_path / "run").exists()


def test_an_unknown_prompt_style_is_refused(tmp_path: Path) -> None:
    """It was a KeyError."""
    with pytest.raises(ValueError, match="prompt is 'vicuna'; known: tiny, vicuna_v1"):
        ConversationData({**conversations(tmp_path / "data", GOOD), "prompt": "vicuna"}, None)


# ------------------------------------------------------------------------------------------------ where a stage starts
@pytest.mark.parametrize(
    ("stage", "start", "message"),
    [
        ("compress", None, "starts from a trained checkpoint; give it with --start"),
        ("polish", None, "no stage 'polish'; it has: align, instruct, compress"),
        ("compress", "no/such/folder", "no/such/folder: no such folder"),
        ("compress", "quantizerless", "no weights yet; give an MGVQ file"),
    ],
)
def test_a_stage_without_what_it_starts_from_is_refused(stage: str, start: str | None, message: str, tmp_path: Path) -> None:
    """A wrong start that is only a warning costs the whole run."""
    if start == "quantizerless":
        start = str(tiny.checkpoint(tiny.NONE))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        setup.train_stage(tiny.preset(), stage, tmp_path / "run", start=start)
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_a_new_model_with_a_compressor_is_refused(tmp_path: Path) -> None:
    """Without --start the block's compressor was ignored: an uncompressed model was trained instead."""
    preset = tiny.preset(instruct={"compressor": {"name": "voco"}})
    with pytest.raises(ValueError, match="has a compressor, but a new model has none; give --start"):
        setup.train_stage(preset, "instruct", tmp_path / "run")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"task": "pictograms"}, "pictograms: empty data set: `images` is 0"),
        ({"task": "pictograms", "images": 10**6}, "1000000 images asked for, the training split has 100000"),
        ({"task": "nothing", "images": 1}, "no data set 'nothing'"),
    ],
)
def test_data_that_are_not_there_are_refused(part: dict[str, Any], message: str, tmp_path: Path) -> None:
    """`images` left out is 0: an empty data set must say so, not fail inside numpy."""
    preset = {**tiny.preset(), "data": [part]}
    with pytest.raises(ValueError, match=message):
        setup.train_stage(preset, "instruct", tmp_path / "run", start=str(tiny.checkpoint(tiny.NONE)))


def test_a_curriculum_that_leaves_no_image_is_refused() -> None:
    """No scene has fewer than one thing."""
    ids = pictograms.images("train")[:8]
    with pytest.raises(ValueError, match="max_things leaves no image"):
        packed_data._simple_first(pictograms, ids, [{"until": 0.5, "max_things": 0}])
    ((until, allowed),) = packed_data._simple_first(pictograms, ids, [{"until": 0.5, "max_things": 2}])
    assert until == 0.5 and [i for i, name in enumerate(ids) if pictograms.n_things(name) <= 2] == allowed.tolist()


# ------------------------------------------------------------------------------------------------ teachers
def packed_batch(compressor: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Two images with two packed questions each, as the stage reads them."""
    model, processor = tiny.loaded(compressor)
    turns = [Turn(question, answer) for question, answer in zip(tiny.QUESTIONS, ("cat", "yes"), strict=True)]
    encoded = encode_questions("x", turns, processor.tokenizer, processor.image_text())
    pixels = processor(images=[tiny.noise(i) for i in range(2)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = model.model.vision_features(pixel_values=pixels)
        codes = model.model.compressor.encode(model.model.denormalise(pixels))
    samples = [Sample(encoded, {"patch_features": features[[i]], "image_codes": codes[[i]]}) for i in range(2)]
    return Collator(0)(samples)


def test_the_teacher_answers_as_the_uncompressed_model_does(tmp_path: Path) -> None:
    """Its logits must be those of its own prompt (patches, no bottleneck), in the order of the student's labels."""
    student, batch = tiny.loaded(tiny.HTC)[0], packed_batch(tiny.HTC)
    got = logits_of_teacher(str(tiny.checkpoint(tiny.NONE)), student)(batch)
    model, processor = tiny.loaded(tiny.NONE)
    rows = []
    for i in range(2):
        for question, answer in zip(tiny.QUESTIONS, ("cat", "yes"), strict=True):
            ids = processor.tokenizer(f"{processor.image_text()}{question} {answer}</s>", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=ids, patch_features=batch["patch_features"][[i]]).logits
            rows.append(logits[0, -3:-1])
    torch.testing.assert_close(got, torch.cat(rows), atol=1e-4, rtol=0)


def test_a_compressed_teacher_is_refused() -> None:
    """It knows no more than the student."""
    with pytest.raises(ValueError, match="teacher must be uncompressed.*'voco'"):
        logits_of_teacher(str(tiny.checkpoint(tiny.VOCO)), tiny.loaded(tiny.HTC)[0])


def test_a_batch_that_the_teacher_cannot_read_is_refused() -> None:
    """A sample without an image would shift the teacher's answers to other tokens."""
    teach = logits_of_teacher(str(tiny.checkpoint(tiny.NONE)), tiny.loaded(tiny.HTC)[0])
    batch = packed_batch(tiny.HTC)
    batch["input_ids"] = torch.full_like(batch["input_ids"], 10)
    with pytest.raises(ValueError, match="exactly one image in front"):
        teach(batch)


def test_distillation_trains_and_needs_its_teacher(tmp_path: Path) -> None:
    """Without a teacher the weight would quietly do nothing."""
    preset = tiny.preset(compress={"distill_weight": 1.0, "steps": 2})
    start = {"start": str(tiny.checkpoint(tiny.NONE)), "mgvq": str(tiny.quantizer()), "cache": tiny.cache()}
    with pytest.raises(ValueError, match="a teacher is needed: --teacher CHECKPOINT"):
        setup.train_stage(preset, "compress", tmp_path / "run", **start)  # type: ignore[arg-type]
    report = setup.train_stage(preset, "compress", tmp_path / "run", teacher=str(tiny.checkpoint(tiny.NONE)), **start)  # type: ignore[arg-type]
    assert report["steps"] == 2 and 0 < report["loss"] < 100


# ------------------------------------------------------------------------------------------------ what is saved
def test_saved_weights_are_rounded_but_the_quantizers(tmp_path: Path) -> None:
    """A rounded codebook changes codes; loaded as float32, the model must compute in float32 everywhere."""
    from htc_vlm import load

    model, processor = load(tiny.checkpoint(tiny.HTC))
    save_rounded(model, processor, tmp_path / "model")
    again = load(tmp_path / "model")[0]
    there = dict(model.named_parameters())
    for name, value in again.named_parameters():
        exact = ".quantizer." in name
        assert value.dtype == torch.float32
        assert torch.equal(value, there[name] if exact else there[name].bfloat16().float()), name


def test_code_files_are_named_by_what_codes_depend_on() -> None:
    """Codes of another quantizer, or latents for codes, would be read from the cache without a word."""
    from htc_vlm import load

    model = load(tiny.checkpoint(tiny.HTC))[0].model.compressor
    key = packed_data.code_key(model)
    assert key == packed_data.code_key(tiny.loaded(tiny.HTC)[0].model.compressor) and key.startswith("quantized-32-")
    next(model.quantizer.parameters()).data.add_(1)
    assert packed_data.code_key(model) != key


def test_the_presets_prompt_styles_are_those_of_the_data() -> None:
    """configs name them by these words."""
    named = {presets.read(path).get("prompt", "tiny") for path in presets.shipped()}
    assert named <= set(STYLES)


def test_words_of_patches_need_a_task_that_knows_them() -> None:
    """Without this, a preset's `words` block with another task would do nothing."""
    preset = {"words": {"task": "fashion-mnist"}, "data": [{"task": "fashion-mnist"}, {"task": "pictograms"}]}
    with pytest.raises(ValueError, match="know a patch's words: pictograms"):
        packed_data.align_patches(preset, None, None, [], 0)


def test_a_block_without_max_things_allows_all_images() -> None:
    """The limit of a later block once held for the blocks before it, too."""
    ids = pictograms.images("train")[:30]
    blocks = [{"until": 0.2}, {"until": 0.5, "max_things": 1}, {"until": 1.0}]
    (first, every), (second, single) = packed_data._simple_first(pictograms, ids, blocks)
    assert (first, second) == (0.2, 0.5) and len(every) == 30 and 0 < len(single) < 30
