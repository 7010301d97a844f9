"""Many questions about one image in one sequence, over features of the frozen tower computed before.

Source:  ours (docs/specs/feasibility.md: without packing the visual tokens are paid for once per question).
Differs: a sample is a pure function of (seed, number), so a run that was killed goes on exactly where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from htc_vlm.data.collate import Sample
from htc_vlm.data.conversations import Turn, encode_questions
from htc_vlm.data.prompt_ids import PromptIds
from htc_vlm.data.prompts import TINY, PromptStyle
from htc_vlm.tiny.features import FeatureCache

N_SPARE = 4  # questions drawn beyond those that surely fit
N_TOKENS = 8  # of a usual question and answer: if more questions fit, more are drawn


@dataclass(frozen=True)
class Source:
    """One data set: cached features, codes, and a way to ask about image number i.

    ask(i, n, seed, progress) -> n (question, answer) pairs, progress of the run from 0 to 1 (for a curriculum); share: of all
    samples; codes (n images, h, w, channels) or None.
    """

    name: str
    cache: FeatureCache
    ask: Callable[[int, int, int, float], Sequence[tuple[str, str]]]
    share: float
    codes: np.ndarray | None = None
    simple_first: Sequence[tuple[float, np.ndarray]] = field(default=())     # until this progress, only these images

    def pick(self, rng: np.random.Generator, progress: float) -> int:
        """The number of an image, drawn from those allowed at this point of the run."""
        for until, allowed in self.simple_first:
            if progress < until:
                return int(allowed[rng.integers(len(allowed))])
        return int(rng.integers(len(self.cache)))


class PackedQuestions(Dataset):
    """Sample k: an image of some source and as many questions as fit in `n_text` tokens, both drawn from (seed, k)."""

    def __init__(
        self, sources: Sequence[Source], n_samples: int, n_text: int, tokenizer: Any, image_text: str, seed: int,
        style: PromptStyle = TINY,
    ) -> None:  # fmt: skip
        if not sources or any(len(source.cache) == 0 for source in sources):
            raise ValueError("empty data set: give at least one source with at least one image")
        self.sources, self.n_samples, self.n_text = list(sources), n_samples, n_text
        self.tokenizer, self.image_text, self.seed, self.style = Remembering(tokenizer), image_text, seed, style
        shares = np.array([source.share for source in sources], dtype=float)
        self._bounds = np.cumsum(shares / shares.sum())

    def __len__(self) -> int:
        return self.n_samples

    def __getitem__(self, number: int) -> Sample:
        rng = np.random.default_rng((self.seed, number))
        source = self.sources[min(int(np.searchsorted(self._bounds, rng.random())), len(self.sources) - 1)]
        progress = number / self.n_samples
        image = source.pick(rng, progress)
        seed = int(rng.integers(2**31))
        for n_most in (self.n_text // N_TOKENS + N_SPARE, self.n_text // 4 + N_SPARE):
            asked = [Turn(question, answer) for question, answer in source.ask(image, n_most, seed, progress)]
            turns = self._fitting(asked)
            if len(turns) < len(asked):
                break
        encoded = encode_questions(f"{source.name}/{image}#{number}", turns, self.tokenizer, self.image_text, self.style)
        images = {"patch_features": source.cache.get([image]).float()}
        if source.codes is not None:
            images["image_codes"] = torch.from_numpy(source.codes[image : image + 1].astype(np.float32))
        return Sample(encoded, images)

    def _fitting(self, turns: list[Turn]) -> list[Turn]:
        """As many turns from the first on as fit into n_text tokens (each: question, answer, end)."""
        n_used, chosen = 0, []
        for turn in turns:
            n_used += self._length(turn)
            if n_used > self.n_text:
                break
            chosen.append(turn)
        if not chosen:
            raise ValueError(f"n_text is {self.n_text}, too few tokens for {turns[0].question!r}")
        return chosen

    def _length(self, turn: Turn) -> int:
        prompt = self.tokenizer.encode(self.style.prompt(turn.question), add_special_tokens=False)
        return len(prompt) + len(PromptIds(self.tokenizer, self.style).answer(turn.answer))


class Remembering:
    """A tokenizer that remembers what it has encoded: the same pieces come again and again."""

    def __init__(self, tokenizer: Any) -> None:
        self.bos_token, self.eos_token = tokenizer.bos_token, tokenizer.eos_token
        self.encode = lru_cache(maxsize=65536)(tokenizer.encode)


def codes_of(
    cache: FeatureCache, encode: Callable[[torch.Tensor], torch.Tensor], file: Path, batch_size: int = 64
) -> np.ndarray:
    """(n images, h, w, channels) float16: `encode` of the cache's small pictures; computed once and kept in `file`.

    `encode` takes (B, 3, S, S) in [0, 1] with S the tower's image size: the small pictures are enlarged as the processor
    enlarges a picture of that size, so that training sees the codes that inference computes.
    """
    if file.exists():
        codes: np.ndarray = np.load(file, mmap_mode="r")
        if len(codes) != len(cache):
            raise ValueError(f"{file} holds codes of {len(codes)} images, the cache has {len(cache)}; remove the file")
        return codes
    size = (cache.meta.image_size,) * 2
    parts = []
    for begin in range(0, len(cache), batch_size):
        small = cache.pictures(range(begin, min(begin + batch_size, len(cache)))).permute(0, 2, 3, 1).numpy()
        large = [np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BILINEAR)) for one in small]
        parts.append(encode(torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2).float() / 255).half().numpy())
    codes = np.concatenate(parts)
    partial = file.with_suffix(".partial.npy")
    np.save(partial, codes)
    partial.replace(file)
    return codes
