"""Chat requests -> rows for the engine; pieces of answers -> chat completions, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from htc_vlm.data.prompt_ids import PromptIds
from htc_vlm.data.prompts import IMAGE, PromptStyle
from htc_vlm.model.compressed import CompressedImages
from htc_vlm.serve.engine import Engine, refusal
from htc_vlm.serve.errors import Refusal
from htc_vlm.serve.pictures import Pictures
from htc_vlm.serve.rows import Piece, Prompt, Row, Sampling
from htc_vlm.serve.schema import ChatRequest, ImagePart, Message, TextPart

NOTHING_ASKED = "messages: nothing is asked; write a text"
LEAST_TEMPERATURE = 1e-5  # below it scores overflow; the likeliest token is what is meant


class Writer:
    """Writes prompts for one model."""

    def __init__(self, engine: Engine) -> None:
        self.model, self.processor, self.limits = engine.model, engine.processor, engine.limits
        self.own = engine.own  # the model's, which is another while the engine decodes
        self.n_context = int(self.model.config.get_text_config().max_position_embeddings)
        marks = (getattr(self.processor, name, None) for name in ("image_token", "bottleneck_token"))
        self._marks = tuple(mark for mark in marks if mark)

    def prompt(self, messages: Sequence[Message], image_ids: Sequence[str], images: CompressedImages | None) -> Prompt:
        """Refusal 400 where the chat template refuses, or where a text holds a placeholder of the model."""
        n_bottleneck = self.processor.n_bottleneck if images is None else images.n_bottleneck
        n_cached = n_bottleneck * len(image_ids)
        ids = self._ids([self._checked(message) for message in messages], self.processor.bottleneck_text(n_bottleneck))
        image, bottleneck = (self.processor.tokenizer.convert_tokens_to_ids(mark) for mark in self._marks)
        if image in ids or ids.count(bottleneck) != n_cached:
            what = f"the prompt has {ids.count(bottleneck)} places, the images need {n_cached}"
            raise Refusal(400, what, "invalid_request")
        if len(ids) == n_cached:
            raise Refusal(400, NOTHING_ASKED, "invalid_request")
        n_free = sum(images.n_visual) if images is not None and self.model.model.compressor.positions == "sequential" else 0
        return Prompt(tuple(ids), images, tuple(image_ids), n_cached, len(ids) + n_free, len(ids))

    def _checked(self, message: Message) -> Message:
        """Text that stands for a picture inside the model would take the place of one."""
        for part in message.parts():
            found = [mark for mark in self._marks if isinstance(part, TextPart) and mark in part.text]
            if found:
                what = f"a text contains {found[0]}, which stands for a picture inside the model; leave it out"
                raise Refusal(400, what, "invalid_request")
        return message

    def _ids(self, messages: Sequence[Message], image_text: str) -> list[int]:
        """As training writes conversations, where the model has a style of its own; else as its chat template does."""
        style = self.processor.style
        roles = ["user" if i % 2 == 0 else "assistant" for i in range(len(messages))]
        if style is not None and len(roles) % 2 and roles == [message.role for message in messages]:
            said = ["".join(IMAGE if isinstance(part, ImagePart) else part.text for part in one.parts()) for one in messages]
            history = list(zip(said[::2], said[1::2], strict=False))
            return PromptIds(self.processor.tokenizer, style).question(said[-1], image_text, history)
        text = self._templated(messages)
        plain = PromptIds(self.processor.tokenizer, PromptStyle())
        return plain.begin(text.replace(self.processor.image_token, image_text))

    def _templated(self, messages: Sequence[Message]) -> str:
        """What the chat template writes, with the processor's image token. Refusal 400 where it refuses."""
        written = [
            {
                "role": message.role,
                "content": [
                    {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
                    for part in message.parts()
                ],
            }
            for message in messages
        ]
        try:
            return str(self.processor.apply_chat_template(written, add_generation_prompt=True, tokenize=False))
        except TemplateError as error:
            raise Refusal(400, f"this model's chat template refuses: {error}", "invalid_request") from error

    def sampling(self, request: ChatRequest, n_positions: int) -> Sampling:
        """What the request says, or the checkpoint's generation_config. Refusal 400 for more than the context holds."""
        limit, default = self.limits.max_tokens, min(self.limits.default_tokens, self.limits.max_tokens)
        wanted = request.max_completion_tokens or request.max_tokens
        if wanted is not None and wanted > limit:
            raise Refusal(400, f"max_tokens is {wanted}; this server gives at most {limit}", "invalid_request")
        room = self.n_context - n_positions
        if room < (wanted or 1):
            what = f"the prompt takes {n_positions} of {self.n_context} positions, {wanted or 1} tokens do not fit after it"
            raise Refusal(400, what, "context_length_exceeded")
        own = self.own
        temperature = (own.temperature if own.temperature is not None else 1.0) if own.do_sample else 0.0
        top_p = (own.top_p if own.top_p is not None else 1.0) if own.do_sample else 1.0
        temperature = temperature if request.temperature is None else request.temperature
        top_p = top_p if request.top_p is None else request.top_p
        return Sampling(
            max_tokens=wanted or min(default, room),
            temperature=temperature if temperature >= LEAST_TEMPERATURE and top_p > 0 else 0.0,
            top_p=top_p,
            top_k=(own.top_k or 0) if own.do_sample else 0,
            seed=request.seed,
            stop=request.stops(),
        )

    def decode(self, ids: list[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@dataclass
class Chat:
    """One request that is being answered: its rows, and the queue into which the engine puts their pieces."""

    model_name: str
    rows: list[Row]
    pieces: asyncio.Queue[Piece]
    started: float
    engine: Engine

    @classmethod
    async def begin(cls, request: ChatRequest, model_name: str, engine: Engine, pictures: Pictures, writer: Writer) -> Chat:
        """Looks at everything that can be refused, compresses pictures that are new, and queues the rows."""
        started = time.perf_counter()
        n_choices = request.n or 1
        if request.model != model_name:
            raise Refusal(404, f"no model {request.model!r}; this server has {model_name!r}", "model_not_found")
        if n_choices > engine.limits.max_choices:
            raise Refusal(400, f"n is {n_choices}; at most {engine.limits.max_choices}", "invalid_request")
        request.refuse_what_cannot_be_done()
        urls = [part.image_url.url for one in request.messages for part in one.parts() if isinstance(part, ImagePart)]
        if len(urls) > engine.limits.max_images:
            raise Refusal(400, f"{len(urls)} images; at most {engine.limits.max_images} in a request", "too_many_images")
        engine.check_room(n_choices)
        found = [await pictures.by_url(url) for url in urls]
        images = CompressedImages.concat([one.images for one in found]) if found else None
        prompt = writer.prompt(request.messages, [one.id for one in found], images)
        sampling = writer.sampling(request, prompt.n_positions)
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        rows = [Row(prompt, sampling, i, writer.decode, pieces.put_nowait) for i in range(n_choices)]
        engine.submit(rows)
        engine.metrics.prompt_tokens.inc(prompt.n_tokens * n_choices)
        return cls(model_name, rows, pieces, started, engine)

    def cancel(self) -> None:
        """Frees the rows of a client that went away; does nothing to those that are done."""
        for row in self.rows:
            if not row.is_done and not row.is_cancelled:
                row.cancel()
                self.engine.metrics.hang_ups.inc()

    async def all_pieces(self) -> AsyncIterator[Piece]:
        """Until every choice has ended. Raises what went wrong."""
        n_left, is_first = len(self.rows), True
        while n_left:
            piece = await self.pieces.get()
            if piece.error is not None:
                raise piece.error
            if is_first:
                self.engine.metrics.first_token_seconds.observe(time.perf_counter() - self.started)
                is_first = False
            yield piece
            n_left -= piece.finish_reason is not None
        self.engine.metrics.request_seconds.observe(time.perf_counter() - self.started)

    def usage(self) -> dict[str, Any]:
        """cached_tokens: those that came from compressed images."""
        prompt = self.rows[0].prompt
        n_prompt, n_new = prompt.n_tokens, sum(row.n_tokens for row in self.rows)
        return {
            "prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new,
            "prompt_tokens_details": {"cached_tokens": prompt.n_cached},
        }  # fmt: skip

    # ---------------------------------------------------------------- answers
    async def whole(self) -> dict[str, Any]:
        """A chat.completion object."""
        texts, reasons = [""] * len(self.rows), [""] * len(self.rows)
        async for piece in self.all_pieces():
            texts[piece.choice] += piece.text
            reasons[piece.choice] = piece.finish_reason or ""
        choices = [
            {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": reason, "logprobs": None}
            for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage()}

    async def events(self, include_usage: bool) -> AsyncIterator[str]:
        """Server-sent events of chat.completion.chunk objects. An error after the first of them is an event, too."""
        head = self._head("chat.completion.chunk") | ({"usage": None} if include_usage else {})

        def chunk(choice: int, delta: dict[str, str], reason: str | None = None) -> str:
            return _event(head | {"choices": [{"index": choice, "delta": delta, "finish_reason": reason, "logprobs": None}]})

        try:
            for row in self.rows:
                yield chunk(row.choice, {"role": "assistant", "content": ""})
            async for piece in self.all_pieces():
                if piece.text:
                    yield chunk(piece.choice, {"content": piece.text})
                if piece.finish_reason:
                    yield chunk(piece.choice, {}, piece.finish_reason)
            if include_usage:
                yield _event(head | {"choices": [], "usage": self.usage()})
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield _event(refusal(error).body())
        finally:
            self.cancel()

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self.model_name}


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
