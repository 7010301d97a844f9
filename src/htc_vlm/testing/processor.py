"""A tiny processor and tokenizer for the tiny models: words to ids, size numbers to pictures.

Source:  the calls that transformers' processors answer (image_token, chat_template, tokenizer, images and text to inputs).
Differs: a picture is the number of one of the family's sizes (see `families.tiny_inputs`), a word's id the sum of its bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from htc_vlm.testing.families import FAMILIES, IMAGE, PAD

MARK = "<image>"


class TinyTokenizer:
    """Words by spaces; ids 10 to 89, IMAGE for the image token, 1 in front."""

    pad_token_id = PAD

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        words = text.replace(MARK, f" {MARK} ").split()
        ids = [IMAGE if word == MARK else 10 + sum(word.encode()) % 80 for word in words]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}

    def batch_decode(self, ids: Tensor, skip_special_tokens: bool = True) -> list[str]:
        return [" ".join(map(str, row)) for row in ids.tolist()]


class TinyProcessor:
    """Of one family of `families.FAMILIES`."""

    image_token = MARK
    chat_template = "sys user <image> QUESTION answer"
    image_processor = None

    def __init__(self, family: str) -> None:
        self.family, self.tokenizer = family, TinyTokenizer()

    def apply_chat_template(self, messages: Sequence[Any], add_generation_prompt: bool = True, tokenize: bool = False) -> str:
        """A user's turn with an image and a text -> the prompt."""
        texts = [part["text"] for part in messages[0]["content"] if part["type"] == "text"]
        return self.chat_template.replace("QUESTION", " ".join(texts))

    def __call__(self, images: Sequence[int], text: Sequence[str], return_tensors: str = "pt") -> dict[str, Tensor]:
        """One picture (a size's number) and one prompt each, left-padded."""
        known = FAMILIES[self.family]
        sizes = [size % known.sizes if known.sizes > 1 else size for size in images]
        rows = []
        for size, prompt in zip(sizes, text, strict=True):
            ids = self.tokenizer(prompt)["input_ids"]
            place = ids.index(IMAGE)
            rows.append([*ids[:place], *known.prompt(size), *ids[place + 1 :]])
        longest = max(map(len, rows))
        out = {
            "input_ids": torch.tensor([[PAD] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
            **known.pictures([[size] for size in sizes]),
        }
        if self.family.startswith("qwen"):
            out["mm_token_type_ids"] = (out["input_ids"] == IMAGE).int()
        return out
