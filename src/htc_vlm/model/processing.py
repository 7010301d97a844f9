"""The processor: LLaVA's, with placeholders for what the compressor gives and for the bottleneck tokens.

Source:  transformers' LlavaProcessor (expansion hook `replace_image_token`).
Differs: `<image>` becomes C visual placeholders and K bottleneck tokens; in a prompt without pictures (answered from
         compressed images) it becomes the K bottleneck tokens alone. The format of questions is kept beside the counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import LlavaProcessor

from htc_vlm import compressors
from htc_vlm.data.prompt_ids import PromptIds
from htc_vlm.data.prompts import IMAGE, STYLES, PromptStyle
from htc_vlm.model.configuration import HtcVlmConfig
from htc_vlm.model.modeling import sizes_of


class AsksQuestions:
    """Mixed in front of a processor: prompts about images that are their bottleneck tokens, and questions as training writes
    them. The processor has `n_bottleneck`, `bottleneck_token` and `prompt_style`."""

    tokenizer: Any
    image_processor: Any
    apply_chat_template: Callable[..., Any]
    image_token: str
    chat_template: Any
    n_bottleneck: int
    bottleneck_token: str
    prompt_style: dict[str, Any] | None

    def image_text(self) -> str:
        """What stands for one image in the text of a prompt with pictures."""
        raise NotImplementedError

    def bottleneck_text(self, n_entries: int | None = None) -> str:
        """What stands for one compressed image in the text of a prompt. n_entries: where it has fewer than n_bottleneck."""
        return self.bottleneck_token * (self.n_bottleneck if n_entries is None else n_entries)

    # ---------------------------------------------------------------- questions
    @property
    def style(self) -> PromptStyle | None:
        """The style that the chat template is made of: the saved one, or a named one; None where a template of another
        kind (a stock checkpoint's, or one that was set by hand) says how questions are written."""
        saved = [] if self.prompt_style is None else [PromptStyle.from_dict(self.prompt_style)]
        return next((one for one in (*saved, *STYLES.values()) if self._template(one) == self.chat_template), None)

    def set_style(self, style: PromptStyle) -> None:
        """Write questions in this style from now on; it is saved with the processor."""
        self.prompt_style, self.chat_template = style.to_dict(), self._template(style)

    def _template(self, style: PromptStyle) -> str:
        return style.chat_template().replace(IMAGE, self.image_token)

    def for_training(self, pictures: Sequence[Any]) -> tuple[list[str], dict[str, Any]]:
        """What stands for each picture in a text, and the model's inputs of them."""
        pixels = self.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return [self.image_text()] * len(pictures), {"pixel_values": pixels}

    def question_ids(
        self,
        question: str,
        is_compressed: bool = False,
        history: Sequence[tuple[str, str]] = (),
        with_image: bool = True,
    ) -> list[int]:
        """A question about one image, as training writes it -> ids. is_compressed: the image is its bottleneck tokens alone.

        history: (question, answer) of the turns before; the image then belongs to the first of them. with_image=False: the
        same words about nothing. ValueError for a question that contains a placeholder.
        """
        asked = [*(one for one, _ in history), question]
        self._check_words(asked)
        image = self.bottleneck_text() if is_compressed else self.image_text()
        style = self.style
        if style is not None:
            asked[0] = (IMAGE if with_image else "") + asked[0]
            turns = [(one, answer) for one, (_, answer) in zip(asked, history, strict=False)]
            return PromptIds(self.tokenizer, style).question(asked[-1], image, turns)
        messages = [_message("user", asked[0], with_image)]
        for (_, answer), one in zip(history, asked[1:], strict=True):
            messages += [_message("assistant", answer), _message("user", one)]
        text = self.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return PromptIds(self.tokenizer, PromptStyle()).begin(text.replace(self.image_token, image))

    def _check_words(self, questions: Sequence[str]) -> None:
        marks = (self.image_token, self.bottleneck_token) if self.n_bottleneck else (self.image_token,)
        for question in questions:
            found = [mark for mark in marks if mark in question]
            if found:
                raise ValueError(
                    f"the question {question!r} contains {found[0]}, which stands for a picture inside the model; leave it "
                    "out: the picture is put where it belongs"
                )

    # ---------------------------------------------------------------- text and pictures -> inputs
    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """As the stock processor's; `text` without `images` may say `<image>` where a compressed image goes."""
        if images is None and text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            if any(self.image_token in one for one in texts):
                if not self.n_bottleneck:
                    raise ValueError(
                        f"the text has {self.image_token} but no images were given, "
                        "and this model keeps no compressed images"
                    )
                text = [one.replace(self.image_token, self.bottleneck_text()) for one in texts]
        return super().__call__(images=images, text=text, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """As transformers'. The tokenizer is saved to be read from tokenizer.json as it stands: LlamaTokenizer, of
        transformers 5.23, builds itself anew at loading and forgets `legacy` and `add_bos_token`, which changes ids."""
        out = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        file = Path(save_directory) / "tokenizer_config.json"
        if file.is_file() and file.with_name("tokenizer.json").is_file():
            options = {**json.loads(file.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
            file.write_text(json.dumps(options, indent=2, ensure_ascii=False) + "\n")
        return out


class HtcVlmProcessor(AsksQuestions, LlavaProcessor):
    """n_visual (C): visual tokens per image, None: as many as patches; n_bottleneck (K); bottleneck_token: a word;
    prompt_style: the strings of a `PromptStyle`, None: questions are written by the chat template alone."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        n_visual: int | None = None,
        n_bottleneck: int = 0,
        bottleneck_token: str = "<voco>",
        prompt_style: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.n_visual = n_visual
        self.n_bottleneck = n_bottleneck
        self.bottleneck_token = bottleneck_token
        self.prompt_style = prompt_style
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )
        if n_bottleneck and len(tokenizer.encode(bottleneck_token, add_special_tokens=False)) != 1:
            raise ValueError(f"the tokenizer splits {bottleneck_token!r}; add it as a special token")

    def image_text(self, image_inputs: dict[str, Any] | None = None, image_idx: int = 0) -> str:
        """What stands for one image in the text of a prompt with pictures."""
        if self.n_visual is None:
            visual = super().replace_image_token(image_inputs or {}, image_idx)
        else:
            visual = self.image_token * self.n_visual
        return visual + self.bottleneck_token * self.n_bottleneck

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        return self.image_text(image_inputs, image_idx)

    @classmethod
    def for_config(cls, config: HtcVlmConfig, image_processor: Any, tokenizer: Any, **kwargs: Any) -> HtcVlmProcessor:
        """The processor that fits a model: counts come from its configuration."""
        method = compressors.build(**config.compressor)
        sizes = sizes_of(config)
        if config.image_token_id != tokenizer.convert_tokens_to_ids(kwargs.get("image_token", "<image>")):
            raise ValueError("the tokenizer's <image> is not config.image_token_id; take both from one checkpoint")
        return cls(
            image_processor,
            tokenizer,
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            n_visual=method.n_visual(sizes.n_patches),
            n_bottleneck=method.n_bottleneck,
            **kwargs,
        )

    def fitted_to(self, config: HtcVlmConfig) -> HtcVlmProcessor:
        """The same processor with the counts of another model on the same tokenizer."""
        return self.for_config(
            config,
            self.image_processor,
            self.tokenizer,
            chat_template=self.chat_template,
            image_token=self.image_token,
            num_additional_image_tokens=self.num_additional_image_tokens,
            bottleneck_token=self.bottleneck_token,
            prompt_style=self.prompt_style,
        )


def _message(role: str, text: str, with_image: bool = False) -> dict[str, Any]:
    image = [{"type": "image"}] if with_image else []
    return {"role": role, "content": [*image, {"type": "text", "text": text}]}
