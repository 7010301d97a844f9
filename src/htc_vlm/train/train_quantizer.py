"""Train a picture tokenizer, a quantizer by its name: one short loop that survives being killed.

Source: MGVQ (arXiv 2507.07997): reconstruction plus 0.25 * commitment, straight-through; its training code is not
released. Differs: mean squared error only (no perceptual or adversarial loss), codebook by moving averages with dead
codes revived (see quantizers/mgvq.py).

Everything random in a step comes from (seed, step): which pictures, where they are cropped, which latents revive dead
codes. So a resumed run needs weights, optimizer and step, no random state, and ends where an uninterrupted one does.
Files in `output`: training.pt (newest checkpoint, replaced atomically), metrics.jsonl, and at the end config.json and
model.safetensors (read by the quantizer's `load`) and report.json.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from htc_vlm.files import write_json
from htc_vlm.quantizers import QUANTIZERS
from htc_vlm.quantizers.mgvq import code_statistics

Pictures = npt.NDArray[np.uint8]  # (N, H, W, 3); a memory map works

CHECKPOINT_FILE = "training.pt"
METRICS_FILE = "metrics.jsonl"
REPORT_FILE = "report.json"


@dataclass(frozen=True)
class TokenizerTraining:
    """Settings of `train_tokenizer`. `crop` is the side in pixels of the training crops, 0 for whole pictures."""

    quantizer: str = "mgvq"
    preset: str = "tiny"
    changes: Mapping[str, Any] = field(default_factory=dict)  # arguments of the quantizer that differ from the preset
    start_from: str = ""  # folder of an earlier tokenizer of the same sizes; empty starts from random weights
    steps: int = 2000
    batch_size: int = 32
    crop: int = 96
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    commitment_weight: float = 0.25
    seed: int = 0
    checkpoint_every: int = 200
    log_every: int = 20
    use_bf16: bool = False  # autocast of the network; the quantizer always runs in float32
    round_weights_to_bf16: bool = False  # of the saved model: float32 files that lose nothing when stored as bf16


@dataclass(frozen=True)
class TokenizerQuality:
    """`psnr_db`: mean over pictures. `usage` and `perplexity` per group, over all of them (see CodeStatistics)."""

    n_pictures: int
    psnr_db: float
    usage: tuple[float, ...]
    perplexity: tuple[float, ...]


@dataclass(frozen=True)
class TokenizerReport:
    """What `train_tokenizer` leaves in report.json; `held_out` is None when no held-out pictures were given."""

    steps: int
    resumed_at: int
    trained: TokenizerQuality
    held_out: TokenizerQuality | None


def train_tokenizer(
    pictures: Pictures, settings: TokenizerTraining, output: str | Path, held_out: Pictures | None = None
) -> TokenizerReport:
    """Train on uint8 pictures (N, H, W, 3), resuming from `output` when a checkpoint of the same run lies there.

    An array, not a stream: a step reads its pictures by number, which is what makes resuming exact. Raises ValueError
    for empty or wrong pictures, a loss that is not finite, or a checkpoint of other settings or pictures.
    """
    _check_pictures(pictures, settings.crop)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        cls = _trainable(settings.quantizer)
        model = cls.preset(settings.preset, **settings.changes).train()
        if settings.start_from:
            model.load_state_dict(cls.load(settings.start_from).state_dict())
        model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
        )
        run = _fingerprint(pictures, settings)
        start = _resume(output, model, optimizer, run)
        _keep_metrics_until(output / METRICS_FILE, start)
        with open(output / METRICS_FILE, "a") as metrics:
            for step in tqdm(range(start, settings.steps), "tokenizer", settings.steps, initial=start, disable=None):
                row = _train_step(model, optimizer, pictures, settings, step)
                if (step + 1) % settings.log_every == 0 or step + 1 == settings.steps:
                    print(json.dumps(row), file=metrics, flush=True)
                if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
                    _save_checkpoint(output, model, optimizer, step + 1, run)
    model.eval().to(memory_format=torch.contiguous_format)
    if settings.round_weights_to_bf16:
        for weight in model.parameters():
            weight.data.copy_(weight.data.bfloat16())
    model.save(output)
    sample = pictures[:: max(1, len(pictures) // 256)][:256]
    unseen = None if held_out is None else tokenizer_quality(model, held_out)
    report = TokenizerReport(settings.steps, start, tokenizer_quality(model, sample), unseen)
    write_json(output / REPORT_FILE, asdict(report))
    return report


def _trainable(name: str) -> Any:
    """The quantizer's class; ValueError names what it lacks to be trained here.

    Needed: preset(name, **changes), load(folder), save(folder), codes_per_group, decode(quantized), encode with `indices`,
    and forward(pixels) with reconstruction, commitment and indices, as `quantizers/mgvq.py` has them.
    """
    cls = QUANTIZERS.get(name)
    lacking = [part for part in ("preset", "load", "save", "codes_per_group", "decode") if not hasattr(cls, part)]
    if lacking:
        raise ValueError(f"quantizer {name} cannot be trained: it has no {lacking[0]}")
    return cls


@dataclass(frozen=True)
class Draw:
    """The randomness of one step: picture numbers, corner of the crop in pixels, seed for dead codes."""

    numbers: tuple[int, ...]
    top: int
    left: int
    torch_seed: int


def draw_at(n_pictures: int, height: int, width: int, settings: TokenizerTraining, step: int) -> Draw:
    """What step `step` draws, from (seed, step) alone.

    >>> settings = TokenizerTraining(batch_size=4)
    >>> draw_at(100, 160, 160, settings, step=7) == draw_at(100, 160, 160, settings, step=7)
    True
    >>> draw_at(100, 160, 160, settings, step=7) == draw_at(100, 160, 160, settings, step=8)
    False
    """
    random = np.random.default_rng((settings.seed, step))
    numbers = random.integers(0, n_pictures, settings.batch_size)
    top, left = (int(random.integers(0, side - (settings.crop or side) + 1)) for side in (height, width))
    return Draw(tuple(numbers.tolist()), top, left, int(random.integers(0, 2**62)))


def learning_rate_at(settings: TokenizerTraining, step: int) -> float:
    """Linear warm-up, then a cosine to a hundredth.

    >>> short = TokenizerTraining(learning_rate=1.0, warmup_steps=10, steps=110)
    >>> [round(learning_rate_at(short, step), 3) for step in (0, 9, 10, 60, 109)]
    [0.1, 1.0, 1.0, 0.505, 0.01]
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


