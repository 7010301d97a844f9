"""In which order a run reads its samples: one endless stream, whose steps are equal for any number of processes.

Source:  ours.
Differs: transformers' Trainer begins a new epoch with a new batch and fills the last one up with samples from the data's
         beginning, differently for each number of processes. Here a step that reaches the data's end goes on with the next
         epoch's first samples, so `images_per_step` samples make a step, always, and two processes train what one does.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class RunOrder(Sampler[int]):
    """Numbers of `n_samples` samples in the order of a run: the data as they lie, then shuffled anew for each epoch.

    >>> list(RunOrder(n_data=3, n_samples=3, seed=0)), len(RunOrder(n_data=3, n_samples=8, seed=0))
    ([0, 1, 2], 8)
    >>> order = list(RunOrder(n_data=3, n_samples=8, seed=0))
    >>> sorted(order[3:6])
    [0, 1, 2]
    """

    def __init__(self, n_data: int, n_samples: int, seed: int) -> None:
        if n_data < 1:
            raise ValueError("the data set is empty; there is nothing to train on")
        self.n_data, self.n_samples, self.seed = n_data, n_samples, seed

    def __len__(self) -> int:
        return self.n_samples

    def __iter__(self) -> Iterator[int]:
        for begin in range(0, self.n_samples, self.n_data):
            epoch = begin // self.n_data
            numbers = np.random.default_rng((self.seed, epoch)).permutation(self.n_data) if epoch else np.arange(self.n_data)
            yield from (int(number) for number in numbers[: self.n_samples - begin])
