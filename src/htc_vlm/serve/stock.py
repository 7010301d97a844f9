"""Serves a stock model: its pictures are kept as the beginning of a prompt (prefix_cache.py), and a question continues it.

Source:  model/prefix_cache.py; answers are those of `htc_vlm.generate`.
Differs: what would not be exact is refused: a second picture, or other text before the picture than it was kept behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from htc_vlm.model import prefix_cache
from htc_vlm.model.compressed import CompressedImages
from htc_vlm.serve.chat import NOTHING_ASKED, Writer
from htc_vlm.serve.engine import Engine, images_of
from htc_vlm.serve.errors import Refusal
from htc_vlm.serve.rows import Prompt, Row
from htc_vlm.serve.schema import Message

PICTURE_FIRST = (
    "this model's pictures are kept together with the text before them, so the picture must open the first message of the "
    "user, without a system message; put the text behind it"
)


class StockEngine(Engine):
    """Rows about pictures of equally many entries share a batch; rows without a picture have batches of their own."""

    def _sizes(self, row: Row) -> set[int]:
        return {0} if row.prompt.images is None else super()._sizes(row)

    def _inputs(self, rows: Sequence[Row]) -> dict[str, Any]:
        images = images_of(rows)
        if images is None:
            return super()._inputs(rows)
        which = [0] * len(rows) if len(images) == 1 else list(range(len(rows)))
        return prefix_cache.over(self.model, self.processor, images, which, [list(row.prompt.ids) for row in rows])


class StockWriter(Writer):
    """Writes what stands behind the picture, with the ids that `htc_vlm.generate` gives it."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._marks = (self.processor.image_token,)

    def prompt(self, messages: Sequence[Message], image_ids: Sequence[str], images: CompressedImages | None) -> Prompt:
        """Refusal 400 for a second picture, one that does not come first, and what the chat template refuses."""
        if len(image_ids) > 1:
            what = f"this model's pictures are kept one by one, got {len(image_ids)} in a request; ask about one at a time"
            raise Refusal(400, what, "too_many_images")
        checked = [self._checked(message) for message in messages]
        before, after = self._around(checked)
        if not before and not after:
            raise Refusal(400, NOTHING_ASKED, "invalid_request")
        if images is None:
            return Prompt((*before, *after), None, (), 0, len(before) + len(after), len(before) + len(after))
        assert images.prompt is not None
        if before != list(images.prompt["prefix"]):
            raise Refusal(400, PICTURE_FIRST, "invalid_request")
        ids = (*images.prompt["after"], *after)
        n_cached = images.n_bottleneck
        return Prompt(ids, images, tuple(image_ids), n_cached, images.n_visual[0] + len(ids), n_cached + len(ids))

    def _around(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Ids before and behind the picture; all of them before where there is none."""
        if hasattr(self.processor, "question_ids"):  # ours: the ids that training gave
            ids = self._ids(messages, self.processor.image_text())
            visual = self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token)
            at = [i for i, id in enumerate(ids) if id == visual]
            return (ids[: at[0]], ids[at[-1] + 1 :]) if at else (ids, [])
        if getattr(self.processor, "chat_template", None) is None:
            raise Refusal(400, "this model's processor has no chat template, so no prompt can be written", "invalid_request")
        text = self._templated(messages)
        if self.processor.image_token not in text:
            return list(self.processor.tokenizer(text, **prefix_cache.begun(self.processor, text))["input_ids"]), []
        asked = prefix_cache.split(self.processor, text)
        return asked.before, asked.after
