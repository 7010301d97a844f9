"""Right answers by kind of question on pictures that are not trained on.

Source:  ours.
Differs: the answer is the likeliest word at the question's last node; `htc-vlm eval` generates, with placeholders barred.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch

from study.fast_trainer.data import Pictures
from study.fast_trainer.model import FastModel
from study.fast_trainer.tree import grow

BATCH = 20


@torch.no_grad()
def right_answers(model: FastModel, pictures: Pictures, n_entries: int) -> dict[str, float]:
    """Percent by kind, and of all questions together ("score")."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for begin in range(0, len(pictures.cache), BATCH):
        numbers = np.arange(begin, min(begin + BATCH, len(pictures.cache)))
        questions = [pictures.pool.asked(pictures.pool.rows(int(number))) for number in numbers]
        n_text = max(sum(len(one.tokens) for one in asked) for asked in questions)
        trees = grow(questions, n_text, max(map(len, questions)), end_id=0)
        logits, _ = model(
            pictures.features(numbers), pictures.code(numbers), trees.ids, trees.depth, trees.visible, trees.at, n_entries
        )
        right = (logits.argmax(-1) == trees.target).tolist()
        for row, kinds in zip(right, trees.kinds, strict=True):
            for hit, kind in zip(row, kinds, strict=False):
                hits[kind].append(hit)
    every = [hit for row in hits.values() for hit in row]
    by_kind = {kind: percent(row) for kind, row in sorted(hits.items())}
    return {"score": percent(every), **by_kind}


def percent(hits: list[bool]) -> float:
    """
    >>> percent([True, False, True])
    66.67
    """
    return round(100 * sum(hits) / len(hits), 2)
