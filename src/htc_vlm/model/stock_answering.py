"""Questions in, answers out, for any vision-language model of transformers: from pictures, or from what is kept of them.

Source:  the chat template of the model's own processor; prefix_cache.py.
Differs: a question-independent method reads each picture once; methods that need the question read it with each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from htc_vlm.applied.apply import apply
from htc_vlm.applied.hf_compat import unwrapped
from htc_vlm.compressors import COMPRESSORS, Compressor, build
from htc_vlm.model import prefix_cache
from htc_vlm.model.answering import AskLike
from htc_vlm.model.compressed import CompressedImages
from htc_vlm.model.generation import GeneratesOverKv
from htc_vlm.model.generation_options import greedy

Kept = CompressedImages | list[CompressedImages] | list[Image.Image]


def is_stock(model: Any) -> bool:
    """Is it a model of transformers' own, which `answering.Answerer` does not know?"""
    return not isinstance(unwrapped(model), GeneratesOverKv)


class StockAnswerer:
    """Greedy answers. method: {"name": ..., its settings or "budget"}; None for the model as it is.

    one_file: keep all pictures of a batch in one CompressedImages (for a file), which takes pictures of one size.
    """

    def __init__(
        self, model: Any, processor: Any, method: Mapping[str, Any] | None = None, one_file: bool = False
    ) -> None:
        self.model, self.processor, self.one_file = unwrapped(model), processor, one_file
        self.method = {"name": "none"} if method is None else dict(method)
        self.keeps = one_file or method_is_independent(self.method)
        self._last: tuple[str, Kept] | None = None

    def encode(self, pictures: Sequence[Image.Image]) -> Kept:
        """What is kept of each picture; the pictures themselves for a method that needs the question."""
        if not self.keeps:
            return list(pictures)
        settings = {key: value for key, value in self.method.items() if key != "name"}

        def kept(part: Sequence[Image.Image]) -> CompressedImages:
            return prefix_cache.compress(self.model, self.processor, part, self.method["name"], **settings)

        return kept(pictures) if self.one_file else [kept([picture]) for picture in pictures]

    def ask(self, encoded: Kept, which: Sequence[int], questions: Sequence[str], max_new_tokens: int) -> list[str]:
        """questions[i] about image which[i] of `encoded` -> answers. ValueError for a question that contains a placeholder,
        which would be taken for a whole prompt."""
        mark = self.processor.image_token
        for question in questions:
            if mark in question:
                raise ValueError(
                    f"the question {question!r} contains {mark}, which stands for a picture inside the model; leave it out: "
                    "the picture is put where it belongs"
                )
        if isinstance(encoded, CompressedImages):
            return self._over(encoded, list(which), list(questions), max_new_tokens)
        answers: dict[int, str] = {}
        for image in dict.fromkeys(which):
            rows = [i for i, one in enumerate(which) if one == image]
            asked, kept = [questions[i] for i in rows], encoded[image]
            if isinstance(kept, CompressedImages):
                found = self._over(kept, [0] * len(rows), asked, max_new_tokens)
            else:
                found = [self._anew(kept, question, max_new_tokens) for question in asked]
            answers.update(zip(rows, found, strict=True))
        return [answers[i] for i in range(len(which))]

    def answer(
        self, image_key: str, load_image: Callable[[], Image.Image], questions: list[str], max_new_tokens: int
    ) -> list[str]:
        """One answer per question about one picture; the picture of the last key is kept."""
        if self._last is None or self._last[0] != image_key:
            self._last = (image_key, self.encode([load_image()]))
        return self.ask(self._last[1], [0] * len(questions), questions, max_new_tokens)

    def answer_batch(self, asks: Sequence[AskLike], max_new_tokens: int) -> list[list[str]]:
        """Several pictures, each with its questions."""
        return [self.answer(ask.image_key, ask.load_image, ask.questions, max_new_tokens) for ask in asks]

    def unknown_words(self, question: str) -> list[str]:
        """None: tokenizers of stock models know parts of words."""
        return []

    def _over(self, kept: CompressedImages, which: list[int], questions: list[str], max_new_tokens: int) -> list[str]:
        with greedy(self.model):
            found: list[str] = prefix_cache.generate(
                self.model, self.processor, compressed=kept, text=questions, which=which, max_new_tokens=max_new_tokens
            )
        return found

    @torch.no_grad()
    def _anew(self, picture: Image.Image, question: str, max_new_tokens: int) -> str:
        """The picture is read with the question."""
        asked = prefix_cache.split(self.processor, question)
        inputs = prefix_cache.read(self.model, self.processor, asked, picture, whole=True)
        with apply(self.model, **self.method), greedy(self.model):
            out = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        return str(self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)[0]).strip()


def method_is_independent(method: Mapping[str, Any]) -> bool:
    """May what the method keeps of a picture be shared by all questions?"""
    cls: Any = COMPRESSORS.get(method["name"])
    own = {key: value for key, value in method.items() if key in prefix_cache.fields_of(cls)}
    made: Compressor = build(method["name"], **own)
    return made.question_independent
