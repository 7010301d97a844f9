"""HTC-VLM as a Hugging Face model: LLaVA plus a compressor.

Source:  transformers' LlavaForConditionalGeneration; HTC-VLM Algorithm 1; VoCo-LLaMA section 3.
Differs: training runs the paper's one masked pass; inference runs two (compress, then text over the kv), which a
         contract test proves equal. With `compressor: none` nothing differs from LLaVA.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import select_hidden_states

from htc_vlm import compressors
from htc_vlm.applied import hf_compat
from htc_vlm.applied.hf_compat import n_patches
from htc_vlm.compressors import Compressor, ImageFeatures, Sizes
from htc_vlm.model import fast_prefill
from htc_vlm.model.compressed import CompressedImages
from htc_vlm.model.configuration import HtcVlmConfig
from htc_vlm.model.image_slots import Placed, place
from htc_vlm.model.prefusion import ImagesToFuse, fuse
from htc_vlm.model.recipe import fingerprint
from htc_vlm.ops import masks, rope
from htc_vlm.tokens import TokenLayout

# How LLaVA checkpoints on the hub name their weights -> the names in memory (and in files that we write).
# transformers does the same renaming, but only for its own classes.
HUB_NAMES = {
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^vision_tower\.": "model.vision_tower.",
    r"^multi_modal_projector\.": "model.multi_modal_projector.",
}


class HtcVlmPreTrainedModel(LlavaPreTrainedModel):
    config_class = HtcVlmConfig
    config: HtcVlmConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Compressor):
            module.init_own_weights()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; checkpoints named as LLaVA's on the hub are understood too."""
        kwargs.setdefault("key_mapping", HUB_NAMES)
        return super().from_pretrained(*args, **kwargs)

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> None:
        """As transformers', under the names in memory: Trainer resumes by these, and would silently skip hub names."""
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)


class HtcVlmModel(HtcVlmPreTrainedModel, LlavaModel):
    """Vision tower, projector, compressor and language model, without a head."""

    def __init__(self, config: HtcVlmConfig) -> None:
        super().__init__(config)
        self.compressor = compressors.build(**config.compressor)
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
            features=patch_features.to(self.multi_modal_projector.linear_1.weight.dtype),
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
        shape = (1, -1, 1, 1)
        mean = torch.tensor(self.config.image_mean, device=pixel_values.device).view(shape)
        std = torch.tensor(self.config.image_std, device=pixel_values.device).view(shape)
        return (pixel_values.float() * std + mean).clamp(0, 1)

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
        has_past = past_key_values is not None and hf_compat.has_past(past_key_values, _n_new(input_ids, inputs_embeds))
        if has_past and kv_positions is not None and _n_new(input_ids, inputs_embeds) > 1:
            like = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            if position_ids is None:
                raise ValueError("images amid the text need position_ids beside kv_positions; use compressed=...")
            attention_mask = hf_compat.mask_over_kv(
                self.language_model.config, like, attention_mask, past_key_values, position_ids, kv_positions
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
        if not has_image and question_ids is None:
            return attention_mask, position_ids  # text only: plain LLaVA
        if has_image and self.compressor.n_bottleneck:
            self._check_bottlenecks(layout)
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

    def _check_bottlenecks(self, layout: TokenLayout) -> None:
        n_images = int(layout.image.max(dim=1).values.sum())
        n_bottleneck = int(layout.is_bottleneck.sum())
        if n_bottleneck != n_images * self.compressor.n_bottleneck:
            raise ValueError(
                f"{n_images} images need {self.compressor.n_bottleneck} bottleneck tokens each after their "
                f"placeholders, the prompts have {n_bottleneck}: text would not see the image. Use HtcVlmProcessor "
                "with this model's settings"
            )

    # ---------------------------------------------------------------- compress
    @torch.no_grad()
    def compress_visual(self, visual: Tensor, path: str = "auto") -> Tensor:
        """(N, C, D) visual tokens -> their kv (N, layers, 2, kv heads, K, head_dim): the language model's part of
        `compress`. path: "general" is the masked pass, "auto" takes the fast path of fast_prefill.py where it applies,
        "fast" refuses (ValueError) where it does not."""
        n_bottleneck = self.compressor.n_bottleneck
        if fast_prefill.takes_fast_path(path, self.language_model, self.compressor, visual.shape[1] + n_bottleneck):
            return fast_prefill.compress(self.language_model, visual, self._bottleneck_embeds(visual))
        out, _ = self.compress_pass(visual)
        return hf_compat.kv_from_cache(out.past_key_values, n_bottleneck)

    def compress_pass(self, visual: Tensor, output_hidden_states: bool = False) -> tuple[Any, Tensor]:
        """(N, C, D) visual tokens -> the output of a pass over [visual; bottleneck] with cache; the position ids."""
        n_images, n_visual, _ = visual.shape
        n_bottleneck = self.compressor.n_bottleneck
        embeds = torch.cat((visual, self._bottleneck_embeds(visual).expand(n_images, -1, -1)), dim=1)
        kinds = TokenLayout.from_string("v" * n_visual + "b" * n_bottleneck).kind.to(visual.device)
        layout = TokenLayout.from_kind(kinds.expand(n_images, -1))
        position_ids = torch.arange(-n_visual, n_bottleneck, device=visual.device).expand(n_images, -1)
        visible = self.compressor.visible(layout)
        if visible is None:
            raise ValueError(f"compressor {self.compressor.name!r} has bottleneck tokens but no mask around them")
        mask = hf_compat.ready_mask(self.language_model.config, embeds, None, visible)
        out = self.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=True,
            output_hidden_states=output_hidden_states,
        )
        return out, position_ids

    def _bottleneck_embeds(self, like: Tensor) -> Tensor:
        """(K, D)"""
        ids = torch.full((self.compressor.n_bottleneck,), self._bottleneck_id(), device=like.device)
        return self.get_input_embeddings()(ids).to(like.dtype)

    def _bottleneck_id(self) -> int:
        if self.config.bottleneck_token_id is None:
            raise ValueError(
                f"compressor {self.compressor.name!r} needs config.bottleneck_token_id; htc_vlm.model.add_compressor adds it"
            )
        return int(self.config.bottleneck_token_id)


