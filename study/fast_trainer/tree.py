"""Questions about a picture as a tree: equal beginnings stand once, and every node sees the nodes above it.

"what is at the top left" and "what is at the top right" share five nodes; the answer is read off each question's last node. A
node sees what it would see were its question asked alone, at the same position, so the logits are the same.

Source:  ours.
Differs: nothing known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NOTHING = -100  # a target that is none
END = "end"  # the kind of the token that ends an answer


@dataclass(frozen=True)
class Asked:
    """One question as tokens, with the one token of its answer."""

    tokens: tuple[int, ...]
    answer: int
    kind: str


@dataclass(frozen=True)
class Trees:
    """A batch of trees, one a picture.

    ids, depth (B, T); visible (B, 1, T, T); at, target (B, A): nodes where something is answered, and what; kinds: of each of
    them, by picture.
    """

    ids: Tensor
    depth: Tensor
    visible: Tensor
    at: Tensor
    target: Tensor
    kinds: list[list[str]]

    @property
    def n_answers(self) -> int:
        return sum(map(len, self.kinds))


def grow(questions: Sequence[Sequence[Asked]], n_text: int, n_answers: int, end_id: int, end_every: int = 0) -> Trees:
    """Trees of n_text nodes with n_answers places for answers, filled with each picture's questions in order while they fit.

    end_every: so many places apart, an answer becomes a node, too, and end_id is the answer there; 0: nowhere.

    >>> cat = [Asked((5, 6, 7), 1, "name"), Asked((5, 6, 8), 2, "name"), Asked((5, 9), 3, "size")]
    >>> trees = grow([cat], n_text=6, n_answers=3, end_id=0)
    >>> trees.ids.tolist(), trees.depth.tolist(), trees.at.tolist(), trees.target.tolist()
    ([[5, 6, 7, 8, 9, 0]], [[0, 1, 2, 2, 1, 0]], [[2, 3, 4]], [[1, 2, 3]])
    >>> trees.visible[0, 0, 3].int().tolist()
    [1, 1, 0, 1, 0, 0]
    """
    n_pictures = len(questions)
    ids, depth = np.zeros((n_pictures, n_text), np.int64), np.zeros((n_pictures, n_text), np.int64)
    visible = np.zeros((n_pictures, n_text, n_text), bool)
    visible[:, np.arange(n_text), np.arange(n_text)] = True  # padding must see something
    at = np.zeros((n_pictures, n_answers), np.int64)
    target = np.full((n_pictures, n_answers), NOTHING, np.int64)
    kinds = []
    for number, asked in enumerate(questions):
        tree = _Tree(ids[number], depth[number], visible[number])
        rows: list[tuple[int, int, str]] = []  # node, answer, kind
        for question in asked:
            with_end = bool(end_every) and len(rows) % end_every == 0
            path = (*question.tokens, question.answer) if with_end else question.tokens
            if len(rows) + 1 + with_end > n_answers or not tree.fits(path):
                break
            last = tree.add(question.tokens)
            rows.append((last, question.answer, question.kind))
            if with_end:
                rows.append((tree.add(path), end_id, END))
        for place, (node, answer, _) in enumerate(rows):
            at[number, place], target[number, place] = node, answer
        kinds.append([kind for *_, kind in rows])
    made = (torch.from_numpy(array) for array in (ids, depth, visible[:, None], at, target))
    return Trees(*made, kinds=kinds)


class _Tree:
    """One picture's tree, written into arrays."""

    def __init__(self, ids: np.ndarray, depth: np.ndarray, visible: np.ndarray) -> None:
        self.ids, self.depth, self.visible = ids, depth, visible
        self.child: dict[tuple[int, int], int] = {}  # (node above or -1, token) -> node

    def fits(self, tokens: Sequence[int]) -> bool:
        """Is there room for the nodes that are missing?"""
        node, found = -1, 0
        for token in tokens:
            node = self.child.get((node, token), -2)
            if node == -2:
                break
            found += 1
        return len(self.child) + len(tokens) - found <= len(self.ids)

    def add(self, tokens: Sequence[int]) -> int:
        """The last node of these tokens, made where it is missing."""
        node = -1
        for deep, token in enumerate(tokens):
            above, node = node, self.child.get((node, token), -1)
            if node == -1:
                node = len(self.child)
                self.child[above, token] = node
                self.ids[node], self.depth[node] = token, deep
                if above >= 0:
                    self.visible[node] |= self.visible[above]
        return node
