"""Checkpoints in, HTC-VLM checkpoints out: Hugging Face's layout, the original one, and refusals of what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from htc_vlm.model import HtcVlmForConditionalGeneration
from htc_vlm.model.add_compressor import is_original_layout, llava_state_dict, with_compressor
from htc_vlm.quantizers.mgvq import MGVQ

from .. import tinies
from ..tinies import BOTTLENECK, IMAGE, N_PATCHES, TINY_CODE, batch, pixels

HTC = {"name": "htc", "quantizer": TINY_CODE}
CODE = {name: value for name, value in TINY_CODE.items() if name != "image_size"}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock Hugging Face LLaVA checkpoint, under the names of the hub."""
    return tinies.save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def mgvq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("mgvq")
    MGVQ(**CODE).save(folder)
    return folder


def original_weights(model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """A stock model's weights as liuhaotian/llava-v1.5 names them, without the row of <image>."""
    names = {
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "model.language_model.": "model.",
        "lm_head.": "lm_head.",
    }
    out = {}
    for name, value in model.state_dict().items():
        new, old = next((new, old) for old, new in names.items() if name.startswith(old))
        is_row = name in ("lm_head.weight", "model.language_model.embed_tokens.weight")
        out[new + name.removeprefix(old)] = (value[:IMAGE] if is_row else value).clone()
    out["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    out["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    return out


ORIGINAL_CONFIG: dict[str, Any] = {
    "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "vocab_size": IMAGE, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_act": "silu", "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "initializer_range": 0.3,
    "bos_token_id": 3, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False, "rope_scaling": None,
    "mm_hidden_size": 16, "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/some-clip", "image_aspect_ratio": "pad", "torch_dtype": "float16",
}  # fmt: skip


@pytest.fixture(scope="module")
def clip(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vision tower of `stock` as a CLIP folder of its own."""
    folder = tmp_path_factory.mktemp("clip")
    tower = LlavaForConditionalGeneration.from_pretrained(stock).model.vision_tower
    assert isinstance(tower, CLIPVisionModel)
    tower.save_pretrained(folder)
    return folder


def write_original(
    folder: Path, stock: Path, change: Callable[[dict[str, Tensor]], None] = lambda weights: None, **config: Any
) -> Path:
    """The same model in the original layout: two .bin shards, LLaVA's config.json, a tokenizer without <image>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    weights = original_weights(LlavaForConditionalGeneration.from_pretrained(stock))
    change(weights)
    names = sorted(weights)
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        torch.save({name: weights[name] for name in part}, folder / f"pytorch_model-0000{i}-of-00002.bin")
    torch.save({"steps": 1}, folder / "training_args.bin")
    (folder / "config.json").write_text(json.dumps({**ORIGINAL_CONFIG, **config}))
    vocabulary = tinies.tokenizer().get_vocab()
    words = {word: i for word, i in vocabulary.items() if i < IMAGE}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def original(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_original(tmp_path_factory.mktemp("original"), stock)


PROMPT = [4, 5, *[IMAGE] * N_PATCHES, 6, 7]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(**batch([PROMPT]), pixel_values=pixels(1)).logits[..., :IMAGE]


# ------------------------------------------------------------------------------------------------ Hugging Face layout
def test_a_new_row_is_added_for_the_bottleneck_token(stock: Path, mgvq: Path) -> None:
    """A token id beyond the embedding crashes in training; a random row starts far from every word."""
    before = LlavaForConditionalGeneration.from_pretrained(stock).get_input_embeddings().weight
    model, processor = with_compressor(stock, HTC, mgvq)
    after = model.get_input_embeddings().weight
    assert before.shape[0] == IMAGE + 1 and after.shape[0] == IMAGE + 2
    assert model.config.bottleneck_token_id == BOTTLENECK == processor.tokenizer.convert_tokens_to_ids("<voco>")
    assert after[:-1].equal(before)
    torch.testing.assert_close(after[-1], before.mean(dim=0))
    assert model.lm_head.weight.shape[0] == model.config.text_config.vocab_size == IMAGE + 2
    assert model.generation_config.suppress_tokens == [IMAGE, BOTTLENECK]


def test_the_rest_of_the_model_is_untouched(stock: Path, mgvq: Path) -> None:
    """Adding a compressor must not change what the language model knows."""
    old = LlavaForConditionalGeneration.from_pretrained(stock).state_dict()
    model, _ = with_compressor(stock, HTC, mgvq)
    for name, value in model.state_dict().items():
        if name in old and value.shape == old[name].shape:
            assert value.equal(old[name]), name
    assert {name for name in old if name not in model.state_dict()} == set()


def test_the_quantizers_weights_are_those_of_the_file(stock: Path, mgvq: Path) -> None:
    """Anchors of an untrained quantizer are noise that trains without complaint."""
    model, _ = with_compressor(stock, HTC, mgvq)
    file = load_file(mgvq / "model.safetensors")
    state = model.model.compressor.quantizer.state_dict()
    assert state and all(value.equal(file[name]) for name, value in state.items())


def test_a_converted_checkpoint_loads_again(stock: Path, mgvq: Path, tmp_path: Path) -> None:
    """Processor, configuration and weights must agree on disk, also where the embedding grew."""
    model, processor = with_compressor(stock, HTC, mgvq)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = with_compressor(tmp_path, HTC)  # the quantizer is in the checkpoint
    assert again.recipe() == model.recipe()
    assert again.get_input_embeddings().weight.equal(model.get_input_embeddings().weight)


def test_an_untrained_quantizer_is_refused(stock: Path) -> None:
    """The same, where nobody gave a file."""
    with pytest.raises(ValueError, match="quantizer has no weights yet.*--mgvq"):
        with_compressor(stock, HTC)
    model, _ = with_compressor(stock, HTC, allow_untrained_quantizer=True)
    assert model.model.compressor.name == "htc"


def test_a_quantizer_of_other_size_is_refused(stock: Path, tmp_path: Path) -> None:
    """The paper's f16c32g8 and the smaller official files have the same names and other shapes."""
    MGVQ(**{**CODE, "codebook_size": 32}).save(tmp_path)
    with pytest.raises(ValueError, match="not the quantizer that this compressor was configured for"):
        with_compressor(stock, HTC, tmp_path)


def test_a_missing_quantizer_file_is_named(stock: Path, tmp_path: Path) -> None:
    """A wrong path must not read as 'no quantizer needed'."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        with_compressor(stock, HTC, tmp_path / "nowhere")


def test_a_missing_and_a_foreign_weight_are_named(stock: Path, tmp_path: Path) -> None:
    """transformers initialises what is missing at random, drops what is unexpected, and goes on."""
    for file in stock.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(stock / "model.safetensors")
    weight = state.pop("multi_modal_projector.linear_2.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing \['model.multi_modal_projector.linear_2.weight'\]"):
        with_compressor(tmp_path, {"name": "voco"})
    state["multi_modal_projector.linear_2.weight"] = weight
    save_file({**state, "language_model.adapter": weight.clone()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected \['.*adapter'\]"):
        with_compressor(tmp_path, {"name": "voco"})
    state["multi_modal_projector.linear_2.weight"] = weight[:3]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"of another size \['model.multi_modal_projector.linear_2.weight'\]"):
        with_compressor(tmp_path, {"name": "voco"})


@torch.no_grad()
def test_the_vision_tower_of_hub_checkpoints_loads_under_its_old_name(stock: Path, tmp_path: Path) -> None:
    """llava-1.5-7b-hf says vision_tower.vision_model.*, transformers 5 has no vision_model inside."""
    for file in stock.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(stock / "model.safetensors")
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in state.items()}
    assert renamed.keys() != state.keys()
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, _ = with_compressor(tmp_path, {"name": "none"})
    assert logits(model).equal(logits(LlavaForConditionalGeneration.from_pretrained(stock)))


def test_vision_is_refused_for_hugging_face_checkpoints(stock: Path, clip: Path) -> None:
    """A tower that would silently not be used."""
    with pytest.raises(ValueError, match="has its own vision tower"):
        with_compressor(stock, {"name": "voco"}, vision=clip)


# ----------------------------------------------------------------------------------------------------- original layout
def test_the_layouts_are_told_apart(stock: Path, original: Path, tmp_path: Path) -> None:
    assert is_original_layout(original) and not is_original_layout(stock)
    with pytest.raises(FileNotFoundError, match="no config.json"):
        is_original_layout(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        is_original_layout(tmp_path)


def test_an_original_checkpoint_gives_the_logits_of_the_model_it_came_from(stock: Path, original: Path, clip: Path) -> None:
    """Swapped projector layers, or a tower read one layer off, answer fluently and wrongly."""
    model, processor = with_compressor(original, {"name": "none"}, vision=clip)
    assert isinstance(model, HtcVlmForConditionalGeneration)
    assert model.config.image_token_id == IMAGE == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert logits(model).equal(logits(LlavaForConditionalGeneration.from_pretrained(stock)))


def test_original_checkpoints_may_keep_their_tower_in_a_clip_folder(stock: Path, clip: Path, tmp_path: Path) -> None:
    """llava-v1.5-13b's lora and pretrain folders hold no tower; CLIP's own folder does."""

    def without_tower(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if "vision_tower" in name]:
            del weights[name]

    folder = write_original(tmp_path, stock, without_tower)
    with pytest.raises(ValueError, match="--vision CLIP_FOLDER"):
        with_compressor(folder, {"name": "none"})
    model, _ = with_compressor(folder, {"name": "none"}, vision=clip)
    assert logits(model).equal(logits(LlavaForConditionalGeneration.from_pretrained(stock)))
    (folder / "config.json").write_text(json.dumps({**ORIGINAL_CONFIG, "mm_vision_tower": str(clip)}))
    model, _ = with_compressor(folder, {"name": "none"})
    assert logits(model).equal(logits(LlavaForConditionalGeneration.from_pretrained(stock)))


def test_an_original_checkpoint_takes_a_compressor_and_saves(original: Path, clip: Path, mgvq: Path, tmp_path: Path) -> None:
    """Both steps at once; the saved result is an ordinary checkpoint."""
    model, processor = with_compressor(original, HTC, mgvq, vision=clip)
    assert processor.image_processor.do_pad  # image_aspect_ratio: pad
    assert model.config.bottleneck_token_id not in (None, model.config.image_token_id)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, loaded = with_compressor(tmp_path, HTC)
    assert again.recipe() == model.recipe()
    inputs = loaded(images=tinies.pictures(1), text="<image> what is it ?", return_tensors="pt")
    out = again.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3


def test_what_llava_1_5_does_not_have_is_refused(original: Path, clip: Path, stock: Path, tmp_path: Path) -> None:
    """A linear projector (LLaVA 1.0) or image start tokens would need code that is not here."""
    for i, (change, message) in enumerate(
        (
            ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
            ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        )
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        write_original(folder, stock, **change)
        with pytest.raises(ValueError, match=message):
            with_compressor(folder, {"name": "none"}, vision=clip)


def test_a_missing_original_weight_is_named(stock: Path, clip: Path, tmp_path: Path) -> None:
    def lose(weights: dict[str, Tensor]) -> None:
        del weights["model.mm_projector.2.bias"]

    folder = write_original(tmp_path, stock, lose)
    with pytest.raises(ValueError, match="missing .*multi_modal_projector.linear_2.bias"):
        with_compressor(folder, {"name": "none"}, vision=clip)


def test_a_foreign_original_weight_is_named() -> None:
    with pytest.raises(ValueError, match="'model.image_newline' is not a weight of the original LLaVA-1.5 layout"):
        llava_state_dict({"model.image_newline": torch.zeros(1)})


def test_a_missing_quantizer_is_said_in_one_line_before_anything_is_loaded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`htc-vlm convert` without --mgvq printed a table of fifty MISSING weights before its message, after reading 13 GB."""
    from .. import tiny_runs

    start = tiny_runs.checkpoint(tiny_runs.NONE)

    def load(*words: object, **options: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(HtcVlmForConditionalGeneration, "from_pretrained", load)
    with pytest.raises(ValueError, match="this compressor's quantizer has no weights yet; give an MGVQ file"):
        with_compressor(start, tiny_runs.HTC)
    monkeypatch.undo()
    with_compressor(start, tiny_runs.HTC, tiny_runs.quantizer())
    assert "MISSING" not in capfd.readouterr().err
    again = tiny_runs.checkpoint(tiny_runs.HTC)
    assert with_compressor(again, tiny_runs.HTC)[0].model.compressor.name == "htc"  # it holds its own
