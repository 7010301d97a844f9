"""HTC-VLM as a Hugging Face model: LLaVA plus a compressor. backbone.py has it without a head, generation.py `compress`
and `generate`.

Source:  transformers' LlavaForConditionalGeneration; HTC-VLM Algorithm 1; VoCo-LLaMA section 3.
Differs: training runs the paper's one masked pass; inference runs two (compress, then text over the kv), which a
         contract test proves equal. With `compressor: none` nothing differs from LLaVA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, LlavaForConditionalGeneration, LlavaPreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from htc_vlm.applied import hf_compat
from htc_vlm.model.backbone import HtcVlmModel
from htc_vlm.model.compressed import CompressedImages
from htc_vlm.model.compressing import Group
from htc_vlm.model.configuration import HtcVlmConfig
from htc_vlm.model.generation import GeneratesOverKv
from htc_vlm.model.pretrained import HtcVlmPreTrainedModel, sizes_of

__all__ = ["HtcVlmForConditionalGeneration", "HtcVlmModel", "HtcVlmPreTrainedModel", "sizes_of"]


class HtcVlmForConditionalGeneration(GeneratesOverKv, HtcVlmPreTrainedModel, LlavaForConditionalGeneration):
    """The model to train, compress with, and ask. Any LLaVA checkpoint loads unchanged (`compressor: none`)."""

    IMAGE_INPUTS = ("pixel_values", "patch_features", "image_codes")

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
        answers_only: bool = False,
        **kwargs: Any,
    ) -> tuple | LlavaCausalLMOutputWithPast:
        """As LLaVA's. `compressed`: answer from cached images; the logits are those of the text tokens, left-padded,
        as `image_slots.place` orders them. answers_only: with `labels`, compute logits only where one is wanted and return the
        loss alone, which spares time and memory where the vocabulary is large. For the others see HtcVlmModel.forward."""
        if answers_only and (compressed is not None or not (isinstance(logits_to_keep, int) and logits_to_keep == 0)):
            raise ValueError("answers_only computes a training loss: leave out compressed and logits_to_keep")
        if compressed is not None:
            others = {
                "pixel_values": pixel_values, "patch_features": patch_features, "image_codes": image_codes,
                "mm_encoder_outputs": mm_encoder_outputs, "past_key_values": past_key_values, "inputs_embeds": inputs_embeds,
                "position_ids": position_ids, "kv_positions": kv_positions, "question_ids": question_ids, "labels": labels,
            }  # fmt: skip
            inputs = self._text_over(compressed, input_ids, attention_mask, others)
            return self(**inputs, logits_to_keep=logits_to_keep, **kwargs)
        if labels is not None and self.model.compressor.n_fusion and "is_answer" not in kwargs:
            kwargs["is_answer"] = labels != -100
        kwargs |= {
            "input_ids": input_ids, "pixel_values": pixel_values, "attention_mask": attention_mask,
            "position_ids": position_ids, "past_key_values": past_key_values, "inputs_embeds": inputs_embeds,
            "vision_feature_layer": vision_feature_layer, "vision_feature_select_strategy": vision_feature_select_strategy,
            "image_sizes": image_sizes, "mm_encoder_outputs": mm_encoder_outputs, "patch_features": patch_features,
            "image_codes": image_codes, "question_ids": question_ids, "kv_positions": kv_positions,
        }  # fmt: skip
        if answers_only:
            return LlavaCausalLMOutputWithPast(loss=self._loss_of_answers(labels, kwargs))
        return super().forward(labels=labels, logits_to_keep=logits_to_keep, **kwargs)

    def _loss_of_answers(self, labels: Tensor | None, inputs: dict[str, Any]) -> Tensor:
        """What the loss of `super().forward` is: cross-entropy over the labels, divided by their number."""
        if labels is None:
            raise ValueError("answers_only computes a loss, so it needs labels")
        n_labels = inputs.pop("num_items_in_batch", None)
        states = self.model(**inputs)[0]
        labels = labels[:, 1:].to(states.device)
        is_wanted = labels != -100
        logits = self.lm_head(states[:, :-1][is_wanted]).float()
        summed = nn.functional.cross_entropy(logits, labels[is_wanted].to(logits.device), reduction="sum")
        divisor = is_wanted.sum() if n_labels is None else n_labels
        return summed / (divisor.to(summed.device) if isinstance(divisor, Tensor) else divisor)

    def image_groups(self, pixel_values: Tensor | None = None, **features: Tensor) -> list[Group]:
        """All images have one size."""
        visual = self.visual_tokens(pixel_values, **features)
        return [Group(range(len(visual)), visual)]

    def visual_tokens(
        self,
        pixel_values: Tensor | None = None,
        patch_features: Tensor | None = None,
        image_codes: Tensor | None = None,
    ) -> Tensor:
        """-> (N, C, D), in the dtype of the language model."""
        images = self.model.get_image_features(
            pixel_values=pixel_values, patch_features=patch_features, image_codes=image_codes
        ).pooler_output
        return torch.stack(list(images)).to(hf_compat.compute_dtype(self.get_input_embeddings(), self.dtype))


def check_llava(model: object, what: str) -> None:
    """ValueError for another family than LLaVA, whose pictures have no common square grid; `what` needs one."""
    if not isinstance(model, HtcVlmForConditionalGeneration):
        raise ValueError(
            f"{what} needs pictures of one square grid, as LLaVA's are; a {type(model).__name__} has none: give a LLaVA or ours"
        )
