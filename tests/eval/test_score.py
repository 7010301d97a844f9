"""The scorers against the recorded official VQA code and against cases worked out by hand from the official rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from htc_vlm.eval.score import (
    circular_accuracy,
    gqa_match,
    gqa_reads,
    mean_by_kind,
    mme_reads,
    mme_scores,
    normalize_evalai_answer,
    normalize_vqa_answer,
    option_letter,
    plain_match,
    pope_metrics,
    pope_reads,
    scienceqa_letter,
    textvqa_accuracy,
    vqa_accuracy,
)

OFFICIAL = json.loads((Path(__file__).parents[1] / "golden" / "official" / "scorers.json").read_text(encoding="utf-8"))
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "vqa_eval.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDEN["normalize"], ids=lambda case: case["text"])
def test_normalisation_is_the_official_one(case: dict[str, str]) -> None:
    """Prevents a normalisation that is nearly VQA's."""
    assert normalize_vqa_answer(case["text"]) == case["normalized"]


@pytest.mark.parametrize("case", GOLDEN["accuracy"], ids=lambda case: f"{case['prediction']}-{case['accuracy']}")
def test_accuracy_is_the_official_one(case: dict) -> None:  # type: ignore[type-arg]
    """Prevents min(n / 3, 1) over all ten instead of the mean over leaving one out."""
    assert vqa_accuracy(case["prediction"], case["answers"]) == pytest.approx(case["accuracy"], abs=1e-12)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("1,000", "1000"),  # a comma inside a number removes every mark instead of blanking it
        ("1,000-2", "10002"),  # ... the hyphen too
        ("a-b", "b"),  # the hyphen becomes a blank, then the article goes
        ("cat-dog -bird", "catdog bird"),  # one " -" anywhere removes all hyphens
        ("none", "0"),
        ("The", ""),
        ("couldntve", "couldntve"),  # two apostrophes missing: not in the official table
        ("couldnt've", "couldn't've"),
        ("hed", "he'd"),
        ("wed", "wed"),
        ("somebody'd", "somebodyd"),  # the official slip
        ("Im", "im"),  # the official key is "Im", the text is lower case by then
        ("red\nblue\tgreen ", "red blue green"),
        ("..." * 11, "."),  # sub's count is re.UNICODE = 32: the 33rd period stays
    ],
)
def test_normalisation_keeps_the_official_quirks(text: str, normalized: str) -> None:
    """Worked out by hand from vqaEval.py. Prevents a tidy rewrite."""
    assert normalize_vqa_answer(text) == normalized


def test_ten_agreeing_answers_are_compared_as_they_stand() -> None:
    """Prevents normalising where the official code does not: a capital costs the point."""
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1
    assert vqa_accuracy("Yes", ["Yes "] * 10) == 1  # outer white space goes in any case


def test_vqa_accuracy_wants_ten_answers() -> None:
    """Prevents a string being read as its letters, and nine answers as ten."""
    for answers in ("yes yes ye", ["yes"] * 9, []):
        with pytest.raises(ValueError, match="ten human answers"):
            vqa_accuracy("yes", answers)


def test_textvqa_normalises_always() -> None:
    """Prevents VQA's quirk from entering TextVQA; 3 of 10 agreeing give (3 * 2/3 + 7 * 1) / 10."""
    assert textvqa_accuracy("Two", ["2"] * 10) == 1
    assert textvqa_accuracy("nokia", ["NOKIA"] * 3 + ["samsung"] * 7) == pytest.approx(0.9)
    assert normalize_evalai_answer("Mike's 1,000 pubs?") == "mike 's 1000 pubs"


def test_pope_counts_the_predictions() -> None:
    """6 pairs: tp 2, fn 1, fp 1, tn 2. Prevents a yes ratio of the labels (lmms-eval) and a dropped odd answer."""
    pairs = [("Yes", "yes"), ("yes, there is", "yes"), ("No.", "yes"),
             ("It is there", "no"), ("There is not", "no"), ("no", "no")]  # fmt: skip
    assert pope_metrics(pairs) == pytest.approx(
        {"accuracy": 4 / 6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 3 / 6}
    )


def test_pope_without_any_yes_has_no_division_by_zero() -> None:
    """Prevents a crash on a model that always says no (the official script divides by zero)."""
    assert pope_metrics([("no", "yes"), ("no", "no")]) == {
        "accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0
    }  # fmt: skip
    with pytest.raises(ValueError, match="'yes' or 'no'"):
        pope_metrics([("no", "No")])
    with pytest.raises(ValueError, match="no .* pairs"):
        pope_metrics([])


def _mme(subtask: str, image: str, *pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"subtask": subtask, "image": image, "prediction": said, "answer": true} for said, true in pairs]


