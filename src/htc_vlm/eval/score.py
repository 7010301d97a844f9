"""Answers to numbers, one scorer per benchmark. Plain Python; nothing here knows a model, a file or torch.

Source:  VQA: GT-Vision-Lab/VQA vqaEval.py (version 2 of the punctuation list); TextVQA: the EvalAI processor that
         LLaVA's m4c_evaluator.py uses; POPE: AoiDragon/POPE evaluate.py, as in LLaVA's eval_pope.py; MME: the
         official eval_tool/calculation.py; ScienceQA, SEED, GQA: LLaVA's eval_science_qa.py and convert scripts;
         MMBench: open-compass/VLMEvalKit can_infer and its circular rule. tests/golden/official/scorers.json holds
         what these scripts read in 221 predictions; each reader here gives the same.
Differs: nothing is dropped from a denominator: an unreadable answer is wrong. MMBench's last resort (asking a chat
         model which option was meant) is left out, so an answer without a readable option is wrong there too.

Every function returns shares of 1, except MME, whose score is defined on 0 to 200 for each subtask.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

# --------------------------------------------------------------------------------------------- VQAv2 and TextVQA

_NUMBER_WORDS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
                 "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}  # fmt: skip
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The official pattern is (?!<=\d)(\.)(?!\d): its look-behind is misspelt, so only the look-ahead acts. And its
# `re.UNICODE` lands in sub's count argument: at most 32 periods go. Both are kept.
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_REMOVED = int(re.UNICODE)

# The official table restores apostrophes. Each of its keys is one of these words with one apostrophe left out
# (its entries with a capital I can never match, the text being lower case by then), but for one slip: somebody'd.
_CONTRACTED = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
""".split()  # noqa: SIM905
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _strip_punctuation(text: str) -> str:
    """VQAEval.processPunctuation: whether a mark becomes a space or nothing is decided on the untouched text."""
    stripped = text
    for mark in _PUNCTUATION:
        removed = mark + " " in text or " " + mark in text or _COMMA_IN_NUMBER.search(text) is not None
        stripped = stripped.replace(mark, "" if removed else " ")
    return _PERIOD.sub("", stripped, count=_PERIODS_REMOVED)


def _map_words(text: str) -> str:
    """VQAEval.processDigitArticle: lower case, number words, articles, apostrophes."""
    words = [_NUMBER_WORDS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalize_vqa_answer(text: str) -> str:
    """The official VQA normalisation of one answer.

    >>> [normalize_vqa_answer(t) for t in ("The two dogs.", "dont know", "U.S.A.", "7:30", "1,000")]
    ['2 dogs', "don't know", 'usa', '7:30', '1000']
    """
    return _map_words(_strip_punctuation(_one_line(text)))


def _leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the annotators of min(1, agreeing others / 3): the official soft accuracy."""
    n_same = answers.count(prediction)
    shares = [min(1.0, (n_same - (answer == prediction)) / 3) for answer in answers]
    return sum(shares) / len(shares)


def _ten(answers: Sequence[str]) -> list[str]:
    if isinstance(answers, str) or len(answers) != 10:
        raise ValueError(f"VQA accuracy needs the ten human answers as a list, got {answers!r}")
    return [_one_line(answer) for answer in answers]


def vqa_accuracy(prediction: str, ten_answers: Sequence[str]) -> float:
    """The official VQA accuracy of one answer, from 0 to 1.

    The official code normalises only when the ten answers differ; when all agree, the prediction must equal them
    as it stands.

    >>> vqa_accuracy("Red.", ["red"] * 3 + ["blue"] * 7)
    0.9
    >>> vqa_accuracy("two", ["2"] * 10)
    0.0
    """
    answers, prediction = _ten(ten_answers), _one_line(prediction)
    if len(set(answers)) > 1:
        answers = [_map_words(_strip_punctuation(answer)) for answer in answers]
        prediction = _map_words(_strip_punctuation(prediction))
    return _leave_one_out(prediction, answers)


def normalize_evalai_answer(text: str) -> str:
    """EvalAI's normalisation (TextVQA, and LLaVA's VQAv2 upload): commas, question marks go first, 's is split off.

    >>> normalize_evalai_answer("The dog's bowl, two?")
    "dog 's bowl 2"
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalize_vqa_answer(text)


def textvqa_accuracy(prediction: str, ten_answers: Sequence[str]) -> float:
    """TextVQA accuracy of one answer, from 0 to 1: VQA's soft accuracy, everything normalised always.

    >>> textvqa_accuracy("two", ["2"] * 10)
    1.0
    """
    answers = [normalize_evalai_answer(answer) for answer in _ten(ten_answers)]
    return _leave_one_out(normalize_evalai_answer(prediction), answers)


# ------------------------------------------------------------------------------------------------- yes and no


