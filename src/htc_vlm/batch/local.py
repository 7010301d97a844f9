"""The embedded engine: PyTorch's DataLoader decodes in worker processes, this process compresses and asks.

Source:  torch.utils.data.DataLoader.
Differs: ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from htc_vlm.batch.steps import Columns, CompressAndAsk, Decode, Settings


class _Decoded(Dataset[Columns]):
    """One item a batch."""

    def __init__(self, batches: Sequence[Columns], settings: Settings) -> None:
        self.batches, self.decode = batches, Decode(settings)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Columns:
        return self.decode(self.batches[index])


def engine(batches: Sequence[Columns], settings: Settings, n_workers: int = 0) -> Iterator[Columns]:
    """Rows of each batch, in order. n_workers: processes that read and decode; 0: this one does."""
    if not batches:
        return
    step = CompressAndAsk(settings)
    # batch_size=None would make tensors of numpy columns: collate_fn keeps them.
    loader = DataLoader(_Decoded(batches, settings), batch_size=None, num_workers=n_workers, collate_fn=_as_it_is)
    try:
        for batch in loader:
            yield step(batch)
    finally:
        step.store.close()


def _as_it_is(batch: Any) -> Any:
    return batch
