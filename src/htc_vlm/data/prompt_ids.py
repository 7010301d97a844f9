"""Ids of questions and answers: the one function that training, asking and evaluation share.

Source:  LLaVA's `tokenizer_image_token` (llava/mm_utils.py) and `preprocess_v1` (llava/train/train.py).
Differs: the text around an image is tokenised as one text with the image's tokens in it, as Hugging Face's processors do, so
         that every way to ask gives the same ids; LLaVA tokenises the pieces between images alone, which for tokenizers
         with `legacy: false` puts one "▁" more after an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

from htc_vlm.data.prompts import IMAGE, PromptStyle


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    bos_token: str | None
    eos_token: str | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


class PromptIds:
    """One style on one tokenizer. A conversation is a list of pieces, [prompt ids, answer ids] for each turn.

    The first piece begins with what the tokenizer puts before a sequence (BOS, or nothing). What it would put at the end is
    left out: the answer follows.
    """

    def __init__(self, tokenizer: Tokenizer, style: PromptStyle) -> None:
        self.tokenizer, self.style = tokenizer, style

    def question(self, question: str, image_text: str, history: Sequence[tuple[str, str]] = ()) -> list[int]:
        """A question after the turns (question, answer) before it -> the ids that the model continues."""
        prompts = self.prompts([*(asked for asked, _ in history), question], image_text)
        ids: list[int] = []
        for prompt, (_, answer) in zip(prompts, history, strict=False):
            ids += prompt + self.answer(answer)
        return ids + prompts[-1]

    def prompts(self, questions: Sequence[str], image_text: str | Sequence[str]) -> list[list[int]]:
        """The prompt of each turn. `image_text`: what stands for an image, from the processor; one for all, or one for each
        (ValueError where there are not as many)."""
        first, *rest = questions
        n_later = sum(question.count(IMAGE) for question in rest) if self.style.images_first else 0
        texts = [IMAGE * n_later + self.style.prompt(first), *(self.style.user(question) for question in rest)]
        n_images = sum(text.count(IMAGE) for text in texts)
        images = [image_text] * n_images if isinstance(image_text, str) else list(image_text)
        if len(images) != n_images:
            raise ValueError(f"the questions have {n_images} {IMAGE}, and {len(images)} images were given; give one for each")
        begin, *later = (_with_images(text, images) for text in texts)
        return [self.begin(begin), *(self.after_answer(text) for text in later)]

    def begin(self, text: str) -> list[int]:
        """Text at the begin of a sequence. A BOS that the text has already (from a chat template) is not doubled."""
        bos, ids = self.tokenizer.bos_token, self._plain(text)
        return ids if bos and text.startswith(bos) else self.before_all + ids

    @cached_property
    def before_all(self) -> list[int]:
        """What the tokenizer puts before a sequence: [BOS] or []."""
        plain = self._plain("a")
        whole = self.tokenizer.encode("a", add_special_tokens=True)
        n_extra = len(whole) - len(plain)
        starts = [start for start in range(n_extra + 1) if whole[start : start + len(plain)] == plain]
        return whole[: starts[0]] if starts else []

    def after_answer(self, text: str) -> list[int]:
        """Text after the end of an answer. SentencePiece gives a text's first word another id there than at the begin of a
        sequence, unless the tokenizer is a `legacy` one."""
        end = self.style.answer_end(self.tokenizer.eos_token)
        before, both = self._plain(end), self._plain(end + text)
        return both[len(before) :] if both[: len(before)] == before else self._plain(text)

    def answer(self, answer: str) -> list[int]:
        """An answer and its end."""
        return self._plain(self._answer_prefix + answer + self.style.answer_end(self.tokenizer.eos_token))

    @cached_property
    def _answer_prefix(self) -> str:
        """The space before an answer, or "" where the tokenizer puts one before every piece itself (SentencePiece).

        Tried out on the tokenizer: with the wrong choice the model would be trained on another first token than the one
        that whole text gives.
        """
        if self.style.answer_prefix != " ":
            return self.style.answer_prefix
        before = self.style.user_suffix.lstrip()
        whole = self._plain(before + " no")
        for prefix in (" ", ""):
            if self._plain(before) + self._plain(prefix + "no") == whole:
                return prefix
        raise ValueError(
            f"this tokenizer joins {before!r} and the answer's first word into other tokens than it gives each; "
            "use a PromptStyle whose user_suffix ends in a token of its own"
        )

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def _with_images(text: str, images: list[str]) -> str:
    """The text with an image at each `<image>`; takes them out of `images`, from the front.

    >>> _with_images("a <image> and <image>", ["<image><image>!", "?", "left"])
    'a <image><image>! and ?'
    """
    before, *behind = text.split(IMAGE)
    return before + "".join(images.pop(0) + piece for piece in behind)
