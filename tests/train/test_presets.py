"""Presets: what they hold, and that everything wrong in them is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from htc_vlm.train import presets

from .. import tiny_runs as tiny


def written(folder: Path, text: str) -> Path:
    file = folder / "p.yaml"
    file.write_text(text)
    return file


def test_overrides_reach_the_value_they_name(tmp_path: Path) -> None:
    """YAML reads 2e-3 as a string: a learning rate that is text would fail only when the optimizer is made."""
    file = tiny.write_preset(tmp_path)
    preset = presets.read(file, ["stages.instruct.steps=7", "stages.instruct.learning_rate=2e-3", "n_text=20"])
    settings = presets.loop_settings(preset["stages"]["instruct"])
    assert (settings.steps, settings.learning_rate, preset["n_text"]) == (7, 0.002, 20)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("n_text", "has no '='"),
        ("stages.instrukt.steps=3", "no 'instrukt'"),
        ("n_text.x=3", "no 'n_text' with values"),
        ("colour=3", "unknown key 'colour'; known: .*stages"),
        ("stages.instruct=3", "stages.instruct is 3; give it settings"),
        ("n_text={", "is not YAML"),
        ("data=[]", "'data' is missing or empty"),
        ("data=[{task: pictograms, imags: 3}]", "imags.*known: .*images"),
        ("stages.align.nonsense=1", "stages.align: unknown stage setting 'nonsense'; known: .*steps"),
        ("stages.align.steps=-5", "stages.align: steps is -5; give at least 1"),
        ("text.nonsense=1", "text: unknown key 'nonsense'; known: .*hidden_size"),
        ("vision.nonsense=1", "vision: unknown key 'nonsense'; known: .*image_size"),
    ],
)
def test_a_wrong_override_is_refused_by_name(override: str, message: str, tmp_path: Path) -> None:
    """A key that nothing reads trains with the default, and nobody notices."""
    with pytest.raises(ValueError, match=message):
        presets.read(tiny.write_preset(tmp_path), [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'data' is missing or empty"),
        ("- a\n- b\n", "expected keys with values"),
        ("a: [", "not YAML"),
        ("name: x\n", "'data' is missing or empty"),
        ("name: x\ndata: [{task: easy-vqa}]\n", "'stages' is missing"),
    ],
)
def test_a_file_that_is_no_preset_is_refused(text: str, message: str, tmp_path: Path) -> None:
    """An empty file is None to YAML: it ended in a TypeError."""
    with pytest.raises(ValueError, match=message):
        presets.read(written(tmp_path, text))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.tokenizer.nonsense=1", "stages.tokenizer: unknown stage setting 'nonsense'; known: .*image_size"),
        ("words.nonsense=1", "unknown setting 'words.nonsense'"),
    ],
)
def test_blocks_that_are_not_read_now_are_checked_too(change: str, message: str) -> None:
    """A stage that runs tomorrow would be refused tomorrow; and a key of a new model beside --start never was."""
    with pytest.raises(ValueError, match=message):
        presets.read(presets.find("tiny"), [change])


def test_a_stage_that_is_none_is_refused(tmp_path: Path) -> None:
    """Its settings were read by nothing."""
    with pytest.raises(ValueError, match="stages: unknown key 'instrukt'; known: tokenizer, align, instruct, compress"):
        presets.read(written(tmp_path, "data: [{task: easy-vqa}]\nstages: {instrukt: {steps: 3}}\n"))


def test_a_missing_preset_names_those_that_ship() -> None:
    """The reader should not have to look for the folder."""
    with pytest.raises(FileNotFoundError, match="tiny.yaml|no such preset; shipped: .*tiny"):
        presets.read(presets.find("tinny"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data=3", "tiny.yaml: data is 3; give a list"),
        ("stages=[1]", r"tiny.yaml: stages is \[1\]; give a mapping"),
        ("text=3", "tiny.yaml: text is 3; give a mapping"),
        ("words=[]", r"tiny.yaml: words is \[\]; give a mapping"),
        ("stages.compress.compressor=voco", "stages.compress.compressor is 'voco'; give a mapping"),
        ("stages.compress.compressor={n_readers: 2}", "compressor is .*; give it a name"),
    ],
)
def test_a_block_of_another_kind_is_refused_by_name(change: str, message: str) -> None:
    """They were a TypeError or an AttributeError of Python."""
    with pytest.raises(ValueError, match=message):
        presets.read(presets.find("tiny"), [change])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"stps": 3}, "unknown stage setting 'stps'; known: .*steps"),
        ({"steps": "many"}, "steps is 'many'; give a whole number"),
        ({"steps": 1.5}, "steps is 1.5; give a whole number"),
        ({"steps": True}, "steps is True; give a whole number"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; give a number"),
        ({"compile": "yes please"}, "compile is 'yes please'; give true or false"),
        ({"extra": [1]}, "extra is .*; give a mapping"),
    ],
)
def test_a_wrong_setting_of_a_stage_is_refused_by_name(setting: dict[str, object], message: str) -> None:
    """A learning rate of the wrong type must not wait for the first step."""
    with pytest.raises(ValueError, match=message):
        presets.loop_settings(setting)


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("vision", {"imagesize": 64}, "vision: unknown key 'imagesize'; known: .*image_size"),
        ("text", {"hidden": 64}, "text: unknown key 'hidden'; known: .*hidden_size"),
    ],
)
def test_a_mistyped_size_of_the_model_is_refused(part: str, settings: dict[str, int], message: str) -> None:
    """transformers keeps unknown settings without a word and builds a model of the default size."""
    preset = tiny.preset()
    preset[part] = {**preset[part], **settings}
    with pytest.raises(ValueError, match=message):
        presets.build_tiny(preset, str(tiny.tower()), seed=0)


@pytest.mark.parametrize("task", ["no-such-task", "images"])
def test_a_task_that_is_no_data_set_is_refused(task: str) -> None:
    """htc_vlm/data has helpers too: `images` is a module, and no data set."""
    with pytest.raises(ValueError, match="no data set"):
        presets.task_module(task)


def test_shipped_presets_are_read_and_their_stages_have_known_settings() -> None:
    """A preset that ships with a typo would be found by its first user."""
    assert {path.stem for path in presets.shipped()} >= {"tiny"}
    for path in presets.shipped():
        for name, block in presets.read(path)["stages"].items():
            if name != "tokenizer":
                assert presets.loop_settings(block).steps > 0


def test_the_word_tokenizer_keeps_words_whole_and_knows_its_specials() -> None:
    """`top-left` in pieces would be three answer tokens; an unknown word must be visible as one."""
    tokenizer = presets.word_tokenizer(["what", "top-left", "?", "cat"])
    assert tokenizer.tokenize("What cat top-left ?") == ["what", "cat", "top-left"]      # no question mark: see its docstring
    assert tokenizer.encode("dog", add_special_tokens=False) == [tokenizer.unk_token_id]
    image, bottleneck = (tokenizer.convert_tokens_to_ids(name) for name in ("<image>", "<voco>"))
    assert tokenizer.encode("<image><voco>cat", add_special_tokens=False)[:2] == [image, bottleneck]
