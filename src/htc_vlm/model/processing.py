"""The processor: LLaVA's, with placeholders for what the compressor gives and for the bottleneck tokens.

Source:  transformers' LlavaProcessor (expansion hook `replace_image_token`).
Differs: `<image>` becomes C visual placeholders and K bottleneck tokens; in a prompt without pictures (answered from
         compressed images) it becomes the K bottleneck tokens alone.
"""

from __future__ import annotations

from typing import Any

from transformers import LlavaProcessor

from htc_vlm import compressors
from htc_vlm.model.configuration import HtcVlmConfig
from htc_vlm.model.modeling import sizes_of


class HtcVlmProcessor(LlavaProcessor):
    """n_visual (C): visual tokens per image, None: as many as patches; n_bottleneck (K); bottleneck_token: a word."""

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
        **kwargs: Any,
    ) -> None:
        self.n_visual = n_visual
        self.n_bottleneck = n_bottleneck
        self.bottleneck_token = bottleneck_token
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

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """As LLaVA's; `text` without `images` may say `<image>` where a compressed image goes."""
        if images is None and text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            if any(self.image_token in one for one in texts):
                if not self.n_bottleneck:
                    raise ValueError(
                        f"the text has {self.image_token} but no images were given, "
                        "and this model keeps no compressed images"
                    )
                text = [one.replace(self.image_token, self.bottleneck_token * self.n_bottleneck) for one in texts]
        return super().__call__(images=images, text=text, **kwargs)

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
