"""Patches that speak the language model's words, before a small model is trained from scratch.

Source:  ours. LLaVA's tower is CLIP, whose patches already match words; an ImageNet tower's do not, and a language model
         that starts from nothing spends thousands of steps on that alone (LOG.md, "Looking things up by name").
Differs: not in the paper. Only before the first stage: projector and word embedding learn, with no language model in
         between, which words belong to a patch; then `instruct` begins. A pretrained embedding stays as it is: patches learn
         to point where the mean of a name's tokens points, among all names. Patches of pictures without words are told by the
         classifier that the tower was trained with (distillation, Hinton et al., arXiv:1503.02531).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from htc_vlm.tiny.features import FeatureCache, load_picture
from htc_vlm.tiny.tower import EfficientNetLiteModel

NO_WORD = -100
SHARPNESS = 15.0  # a pretrained word's logit for a patch that points exactly there


@dataclass(frozen=True)
class WordSettings:
    """A preset's `words` block: which task's pictures, and for how long.

    patch_rms: root mean square of the projected patches afterwards (the decoder's first layer adds to them); beside pretrained
    words, of their distance from the words' mean. told: pictures without words whose patches the tower's own classifier names
    (0: none), and patches_per_step of them.
    """

    task: str
    steps: int = 600
    images_per_step: int = 48
    learning_rate: float = 3e-3
    weight_decay: float = 0.02
    patch_rms: float = 2.0
    told: int = 0
    patches_per_step: int = 512


@dataclass(frozen=True)
class Told:
    """What a classifier says of patches: patches (N, D) as the projector takes them, shares (N, C) of each class."""

    patches: Tensor
    shares: Tensor


def word_loss(patches: Tensor, embedding: Tensor, words: Tensor) -> Tensor:
    """Patches (N, D), embedding (V, D), words (N, W) ids or NO_WORD -> mean negative log-likelihood of the words, nats.

    A patch has several words, each drawn from one softmax over the vocabulary, as the tied output layer will do.

    >>> patches, embedding = torch.tensor([[1.0, -1.0]]), torch.zeros(4, 2)
    >>> round(word_loss(patches, embedding, torch.tensor([[2, NO_WORD]])).item(), 4)       # 1 of 4, by chance: ln 4
    1.3863
    """
    is_word = words != NO_WORD
    found = _log_share(patches, embedding).gather(-1, words.masked_fill(~is_word, 0))
    return -(found * is_word).sum() / is_word.sum()


@torch.inference_mode()
def told_by_head(
    tower: EfficientNetLiteModel, head: tuple[Tensor, Tensor], pictures: Iterable[Image.Image], batch_size: int = 8
) -> Told:
    """Ask the tower's classifier (weight (C, 1280), bias (C,)) about each patch of the pictures alone. ValueError: no picture.

    A patch's map after the head takes the place of the mean over all patches, on which the classifier was trained.
    """
    weight, bias = (part.to(tower.device) for part in head)
    patches, shares, left = [], [], iter(pictures)
    while some := list(islice(left, batch_size)):  # all of them at once would fill a gigabyte
        pixels = torch.stack([load_picture(one, tower.config.image_size).pixel_values for one in some]).to(tower.device)
        coarse, _ = maps = tower.maps(pixels)
        patches.append(tower.with_positions(tower.patches_of(*maps)).flatten(0, 1).bfloat16().cpu())
        shares.append((coarse.flatten(2).transpose(1, 2) @ weight.T + bias).softmax(-1).flatten(0, 1).half().cpu())
    if not patches:
        raise ValueError("no picture to be told about; words.told needs photos to crop")
    return Told(torch.cat(patches), torch.cat(shares))


def told_loss(patches: Tensor, embedding: Tensor, shares: Tensor) -> Tensor:
    """Patches (N, D), embedding (V, D), shares (N, C) of its first C words -> mean cross-entropy, nats.

    >>> told_loss(torch.tensor([[1.0, -1.0]]), torch.zeros(4, 2), torch.tensor([[0.5, 0.5]])).item()    # ln 4 for each
    1.3862943649291992
    """
    return -(shares * _log_share(patches, embedding)[:, : shares.shape[1]]).sum(-1).mean()


def _log_share(patches: Tensor, embedding: Tensor) -> Tensor:
    """Patches (N, D), embedding (V, D) -> (N, V): where each patch points, as log probabilities of the words."""
    return (F.rms_norm(patches, patches.shape[-1:]) @ embedding.T).log_softmax(-1)


def word_ids(rows: Sequence[Sequence[Sequence[str]]], vocabulary: dict[str, int]) -> Tensor:
    """Words of each patch of each image -> (N images, P, W) ids, NO_WORD where a patch has fewer. ValueError: unknown word."""
    n_most = max(len(words) for row in rows for words in row)
    out = torch.full((len(rows), len(rows[0]), n_most), NO_WORD, dtype=torch.long)
    for i, row in enumerate(rows):
        for p, words in enumerate(row):
            for k, word in enumerate(words):
                if word not in vocabulary:
                    raise ValueError(f"the tokenizer has no word {word!r}; add it to the data set's vocabulary()")
                out[i, p, k] = vocabulary[word]
    return out


def align_words(
    model: Any,
    cache: FeatureCache,
    words_of: Callable[[int], Sequence[Sequence[str]]],
    vocabulary: dict[str, int],
    settings: WordSettings,
    seed: int,
    table: Tensor | None = None,
    told: Told | None = None,
) -> float:
    """Train projector and word embedding of `model` in place; the last step's loss (nats per word).

    words_of(i): the words of each patch of image i of the cache, in raster order. table (V, D): what patches are compared
    with in place of the word embedding, which then stays as it is (`name_table`); its first rows are the classes of `told`.
    """
    projector, embedding = model.model.multi_modal_projector, model.get_input_embeddings().weight
    words = word_ids([words_of(i) for i in range(len(cache))], vocabulary)
    parameters: list[nn.Parameter] = [*projector.parameters(), *([embedding] if table is None else [])]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    device = embedding.device
    rows = embedding if table is None else table.to(device)
    rng = np.random.default_rng((seed, settings.steps))
    loss = torch.zeros(())
    for _ in range(settings.steps):
        chosen = np.sort(rng.integers(0, len(cache), settings.images_per_step))
        features = cache.get(chosen.tolist()).to(device, torch.float32)
        loss = word_loss(projector(features).flatten(0, 1), rows, words[chosen].flatten(0, 1).to(device))
        if told is not None:
            some = rng.integers(0, len(told.patches), settings.patches_per_step)
            patches, shares = (part[some].to(device, torch.float32) for part in (told.patches, told.shares))
            loss = loss + told_loss(projector(patches), rows, shares)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    _scale_to(projector, features, settings.patch_rms)
    if table is not None:  # pretrained words lie around a mean that is as long as they are: so do patches, then
        with torch.no_grad():
            projector.linear_2.bias.add_(embedding.mean(dim=0))
    if not torch.isfinite(loss):
        raise ValueError(f"words: the loss is {loss.item()}; lower words.learning_rate")
    return loss.item()


@torch.no_grad()
def name_table(names: Sequence[str], tokenizer: Any, embedding: Tensor) -> Tensor:
    """Names of one or more tokens -> (names, D), for `word_loss`: each's mean token less the mean of all, in one length."""
    ids = [tokenizer.encode(f" {name}", add_special_tokens=False) for name in names]
    means = torch.stack([embedding[torch.tensor(row)].float().mean(dim=0) for row in ids])
    return F.normalize(means - means.mean(dim=0), dim=-1) * SHARPNESS / means.shape[1] ** 0.5


@torch.no_grad()
def _scale_to(projector: Any, features: Tensor, rms: float) -> None:
    scale = rms / projector(features).pow(2).mean().sqrt()
    projector.linear_2.weight.mul_(scale)
    projector.linear_2.bias.mul_(scale)
