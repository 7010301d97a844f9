"""LLaVA's conversation JSON as training data: every picture checked before training, processed when it is asked for.

Source:  llava/train/train.py::LazySupervisedDataset (haotian-liu/LLaVA).
Differs: a broken picture is an error before the first step, never another sample in its place.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from htc_vlm.data.collate import Sample
from htc_vlm.data.conversations import Record, encode, load_conversations
from htc_vlm.data.images import ImageError, load_for_model
from htc_vlm.data.prompts import VICUNA_V1, find_style
from htc_vlm.files import write_json
from htc_vlm.train import presets
from htc_vlm.train.held_out import hold_out


class ConversationData(Dataset):
    """LLaVA's conversation JSON with its images, processed when asked for: the way to train at real size.

    The style is the preset's `prompt`; without one the processor's own, or LLaVA-1.5's where it has none. The processor is set
    to it, so that the model is saved with it and asked in it.
    Shuffled once, by `seed`. Every picture is decoded before training starts, and all broken ones are named in one
    ValueError; `checked` remembers that, so that a resumed run starts at once.
    """

    def __init__(self, preset: dict[str, Any], processor: Any, seed: int = 0, checked: Path | None = None) -> None:
        self.processor = processor
        name = preset.get("prompt")
        self.style = (processor.style or VICUNA_V1) if name is None else find_style(name)
        processor.set_style(self.style)
        records: list[Record] = []
        for options in preset["data"]:
            part = presets.DataPart(**options)
            if part.json is None:
                raise ValueError("conversations and packed tasks cannot be mixed in one preset")
            without = {"share": part.share == 1.0, "images": not part.images, "curriculum": not part.curriculum}
            for name in [name for name, is_default in without.items() if not is_default]:
                raise ValueError(
                    f"data: {part.task}: `{name}` chooses nothing here, all conversations are trained on; leave it out, and "
                    f"the samples that you do not want out of {part.json}"
                )
            records += load_conversations(part.json, part.image_folder)
        _refuse_placeholders(records, processor)
        _refuse_broken(records, checked)
        self.records = [records[i] for i in np.random.default_rng(seed).permutation(len(records))]

    def split(self, n_held_out: int) -> tuple[ConversationData, ConversationData | None]:
        """(what is trained on, the samples held out); no picture is in both."""
        if not n_held_out:
            return self, None
        parts = copy.copy(self), copy.copy(self)
        parts[0].records, parts[1].records = hold_out(self.records, n_held_out)
        return parts

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> Sample:
        record = self.records[number]
        pictures = [load_for_model(path) for path in record.images]
        texts, inputs = self.processor.for_training(pictures) if pictures else ([], {})
        return Sample(encode(record, self.processor.tokenizer, texts, self.style), inputs)


def _refuse_placeholders(records: list[Record], processor: Any) -> None:
    """ValueError for samples whose text has the bottleneck token in it, which would be taken for a picture's."""
    mark = processor.bottleneck_token
    wrong = [record.id for record in records if any(mark in turn.question + turn.answer for turn in record.turns)]
    if wrong:
        raise ValueError(f"sample {wrong[0]!r} contains {mark}, which stands for a picture inside the model; remove it")


def _refuse_broken(records: list[Record], checked: Path | None) -> None:
    """ValueError that lists every picture that cannot be used, unless `checked` says that these files were good."""
    files = sorted({image for record in records for image in record.images})
    listing = [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    key = hashlib.sha256("\n".join(listing).encode()).hexdigest()
    if checked is not None and checked.exists() and json.loads(checked.read_text()) == key:
        return
    broken = []
    for file in files:
        try:
            load_for_model(file)
        except ImageError as error:
            broken.append(str(error))
    if broken:
        raise ValueError(f"{len(broken)} of {len(files)} pictures cannot be used; repair or remove them: {'; '.join(broken)}")
    if checked is not None:
        checked.parent.mkdir(parents=True, exist_ok=True)
        write_json(checked, key)
