"""What each of two processes does for test_two_processes.py; what it finds goes to OUTPUT/RANK.json.

    python two_processes.py RANK RENDEZVOUS CHECKPOINT OUTPUT
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from htc_vlm import load
from htc_vlm.model import HtcVlmForConditionalGeneration, HtcVlmProcessor
from htc_vlm.train.saving import save_rounded
from htc_vlm.train.stages import STAGES, freeze

WORLD = 2


def samples(model: HtcVlmForConditionalGeneration, processor: HtcVlmProcessor) -> dict[str, Tensor]:
    """Two samples of one image and one question each, with equally many supervised tokens; the same in every process."""
    generator = torch.Generator().manual_seed(0)
    texts = [f"{processor.image_text()} what is at the top left ?", f"{processor.image_text()} is there a mammal ? yes no"]
    batch = processor.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    labels = batch["input_ids"].clone()
    labels[:, :-3] = -100
    size = model.config.vision_config.image_size
    pixels = torch.rand(WORLD, 3, size, size, generator=generator)
    return {
        "input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels, "pixel_values": pixels,
    }  # fmt: skip


def train_step(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """One step of plain gradient descent (Adam's first step would turn rounding into whole steps) -> the loss."""
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def largest_difference(model: nn.Module, reference: nn.Module) -> float:
    """Over all weights; every process must call it."""
    there = dict(reference.named_parameters())
    return max(float((whole(weight.detach()) - there[name]).abs().max()) for name, weight in model.named_parameters())


def compress_stage(checkpoint: Path) -> tuple[HtcVlmForConditionalGeneration, HtcVlmProcessor]:
    model, processor = load(checkpoint)
    freeze(model, STAGES["compress"].trains)
    return model, processor


def check_step(model: Any, reference: Any, processor: Any, rank: int, output: Path) -> dict[str, Any]:
    """A step of each process on its own sample against one process's step on both; then save."""
    batch = samples(reference, processor)
    before = copy.deepcopy(reference)
    alone = train_step(reference, batch)
    own = train_step(model, {name: value[rank : rank + 1] for name, value in batch.items()})
    losses = torch.tensor([own])
    dist.all_reduce(losses)
    found = {
        "sharded_weights": sum(isinstance(weight, DTensor) for weight in model.parameters()),
        "local_share": sum(w.to_local().numel() if isinstance(w, DTensor) else w.numel() for w in model.parameters())
        / sum(weight.numel() for weight in reference.parameters()),
        "loss": [float(losses) / WORLD, alone],
        "moved": largest_difference(reference, before),
        "difference": largest_difference(model, reference),
    }
    save_rounded(model, processor, output)
    return {**found, "saved": compare_saved(output, reference) if rank == 0 else None}


def compare_saved(output: Path, reference: nn.Module) -> dict[str, Any]:
    """The saved checkpoint, loaded in one process, against the reference rounded as it was saved."""
    again, _ = load(output)
    there = dict(reference.named_parameters())
    worst = 0.0
    for name, weight in again.named_parameters():
        expected = there[name] if ".quantizer." in name else there[name].bfloat16().float()
        step = 0.0 if ".quantizer." in name else 2.0**-7  # one rounding to bfloat16 may fall to the other side
        worst = max(worst, float(((weight - expected).abs() - step * expected.abs()).max()))
    return {"files": sorted(path.name for path in output.iterdir()), "worst_beyond_rounding": worst}


def fsdp(rank: int, checkpoint: Path, output: Path) -> dict[str, Any]:
    """torch's own fully_shard, a layer at a time."""
    reference, processor = compress_stage(checkpoint)
    model = copy.deepcopy(reference)
    for layer in model.model.language_model.layers:
        fully_shard(layer)
    fully_shard(model)
    return check_step(model, reference, processor, rank, output)


def native_fsdp(rank: int, checkpoint: Path, output: Path) -> dict[str, Any]:
    """transformers' own sharding at load time."""
    from transformers.distributed import DistributedConfig

    reference, processor = compress_stage(checkpoint)
    model = HtcVlmForConditionalGeneration.from_pretrained(
        checkpoint, distributed_config=DistributedConfig(fsdp_size=WORLD), dtype=torch.float32
    ).eval()
    freeze(model, STAGES["compress"].trains)
    return check_step(model, reference, processor, rank, output)


@torch.no_grad()
def tensor_parallel(rank: int, checkpoint: Path, output: Path) -> dict[str, Any]:
    """Half of the heads in each process."""
    from transformers.distributed import DistributedConfig

    reference, processor = load(checkpoint)
    model = HtcVlmForConditionalGeneration.from_pretrained(
        checkpoint, distributed_config=DistributedConfig(tp_size=WORLD), dtype=torch.float32
    ).eval()
    batch = samples(reference, processor)
    del batch["labels"]
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found: dict[str, Any] = {
        "sharded_weights": sum(isinstance(weight, DTensor) for weight in model.parameters()),
        "logits": float((whole(model(**batch).logits) - reference(**batch).logits).abs().max()),
    }
    calls = {
        "compress": lambda m: m.compress(pixel_values=batch["pixel_values"]).kv,
        "generate": lambda m: m.generate(**text, pixel_values=batch["pixel_values"], max_new_tokens=4, do_sample=False),
    }
    for name, call in calls.items():
        try:
            found[name] = {"shape": list(call(model).shape), "expected_shape": list(call(reference).shape)}
        except (ValueError, RuntimeError) as error:
            found[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    return found


def main() -> None:
    rank, rendezvous, checkpoint, output = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    found = {work.__name__: work(rank, checkpoint, output / work.__name__) for work in (fsdp, native_fsdp, tensor_parallel)}
    (output / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
