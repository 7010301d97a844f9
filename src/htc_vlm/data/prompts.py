"""The strings around questions and answers: one home for what training, chat template and asking must share.

Source:  LLaVA's `conv_vicuna_v1` (llava/conversation.py); the paper's sequence [V_hy; voco; W].
Differs: images come before everything else, so that their cache is a plain prefix (`images_first`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass

IMAGE = "<image>"


@dataclass(frozen=True)
class PromptStyle:
    """The strings around questions and answers; `prompt`, `answer` and `chat_template` are made of them.

    [images] system [user_prefix question user_suffix] [answer_prefix answer answer_suffix] [user_prefix ...

    answer_suffix: None = the tokenizer's end-of-sequence token. images_first: all images before everything else, which
    makes their cache a plain prefix; False leaves them where the question says `<image>`.
    """

    system: str = ""
    user_prefix: str = ""
    user_suffix: str = " "
    answer_prefix: str = ""
    answer_suffix: str | None = None
    images_first: bool = True

    def user(self, question: str, image_text: str = IMAGE) -> str:
        """One question as it stands in the prompt, without the images where they come first.

        >>> PromptStyle(user_prefix="USER: ").user("<image>\\nWhat is it ?")
        'USER: What is it ? '
        """
        text = without_images(question) if self.images_first else question.replace(IMAGE, image_text)
        return f"{self.user_prefix}{text}{self.user_suffix}"

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

    def chat_template(self) -> str:
        """The same format as a Jinja chat template; a message's content may be a string or a list of parts."""
        end = "eos_token" if self.answer_suffix is None else _jinja(self.answer_suffix)
        images = (
            "{% for message in messages %}{% if message['content'] is not string %}"
            "{% for part in message['content'] if part['type'] == 'image' %}" + IMAGE + "{% endfor %}"
            "{% endif %}{% endfor %}"
        )
        inline = "" if self.images_first else "{% if part['type'] == 'image' %}" + IMAGE + "{% endif %}"
        text = (
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
            "{% for part in message['content'] %}" + inline
            + "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        )
        return (
            (images if self.images_first else "")
            + "{{ " + _jinja(self.system) + " }}{% for message in messages %}{% if message['role'] == 'user' %}"
            + "{{ " + _jinja(self.user_prefix) + " }}" + text + "{{ " + _jinja(self.user_suffix) + " }}"
            + "{% elif message['role'] == 'assistant' %}{{ " + _jinja(self.answer_prefix) + " }}"
            + "{% generation %}" + text + "{{ " + end + " }}{% endgeneration %}"
            + "{% else %}{{ raise_exception('known roles: user, assistant; got ' + message['role']) }}"
            + "{% endif %}{% endfor %}"
        )  # fmt: skip


TINY = PromptStyle()
"""The shipped tiny models: `<image>what is at the top left ? ` and the answer."""

VICUNA_V1 = PromptStyle(
    system=(
        "<s>A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions. "
    ),
    user_prefix="USER: ",
    user_suffix=" ASSISTANT:",
    answer_prefix=" ",
    answer_suffix="</s>",
)
"""LLaVA-1.5's `conv_vicuna_v1`, but with the images before the system prompt and no newline after them."""


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
