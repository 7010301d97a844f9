"""The strings around questions and answers: one home for what training, chat template and asking must share.

Source:  LLaVA's `conv_vicuna_v1` (llava/conversation.py) and `preprocess_multimodal` (llava/train/train.py); for TINY the
         paper's sequence [V_hy; voco; W].
Differs: nothing known of LLaVA-1.5's format. BOS is no part of a style: the tokenizer adds it, or does not (`prompt_ids`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

IMAGE = "<image>"


@dataclass(frozen=True)
class PromptStyle:
    """The strings around questions and answers; `prompt`, `user`, `answer_end` and `chat_template` are made of them.

    system [user_prefix question user_suffix] [answer_prefix answer answer_suffix] [user_prefix ...

    answer_suffix: None = the tokenizer's end-of-sequence token. images_first: all images before everything else, which
    makes their cache a plain prefix; False: the one image of a question stands at its begin, followed by image_suffix, and
    several images stand where the question says `<image>`.
    """

    system: str = ""
    user_prefix: str = ""
    user_suffix: str = " "
    answer_prefix: str = ""
    answer_suffix: str | None = None
    images_first: bool = True
    image_suffix: str = ""

    def user(self, question: str, image_text: str = IMAGE) -> str:
        """One question as it stands in the prompt, without the images where they come first.

        >>> PromptStyle(user_prefix="USER: ").user("<image>\\nWhat is it ?")
        'USER: What is it ? '
        >>> PromptStyle(images_first=False, image_suffix="\\n").user("What is it ? <image>")
        '<image>\\nWhat is it ? '
        """
        if self.images_first:
            text = without_images(question)
        elif question.count(IMAGE) == 1:
            text = f"{IMAGE}{self.image_suffix}{question.replace(IMAGE, '').strip()}".strip()
        else:
            text = question
        return f"{self.user_prefix}{text.replace(IMAGE, image_text)}{self.user_suffix}"

    def prompt(self, question: str, image_text: str = IMAGE) -> str:
        """Everything before the first answer: exactly the text that is tokenised when the question is asked.

        >>> TINY.prompt("<image>\\nwhat is it ?")
        '<image>what is it ? '
        """
        first = image_text * question.count(IMAGE) if self.images_first else ""
        return first + self.system + self.user(question, image_text)

    def answer_end(self, eos_token: str | None) -> str:
        """What ends an answer. ValueError where the style wants the tokenizer's and it has none."""
        end = eos_token if self.answer_suffix is None else self.answer_suffix
        if not end:
            raise ValueError("the tokenizer has no eos_token, so answers would never end; set one, or answer_suffix")
        return end

    def to_dict(self) -> dict[str, Any]:
        """All strings by name, as a checkpoint's processor keeps them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> PromptStyle:
        """What `to_dict` gave. ValueError for a name that no style has."""
        known = [field.name for field in fields(cls)]
        wrong = sorted(set(options) - set(known))
        if wrong:
            raise ValueError(f"prompt_style has no {wrong[0]!r}; known: {', '.join(known)}")
        return cls(**options)

    def chat_template(self) -> str:
        """The same format as a Jinja chat template; a message's content may be a string or a list of parts."""
        end = "eos_token" if self.answer_suffix is None else _jinja(self.answer_suffix)
        return (
            (_IMAGES_OF_ALL if self.images_first else "")
            + "{{ " + _jinja(self.system) + " }}{% for message in messages %}{% if message['role'] == 'user' %}"
            + "{{ " + _jinja(self.user_prefix) + " }}" + self._content() + "{{ " + _jinja(self.user_suffix) + " }}"
            + "{% elif message['role'] == 'assistant' %}{{ " + _jinja(self.answer_prefix) + " }}"
            + "{% generation %}" + self._content() + "{{ " + end + " }}{% endgeneration %}"
            + "{% else %}{{ raise_exception('known roles: user, assistant; got ' + message['role']) }}"
            + "{% endif %}{% endfor %}"
        )  # fmt: skip

    def _content(self) -> str:
        """Jinja for what a message says. In place, a message's only image comes first, as in `user`."""
        image = IMAGE + "{{ " + _jinja(self.image_suffix) + " }}"
        before = inline = ""
        if not self.images_first:
            count = "message['content'] | selectattr('type', 'equalto', 'image') | list | length"
            before = "{% set n_images = " + count + " %}{% if n_images == 1 %}" + image + "{% endif %}"
            inline = "{% if part['type'] == 'image' and n_images > 1 %}" + image + "{% endif %}"
        return (
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}" + before
            + "{% for part in message['content'] %}" + inline
            + "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        )  # fmt: skip


_IMAGES_OF_ALL = (
    "{% for message in messages %}{% if message['content'] is not string %}"
    "{% for part in message['content'] if part['type'] == 'image' %}" + IMAGE + "{% endfor %}"
    "{% endif %}{% endfor %}"
)

TINY = PromptStyle()
"""The shipped tiny models: `<image>what is at the top left ? ` and the answer."""

VICUNA_V1 = PromptStyle(
    system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    ),
    user_prefix="USER: ",
    user_suffix=" ASSISTANT:",
    answer_prefix=" ",
    images_first=False,
    image_suffix="\n",
)
"""LLaVA-1.5's own: `[BOS]A chat ... questions. USER: <image>\\nWhat is it? ASSISTANT: A cat.[EOS]USER: ...`"""

LINES = PromptStyle(user_suffix="\n")
"""A pretrained language model that is asked many questions at once: `<image>What is this?`, a line's end, and the answer."""

STYLES = {"tiny": TINY, "vicuna_v1": VICUNA_V1, "lines": LINES}


def find_style(name: str) -> PromptStyle:
    """A style by its name in presets. ValueError lists the known ones."""
    if name not in STYLES:
        raise ValueError(f"prompt is {name!r}; known: {', '.join(STYLES)}")
    return STYLES[name]


def _jinja(text: str) -> str:
    """A Jinja string literal.

    >>> _jinja("it's")
    '"it\\'s"'
    """
    return json.dumps(text, ensure_ascii=False)


def without_images(question: str) -> str:
    """The question's words alone.

    >>> without_images("<image>\\nWhat is it?"), without_images("Look at <image> and <image> .")
    ('What is it?', 'Look at and .')
    """
    pieces = (piece.strip() for piece in question.split(IMAGE))
    return " ".join(piece for piece in pieces if piece)