def pope_reads(prediction: str) -> str:
    """POPE's reading of an answer: the first sentence is "no" if a word of it is No, no or not; else it is "yes".

    >>> pope_reads("No, there is none."), pope_reads("nothing"), pope_reads("Yes. Not sure.")
    ('no', 'yes', 'yes')
    """
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope_metrics(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """accuracy, precision, recall, f1 and yes_ratio over (prediction text, "yes" | "no") pairs, as shares of 1.

    "yes" is the positive class; yes_ratio counts predictions. A ratio over nothing is 0.
    """
    counts = {(said, true): 0 for said in ("yes", "no") for true in ("yes", "no")}
    for prediction, label in pairs:
        if label not in ("yes", "no"):
            raise ValueError(f"a POPE label is 'yes' or 'no', got {label!r}")
        counts[pope_reads(prediction), label] += 1
    total = sum(counts.values())
    if total == 0:
        raise ValueError("pope_metrics was given no (prediction, label) pairs")
    true_yes, false_yes, false_no = counts["yes", "yes"], counts["yes", "no"], counts["no", "yes"]
    precision = true_yes / (true_yes + false_yes) if true_yes + false_yes else 0.0
    recall = true_yes / (true_yes + false_no) if true_yes + false_no else 0.0
    return {
        "accuracy": (true_yes + counts["no", "no"]) / total,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": (true_yes + false_yes) / total,
    }


MME_PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork",
                  "OCR")  # fmt: skip
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme_reads(prediction: str) -> str:
    """MME's reading: "yes" or "no" within the first four letters, else "other" (always wrong).

    >>> mme_reads("Yes, it is"), mme_reads("No"), mme_reads("It is not")
    ('yes', 'no', 'other')
    """
    start = prediction.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_scores(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """MME over rows with subtask, image, prediction and answer ("Yes" | "No"); every image has two questions.

    -> perception, cognition, total (sums of subtask scores), and subtasks: name -> {acc, acc_plus, score}, where
    acc counts questions, acc_plus images with both questions right, and score = 100 acc + 100 acc_plus.
    Raises ValueError on an unknown subtask or on an image that has not exactly two rows.
    """
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        subtask, answer = row["subtask"], str(row["answer"]).strip().lower()
        if subtask not in MME_PERCEPTION + MME_COGNITION:
            raise ValueError(f"unknown MME subtask {subtask!r}; known: {', '.join(MME_PERCEPTION + MME_COGNITION)}")
        if answer not in ("yes", "no"):
            raise ValueError(f"MME answers are Yes or No, got {row['answer']!r} for {subtask}/{row['image']}")
        right[subtask][row["image"]].append(mme_reads(row["prediction"]) == answer)
    if not right:
        raise ValueError("mme_scores was given no rows")
    subtasks = {name: _mme_subtask(name, right[name]) for name in MME_PERCEPTION + MME_COGNITION if name in right}
    perception = sum(score["score"] for name, score in subtasks.items() if name in MME_PERCEPTION)
    cognition = sum(score["score"] for name, score in subtasks.items() if name in MME_COGNITION)
    return {"perception": perception, "cognition": cognition, "total": perception + cognition, "subtasks": subtasks}


def _mme_subtask(name: str, images: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    odd = {image: len(answers) for image, answers in images.items() if len(answers) != 2}
    if odd:
        raise ValueError(f"MME asks two questions per image; in {name} this many rows were given: {odd}")
    acc = sum(sum(answers) for answers in images.values()) / (2 * len(images))
    acc_plus = sum(all(answers) for answers in images.values()) / len(images)
    return {"acc": acc, "acc_plus": acc_plus, "score": 100 * acc + 100 * acc_plus}


# --------------------------------------------------------------------------------------------- option letters


def _lettered(options: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """{letter: text}; a list of letters A, B, ... has no texts, any other list gives the texts in order."""
    if isinstance(options, Mapping):
        return dict(options)
    if list(options) == list(ascii_uppercase[: len(options)]):
        return dict.fromkeys(options, "")
    return dict(zip(ascii_uppercase, options, strict=False))


# The order of VLMEvalKit's rules; "answer is" takes the next letter, without asking for a word's end.
_SCIENCEQA_LETTERS = tuple("ABCDE")  # eval_science_qa.py --options
_OPTION_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([A-D])", re.IGNORECASE)
_REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
             "I'm sorry, but without the image provided", "Cannot determine the answer")  # fmt: skip


def option_letter(prediction: str, options: Mapping[str, str] | Sequence[str]) -> str | None:
    """Reads the one option that a free answer names, as VLMEvalKit's can_infer does; None where it reads none.

    In this order: a refusal names nothing; exactly one option letter (upper case) stands alone, among the last five
    words; "answer is X"; exactly one option's text occurs in the answer, which is at most twice as long as all texts
    together. As there, an article counts as a letter ("A dog" names A), and so does the first letter after "answer is".

    >>> [option_letter(text, ["cat", "dog"]) for text in ("Answer: A", "B. dog", "a dog", "A or B", "C", "cat or dog")]
    ['A', 'B', 'B', None, None, None]
    """
    lettered = _lettered(options)
    if any(refusal in prediction for refusal in _REFUSALS):
        return None
    if "Failed to obtain answer via API" not in prediction:
        letter = _standing_letter(prediction, lettered) or _after_answer_is(prediction, lettered)
        if letter is not None:
            return letter
    texts = {letter: str(text).lower() for letter, text in lettered.items()}
    lower = prediction.lower()
    if len(lower) > 2 * sum(map(len, texts.values())):
        return None
    named = [letter for letter, text in texts.items() if text and text in lower]
    return named[0] if len(named) == 1 else None


def _standing_letter(prediction: str, lettered: Mapping[str, str]) -> str | None:
    """The only option letter among the words, if it is one of the last five."""
    words = prediction.translate(_OPTION_MARKS).split()
    standing = [letter for letter in lettered if letter in words]
    return standing[0] if len(standing) == 1 and words.index(standing[0]) > len(words) - 5 else None


def _after_answer_is(prediction: str, lettered: Mapping[str, str]) -> str | None:
    found = _ANSWER_IS.search(prediction)
    letter = found.group(1).upper() if found else None
    return letter if letter in lettered else None


def scienceqa_letter(text: str, n_choices: int) -> str | None:
    """Reads an option's letter as LLaVA's eval_science_qa.py does: "B", "B. because", one "The answer is B." (with a
    character after the letter); anything else, two of these sentences, or a letter not on offer: None.

    >>> scienceqa_letter("The answer is B.", 3), scienceqa_letter("(B)", 3), scienceqa_letter("D", 3)
    ('B', None, None)
    """
    text = text.strip()  # LLaVA strips what the model said before it stores it
    if text in _SCIENCEQA_LETTERS:
        letter = text
    elif len(text) >= 3 and text[0] in _SCIENCEQA_LETTERS and text[1:3] == ". ":
        letter = text[0]
    else:
        found = re.findall(r"The answer is ([A-Z]).", text)
        letter = found[0] if len(found) == 1 else ""
    return letter if letter in _SCIENCEQA_LETTERS[:n_choices] else None


def circular_accuracy(rows: Iterable[tuple[int, bool]]) -> float:
    """MMBench's circular rule over (row index, is right): a question counts when all its rotations are right.

    Rotations of question i have the indices i, i + 1000000, i + 2000000, ...

    >>> circular_accuracy([(1, True), (1000001, True), (2, True), (1000002, False)])
    0.5
    """
    questions: dict[int, list[bool]] = defaultdict(list)
    for index, is_right in rows:
        questions[index % 1_000_000].append(is_right)
    if not questions:
        raise ValueError("circular_accuracy was given no rows")
    return sum(all(rotations) for rotations in questions.values()) / len(questions)


# ------------------------------------------------------------------------------------------------ exact match


def gqa_reads(prediction: str) -> str:
    """An answer as LLaVA converts it for GQA: trailing periods off, lower case.

    >>> gqa_reads(" Left.")
    'left'
    """
    return prediction.strip().rstrip(".").lower()


def gqa_match(prediction: str, answer: str) -> bool:
    """GQA's exact match after LLaVA's conversion.

    >>> gqa_match("Left.", "left"), gqa_match("the left", "left")
    (True, False)
    """
    return gqa_reads(prediction) == answer


def plain_match(prediction: str, answer: str) -> bool:
    """Exact match of our own sets: lower case, outer white space and trailing periods off.

    >>> plain_match(" Cat.", "cat")
    True
    """
    return prediction.strip().rstrip(".").strip().lower() == answer.strip().lower()


def mean_by_kind(rows: Iterable[tuple[str, float]]) -> dict[str, float]:
    """(kind, score of one answer) -> {"overall": mean over answers, kind: its mean, ...}, kinds in sorted order.

    >>> mean_by_kind([("colour", 1), ("colour", 0), ("count", 1)])
    {'overall': 0.6666666666666666, 'colour': 0.5, 'count': 1.0}
    """
    by_kind: dict[str, list[float]] = defaultdict(list)
    for kind, score in rows:
        by_kind[kind].append(float(score))
    if not by_kind:
        raise ValueError("mean_by_kind was given no rows")
    if "overall" in by_kind:
        raise ValueError("a kind of question may not be called 'overall'")
    everything = [score for scores in by_kind.values() for score in scores]
    means = {kind: sum(scores) / len(scores) for kind, scores in sorted(by_kind.items())}
    return {"overall": sum(everything) / len(everything)} | means
