"""What ends a row, what of its text is certain, and how its tokens are drawn."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from htc_vlm.serve.rows import ChooseByRow, EndByRow, Piece, Prompt, Row, Sampling, TextSoFar

PROMPT = Prompt((), None, (), 0, 0, 0)


def of_bytes(ids: list[int]) -> str:
    """A tokenizer of bytes, whose characters take several tokens."""
    return bytes(ids).decode("utf-8", errors="replace")


def row(sampling: Sampling, choice: int = 0) -> Row:
    return Row(PROMPT, sampling, choice, of_bytes, lambda piece: None)


def written(text: str, *stop: str) -> tuple[list[str], str, bool]:
    so_far = TextSoFar(of_bytes, stop)
    pieces = []
    for token in text.encode():
        pieces.append(so_far.add(token))
        if so_far.is_stopped:
            break
    return pieces, so_far.finish(), so_far.is_stopped


def test_half_a_character_is_never_sent() -> None:
    """Streams that decode token by token show U+FFFD for every emoji."""
    assert written("aé!") == (["a", "", "é", "!"], "", False)


def test_an_answer_is_stripped_as_answerer_does() -> None:
    assert written("  a b \n") == (["", "", "a", "", " b", "", ""], "", False)


def test_what_may_begin_a_stop_string_waits_until_it_cannot() -> None:
    """Clients must not see a half of it; text that only looked like it is not lost."""
    assert written("ab<x<end>c", "<end>") == (["a", "b", "", "<x", "", "", "", "", ""], "", True)
    assert written("ab<en", "<end>") == (["a", "b", "", "", ""], "<en", False)


def test_the_first_of_several_stop_strings_ends_the_answer() -> None:
    assert "".join(written("one two three", "three", "two")[0]) == "one"


def test_each_row_ends_at_its_own_limit_and_at_its_own_end() -> None:
    """Tokens of three rows, by hand: limits 1 and 3, and an end token (0) at step 2."""
    rows = [row(Sampling(1)), row(Sampling(3)), row(Sampling(9))]
    posted: list[tuple[Row, Piece]] = []
    end = EndByRow(rows, frozenset([0]), posted.extend)
    a, b, c = b"abc"
    done = [end(torch.tensor(step)[:, None], None).tolist() for step in ([a, a, a], [b, b, 0], [c, c, c])]
    assert done == [[True, False, False], [True, False, True], [True, True, True]]
    assert [(rows.index(one), piece.text, piece.finish_reason) for one, piece in posted] == [
        (0, "a", "length"), (1, "a", None), (2, "a", None), (1, "b", None), (2, "", "stop"), (1, "c", "length"),
    ]  # fmt: skip
    assert [one.n_tokens for one in rows] == [1, 3, 2]


def test_a_cancelled_row_is_done_at_the_next_step() -> None:
    rows = [row(Sampling(9)), row(Sampling(9))]
    end = EndByRow(rows, frozenset(), lambda pieces: None)
    end(torch.tensor([[97], [97]]), None)
    rows[0].cancel()
    assert end(torch.tensor([[97], [97]]), None).tolist() == [True, False]


def draws(sampling: Sampling, scores: torch.Tensor, n: int) -> Counter[int]:
    one = row(sampling)
    choose = ChooseByRow([one])
    return Counter(int(choose(torch.zeros(1, 1), scores.log()[None].clone()).argmax()) for _ in range(n))


def test_rows_are_drawn_from_their_own_distribution() -> None:
    """Gumbel noise: shares 0.6, 0.3, 0.1 of 4000 draws, within four standard deviations; at temperature 1/2 squared."""
    shares = torch.tensor([0.6, 0.3, 0.1])
    for temperature, expected in ((1.0, shares), (0.5, shares**2 / (shares**2).sum())):
        counts = draws(Sampling(1, temperature, seed=3), shares, 4000)
        for i, share in enumerate(expected.tolist()):
            assert abs(counts[i] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_top_p_leaves_the_tail_out() -> None:
    """0.6 + 0.3 reach 0.8, so the third is never drawn."""
    counts = draws(Sampling(1, 1.0, top_p=0.8, seed=0), torch.tensor([0.6, 0.3, 0.1]), 500)
    assert set(counts) == {0, 1}


def test_greedy_rows_stay_greedy_beside_sampled_ones() -> None:
    scores = torch.tensor([[0.0, 1.0, 0.5]] * 2)
    chosen = ChooseByRow([row(Sampling(1, 2.0, seed=0)), row(Sampling(1))])(torch.zeros(2, 1), scores.clone())
    assert torch.equal(chosen[1], scores[1])
    assert not torch.equal(chosen[0], scores[0])


@pytest.mark.parametrize("others", [0, 3])
def test_a_seed_gives_the_same_draws_in_any_company(others: int) -> None:
    """One generator for a batch would give an answer that depends on who else asks."""

    def sequence(rows: list[Row], at: int) -> list[int]:
        choose = ChooseByRow(rows)
        return [int(choose(torch.zeros(len(rows), 1), torch.zeros(len(rows), 50))[at].argmax()) for _ in range(5)]

    mates: list[Any] = [row(Sampling(9, 1.0, seed=100 + i)) for i in range(others)]
    assert sequence([*mates, row(Sampling(9, 1.0, seed=7))], others) == sequence([row(Sampling(9, 1.0, seed=7))], 0)
    assert sequence([row(Sampling(9, 1.0, seed=7), choice=1)], 0) != sequence([row(Sampling(9, 1.0, seed=7))], 0)


def test_top_k_keeps_the_k_largest_scores() -> None:
    """temperature 50 with top_k 1 was noise."""
    scores = torch.tensor([0.0, 3.0, 1.0, 2.0])
    assert all(int(row(Sampling(1, temperature=50.0, top_k=1, seed=i)).perturb(scores).argmax()) == 1 for i in range(20))
