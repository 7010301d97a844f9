"""Requests of the OpenAI API, as far as they mean something here. What would change an answer and cannot be done is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt

from htc_vlm.serve.errors import Refusal

# Options that do not change an answer, and values by which others ask for nothing.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],), "repetition_penalty": (1,), "best_of": (1,),
}  # fmt: skip


def whole_letters(text: str) -> str:
    """JSON can write half a letter (a lone surrogate), which no tokenizer and no file takes. ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a text is no Unicode: half a letter ({text[error.start]!r}) at {error.start}") from error
    return text


Text = Annotated[str, AfterValidator(whole_letters)]


class TextPart(BaseModel):
    type: Literal["text"]
    text: Text


class ImageUrl(BaseModel):
    """`data:image/...;base64,...` or `htc:ID`."""

    url: Text


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]

    def parts(self) -> list[TextPart | ImagePart]:
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else list(self.content)


class StreamOptions(BaseModel):
    include_usage: StrictBool = False


class ChatRequest(BaseModel):
    """POST /v1/chat/completions"""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: StrictBool | None = False  # strict here and below: "4" is no number, and true is not 1
    stream_options: StreamOptions | None = None
    max_tokens: StrictInt | None = Field(None, ge=1)
    max_completion_tokens: StrictInt | None = Field(None, ge=1)
    temperature: StrictFloat | None = Field(None, ge=0, le=2)
    top_p: StrictFloat | None = Field(None, ge=0, le=1)
    seed: StrictInt | None = None
    stop: Text | list[Text] | None = None
    n: StrictInt | None = Field(1, ge=1)

    def stops(self) -> tuple[str, ...]:
        """Refusal 400 for empty ones, which would end every answer at once."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > 4 or not all(stops):
            raise Refusal(400, "stop: give up to four strings that are not empty", "invalid_request")
        return tuple(stops)

    def refuse_what_cannot_be_done(self) -> None:
        """Refusal 400 that names the option."""
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in IGNORED and value not in NEUTRAL.get(name, ()):
                raise Refusal(400, f"{name}={value!r} is not supported here; leave it out", "unsupported_parameter")


class ImageRequest(BaseModel):
    """POST /v1/images as JSON: a `data:` URI, and a name to find the picture by."""

    model_config = ConfigDict(extra="forbid")

    url: Text
    name: Text | None = None
