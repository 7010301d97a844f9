"""Questions in, answers out: what the evaluation, the command line and the demo share.

Source:  HTC-VLM section 4.2 (text after the bottleneck), asked with the ids the model was trained on
         (`processing.HtcVlmProcessor.question_ids`).
Differs: nothing known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from htc_vlm.applied.hf_compat import unwrapped
from htc_vlm.model.compressed import CompressedImages
from htc_vlm.model.generation_options import greedy
from htc_vlm.model.recipe import Recipe


class AskLike(Protocol):
    """A picture and its questions (see htc_vlm.eval.run.Ask)."""

    @property
    def image_key(self) -> str: ...
    @property
    def load_image(self) -> Callable[[], Image.Image]: ...
    @property
    def questions(self) -> list[str]: ...


def one_by_one_if_refused(
    encode: Callable[[list[Image.Image]], Any], pictures: Sequence[Image.Image], refuse: Callable[[int, str], None]
) -> Iterator[tuple[range, Any]]:
    """(numbers of pictures, what `encode` makes of them): all together, or each alone where they are refused together.

    refuse(number, reason): for a picture that the processor or the method cannot take (too thin, fewer tokens than the budget),
    which holds the others up no longer.
    """
    try:
        encoded = encode(list(pictures))
    except ValueError as error:
        if len(pictures) == 1:
            refuse(0, str(error))
            return
    else:
        yield range(len(pictures)), encoded
        return
    for number, picture in enumerate(pictures):
        try:
            encoded = encode([picture])
        except ValueError as why:
            refuse(number, str(why))
        else:
            yield range(number, number + 1), encoded


class Answerer:
    """Greedy answers of a LLaVA, or of another family with a bottleneck of its own (bottlenecks.py).

    Pictures are encoded once (compressed where the model can) and shared by their questions.
    cache: "dynamic" or "static", for answers from compressed pictures: see `generate`'s cache_implementation.
    keep_pixels: give the model pixels with every question, as applied methods that act in the vision tower need.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        cache: str = "dynamic",
        keep_pixels: bool = False,
    ) -> None:
        self.model, self.processor, self.cache, self.keep_pixels = unwrapped(model), processor, cache, keep_pixels
        self._last: tuple[str, Any] | None = None

    def answer(
        self, image_key: str, load_image: Callable[[], Image.Image], questions: list[str], max_new_tokens: int
    ) -> list[str]:
        """One answer per question about one picture; the picture of the last key is kept."""
        if self._last is None or self._last[0] != image_key:
            self._last = (image_key, self.encode([load_image()]))
        return self.ask(self._last[1], [0] * len(questions), questions, max_new_tokens)

    def answer_batch(self, asks: Sequence[AskLike], max_new_tokens: int) -> list[list[str]]:
        """Several pictures, each with its questions, in one batch."""
        encoded = self.encode_asked(asks)
        which = [i for i, ask in enumerate(asks) for _ in ask.questions]
        texts = iter(self.ask(encoded, which, [q for ask in asks for q in ask.questions], max_new_tokens))
        return [[next(texts) for _ in ask.questions] for ask in asks]

    def encode_asked(self, asks: Sequence[AskLike]) -> CompressedImages | Tensor:
        """The pictures of a batch, encoded in its order; a subclass may have them already."""
        return self.encode([ask.load_image() for ask in asks])

    @torch.no_grad()
    def encode(self, pictures: Sequence[Image.Image], maps: bool = False) -> CompressedImages | Tensor:
        """Pictures -> their cells; for methods without a bottleneck the vision tower's features (N, P, width), or the
        pixels (N, 3, H, W) with `keep_pixels`. maps: compressed pictures keep where the bottleneck looked."""
        given = self.processor(images=list(pictures), return_tensors="pt")
        device, dtype = self.model.device, self.model.dtype
        inputs = {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in given.items()}
        if self.model.model.compressor.n_bottleneck:
            _check_processor(self.model, self.processor)
            return self.model.compress(**inputs, maps=maps, image_processor=self.processor.image_processor)
        pixels = inputs["pixel_values"]
        if self.keep_pixels:
            return pixels
        return self.model.model.vision_features(pixel_values=pixels)

    def recipe(self) -> Recipe:
        """What decides how this model and processor compress a picture."""
        return self.model.recipe(self.processor.image_processor)

    def inputs(self, questions: Sequence[str], is_compressed: bool) -> dict[str, Tensor]:
        """Left-padded input_ids and attention_mask of questions about one image each."""
        rows = [self.processor.question_ids(question, is_compressed) for question in questions]
        longest, pad = max(map(len, rows)), self.processor.tokenizer.pad_token_id or 0
        ids = [[pad] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return {
            "input_ids": torch.tensor(ids, device=self.model.device),
            "attention_mask": torch.tensor(mask, device=self.model.device),
        }

    def ask(
        self, encoded: CompressedImages | Tensor, which: Sequence[int], questions: Sequence[str], max_new_tokens: int
    ) -> list[str]:
        """questions[i] about image which[i] of `encoded` -> answers."""
        ids = self.generate_ids(encoded, which, questions, max_new_tokens)
        return [text.strip() for text in self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @torch.no_grad()
    def generate_ids(
        self, encoded: CompressedImages | Tensor, which: Sequence[int], questions: Sequence[str], max_new_tokens: int
    ) -> Tensor:
        """(number of questions, up to max_new_tokens) new ids."""
        is_compressed = isinstance(encoded, CompressedImages)
        inputs = self.inputs(questions, is_compressed)
        images: dict[str, Any]
        if isinstance(encoded, CompressedImages):
            _check_processor(self.model, self.processor)
            # one picture for all questions is shared; several are gathered
            one = encoded[which[0]] if len(set(which)) == 1 else None
            images = {"compressed": encoded[list(which)] if one is None else one, "cache_implementation": self.cache}
        else:
            images = {"pixel_values" if self.keep_pixels else "patch_features": encoded[list(which)]}
        options: dict[str, Any] = {**inputs, **images}
        with greedy(self.model):
            out = self.model.generate(**options, max_new_tokens=max_new_tokens, do_sample=False)
        return out[:, inputs["input_ids"].shape[1] :]

    def unknown_words(self, question: str) -> list[str]:
        """Words that a word-level tokenizer does not know (always empty for sub-word tokenizers)."""
        tokenizer = self.processor.tokenizer
        if tokenizer.unk_token_id is None:
            return []
        unknown = tokenizer.unk_token_id
        return [word for word in question.split() if unknown in tokenizer.encode(word, add_special_tokens=False)]


def _check_processor(model: Any, processor: Any) -> None:
    """ValueError for another image processor than the model's own: its images would not be this model's. One is adopted
    by a model without."""
    given = processor.image_processor
    if model.image_processor is None:
        model.image_processor = given
    elif model.image_processor is not given:
        other = [name for name in model.recipe().differences(model.recipe(given).parts) if name.startswith("processor")]
        if other:
            raise ValueError(
                f"the image processor is not the one this model was loaded with ({', '.join(other)} differ); "
                "set model.image_processor = processor.image_processor first"
            )