def test_mme_acc_plus_is_over_pictures() -> None:
    """existence: 3 of 4 questions, 1 of 2 pictures: 75 + 50; count: 50 + 0. Prevents acc+ over questions."""
    rows = _mme("existence", "a", ("Yes", "Yes"), ("No", "No")) + _mme("existence", "b", ("yes", "Yes"), ("yes", "No"))
    rows += _mme("count", "a", ("not at all", "No"), ("Sure", "Yes"))
    rows += _mme("code_reasoning", "a", ("Yes.", "Yes"), ("no", "No"))
    scores = mme_scores(rows)
    assert scores["subtasks"]["existence"] == pytest.approx({"acc": 0.75, "acc_plus": 0.5, "score": 125})
    assert scores["subtasks"]["count"]["score"] == pytest.approx(50)
    assert (scores["perception"], scores["cognition"], scores["total"]) == pytest.approx((175, 200, 375))


def test_mme_refuses_half_a_picture_and_unknown_subtasks() -> None:
    """Prevents acc+ over pictures with one question, and a misspelt subtask that adds nothing."""
    with pytest.raises(ValueError, match=r"count .*\{'a': 1\}"):
        mme_scores(_mme("count", "a", ("Yes", "Yes")))
    with pytest.raises(ValueError, match="unknown MME subtask 'counting'"):
        mme_scores(_mme("counting", "a", ("Yes", "Yes"), ("No", "No")))


@pytest.mark.parametrize("item", OFFICIAL["items"], ids=lambda item: repr(item["prediction"]))
def test_each_answer_is_read_as_the_official_script_reads_it(item: dict) -> None:  # type: ignore[type-arg]
    """Prevents rules that are nearly the official ones: 221 predictions, six scripts, as recorded from these scripts."""
    text = item["prediction"]
    assert pope_reads(text) == item["pope"]
    assert mme_reads(text) == item["mme"]
    assert normalize_evalai_answer(text) == item["evalai"]
    assert gqa_reads(text) == item["gqa"]
    assert {n: scienceqa_letter(text, int(n)) for n in "2345"} == item["scienceqa"]
    assert [option_letter(text, options) for options in OFFICIAL["mmbench_options"]] == item["mmbench"]


OPTIONS = ["a red cat", "a dog", "two birds", "grass"]


@pytest.mark.parametrize("letter", list("ABCD"))
@pytest.mark.parametrize(
    "form", ["{}", " {} \n", "{}.", "({})", "{}) it", "{}: it", "Answer: {}", "Option {}", "The answer is: {}", "It is {}",
             "{} is correct", "The correct answer is {}", "<answer> {} </answer>"],
)  # fmt: skip
def test_every_option_letter_is_read_in_the_same_words(form: str, letter: str) -> None:
    """Prevents a rule for the article A that marks a model down whenever the right option is A."""
    assert option_letter(form.format(letter), OPTIONS) == letter
    assert option_letter(form.format(letter), dict(zip("ABCD", OPTIONS, strict=True))) == letter


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("C. two birds", "C"), ("The answer is C.", "C"), ("The answer is (C)", "C"),
        ("two birds", "C"), ("I see Two Birds.", "C"),
        ("A dog", "A"), ("A nice picture", "A"),  # VLMEvalKit reads an article as a letter among the last five words
        ("A nice picture of grass", "D"),  # but not further away
        ("the answer is dog", "D"),  # nor does it ask for a word's end after "answer is"
        ("E", None), ("c", None), ("", None), ("I do not know", None), ("B or C", None), ("a dog on grass", None),
    ],
)  # fmt: skip
def test_an_option_is_read_or_is_none(prediction: str, letter: str | None) -> None:
    """Worked out by hand from matching_util.py. Prevents a guess where two options are named, and a tidy rewrite."""
    assert option_letter(prediction, OPTIONS) == letter


def test_options_may_be_letters_alone() -> None:
    """Prevents the texts "A", "B" from matching any word with an a in it."""
    assert option_letter("B", ["A", "B", "C", "D"]) == "B"
    assert option_letter("a banana", ["A", "B", "C", "D"]) is None
    assert option_letter("E", ["A", "B", "C", "D"]) is None


def test_scienceqa_reads_what_llava_reads() -> None:
    """Prevents a kinder reading than eval_science_qa.py's: its pattern wants a character after the letter, once."""
    said = ["B", " B\n", "B. because", "so The answer is B."]
    assert [scienceqa_letter(text, 2) for text in said] == ["B"] * 4
    said = ["B\nbecause", "The answer is B", "The answer is A. The answer is B.", "(B)", "B because", "b", "C"]
    assert [scienceqa_letter(text, 2) for text in said] == [None] * 7


def test_the_circular_rule_needs_every_rotation() -> None:
    """Question 5: three right of three; 6: one of two. Prevents the mean over rotations (4 of 5)."""
    rows = [(5, True), (1_000_005, True), (2_000_005, True), (6, True), (1_000_006, False)]
    assert circular_accuracy(rows) == 0.5


def test_exact_matches() -> None:
    """Prevents GQA's match from forgiving an article, ours from a capital or a period."""
    assert gqa_match("Left..", "left") and not gqa_match("the left", "left")
    assert plain_match("Red .", "red") and not plain_match("dark red", "red")


def test_kinds_are_averaged_over_their_own_answers() -> None:
    """Prevents the mean of kinds from standing as the overall score."""
    assert mean_by_kind([("a", 1), ("a", 1), ("a", 0), ("b", 0)]) == pytest.approx(
        {"overall": 0.5, "a": 2 / 3, "b": 0}
    )
