"""A question about a picture, and how its words are written."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One question with one right answer. id is unique over all data sets, e.g. "pictograms/test/17/3"."""

    id: str
    image: str
    text: str
    answer: str
    kind: str


def words(text: str) -> str:
    """Lower case, punctuation apart, single spaces: the one form that the tiny model's vocabulary is made of.

    >>> words("What color is the shape?")
    'what color is the shape ?'
    """
    return " ".join(re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*|[^\sa-z0-9]", text.lower()))
