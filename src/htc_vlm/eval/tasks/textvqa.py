"""TextVQA val: 5000 questions about text in pictures, ten human answers each.

Source:  Singh et al. 2019; TextVQA_0.5.1_val.json and TextVQA_Rosetta_OCR_v0.2_val.json from textvqa.org; prompt and
         scoring as in LLaVA-1.5 (llava_textvqa_val_v051_ocr.jsonl, eval_textvqa.py).
Differs: answers are joined by question id; LLaVA joins by picture and question text.

`ocr`: true (the default, and what the paper's 58.3 is) shows the OCR tokens in the prompt; false asks the picture
alone, about 46 for LLaVA-1.5-7B. With them, much can be answered without seeing: not a test of compression alone.

Files:   textvqa/TextVQA_0.5.1_val.json, textvqa/TextVQA_Rosetta_OCR_v0.2_val.json (ocr), textvqa/train_images/*.jpg;
         or, below textvqa/, the parquet files of lmms-lab/textvqa: data/validation-*.parquet
Prompt:  <question>[\\nReference OCR token: a, b, c]\\nAnswer the question using a single word or phrase.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from htc_vlm.eval.blind import Facts
from htc_vlm.eval.hub_files import hub_files, hub_rows, reads_hub
from htc_vlm.eval.score import textvqa_accuracy
from htc_vlm.eval.task import SHORT, TASKS, Item, Mark, commonest, percent, picture_at, read_json


def _ocr_line(tokens: Sequence[str]) -> str:
    return f"\nReference OCR token: {', '.join(tokens)}"


@TASKS.register("textvqa")
@dataclass(frozen=True)
class TextVqa:
    name: ClassVar[str] = "textvqa"
    splits: ClassVar[tuple[str, ...]] = ("val",)
    max_new_tokens: ClassVar[int] = 128
    layout: ClassVar[str] = (
        "textvqa/TextVQA_0.5.1_val.json, textvqa/TextVQA_Rosetta_OCR_v0.2_val.json and textvqa/train_images/*.jpg, or, below "
        "textvqa/, lmms-lab/textvqa's data/validation-*.parquet"
    )
    ocr: bool = True

    def load(self, root: Path, split: str) -> list[Item]:
        folder = root / "textvqa"
        files = hub_files(folder, "validation")
        if reads_hub(folder / "TextVQA_0.5.1_val.json", files):
            return self._from_hub(files)
        entries = read_json(folder / "TextVQA_0.5.1_val.json")["data"]
        read = self._ocr_lines(folder, {entry["image_id"] for entry in entries}) if self.ocr else {}
        return [
            Item(str(entry["question_id"]), entry["image_id"],
                 picture_at(folder / "train_images" / f"{entry['image_id']}.jpg"),
                 entry["question"] + read.get(entry["image_id"], "") + SHORT, entry["answers"])
            for entry in entries
        ]  # fmt: skip

    def _from_hub(self, files: Sequence[Path]) -> list[Item]:
        columns = ["question_id", "image_id", "question", "answers", *(["ocr_tokens"] if self.ocr else [])]
        return [
            Item(str(row["question_id"]), row["image_id"], picture,
                 row["question"] + (_ocr_line(row["ocr_tokens"]) if self.ocr else "") + SHORT, row["answers"])
            for row, picture in hub_rows(files, columns)
        ]  # fmt: skip

    @staticmethod
    def _ocr_lines(folder: Path, images: set[str]) -> dict[str, str]:
        tokens = {
            entry["image_id"]: entry["ocr_tokens"]
            for entry in read_json(folder / "TextVQA_Rosetta_OCR_v0.2_val.json")["data"]
        }
        missing = sorted(images - set(tokens))
        if missing:
            raise ValueError(f"TextVQA: {len(missing)} pictures have no OCR entry: {', '.join(missing[:10])}")
        return {image: _ocr_line(found) for image, found in tokens.items()}

    def facts(self, item: Item) -> Facts:
        return Facts(item.prompt.split("\n")[0], commonest(item.reference))

    def marks(self, items: Sequence[Item], answers: Mapping[str, str]) -> list[Mark]:
        return [Mark(item.id, item.image, textvqa_accuracy(answers[item.id], item.reference)) for item in items]

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
        accuracies = [mark.score for mark in self.marks(items, answers)]
        return percent({"score": sum(accuracies) / len(accuracies)})