@dataclass(frozen=True)
class Reserve:
    """Room of a static cache: so many new tokens, at least so many entries in all, so many rows of each prompt."""

    n_new: int
    n_least: int
    n_copies: int


class HtcVlmForConditionalGeneration(HtcVlmPreTrainedModel, LlavaForConditionalGeneration):
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
        as `placing.place` orders them. For the other additions see HtcVlmModel.forward."""
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

    # ---------------------------------------------------------------- compress
    @torch.no_grad()
    def compress(
        self,
        pixel_values: Tensor | None = None,
        patch_features: Tensor | None = None,
        image_codes: Tensor | None = None,
        path: str = "auto",
    ) -> CompressedImages:
        """(N, 3, height, width) -> N images as kv, one cache entry (K for K bottleneck tokens) per layer each.

        path: "auto", "fast" or "general", see `HtcVlmModel.compress_visual`.
        ValueError for methods without a bottleneck: they have nothing smaller to keep.
        """
        self._need_bottleneck()
        visual = self.visual_tokens(pixel_values, patch_features, image_codes)
        kv = self.model.compress_visual(visual, path=path)
        return CompressedImages(kv=kv, fingerprint=self.fingerprint(), n_visual=visual.shape[1])

    @torch.no_grad()
    def bottleneck_attention(self, pixel_values: Tensor | None = None, **features: Tensor) -> Tensor:
        """What each bottleneck token looked at: (N, layers, H, K, C + K), rows sum to 1; from `compress`'s pass."""
        self._need_bottleneck()
        visual = self.visual_tokens(pixel_values, **features)
        out, position_ids = self.model.compress_pass(visual, output_hidden_states=True)
        return hf_compat.attention_of_last_rows(
            self.model.language_model,
            out.hidden_states,
            out.past_key_values,
            position_ids,
            self.model.compressor.n_bottleneck,
        )

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
        return torch.stack(list(images)).to(self.get_input_embeddings().weight.dtype)

    def _need_bottleneck(self) -> None:
        if not self.model.compressor.n_bottleneck:
            raise ValueError(
                f"compressor {self.model.compressor.name!r} has no bottleneck, so there are no kv to keep; "
                "use voco or htc, or call generate with pixel_values"
            )

    def fingerprint(self) -> str:
        """16 hex digits of the weights and the compressor's settings: see fingerprint.py."""
        return fingerprint(self, self.config.compressor)

    # ---------------------------------------------------------------- answer
    def generate(
        self, inputs: Tensor | None = None, *args: Any, compressed: CompressedImages | None = None, **kwargs: Any
    ) -> Any:
        """As transformers' generate. With a bottleneck method images are compressed first, then answered from kv.

        compressed: images compressed before, instead of pixel_values; `placing.place` says how prompts refer to them.
        cache_implementation: "dynamic" (default) grows with each token; "static" reserves max_new_tokens (or
        max_cache_len) at once, which transformers then compiles the decoding for, on a GPU (not measured). On a CPU
        nothing is compiled and each step attends to the whole reserve: 16 tokens of `tiny` took 1.03 times as long as
        with "dynamic", 1.17 times with 256 entries reserved (CPU time, best of four on a busy machine).
        Returned sequences start with the prompt as it was given.
        """
        bottleneck = self.model.compressor.n_bottleneck
        pixels = {name: kwargs.pop(name, None) for name in ("pixel_values", "patch_features", "image_codes")}
        has_pixels = pixels["pixel_values"] is not None or pixels["patch_features"] is not None
        if not bottleneck or not (has_pixels or compressed is not None):
            if compressed is not None:
                self._need_bottleneck()
            if pixels["patch_features"] is not None:  # generate knows pixel_values only, and would drop these silently
                kwargs["mm_encoder_outputs"] = {"image": self.model.get_image_features(**pixels)}
            elif has_pixels:
                kwargs["pixel_values"] = pixels["pixel_values"]
            return super().generate(inputs, *args, **kwargs)
        if has_pixels and compressed is not None:
            raise ValueError("give pixel_values or compressed=..., not both")
        if kwargs.get("past_key_values") is not None:
            raise ValueError(
                "past_key_values cannot be combined with images; give the whole conversation and compressed=..."
            )
        if compressed is None:
            compressed = self.compress(**pixels)
        prompt = kwargs.pop("input_ids", None) if inputs is None else inputs
        if prompt is None:
            raise ValueError("generate needs input_ids (the question); got images only")
        reserve, n_copies = self._reserve(args, kwargs), self._n_copies(args, kwargs)
        inputs_over_cells = self._inputs_over_cells(prompt, kwargs.pop("attention_mask", None), compressed, reserve)
        if n_copies > 1 and reserve is None:
            inputs_over_cells["past_key_values"].batch_repeat_interleave(n_copies)
        out = super().generate(None, *args, **inputs_over_cells, **kwargs)
        return _with_prompt(out, prompt, n_placed=inputs_over_cells["input_ids"].shape[1])

    def _reserve(self, args: tuple, kwargs: dict[str, Any]) -> Reserve | None:
        """What a static cache must have room for; None for a dynamic one. Takes `cache_implementation` and
        `max_cache_len` out of `kwargs`: generate gets a ready-made cache."""
        kind, n_least = kwargs.pop("cache_implementation", None), kwargs.pop("max_cache_len", None)
        if kind not in (None, "dynamic", "static"):
            raise ValueError(f"cache_implementation is {kind!r}; over compressed images: 'dynamic', 'static'")
        if kind != "static":
            return None
        config = self._generation_config(args, kwargs)
        n_new = kwargs.get("max_new_tokens") or config.max_new_tokens
        if n_new is None:
            raise ValueError("a static cache is reserved at once; give max_new_tokens")
        return Reserve(int(n_new), int(n_least or config.max_cache_len or 0), self._n_copies(args, kwargs))

    def _generation_config(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        return kwargs.get("generation_config") or (args[0] if args else None) or self.generation_config

    def _n_copies(self, args: tuple, kwargs: dict[str, Any]) -> int:
        """How many rows generate will make of each prompt (beams, return sequences)."""
        config = self._generation_config(args, kwargs)
        counts = [kwargs.get(name) or getattr(config, name) or 1 for name in ("num_beams", "num_return_sequences")]
        return max(counts)

    def _inputs_over_cells(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        compressed: CompressedImages,
        reserve: Reserve | None = None,
    ) -> dict[str, Any]:
        """Prompts and compressed images -> what a forward pass or generate needs to run the text over the kv."""
        self._need_bottleneck()
        compressed.check_made_by(self.fingerprint())
        compressor = self.model.compressor
        placed = place(
            input_ids,
            attention_mask,
            n_images=len(compressed),
            n_bottleneck=compressor.n_bottleneck,
            image_cost=compressed.n_visual if compressor.positions == "sequential" else 0,
            image_token_id=self.config.image_token_id,
            bottleneck_token_id=self.model._bottleneck_id(),
        )
        keys, values = self._gather_cells(placed, compressed)
        batch, n_cells = placed.is_slot.shape[0], keys.shape[3]
        is_cell = placed.is_slot.repeat_interleave(compressor.n_bottleneck, dim=1)
        config = self.model.language_model.config
        if reserve is None:
            cache: Cache = hf_compat.cache_from_kv(keys, values, batch, config)
        elif placed.interleaved:
            raise ValueError("images amid the text need cache_implementation='dynamic', or put the images first")
        else:
            n_entries = max(n_cells + placed.text_ids.shape[1] + reserve.n_new, reserve.n_least)
            cache = hf_compat.static_cache_from_cells(keys, values, batch, reserve.n_copies, n_entries, config)
        out = {
            "input_ids": torch.cat(
                (placed.text_ids.new_full((batch, n_cells), self.model._bottleneck_id()), placed.text_ids), 1
            ),
            "attention_mask": torch.cat((is_cell, placed.text_mask), dim=1).long(),
            "position_ids": placed.text_position,
            "past_key_values": cache,
        }
        if placed.interleaved:
            steps = torch.arange(compressor.n_bottleneck, device=keys.device)
            out["kv_positions"] = (placed.slot_position[:, :, None] + steps).flatten(1)
        return out

    def _gather_cells(self, placed: Placed, compressed: CompressedImages) -> tuple[Tensor, Tensor]:
        """Keys rotated to their places, and values, each (B, layers, kv heads, slots * K, head_dim); B is 1 where all
        prompts read one image at one position."""
        image, position = placed.image, placed.slot_position
        if placed.alike:
            image, position = image[:1], position[:1]
        embedding = self.get_input_embeddings().weight
        kv = compressed.kv.to(embedding.device, embedding.dtype)
        chosen = kv if placed.alike else kv[image.flatten()]  # (B * slots, layers, 2, kv heads, K, head_dim)
        inv_freq = self.model.language_model.rotary_emb.inv_freq
        keys = rope.rotate_keys(chosen[:, :, 0], inv_freq.to(kv.device), position.flatten())
        return _join_slots(keys, image.shape[1]), _join_slots(chosen[:, :, 1], image.shape[1])


def _join_slots(kv: Tensor, n_slots: int) -> Tensor:
    """(B * slots, layers, kv heads, K, head_dim) -> (B, layers, kv heads, slots * K, head_dim); one slot: no copy."""
    if n_slots == 1:
        return kv
    return kv.unflatten(0, (-1, n_slots)).permute(0, 2, 3, 1, 4, 5).flatten(3, 4)


def _n_new(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """Tokens of this forward pass."""
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise ValueError("give input_ids or inputs_embeds")
    return given.shape[1]


def _with_prompt(out: Any, prompt: Tensor, n_placed: int) -> Any:
    """Sequences that start with the caller's prompt instead of the one that ran over the kv."""
    sequences = out if isinstance(out, Tensor) else out.sequences
    repeated = prompt.repeat_interleave(sequences.shape[0] // prompt.shape[0], dim=0).to(sequences.device)
    joined = torch.cat((repeated, sequences[:, n_placed:]), dim=1)
    if isinstance(out, Tensor):
        return joined
    out.sequences = joined
    return out


def sizes_of(config: HtcVlmConfig) -> Sizes:
    """What compressors with weights need to know, read from the configuration."""
    vision = config.vision_config
    n_layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
    return Sizes(
        n_patches=n_patches(config),
        vision_width=vision.hidden_size * n_layers,
        llm_width=config.text_config.hidden_size,
        initializer_range=config.text_config.initializer_range,
    )
