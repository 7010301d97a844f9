"""Checkpoints by name or folder; weights that do not fit are refused; the bounds are the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from htc_vlm import load
from htc_vlm.model import loading
from htc_vlm.model.answering import Answerer
from htc_vlm.model.loading import without_compression
from htc_vlm.model.processing import HtcVlmProcessor

from .. import tiny_runs as tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be spoilt."""
    return shutil.copytree(tiny.checkpoint(tiny.HTC), tmp_path / "model")


def test_a_name_that_does_not_ship_names_those_that_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the message alone one must find the right name."""
    for name in ("tiny", "tiny-upper"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.setattr(loading, "SHIPPED", tmp_path)
    with pytest.raises(FileNotFoundError, match="tinny: no such folder, .*; shipped: tiny, tiny-upper$"):
        load("tinny")
    assert loading.find("tiny") == tmp_path / "tiny"
    monkeypatch.setattr(loading, "SHIPPED", tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="shipped: none"):
        load("tiny")


def test_what_is_no_name_is_told_so() -> None:
    """A variable that was never set, for example: pathlib's own message speaks of neither folders nor names."""
    for wrong in (None, 7, b"tiny"):
        with pytest.raises(TypeError, match="takes a folder or a name, not .*tiny"):
            load(wrong)  # type: ignore[arg-type]


def test_a_folder_of_the_same_name_does_not_hide_a_shipped_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`runs/` often holds a folder called tiny; only one with a config.json is a checkpoint."""
    (tmp_path / "here" / "tiny").mkdir(parents=True)
    (tmp_path / "shipped" / "tiny").mkdir(parents=True)
    (tmp_path / "shipped" / "tiny" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        monkeypatch.setattr(loading, "SHIPPED", tmp_path / "none")
        loading.find("tiny")
    monkeypatch.setattr(loading, "SHIPPED", tmp_path / "shipped")
    assert loading.find("tiny") == tmp_path / "shipped" / "tiny"


def test_missing_surplus_and_misshapen_weights_are_refused_by_name(folder: Path) -> None:
    """transformers fills what is missing with random numbers and goes on."""
    file = folder / "model.safetensors"
    state = load_file(file)
    name = "model.compressor.to_anchors.w2.weight"
    cases = [
        {key: value for key, value in state.items() if key != name},
        {**state, "model.compressor.to_anchors.w3.weight": torch.zeros(2)},
        {**state, name: state[name][:1].clone()},
    ]
    for spoilt in cases:
        save_file(spoilt, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"weights do not fit its config.json, e.g. model.compressor.to_anchors.w[23]"):
            load(folder)


def test_damaged_weights_are_refused_with_the_folder(folder: Path) -> None:
    """SafetensorError is no ValueError: it came through as a traceback."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model: damaged weights"):
        load(folder)
    file.unlink()
    with pytest.raises(OSError, match="model"):
        load(folder)


def test_an_unknown_method_in_the_config_is_refused(folder: Path) -> None:
    """It names what there is."""
    config = json.loads((folder / "config.json").read_text())
    config["compressor"] = {"name": "hct"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="hct.*htc"):
        load(folder)


def test_options_that_another_method_cannot_take_are_refused() -> None:
    """They were dropped without a word."""
    with pytest.raises(ValueError, match="attn_implementation cannot be combined with compressor"):
        load(tiny.checkpoint(tiny.NONE), compressor=tiny.VOCO, attn_implementation="eager")


def test_the_model_comes_in_eval_mode_with_a_processor_of_its_counts(folder: Path) -> None:
    """Whatever counts the saved processor has: with another compressor they are others."""
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["n_visual"] = 99
    (folder / "processor_config.json").write_text(json.dumps(settings))
    model, processor = load(folder)
    assert not model.training
    assert (processor.n_visual, processor.n_bottleneck) == (tiny.N_PATCHES + tiny.HTC["n_anchors"], 1)


def test_the_lower_bound_is_the_same_weights_through_the_mask() -> None:
    """Weights trained without compression, asked through the bottleneck: every weight equal, and the answer that of one
    masked pass in which text cannot see the patches."""
    model, processor = load(tiny.checkpoint(tiny.NONE), compressor=tiny.VOCO)
    upper = dict(tiny.loaded(tiny.NONE)[0].named_parameters())
    assert all(torch.equal(value, upper[name]) for name, value in model.named_parameters())
    inputs = processor(images=[tiny.noise(0)], text=f"<image>{tiny.QUESTIONS[0]} ", return_tensors="pt")
    ids = inputs["input_ids"][0]
    n_image = tiny.N_PATCHES + 1
    see = torch.ones(len(ids), len(ids)).tril().bool()
    see[n_image:, : tiny.N_PATCHES] = False  # text sees the bottleneck, which sees the patches
    with torch.no_grad():
        visual = model.visual_tokens(inputs["pixel_values"])[0]
        embeds = torch.cat((visual, model.get_input_embeddings()(ids[tiny.N_PATCHES :])))[None]
        mask = torch.where(see, 0.0, torch.finfo(torch.float32).min)[None, None]
        positions = torch.arange(len(ids))[None]
        hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).last_hidden_state
        reference = model.lm_head(hidden)[0, n_image:]
        one_pass = model(**inputs).logits[0, n_image:]
    torch.testing.assert_close(one_pass, reference, atol=1e-4, rtol=0)
    first = model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1]
    allowed = reference[-1].clone()
    allowed[model.generation_config.suppress_tokens] = -torch.inf
    assert first == allowed.argmax()


def test_the_twin_shares_the_weights_and_answers_as_none() -> None:
    """A copy would double the memory of a 7B model just to time it."""
    model, processor = tiny.loaded(tiny.VOCO)
    twin = without_compression(model)
    mine = {name: value.data_ptr() for name, value in model.named_parameters()}
    assert all(value.data_ptr() == mine[name] for name, value in twin.named_parameters())
    assert (twin.model.compressor.name, model.model.compressor.name) == ("none", "voco")
    assert (twin.config.compressor["name"], model.config.compressor["name"]) == ("none", "voco")
    none = tiny.loaded(tiny.NONE)[0]
    plain = HtcVlmProcessor.for_config(twin.config, processor.image_processor, processor.tokenizer)
    inputs = plain(images=[tiny.noise(0)], text=f"<image>{tiny.QUESTIONS[0]} ", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(twin(**inputs).logits, none(**inputs).logits)


def test_the_twin_of_a_model_with_anchors_leaves_them_out() -> None:
    """The uncompressed path is P patches; anchors are part of the compression."""
    twin = without_compression(tiny.loaded(tiny.HTC)[0])
    assert not list(twin.model.compressor.parameters())
    answerer = Answerer(twin, HtcVlmProcessor.for_config(twin.config, *_parts()))
    assert answerer.encode([tiny.noise(0)]).shape[1] == tiny.N_PATCHES  # type: ignore[union-attr]


def _parts() -> tuple[object, object]:
    processor = tiny.loaded(tiny.HTC)[1]
    return processor.image_processor, processor.tokenizer
