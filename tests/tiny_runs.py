"""A whole tiny model to train and ask: EfficientNet-lite tower with narrow stages, P = 4, a Llama of width 32, word tokens.

Checkpoints and feature caches are made once per test process; do not change what these functions return.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from htc_vlm.model import HtcVlmForConditionalGeneration, HtcVlmProcessor
from htc_vlm.model.add_compressor import with_compressor
from htc_vlm.quantizers.mgvq import MGVQ
from htc_vlm.tiny.tower import EfficientNetLiteConfig, EfficientNetLiteModel
from htc_vlm.train import presets

N_PATCHES, N_LAYERS, N_HEADS, N_KV_HEADS, HEAD_DIM = 4, 2, 4, 2, 8
SIZES = {"widths": [8, 8, 8], "depths": [1, 1, 1], "latent_channels": 8, "codebook_size": 16, "groups": 2}
QUANTIZER = {"image_size": 32, **SIZES}
NONE, VOCO = {"name": "none"}, {"name": "voco"}
HTC = {"name": "htc", "n_anchors": 2, "quantizer": QUANTIZER}
QUESTIONS = ["what is at the top left ?", "is there a mammal ?"]
RUN = "import sys, torch; torch.set_num_threads(1); from htc_vlm.cli.train import run; sys.exit(run(sys.argv[1:]))"


def preset(**stages: dict[str, Any]) -> dict[str, Any]:
    """A preset on 8 pictograms; settings of its stages may be changed by name."""
    block = {"steps": 4, "images_per_step": 2, "learning_rate": "1e-2", "warmup_steps": 1, "save_every": 2, "log_every": 1}
    compressors = {"align": NONE, "instruct": NONE, "compress": HTC}
    return {
        "name": "small",
        "vision": {"image_size": 64, "position_scale": 4.0},
        "text": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS,
            "num_key_value_heads": N_KV_HEADS, "max_position_embeddings": 512,
        },
        "data": [{"task": "pictograms", "images": 8}],
        "n_text": 48,
        "stages": {name: {**block, "compressor": dict(c), **stages.get(name, {})} for name, c in compressors.items()},
    }  # fmt: skip


def write_preset(folder: Path, **stages: dict[str, Any]) -> Path:
    """`preset` as a YAML file."""
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(preset(**stages)))
    return file


@functools.cache
def root() -> Path:
    """A folder that lives as long as the test process."""
    folder = Path(tempfile.mkdtemp(prefix="htc-vlm-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def tower() -> Path:
    """A folder with a random vision tower; also $HTC_VLM_TOWER from here on, for training from scratch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = EfficientNetLiteConfig(
            image_size=64, position_dim=8, stem_width=8, stage_widths=[8] * 5, stage_depths=[1] * 5,
            stage_strides=[1, 2, 2, 2, 2], stage_kernels=[3] * 5, stage_expansions=[1, 2, 2, 2, 2], head_width=16,
        )  # fmt: skip
        EfficientNetLiteModel(config).save_pretrained(root() / "tower")
    os.environ["HTC_VLM_TOWER"] = str(root() / "tower")
    return root() / "tower"


@functools.cache
def quantizer() -> Path:
    """A folder with a random MGVQ of the sizes in QUANTIZER."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MGVQ(**SIZES).save(root() / "mgvq")
    return root() / "mgvq"


def cache() -> Path:
    """Where the tower's features of the 8 pictograms are kept."""
    return root() / "cache"


def checkpoint(compressor: dict[str, Any]) -> Path:
    """A folder with a random model and its processor; `none`, `voco` and `htc` share what they can."""
    return _checkpoint(json.dumps(compressor, sort_keys=True))


@functools.cache
def _checkpoint(text: str) -> Path:
    compressor = json.loads(text)
    folder = root() / f"checkpoint-{compressor['name']}-{abs(hash(text))}"
    with torch.random.fork_rng():
        if compressor == NONE:
            model, processor = presets.build_tiny(preset(), str(tower()), seed=0)
            for weight in model.model.language_model.parameters():  # far from uniform answers
                if weight.ndim == 2:
                    weight.data.mul_(5)
        else:
            torch.manual_seed(0)
            mgvq = quantizer() if compressor["name"] == "htc" else None
            model, processor = with_compressor(checkpoint(NONE), compressor, mgvq)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@functools.cache
def _loaded(folder: Path) -> tuple[HtcVlmForConditionalGeneration, HtcVlmProcessor]:
    from htc_vlm import load

    return load(folder)


def loaded(compressor: dict[str, Any]) -> tuple[HtcVlmForConditionalGeneration, HtcVlmProcessor]:
    """The model of `checkpoint` and its processor."""
    return _loaded(checkpoint(compressor))


def train_arguments(preset_file: Path, stage: str, output: Path, *more: str) -> list[str]:
    """What follows `htc-vlm train`; the compress stage starts from random weights."""
    start = {"compress": ["--start", str(checkpoint(NONE)), "--mgvq", str(quantizer())]}.get(stage, [])
    common = ["--preset", str(preset_file), "--stage", stage, "--output", str(output), "--cache", str(cache())]
    tower()
    return [*common, *start, *more]


def noise(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A random RGB picture."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


GOOD = ("16-bit.png", "animated.gif", "cmyk.jpg", "good.png", "one-pixel.png")
BAD = ("empty.png", "folder.png", "text.png", "thin.png", "truncated.jpg")


def hostile_folder(folder: Path) -> Path:
    """Pictures as they are found in the wild: those of GOOD can be read, those of BAD cannot."""
    folder.mkdir()
    noise(0).save(folder / "good.png")
    noise(1).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.arange(0, 60000, 40, dtype=np.uint16).reshape(30, 50)).save(folder / "16-bit.png")
    noise(2).save(folder / "animated.gif", save_all=True, append_images=[noise(3), noise(4)])
    Image.new("RGB", (1, 1), "red").save(folder / "one-pixel.png")
    noise(5, (200, 200)).save(folder / "truncated.jpg")
    data = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("this is no picture")
    (folder / "empty.png").write_bytes(b"")
    Image.new("RGB", (60_000, 1)).save(folder / "thin.png")
    (folder / "folder.png").mkdir()
    assert {path.name for path in folder.iterdir()} == {*GOOD, *BAD}
    return folder
