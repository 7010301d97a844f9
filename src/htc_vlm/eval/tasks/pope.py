"""POPE on COCO: "Is there a ... in the image?" with random, popular and adversarial absent objects.

Source:  Li et al. 2023; output/coco/coco_pope_*.json of AoiDragon/POPE; prompt and scorer as in LLaVA-1.5
         (llava_pope_test.jsonl, eval_pope.py, itself the official evaluate.py).
Differs: answers are joined to labels by question id, not by line order (POPE#17). LLaVA's own question file leaves
         out 90 of the 3000 random questions; here every question of the file counts.

`headline`: the mean F1 over the three settings is what LLaVA reports (85.9, the uncompressed row of the paper's
Table 2) and the default; "accuracy" is the mean accuracy. Both are always shown, for each setting too.

Files:   pope/coco/coco_pope_{random,popular,adversarial}.json (JSON lines), pope/val2014/*.jpg; or, below pope/, the parquet
         files of lmms-lab/POPE: data/test-*.parquet, or Full/{random,popular,adversarial}-*.parquet
Prompt:  <question>\\nAnswer the question using a single word or phrase.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from htc_vlm.eval.blind import Facts
from htc_vlm.eval.hub_files import hub_files, hub_rows, reads_hub
from htc_vlm.eval.score import pope_metrics, pope_reads
from htc_vlm.eval.task import SHORT, TASKS, Item, Mark, check_choice, percent, picture_at, read_json_lines

SETTINGS = ("random", "popular", "adversarial")


@TASKS.register("pope")
@dataclass(frozen=True)
class Pope:
    name: ClassVar[str] = "pope"
    splits: ClassVar[tuple[str, ...]] = ("all", *SETTINGS)
    max_new_tokens: ClassVar[int] = 128
    layout: ClassVar[str] = (
        "pope/coco/coco_pope_{random,popular,adversarial}.json and pope/val2014/*.jpg, or, below pope/, lmms-lab/POPE's "
        "data/test-*.parquet or Full/{random,popular,adversarial}-*.parquet"
    )
    headline: str = "f1"

    def __post_init__(self) -> None:
        check_choice("pope.headline", self.headline, ("f1", "accuracy"))

    def load(self, root: Path, split: str) -> list[Item]:
        wanted = SETTINGS if split == "all" else (split,)
        files = hub_files(root / "pope", "test") or [f for setting in wanted for f in hub_files(root / "pope", setting)]
        if reads_hub(root / "pope" / "coco" / f"coco_pope_{wanted[0]}.json", files):
            return self._from_hub(files, wanted)
        entries = {setting: read_json_lines(root / "pope" / "coco" / f"coco_pope_{setting}.json") for setting in wanted}
        for setting in [setting for setting in wanted if not entries[setting]]:
            raise ValueError(f"{root / 'pope' / 'coco' / f'coco_pope_{setting}.json'}: holds no questions; download it again")
        return [
            Item(f"{setting}/{entry['question_id']}", entry["image"],
                 picture_at(root / "pope" / "val2014" / entry["image"]), entry["text"] + SHORT,
                 (setting, entry["label"]))
            for setting in wanted
            for entry in entries[setting]
        ]  # fmt: skip

    @staticmethod
    def _from_hub(files: Sequence[Path], wanted: Sequence[str]) -> list[Item]:
        rows = list(hub_rows(files, ["question_id", "question", "answer", "image_source", "category"]))
        missing = [setting for setting in wanted if not any(row["category"] == setting for row, _ in rows)]
        if missing:
            raise FileNotFoundError(f"official file missing: {files[0].parent} holds no questions of {', '.join(missing)}")
        return [
            Item(f"{setting}/{row['question_id']}", f"{row['image_source'].removesuffix('.jpg')}.jpg", picture,
                 row["question"] + SHORT, (setting, row["answer"]))
            for setting in wanted for row, picture in rows if row["category"] == setting
        ]  # fmt: skip

    def facts(self, item: Item) -> Facts:
        return Facts(item.prompt, item.reference[1])

    def marks(self, items: Sequence[Item], answers: Mapping[str, str]) -> list[Mark]:
        return [Mark(item.id, item.image, pope_reads(answers[item.id]) == item.reference[1]) for item in items]

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
        by_setting = {
            setting: percent(pope_metrics(
                (answers[item.id], item.reference[1]) for item in items if item.reference[0] == setting
            ))
            for setting in dict.fromkeys(item.reference[0] for item in items)
        }  # fmt: skip
        names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
        means = {name: sum(shares[name] for shares in by_setting.values()) / len(by_setting) for name in names}
        single = {f"{setting} {name}": shares[name] for setting, shares in by_setting.items() for name in names}
        return {"score": means[self.headline]} | means | single