@torch.no_grad()
def tokenizer_quality(model: Any, pictures: Pictures, batch_size: int = 32) -> TokenizerQuality:
    """Reconstruct uint8 pictures (N, H, W, 3) through their codes and measure. Leaves `model` in eval mode."""
    _check_pictures(pictures, crop=0)
    model.eval()
    psnr_db, codes = [], []
    for start in range(0, len(pictures), batch_size):
        pixels = to_signed(pictures[start : start + batch_size]).to(next(model.parameters()).device)
        encoding = model.encode(pixels)
        error = (model.decode(encoding.quantized).clamp(-1, 1) - pixels) / 2
        psnr_db.append(-10 * error.square().flatten(1).mean(1).clamp(min=1e-10).log10())
        codes.append(encoding.indices.flatten(0, 2).cpu())
    statistics = code_statistics(torch.cat(codes), model.codes_per_group)
    return TokenizerQuality(
        len(pictures), round(float(torch.cat(psnr_db).mean()), 3), statistics.usage, statistics.perplexity
    )


def stack_pictures(pictures: Iterable[Image.Image], size: int) -> Pictures:
    """RGB pictures -> uint8 (N, size, size, 3), squeezed to a square; whole-number reductions average blocks."""
    rows = []
    for picture in pictures:
        exact = picture.width % size == 0 and picture.height % size == 0
        method = Image.Resampling.BOX if exact else Image.Resampling.BILINEAR
        rows.append(np.asarray(picture.convert("RGB").resize((size, size), method), dtype=np.uint8))
    if not rows:
        raise ValueError("no pictures to train the tokenizer on: the data set or split given is empty")
    return np.stack(rows)


