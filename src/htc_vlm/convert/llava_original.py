"""The original layout of LLaVA-1.5 folders: configuration, weights and tokenizer -> Hugging Face's.

Source:  liuhaotian/llava-v1.5-7b (LLaVA commit c121f04, llava/model/builder.py); transformers'
         convert_llava_weights_to_hf.py for the new names.
Differs: `<image>` gets a real row of the embedding (the original uses the id -200); it starts as the mean of the others.
         Any size of language model and CLIP tower is read, from the folders' own configurations.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlamaTokenizer

IMAGE_TOKEN = "<image>"
PAD_VOCABULARY_TO = 64  # as transformers' conversion: 32000 -> 32064, so that <voco> needs no new row
# What `mm_vision_tower` names, where its folder is not at hand: CLIP ViT-L/14 at 336 pixels.
CLIP_336 = "openai/clip-vit-large-patch14-336"
CLIP_336_CONFIG: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip

_TOWER = "model.vision_tower."
_NAMES = (
    (r"model\.vision_tower\.vision_tower\.(vision_model\.)?", _TOWER),
    (r"model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    (r"lm_head\.", "lm_head."),
)
_COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")  # buffers that old checkpoints hold beside weights
_LLAMA_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "bos_token_id", "eos_token_id", "rope_theta", "rope_scaling", "attention_bias", "mlp_bias",
)  # fmt: skip


@dataclass(frozen=True)
class Original:
    """An original LLaVA-1.5 folder, under Hugging Face's names. options: for HtcVlmConfig, without the compressor."""

    options: dict[str, Any]
    state: dict[str, Tensor]
    tokenizer: Any
    image_processor: Any


def is_original_layout(path: str | os.PathLike[str]) -> bool:
    """Is this a liuhaotian/llava folder (its config names `mm_vision_tower`), not a Hugging Face LLaVA?"""
    return "mm_vision_tower" in _read_config(Path(path))


