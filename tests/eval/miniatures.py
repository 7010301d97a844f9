"""A miniature of each benchmark's real directory, made here in its exact official layout, with scripted answers.

Each function writes the files under `root` and returns {prompt: what the model answers}. The scores that follow are
worked out by hand in the comments and in test_official_tasks.py.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def _picture(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if shade % 2 else "RGB", (4, 4), shade).save(path)  # grey ones too: readers must give RGB


def _json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def gqa(root: Path) -> dict[str, str]:
    """8 open questions, 6 right; 4 binary ones, 2 right: 75, 50, overall 8 of 12."""
    asked = [
        ("query", "left", "left"), ("query", "left", "Left."), ("query", "left", "the left"), ("query", "dog", "dog"),
        ("query", "dog", "cat"), ("query", "red", "Red"), ("query", "man", "man"), ("query", "table", "table"),
        ("verify", "yes", "yes"), ("verify", "no", "no"), ("logical", "yes", "no"), ("choose", "red", "blue"),
    ]  # fmt: skip
    questions, said = {}, {}
    for number, (structural, answer, predicted) in enumerate(asked):
        text = f"What is {number}?"
        questions[f"2{number:07d}"] = {
            "imageId": f"n{number // 3}", "question": text, "answer": answer, "fullAnswer": f"It is {answer}.",
            "isBalanced": True, "types": {"structural": structural, "semantic": "rel", "detailed": "relO"},
            "groups": {"global": None, "local": "1"}, "entailed": [], "equivalent": [],
        }  # fmt: skip
        said[text + SHORT] = predicted
    _json(root / "gqa" / "testdev_balanced_questions.json", questions)
    for image in range(4):
        _picture(root / "gqa" / "images" / f"n{image}.jpg", image)
    return said


def _ten(counts: dict[str, int]) -> list[dict[str, Any]]:
    words = [word for word, n in counts.items() for _ in range(n)]
    return [{"answer": word, "answer_confidence": "yes", "answer_id": i} for i, word in enumerate(words, start=1)]


def vqav2(root: Path) -> dict[str, str]:
    """yes/no 2.9 of 4, number 1.9 of 4, other 2.9 of 4: 7.7 of 12. Single accuracies in the margin."""
    asked = [
        ("yes/no", {"yes": 10}, "Yes"),  # 0: all agree, so nothing is normalised
        ("yes/no", {"yes": 10}, "yes"),  # 1
        ("yes/no", {"yes": 7, "no": 3}, "Yes."),  # 1
        ("yes/no", {"yes": 7, "no": 3}, "no"),  # the three see two others: (3 * 2/3 + 7) / 10 = 0.9
        ("number", {"2": 9, "two": 1}, "two"),  # 1
        ("number", {"3": 1, "4": 9}, "3"),  # nine see one: 9 * 1/3 / 10 = 0.3
        ("number", {"3": 5, "4": 5}, "7"),  # 0
        ("number", {"2": 2, "6": 8}, "2"),  # (2 * 1/3 + 8 * 2/3) / 10 = 0.6
        ("other", {"dog": 9, "cat": 1}, "a dog"),  # 1
        ("other", {"don't know": 5, "blue": 5}, "dont know"),  # 1
        ("other", {"black white": 3, "grey": 7}, "black/white"),  # 0.9
        ("other", {"red": 5, "blue": 5}, "green"),  # 0
    ]
    questions, annotations, said = [], [], {}
    for number, (kind, counts, predicted) in enumerate(asked):
        question_id, image_id, text = 42000 + number, 42 + number // 4, f"What is in {number}?"
        questions.append({"image_id": image_id, "question": text, "question_id": question_id})
        annotations.append({
            "question_type": "what is", "multiple_choice_answer": max(counts, key=counts.__getitem__),
            "answers": _ten(counts), "image_id": image_id, "answer_type": kind, "question_id": question_id,
        })  # fmt: skip
        said[text + SHORT] = predicted
    folder = root / "vqav2"
    _json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"info": {}, "questions": questions})
    _json(folder / "v2_mscoco_val2014_annotations.json", {"info": {}, "annotations": annotations})
    _json(folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"info": {}, "questions": questions[:5]})
    for image in (42, 43, 44):
        _picture(folder / "val2014" / f"COCO_val2014_{image:012d}.jpg", image)
        _picture(folder / "test2015" / f"COCO_test2015_{image:012d}.jpg", image)
    return said


def mmbench(root: Path, with_rotations: bool = True) -> dict[str, str]:
    """Questions 1 to 4 with 4, 3, 2, 2 options, 11 rows; 1 and 3 right in all rotations, 1, 2 and 3 unrotated."""
    options = {1: ["cat", "dog", "cow", "pig"], 2: ["red", "blue", "green"], 3: ["left", "right"], 4: ["day", "night"]}
    truth = {1: "dog", 2: "red", 3: "right", 4: "day"}
    said_text = {  # by question and rotation: which option's letter, in which words
        1: ["B", "A", "D. dog", "The answer is C"], 2: ["A", "B", "B"], 3: ["right", "(A)"], 4: ["B", "A"],
    }  # fmt: skip
    # right letters: 1: B A D C; 2: A C B (rotation 1 is answered wrongly); 3: B A; 4: A B (both wrong)
    picture = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(picture, "PNG")
    encoded = base64.b64encode(picture.getvalue()).decode()
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category",
               "comment", "split"]  # fmt: skip
    rows, said = [], {}
    for number, texts in options.items():
        hint = "Look closely." if number == 2 else ""
        for turn in range(len(texts)):
            turned = texts[turn:] + texts[:turn]
            lettered = [f"{letter}. {text}" for letter, text in zip("ABCD", turned, strict=False)]
            prompt = "\n".join([*([hint] if hint else []), f"Which {number}?", *lettered]) + LETTER
            said[prompt] = said_text[number][turn]
            if turn == 0 or with_rotations:
                rows.append([turn * 1_000_000 + number, f"Which {number}?", hint, *turned, *[""] * (4 - len(texts)),
                             "ABCD"[turned.index(truth[number])], "odd" if number % 2 else "even", encoded, "ours",
                             "perception", "", "dev"])  # fmt: skip
    rows.sort(key=lambda row: row[0])  # the official file lists the unrotated rows first
    (root / "mmbench").mkdir(parents=True)
    with (root / "mmbench" / "mmbench_dev_20230712.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([columns, *rows])
    return said


def mme(root: Path) -> dict[str, str]:
    """existence: two pictures, 3 of 4 right: 75 + 50. count: 1 of 2: 50 + 0. The other eight of perception: 200.

    commonsense 200, numerical 50, translation 0, code 50 (one answer is neither yes nor no). Sum 1775 and 300.
    """
    folder = root / "mme" / "MME_Benchmark_release_version"
    divided = ("posters", "celebrity", "scene", "landmark", "artwork")
    flat = ("existence", "count", "position", "color", "OCR", "commonsense_reasoning", "numerical_calculation",
            "text_translation", "code_reasoning")  # fmt: skip
    wrong = {("existence", 1, 1): "Yes", ("count", 0, 0): "no", ("numerical_calculation", 0, 1): "yes, it is",
             ("text_translation", 0, 0): "no", ("text_translation", 0, 1): "yes",
             ("code_reasoning", 0, 0): "It is"}  # fmt: skip
    said = {}
    for subtask in flat + divided:
        for image in range(2 if subtask == "existence" else 1):
            lines = []
            for number, answer in enumerate(("Yes", "No")):
                question = f"Is {subtask} {image} {number} so?"
                lines.append(f"{question} Please answer yes or no.\t{answer}")
                said[question + SHORT] = wrong.get((subtask, image, number), answer)
            texts = folder / subtask / ("questions_answers_YN" if subtask in divided else "")
            texts.mkdir(parents=True, exist_ok=True)
            (texts / f"{image:04d}.txt").write_text("\n".join(lines) + "\n")
            pictures = folder / subtask / ("images" if subtask in divided else "")
            _picture(pictures / f"{image:04d}.{'png' if subtask == 'code_reasoning' else 'jpg'}", image)
    return said


def pope(root: Path) -> dict[str, str]:
    """random: 1 true yes, 1 false no, 1 true no, 1 false yes. popular: all right. adversarial: always yes."""
    answers = {
        "random": ["Yes", "No, there is not.", "no", "Yes, there is"],
        "popular": ["yes", "Yes.", "No", "There is not"],
        "adversarial": ["yes", "yes", "yes", "maybe"],
    }
    said = {}
    for setting, predictions in answers.items():
        lines = []
        labelled = zip(("yes", "yes", "no", "no"), predictions, strict=True)
        for number, (label, predicted) in enumerate(labelled, start=1):
            text, image = f"Is there a {setting} {number} in the image?", f"COCO_val2014_{number % 2:012d}.jpg"
            lines.append(json.dumps({"question_id": number, "image": image, "text": text, "label": label}))
            said[text + SHORT] = predicted
            _picture(root / "pope" / "val2014" / image, number)
        path = root / "pope" / "coco" / f"coco_pope_{setting}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    return said


def seedbench(root: Path) -> dict[str, str]:
    """Pictures: Scene 5 of 6, Identity 2 of 4 ("B." is not the letter alone); video: Prediction 1 of 2."""
    asked = [*[(1, "image")] * 6, *[(2, "image")] * 4, *[(11, "video")] * 2]
    predicted = ["A", "A", "A", "A", "A", "B", "B", "B", "B.", "C", "C", "D"]
    truth = ["A"] * 6 + ["B"] * 4 + ["C"] * 2
    folder, questions, said = root / "seed_bench", [], {}
    for number, (dimension, data_type) in enumerate(asked):
        choices = {letter: f"thing {letter} {number}" for letter in "abcd"}
        questions.append({
            "answer": truth[number], **{f"choice_{letter}": text for letter, text in choices.items()},
            "data_id": f"{number // 2}_77" if data_type == "image" else f"video_{number}.webm", "data_type": data_type,
            "question": f"Which {number}?", "question_id": str(1000 + number), "question_type_id": dimension,
        })  # fmt: skip
        lines = [f"Which {number}?", *(f"{letter.upper()}. {text}" for letter, text in choices.items())]
        said["\n".join(lines) + LETTER] = predicted[number]
        if data_type == "image":
            (folder / "SEED-Bench-image").mkdir(parents=True, exist_ok=True)
            with (folder / "SEED-Bench-image" / f"{number // 2}_77").open("wb") as file:  # no suffix, as distributed
                Image.new("RGB", (4, 4)).save(file, "JPEG")
        else:
            _picture(folder / "SEED-Bench-video-image" / f"{1000 + number}.png")
    types = {"Scene Understanding": 1, "Instance Identity": 2, "Action Prediction": 11}
    _json(folder / "SEED-Bench.json", {"questions": questions, "question_type": types})
    return said


def scienceqa(root: Path) -> dict[str, str]:
    """12 problems, 10 with a picture: natural 5 of 6, social 2 of 4 ("(B)" and a letter not on offer are wrong)."""
    predicted = ["A", "B. salt", "The answer is C.", "A", "B", "A",  # natural: truth A B C A B C
                 "A", "(B)", "C", "A"]  # social, two choices: truth A B A A  # fmt: skip
    truth, n_choices = [0, 1, 2, 0, 1, 2, 0, 1, 0, 0], [3] * 6 + [2] * 4
    problems: dict[str, Any] = {}
    said = {}
    for number in range(12):
        with_picture = number < 10
        choices = [f"choice {number} {i}" for i in range(n_choices[number] if with_picture else 2)]
        hint = "Select the better answer." if number % 2 else ""
        problems[str(number)] = {
            "question": f"Which {number}?", "choices": choices, "answer": truth[number] if with_picture else 0,
            "hint": hint, "image": "image.png" if with_picture else None, "task": "closed choice", "grade": "grade2",
            "subject": "natural science" if number < 6 else "social science", "topic": "physics", "category": "c",
            "skill": "s", "lecture": "", "solution": "", "split": "test",
        }  # fmt: skip
        if with_picture:
            lines = [*([f"Context: {hint}"] if hint else []), f"Which {number}?",
                     *(f"{letter}. {text}" for letter, text in zip("ABC", choices, strict=False))]  # fmt: skip
            said["\n".join(lines) + LETTER] = predicted[number]
            _picture(root / "scienceqa" / "images" / "test" / str(number) / "image.png", number)
    _json(root / "scienceqa" / "problems.json", problems)
    splits = {"test": list(problems), "train": [], "val": [], "trainval": [], "minival": [], "minitest": ["3", "11"]}
    _json(root / "scienceqa" / "pid_splits.json", splits)
    return said


def textvqa(root: Path, ocr: bool = True) -> dict[str, str]:
    """1 + 0.9 + 0.3 + 0 + 1 + 1 = 4.2 of 6: always normalised, also when all ten agree (unlike VQAv2)."""
    asked = [
        ({"2": 10}, "two"), ({"nokia": 3, "samsung": 7}, "Nokia"), ({"stop": 1, "go": 9}, "Stop."),
        ({"exit": 10}, "enter"), ({"mike's pub": 10}, "Mike's Pub"), ({"1,000": 10}, "1000"),
    ]  # fmt: skip
    entries, read, said = [], [], {}
    for number, (counts, predicted) in enumerate(asked):
        image, text = f"{number // 2:016x}", f"what is written on {number}?"
        answers = [human["answer"] for human in _ten(counts)]
        entries.append({"question": text, "image_id": image, "image_classes": [], "image_width": 4, "image_height": 4,
                        "answers": answers, "question_tokens": text.split(), "question_id": 34602 + number,
                        "set_name": "val"})  # fmt: skip
        said[text + ("\nReference OCR token: NOKIA, 1,000" if ocr else "") + SHORT] = predicted
        if number % 2 == 0:
            read.append({"image_id": image, "ocr_tokens": ["NOKIA", "1,000"], "ocr_info": []})
            _picture(root / "textvqa" / "train_images" / f"{image}.jpg", number)
    _json(root / "textvqa" / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": entries})
    _json(root / "textvqa" / "TextVQA_Rosetta_OCR_v0.2_val.json", {"dataset_type": "val", "data": read})
    return said


def mmvet(root: Path) -> dict[str, str]:
    """Three questions; no score, only the judge's input."""
    entries, said = {}, {}
    for number in range(3):
        entries[f"v1_{number}"] = {"imagename": f"v1_{number}.png", "question": f"Why {number}?", "answer": "because",
                                   "imagesource": "ours", "capability": ["rec", "know"]}  # fmt: skip
        said[f"Why {number}?"] = f"Because of {number}."
        _picture(root / "mm-vet" / "images" / f"v1_{number}.png", number)
    _json(root / "mm-vet" / "mm-vet.json", entries)
    return said