def to_signed(pictures: Pictures) -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1], in channels-last memory."""
    pixels = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
    return pixels.float().div_(127.5).sub_(1.0)


def _train_step(
    model: Any, optimizer: torch.optim.Optimizer, pictures: Pictures, settings: TokenizerTraining, step: int
) -> dict[str, Any]:
    n_pictures, height, width, _ = pictures.shape
    draw = draw_at(n_pictures, height, width, settings, step)
    torch.manual_seed(draw.torch_seed)  # the caller forked the random state
    rows = slice(draw.top, draw.top + (settings.crop or height))
    columns = slice(draw.left, draw.left + (settings.crop or width))
    pixels = to_signed(np.stack([pictures[number, rows, columns] for number in draw.numbers]))
    learning_rate = learning_rate_at(settings, step)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    with torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=settings.use_bf16):
        result = model(pixels)
    reconstruction = F.mse_loss(result.reconstruction.float(), pixels)
    loss = reconstruction + settings.commitment_weight * result.commitment
    if not torch.isfinite(loss):
        raise ValueError(
            f"loss is {loss.item()} at step {step} (reconstruction {reconstruction.item()}, commitment "
            f"{result.commitment.item()}): lower learning_rate ({settings.learning_rate}) or switch use_bf16 off; the "
            "last checkpoint is untouched"
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    statistics = code_statistics(result.indices, model.codes_per_group)
    return {
        "step": step + 1,
        "loss": loss.item(),
        "reconstruction": reconstruction.item(),
        "commitment": result.commitment.item(),
        "psnr_db": -10 * math.log10(max(reconstruction.item() / 4, 1e-10)),
        "learning_rate": learning_rate,
        "usage": statistics.usage,
        "perplexity": statistics.perplexity,
    }


def _check_pictures(pictures: Pictures, crop: int) -> None:
    shape = tuple(pictures.shape)
    if len(shape) != 4 or shape[-1] != 3 or pictures.dtype != np.uint8:
        raise ValueError(f"pictures are {pictures.dtype} {shape}; the tokenizer takes uint8 (N, H, W, 3)")
    if not shape[0]:
        raise ValueError("no pictures to train the tokenizer on: the array is empty")
    if crop > min(shape[1:3]):
        raise ValueError(f"crop {crop} is larger than the pictures ({shape[1]} x {shape[2]}); 0 takes whole pictures")


def _fingerprint(pictures: Pictures, settings: TokenizerTraining) -> dict[str, Any]:
    """What must be equal for a checkpoint to belong to this run; a few pictures stand for all."""
    some = np.ascontiguousarray(pictures[:: max(1, len(pictures) // 16)])
    return {**asdict(settings), "pictures": [*pictures.shape, zlib.crc32(some.data)]}


def _resume(output: Path, model: Any, optimizer: torch.optim.Optimizer, run: dict[str, Any]) -> int:
    """Load the newest checkpoint, if any; returns the step to go on with."""
    path = output / CHECKPOINT_FILE
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    there = saved["run"]
    differ = [f"{key}: {there.get(key)!r} there, {run[key]!r} here" for key in run if there.get(key) != run[key]]
    if differ:
        raise ValueError(f"{path} is of another run ({'; '.join(differ)}); give another output folder or delete it")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["step"])


def _save_checkpoint(
    output: Path, model: Any, optimizer: torch.optim.Optimizer, step: int, run: dict[str, Any]
) -> None:
    """Write beside, flush to disk, rename: a kill at any moment leaves a whole file, the old one or the new one."""
    path = output / CHECKPOINT_FILE
    beside = path.with_suffix(".partial")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "run": run}
    with open(beside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _keep_metrics_until(path: Path, step: int) -> None:
    """Drop the lines after the checkpoint (the resumed run writes them again) and a half-written last line."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    beside = path.with_suffix(".partial")
    beside.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= step))
    os.replace(beside, path)
