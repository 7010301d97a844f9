"""The HTC-VLM without a head: vision tower, projector, compressor, language model, and the paper's one masked pass.

Source:  transformers' LlavaForConditionalGeneration; HTC-VLM Algorithm 1; VoCo-LLaMA section 3.
Differs: training runs the paper's one masked pass; inference runs two (compress, then text over the kv), which a
         contract test proves equal. With `compressor: none` nothing differs from LLaVA.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, LlavaModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import select_hidden_states

from htc_vlm import compressors
from htc_vlm.applied import hf_compat
from htc_vlm.compressors import ImageFeatures
from htc_vlm.model import compressing, reading
from htc_vlm.model.configuration import HtcVlmConfig
from htc_vlm.model.movable import check_built_as_llama, check_movable
from htc_vlm.model.prefusion import ImagesToFuse, fuse
from htc_vlm.model.pretrained import HtcVlmPreTrainedModel, sizes_of
from htc_vlm.ops import masks, rope
from htc_vlm.tokens import TokenLayout


class HtcVlmModel(HtcVlmPreTrainedModel, LlavaModel):
    """Vision tower, projector, compressor and language model, without a head."""

    def __init__(self, config: HtcVlmConfig) -> None:
        super().__init__(config)
        self.compressor = compressors.build(**config.compressor)
        if self.compressor.n_bottleneck:
            check_built_as_llama(self.compressor.name, self.language_model)
        self.compressor.setup(replace(sizes_of(config), new_decoder_layer=self._new_decoder_layer))
        self.post_init()

    def _new_decoder_layer(self, index: int) -> nn.Module:
        """An untrained layer of the language model's kind, that follows its configuration (attention backend included)."""
        layers: Any = self.language_model.layers
        return type(layers[0])(self.language_model.config, index % len(layers))

    # ---------------------------------------------------------------- images
    @merge_with_config_defaults
    @select_hidden_states("vision_feature_layer")
    def vision_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, 3, height, width) -> (B, P, vision width): the features that LLaVA hands to its projector."""
        states = self.vision_tower(pixel_values, return_dict=True, **kwargs).hidden_states
        layers = [vision_feature_layer] if isinstance(vision_feature_layer, int) else list(vision_feature_layer or [])
        chosen = [states[i] for i in layers]
        if vision_feature_select_strategy == "default":  # leave out CLS
            chosen = [state[:, 1:] for state in chosen]
        return torch.cat(chosen, dim=-1)

    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        patch_features: Tensor | None = None,
        image_codes: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """What the language model receives for each image: `.pooler_output`, one (C, D) tensor per image.

        pixel_values (B, 3, height, width); or patch_features (B, P, vision width), and for htc image_codes
        (B, h, w, channels), computed before (frozen towers need not be run again at each step).
        """
        if self.compressor.name == "none" and patch_features is None:
            return super().get_image_features(
                pixel_values=pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                **kwargs,
            )
        if patch_features is None:
            if pixel_values is None:
                raise ValueError("no image: give pixel_values or patch_features")
            if kwargs.get("image_sizes") is not None:
                raise ValueError(
                    "images of different sizes (image_sizes) are not supported with compressor "
                    f"{self.compressor.name!r}; resize them to one size"
                )
            patch_features = self.vision_features(
                pixel_values=pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
            )
        images = ImageFeatures(
            features=patch_features.to(hf_compat.compute_dtype(self.multi_modal_projector, self.dtype)),
            project=self.multi_modal_projector,
            pixels=None if pixel_values is None else self.denormalise(pixel_values),
            codes=image_codes,
        )
        tokens = self.compressor.before_llm(images)  # (B, C, D)
        promised = self.compressor.n_visual(patch_features.shape[1])
        if tokens.shape[1] != promised:
            raise ValueError(f"{self.compressor.name} promised {promised} visual tokens and gave {tokens.shape[1]}")
        if self.compressor.n_fusion:
            patches = [list(images.patches)]
            return ImagesToFuse(last_hidden_state=patch_features, pooler_output=list(tokens), deepstack_features=patches)
        return BaseModelOutputWithPooling(last_hidden_state=patch_features, pooler_output=list(tokens))

    def denormalise(self, pixel_values: Tensor) -> Tensor:
        """pixel_values -> (B, 3, height, width) in [0, 1]."""
        return hf_compat.in_unit_range(pixel_values, self.config)

    # ---------------------------------------------------------------- one pass
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        patch_features: Tensor | None = None,
        image_codes: Tensor | None = None,
        question_ids: Tensor | None = None,
        kv_positions: Tensor | None = None,
        is_answer: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple | LlavaModelOutputWithPast:
        """As LLaVA's; besides: patch_features, image_codes (see get_image_features); question_ids (B, L) for packed
        questions; kv_positions (B, n) where the cache begins with n kv that stand amid the text; is_answer (B, L)
        bool, the tokens that no pre-fusion reads (as in generate, which makes them later)."""
        if patch_features is not None:
            if pixel_values is not None or mm_encoder_outputs:
                raise ValueError("give pixel_values or patch_features, not both")
            images = self.get_image_features(patch_features=patch_features, image_codes=image_codes)
            mm_encoder_outputs = {"image": images}
        brought = (pixel_values, inputs_embeds, (mm_encoder_outputs or {}).get("image"))
        has_past = hf_compat.has_past(past_key_values, _n_new(input_ids, inputs_embeds))
        if self.compressor.name != "none" and not has_past and all(one is None for one in brought):
            hf_compat.check_has_images(input_ids, [self.config.image_token_id])
        ids = input_ids
        if self.compressor.n_fusion:
            if pixel_values is not None:
                names = ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes")
                options = {name: kwargs.pop(name, None) for name in names}
                mm_encoder_outputs = {"image": self.get_image_features(pixel_values=pixel_values, **options)}
                pixel_values = None
            given = (mm_encoder_outputs or {}).get("image")
            fused = self._fused(input_ids, given, attention_mask, past_key_values, question_ids, is_answer)
            if fused is not None:
                ids, inputs_embeds, mm_encoder_outputs = None, fused, None
        if self.compressor.reads_apart and input_ids is not None and not _goes_on(past_key_values):
            if pixel_values is not None:
                mm_encoder_outputs = {"image": self.get_image_features(pixel_values=pixel_values)}
            images = (mm_encoder_outputs or {}).get("image")
            if images is not None:
                return self._read_apart(input_ids, images, attention_mask, position_ids, question_ids, kwargs)
        if self.compressor.n_bottleneck and input_ids is not None and input_ids.shape[1] > 1:
            check_movable(self.compressor.name, self.language_model, input_ids.shape[1])
        if has_past and kv_positions is not None and _n_new(input_ids, inputs_embeds) > 1:
            attention_mask = compressing.mask_amid_text(
                self, self.language_model, input_ids, inputs_embeds, attention_mask, past_key_values, position_ids, kv_positions
            )
        elif not has_past and (self.compressor.n_bottleneck or question_ids is not None):
            attention_mask, position_ids = self._masked_pass(
                input_ids, inputs_embeds, attention_mask, position_ids, question_ids, past_key_values, kwargs
            )
        return super().forward(
            input_ids=ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )

    def _fused(
        self,
        input_ids: Tensor | None,
        images: Any,
        attention_mask: Tensor | None,
        cache: Cache | None,
        question_ids: Tensor | None,
        is_answer: Tensor | None,
    ) -> Tensor | None:
        """(B, L, D), what the language model gets after pre-fusion; None where there is nothing to fuse."""
        name = self.compressor.name
        if cache is not None and cache.get_seq_length():
            if images is not None or (input_ids is not None and input_ids.shape[1] > 1):
                raise ValueError(
                    f"{name}: words after a cached prompt would not have read the picture; give the whole conversation"
                )
            return None
        if images is None:
            return None
        if input_ids is None:
            raise ValueError(f"{name} finds images by their placeholders; give input_ids, not embeddings")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"{name} masks by itself; give a 2-D attention_mask, got {attention_mask.ndim}-D")
        embeds = self.get_input_embeddings()(input_ids)
        tokens = torch.cat(list(images.pooler_output)).to(embeds.device, embeds.dtype)  # (I * C, D)
        is_image = self.get_placeholder_mask(input_ids, inputs_embeds=embeds, image_features=tokens)
        return fuse(
            embeds.masked_scatter(is_image, tokens),
            self.layout(input_ids, attention_mask, question_ids),
            images.patches.to(embeds.device),
            len(images.pooler_output[0]),
            is_answer,
            self.compressor.fusion_layers,
            self.language_model,
        )

    def _read_apart(
        self,
        input_ids: Tensor,
        images: BaseModelOutputWithPooling,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        question_ids: Tensor | None,
        kwargs: dict[str, Any],
    ) -> LlavaModelOutputWithPast:
        """Compress, with gradients, then the text over the entries: what methods that `reads_apart` train on."""
        compressor = self.compressor
        if kwargs.pop("use_cache", None) and not self.training:
            raise ValueError(
                "this pass keeps no cache; call model.compress(...) and pass compressed=..., or model.generate(...)"
            )
        layout = self.layout(input_ids, attention_mask, question_ids)
        compressing.check_bottlenecks(layout, self.compressor)
        layout, n_entries = reading.of_budget(layout, compressor, self.training)
        embeds = self.get_input_embeddings()(input_ids)
        visual = torch.stack(list(images.pooler_output)).to(embeds.device, embeds.dtype)  # (images, C, D)
        self.get_placeholder_mask(input_ids, inputs_embeds=embeds, image_features=visual.flatten(0, 1))
        kv = reading.read(self.language_model, compressor, visual, n_entries)
        if position_ids is None:
            position_ids = rope.position_ids(layout, compressor.positions)
        out = reading.run_text(self.language_model, embeds, layout, position_ids, kv, **kwargs)
        return LlavaModelOutputWithPast(
            last_hidden_state=out.last_hidden_state,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            image_hidden_states=visual,
        )

    def _masked_pass(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        question_ids: Tensor | None,
        cache: Cache | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor | None, Tensor | None]:
        """The mask and positions of the paper's single pass. Changes `kwargs`: no cache is kept of hidden tokens."""
        if input_ids is None:
            raise ValueError(
                f"compressor {self.compressor.name!r} reads the layout from input_ids; give them, not embeddings"
            )
        layout = self.layout(input_ids, attention_mask, question_ids)
        has_image = bool(layout.is_visual.any())
        compressing.check_has_image(layout, has_image)
        if not has_image and question_ids is None:
            return attention_mask, position_ids  # text only: plain LLaVA
        if has_image and self.compressor.n_bottleneck:
            compressing.check_bottlenecks(layout, self.compressor)
            if cache is not None or kwargs.get("use_cache"):
                raise ValueError(
                    "a masked pass keeps no cache: it would show the visual tokens to what follows. Call "
                    "model.compress(...) and pass compressed=..., or model.generate(...), which does so"
                )
        kwargs["use_cache"] = False
        visible = self.compressor.visible(layout)
        if visible is None:
            visible = masks.packed_causal(layout)
        like = torch.empty((*input_ids.shape, 0), dtype=self.dtype, device=input_ids.device)
        if position_ids is None:
            position_ids = rope.position_ids(layout, self.compressor.positions)
        return hf_compat.ready_mask(self.language_model.config, like, attention_mask, visible), position_ids

    def layout(
        self, input_ids: Tensor, attention_mask: Tensor | None, question_ids: Tensor | None = None
    ) -> TokenLayout:
        """What each token of a prompt is."""
        bottleneck = self.config.bottleneck_token_id if self.compressor.n_bottleneck else None
        return TokenLayout.from_input_ids(
            input_ids, attention_mask, self.config.image_token_id, bottleneck, question_ids
        )

    # ---------------------------------------------------------------- compress
    @torch.no_grad()
    def compress_visual(self, visual: Tensor, path: str = "auto", n_entries: int | None = None) -> Tensor:
        """(N, C, D) visual tokens -> their kv (N, layers, 2, kv heads, K, head_dim): the language model's part of
        `compress`. path: "general" is the masked pass, "auto" takes the fast path of fast_prefill.py where it applies,
        "fast" refuses (ValueError) where it does not."""
        bottleneck = compressing.bottleneck_embeds(self, self.compressor, visual)
        return compressing.compress(self.language_model, self.compressor, visual, bottleneck, path, n_entries)

    def compress_pass(self, visual: Tensor, output_hidden_states: bool = False) -> tuple[Any, Tensor]:
        """(N, C, D) visual tokens -> the output of a pass over [visual; bottleneck] with cache; the position ids."""
        bottleneck = compressing.bottleneck_embeds(self, self.compressor, visual)
        if bottleneck is None:
            raise ValueError(f"{self.compressor.name} has no single pass over an image; use model/reading.py::look")
        return compressing.run(
            self.language_model, self.compressor, visual, bottleneck, output_hidden_states=output_hidden_states
        )


def _goes_on(cache: Cache | None) -> bool:
    """Does the cache hold anything? Then its images were read before."""
    return cache is not None and bool(cache.get_seq_length())


def _n_new(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """Tokens of this forward pass."""
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise ValueError("give input_ids or inputs_embeds")
    return given.shape[1]