def options_of(path: str | os.PathLike[str], vision: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Options of a LlavaConfig from an original folder's config.json alone, without weights (see `llava_options`)."""
    config = _read_config(Path(path))
    return llava_options(config, _vision_config(config, _tower_folder(config, vision)))


def check_layout(path: Any) -> None:
    """ValueError for a folder in the original layout, which Hugging Face's classes would fill with random weights."""
    folder = Path(str(path))
    if path is not None and (folder / "config.json").is_file() and is_original_layout(folder):
        raise ValueError(
            f"{path} is in the layout of the original LLaVA code; convert it first: htc-vlm convert {path} --compressor none "
            "--output NEW"
        )


def read(path: str | os.PathLike[str], vision: str | os.PathLike[str] | None = None) -> Original:
    """Everything of an original folder. vision: a CLIP folder, needed where the checkpoint holds no vision tower.

    FileNotFoundError, or ValueError for what LLaVA-1.5 does not have (another projector, image start tokens, ...).
    """
    config = _read_config(Path(path))
    tower = _tower_folder(config, vision)
    vision_config = _vision_config(config, tower)
    state = read_weights(path)
    if not any(name.startswith(_TOWER) for name in state):
        if tower is None:
            raise ValueError(f"{path} holds no vision tower; give {config['mm_vision_tower']} with --vision CLIP_FOLDER")
        state.update(_tower_weights(tower))
    tokenizer = read_tokenizer(Path(path))
    options = llava_options(config, vision_config)
    add_image_token(options, state, tokenizer)
    return Original(options, state, tokenizer, _image_processor(config, tower, vision_config))


def read_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. FileNotFoundError or ValueError where there is none, or nothing to read it with.

    A `tokenizer.model` is Llama's SentencePiece model. Left to itself, transformers takes the configuration's
    `model_type: llava` for another class, which puts no space before the first word ("A" for "▁A"). It is read as a
    `legacy` one, since LLaVA tokenises the text after an image as a piece of its own, which gives it the space.
    """
    if (folder / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(folder)
    if not (folder / "tokenizer.model").is_file():
        raise FileNotFoundError(f"{folder}: no tokenizer.model and no tokenizer.json; copy the checkpoint's")
    absent = [name for name in ("sentencepiece", "google.protobuf") if not _is_installed(name)]
    if absent:
        raise ValueError(
            f"{folder / 'tokenizer.model'} needs {' and '.join(absent)} to be read; pip install 'htc-vlm[original]'"
        )
    config = _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    return LlamaTokenizer.from_pretrained(folder, legacy=True, add_bos_token=config.get("add_bos_token", True))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is not there either
        return False


def llava_options(config: Mapping[str, Any], vision: CLIPVisionConfig) -> dict[str, Any]:
    """config.json of an original checkpoint -> options of a LlavaConfig (without the image token). Pure."""
    for key, known in {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch", "cls_patch"),
        "mm_use_im_start_end": (False,),
        "mm_use_im_patch_token": (False,),
        "tie_word_embeddings": (False,),
    }.items():
        value = config.get(key, known[0])
        if value not in known:
            raise ValueError(f"config.json: {key} is {value!r}; LLaVA-1.5 has {' or '.join(map(repr, known))}")
    text = {key: config[key] for key in _LLAMA_KEYS if config.get(key) is not None}
    return {
        "vision_config": vision,
        "text_config": LlamaConfig(**text, tie_word_embeddings=False),
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "full" if config.get("mm_vision_select_feature") == "cls_patch" else "default",
        "image_seq_length": (vision.image_size // vision.patch_size) ** 2,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": False,
    }


def add_image_token(options: dict[str, Any], state: dict[str, Tensor], tokenizer: Any) -> None:
    """Give `<image>` an id, and the embedding rows for it; changes all three."""
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    image_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    text = options["text_config"]
    needed = max(image_id, tokenizer.pad_token_id) + 1
    if needed > text.vocab_size:
        n_rows = -(-needed // PAD_VOCABULARY_TO) * PAD_VOCABULARY_TO
        for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            state[name] = _with_mean_rows(state[name], n_rows)
        text.vocab_size = n_rows
    text.pad_token_id = options["pad_token_id"] = tokenizer.pad_token_id
    options["image_token_index"] = image_id


def _with_mean_rows(weight: Tensor, n_rows: int) -> Tensor:
    """(V, D) -> (n_rows, D); the new rows are the mean of the old ones."""
    mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
    return torch.cat((weight, mean.expand(n_rows - weight.shape[0], -1)))


def llava_state_dict(original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights named as in liuhaotian/llava-v1.5 -> as in transformers. ValueError for a name that is not LLaVA's.

    >>> sorted(llava_state_dict({"model.mm_projector.2.bias": torch.zeros(1), "model.norm.weight": torch.ones(1)}))
    ['model.language_model.norm.weight', 'model.multi_modal_projector.linear_2.bias']
    """
    out = {}
    for name, value in original.items():
        if name.endswith(_COMPUTED):
            continue
        for pattern, replacement in _NAMES:
            renamed, n_found = re.subn(f"^{pattern}", replacement, name)
            if n_found:
                out[renamed] = value
                break
        else:
            raise ValueError(f"{name!r} is not a weight of the original LLaVA-1.5 layout")
    return out


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All weight files (.safetensors or .bin) of an original LLaVA-1.5 folder, renamed. The vision tower may be absent:
    there it is a CLIP folder of its own."""
    return llava_state_dict(_load_files(Path(path)))


def _load_files(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(f"{folder}: no model*.safetensors and no pytorch_model*.bin")
    state: dict[str, Tensor] = {}
    for file in files:
        safe = file.suffix == ".safetensors"
        state.update(load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True))
    return state


def _tower_weights(folder: Path) -> dict[str, Tensor]:
    """A CLIP folder (vision alone, or with its text half, which is left out) -> the tower's weights."""
    state = {}
    for name, value in _load_files(folder).items():
        bare = re.sub(r"^vision_model\.", "", name)
        is_vision = bare != name or re.match(r"(embeddings\.(class|patch|position)|encoder|pre_layr|post_layern)", name)
        if is_vision and not name.endswith(_COMPUTED):
            state[_TOWER + bare] = value
    if not state:
        raise ValueError(f"{folder}: no weights of a CLIP vision tower there")
    return state


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no config.json there; give a checkpoint folder")
    return _read_json(file)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        out: dict[str, Any] = json.loads(file.read_text())
        return out
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error


def _tower_folder(config: Mapping[str, Any], vision: str | os.PathLike[str] | None) -> Path | None:
    """The CLIP folder: given, or named by config.json where that is a folder here."""
    if vision is not None:
        return Path(vision)
    named = Path(str(config["mm_vision_tower"]))
    return named if (named / "config.json").is_file() else None


def _vision_config(config: Mapping[str, Any], tower: Path | None) -> CLIPVisionConfig:
    if tower is not None:
        options = _read_config(tower)
        return CLIPVisionConfig.from_dict(options.get("vision_config", options))
    if config["mm_vision_tower"] != CLIP_336:
        raise ValueError(
            f"config.json names the vision tower {config['mm_vision_tower']!r}, whose sizes are not known here; "
            "give its folder with --vision CLIP_FOLDER"
        )
    return CLIPVisionConfig(**CLIP_336_CONFIG)


def _image_processor(config: Mapping[str, Any], tower: Path | None, vision: CLIPVisionConfig) -> Any:
    """LLaVA's image processor with the tower's normalisation; pads to a square where the checkpoint was trained so."""
    from transformers import LlavaImageProcessor  # here: without torchvision its import warns whoever loads a model

    has_file = tower is not None and (tower / "preprocessor_config.json").is_file()
    clip = AutoImageProcessor.from_pretrained(tower) if has_file else LlavaImageProcessor()
    return LlavaImageProcessor(
        do_pad=config.get("image_aspect_ratio") == "pad",
        do_resize=True,
        size={"shortest_edge": vision.image_size},
        do_center_crop=True,
        crop_size={"height": vision.image_size, "width": vision.image_size},
        image_mean=clip.image_mean,
        image_std=clip.image_std,
    )
