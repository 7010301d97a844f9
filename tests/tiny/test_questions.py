"""The one way in which words are written."""

from __future__ import annotations

import pytest

from htc_vlm.tiny.questions import words


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("What is at the top left?", "what is at the top left ?"),
        ("  is there\ta  cat ?\n", "is there a cat ?"),
        ("top-left", "top-left"),
        ("Yes.", "yes ."),
        ("a, b", "a , b"),
        ("", ""),
    ],
)
def test_words_are_lower_case_with_punctuation_apart(text: str, written: str) -> None:
    """Prevents "left?" and "left ?" from being two words of the vocabulary."""
    assert words(text) == written


def test_writing_words_twice_changes_nothing() -> None:
    """Prevents a question that was normalised before from becoming a different text."""
    once = words("What colour is behind the T-shirt?")
    assert words(once) == once
