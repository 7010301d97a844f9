"""HTC-VLM as a Hugging Face model: LLaVA plus a compressor. backbone.py has it without a head, generation.py `compress`
and `generate`.

Source:  transformers' LlavaForConditionalGeneration; HTC-VLM Algorithm 1; VoCo-LLaMA section 3.
Differs: training runs the paper's one masked pass; inference runs two (compress, then text over the kv), which a
         contract test proves equal. With `compressor: none` nothing differs from LLaVA.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Cache, LlavaPreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from htc_vlm.model.backbone import HtcVlmModel
from htc_vlm.model.compressed import CompressedImages
from htc_vlm.model.configuration import HtcVlmConfig
from htc_vlm.model.generation import GeneratesOverKv
from htc_vlm.model.pretrained import HtcVlmPreTrainedModel, sizes_of

__all__ = ["HtcVlmForConditionalGeneration", "HtcVlmModel", "HtcVlmPreTrainedModel", "sizes_of"]


class HtcVlmForConditionalGeneration(GeneratesOverKv):
    """The model to train, compress with, and ask. Any LLaVA checkpoint loads unchanged (`compressor: none`)."""

    def __init__(self, config: HtcVlmConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = HtcVlmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        image_sizes: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        compressed: CompressedImages | None = None,
        patch_features: Tensor | None = None,
        image_codes: Tensor | None = None,
        question_ids: Tensor | None = None,
        kv_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple | LlavaCausalLMOutputWithPast:
        """As LLaVA's. `compressed`: answer from cached images; the logits are those of the text tokens, left-padded,
        as `image_slots.place` orders them. For the other additions see HtcVlmModel.forward."""
        if compressed is not None:
            if (
                pixel_values is not None
                or past_key_values is not None
                or inputs_embeds is not None
                or labels is not None
            ):
                raise ValueError(
                    "with compressed=..., give input_ids and attention_mask only (no pixels, cache or labels)"
                )
            if input_ids is None:
                raise ValueError("compressed=... needs input_ids (the question); got images only")
            inputs = self._inputs_over_cells(input_ids, attention_mask, compressed)
            n_cells = inputs["attention_mask"].shape[1] - inputs["position_ids"].shape[1]
            inputs["input_ids"] = inputs["input_ids"][:, n_cells:]
            return self(**inputs, logits_to_keep=logits_to_keep, **kwargs)
        if labels is not None and self.model.compressor.n_fusion and "is_answer" not in kwargs:
            kwargs["is_answer"] = labels != -100
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            labels=labels,
            logits_to_keep=logits_to_keep,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            patch_features=patch_features,
            image_codes=image_codes,
            question_ids=question_ids,
            kv_positions=kv_positions,
            **kwargs,
        )
