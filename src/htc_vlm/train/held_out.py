"""The loss on samples that training never sees.

Source:  ours.
Differs: transformers' Trainer averages the losses of batches; here each supervised token weighs the same, in any batching and
         for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from htc_vlm.data.conversations import IGNORE, Record


def hold_out(records: Sequence[Record], n: int) -> tuple[list[Record], list[Record]]:
    """The last n records are held out, and training leaves out those that share a picture with them. -> (train, held out)"""
    if n < 0 or n >= len(records):
        raise ValueError(f"held_out is {n} of {len(records)} samples; give 0 to {len(records) - 1}")
    train, held = list(records[: len(records) - n]), list(records[len(records) - n :])
    seen = {image for record in held for image in record.images}
    train = [record for record in train if not seen & set(record.images)]
    if not train:
        raise ValueError(f"held_out is {n}: every other sample shares a picture with these; hold out fewer")
    return train, held


@dataclass(frozen=True)
class HeldOut:
    """Samples whose loss is measured every `every` steps and at the last one."""

    data: Dataset
    collator: Callable
    batch_size: int
    every: int

    @torch.no_grad()
    def loss(self, trainer: Any) -> float:
        """Cross-entropy in nats per answer token, over all processes; the model is in training mode again afterwards, and
        random numbers are as they were."""
        data: Any = self.data
        starts = range(0, len(data), self.batch_size)
        world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        model = trainer.model_wrapped
        found = torch.zeros(2, dtype=torch.float64, device="cpu")
        model.eval()
        with torch.random.fork_rng():
            for first in range(0, len(starts), world):  # every process runs equally often: sharded weights are gathered
                mine = first + rank
                begin = starts[mine if mine < len(starts) else 0]
                samples = [data[i] for i in range(begin, min(begin + self.batch_size, len(data)))]
                inputs: dict[str, Tensor] = trainer._prepare_inputs(self.collator(samples))
                n_tokens = int((inputs["labels"][:, 1:] != IGNORE).sum())
                with trainer.compute_loss_context_manager():
                    mean = float(model(**inputs, **trainer.more_inputs).loss)
                if mine < len(starts):
                    found += torch.tensor([mean * n_tokens, n_tokens], dtype=torch.float64)
        model.train()
        total, n = trainer.accelerator.reduce(found.float().to(trainer.args.device), reduction="sum").tolist()
        return float(total / n)
