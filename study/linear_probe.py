"""A linear probe: how well a closed set of labels is read off fixed features by multinomial logistic regression.

Source:  Alain and Bengio 2016 (linear probes); HTC-VLM section 5.3, "a linear classification head".
Differs: the paper names no split, no regularisation and no interval. Here features are standardised on the training
         items, the L2 weight is chosen on a fifth of the training *pictures*, and every accuracy has an interval.

The loss is convex and starts from zero weights, so nothing depends on a random start; the seed draws the held-out pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

L2 = (0.1, 0.01, 0.001)  # strongest first: each start is the solution before it
HELD_OUT = 0.2


@dataclass(frozen=True)
class Linear:
    """Features (N, width) -> scores (N, classes), over features standardised with `mean` and `scale`."""

    mean: Tensor
    scale: Tensor
    weight: Tensor  # (width, classes)
    bias: Tensor  # (classes,)

    def predict(self, features: Tensor) -> Tensor:
        """(N, width) -> (N,) class numbers"""
        return (((features - self.mean) / self.scale) @ self.weight + self.bias).argmax(dim=1)


@dataclass(frozen=True)
class Probed:
    """What a probe gets right of the test items, (n_test,) bool, and the L2 weight that the held-out part chose."""

    correct: Tensor
    l2: float

    @property
    def accuracy(self) -> float:
        return float(self.correct.float().mean())


def fit(features: Tensor, labels: Tensor, n_classes: int, l2: Sequence[float] = L2) -> list[Linear]:
    """(N, width), (N,) -> one solution per L2 weight: mean cross-entropy + l2 / 2 * |weight|^2, minimised by L-BFGS."""
    mean = features.mean(dim=0)
    spread = features.std(dim=0, correction=0)
    scale = torch.where(spread > 1e-6 * spread.max().clamp_min(1e-30), spread, torch.inf)  # constant features say nothing
    x = (features - mean) / scale
    weight = torch.zeros(x.shape[1], n_classes, device=x.device, requires_grad=True)
    bias = torch.zeros(n_classes, device=x.device, requires_grad=True)
    out = []
    for strength in l2:
        _minimise(x, labels, weight, bias, strength)
        out.append(Linear(mean, scale, weight.detach().clone(), bias.detach().clone()))
    return out


def _minimise(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, l2: float, max_iter: int = 60) -> None:
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iter, tolerance_grad=1e-5, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(x @ weight + bias, labels) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)


def held_out(pictures: Sequence[str], seed: int) -> Tensor:
    """(N,) bool: the items of a random fifth of the pictures; a picture's items stay together.

    >>> int(held_out(["a", "a", "b", "c", "d", "e"], seed=0).sum()) in (1, 2)
    True
    """
    names = sorted(set(pictures))
    n_held = max(1, round(HELD_OUT * len(names)))
    if len(names) < 2:
        raise ValueError(f"a probe needs at least two pictures to train on, got {len(names)}")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    chosen = {names[int(i)] for i in order[:n_held]}
    return torch.tensor([picture in chosen for picture in pictures])


def probe(
    train: Tensor, train_labels: Tensor, train_pictures: Sequence[str], test: Tensor, test_labels: Tensor, seed: int = 0
) -> Probed:
    """Train on (N, width) features with labels 0, 1, ..., choose the L2 weight on held-out pictures, refit, test.

    A tie goes to the stronger weight. Raises ValueError on test labels that the training items do not have.
    """
    n_classes = int(train_labels.max()) + 1
    unknown = sorted(set(test_labels.tolist()) - set(train_labels.tolist()))
    if unknown:
        raise ValueError(f"test labels {unknown} do not occur in training; a probe reads a closed set of labels")
    is_held = held_out(train_pictures, seed).to(train.device)
    tried = fit(train[~is_held], train_labels[~is_held], n_classes)
    scores = [float((one.predict(train[is_held]) == train_labels[is_held]).float().mean()) for one in tried]
    best = scores.index(max(scores))
    final = fit(train, train_labels, n_classes, L2[: best + 1])[-1]
    return Probed(correct=(final.predict(test) == test_labels).cpu(), l2=L2[best])
