"""Compress images into keys and values, and generate text over them.

Source:  transformers' LlavaForConditionalGeneration; HTC-VLM Algorithm 1; VoCo-LLaMA section 3.
Differs: training runs the paper's one masked pass; inference runs two (compress, then text over the kv), which a
         contract test proves equal. With `compressor: none` nothing differs from LLaVA.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin

from htc_vlm.applied import hf_compat
from htc_vlm.applied.hf_compat import check_has_images, generate_option
from htc_vlm.compressors import Compressor
from htc_vlm.model import adapter, compressing
from htc_vlm.model.compressed import CompressedImages, check_images
from htc_vlm.model.compressing import Group
from htc_vlm.model.generation_options import (
    Configs,
    check_fuses_once,
    check_over_images,
    moved_lengths,
    n_reserved,
    own_cache,
)
from htc_vlm.model.image_slots import Placed, place
from htc_vlm.model.look_maps import byte_maps
from htc_vlm.model.movable import check_movable
from htc_vlm.model.recipe import Recipe, recipe_of
from htc_vlm.ops import rope


@dataclass(frozen=True)
class Reserve:
    """Room of a static cache: so many new tokens, at least so many entries in all, so many rows of each prompt."""

    n_new: int
    n_least: int
    n_copies: int


class GeneratesOverKv(GenerationMixin):
    """Mixed in front of a vision-language model with `model.compressor`: compresses images and answers from them.

    IMAGE_INPUTS: the arguments that carry images; a model takes them in `image_groups`. HAS_MAPS: can be told where the
    bottleneck looked, a patch of one square grid each?
    image_processor: what makes this model's pixels, a part of the recipe; `load` sets it. None: not known.
    """

    IMAGE_INPUTS: ClassVar[tuple[str, ...]] = ("pixel_values",)
    HAS_MAPS: ClassVar[bool] = True
    image_processor: Any = None

    def image_groups(self, **images: Any) -> list[Group]:
        """The images of a batch as the language model is to read them, those of one size together."""
        raise NotImplementedError

    @property
    def _compressor(self) -> Compressor:
        compressor: Compressor = self.model.compressor
        return compressor

    # ---------------------------------------------------------------- compress
    @torch.no_grad()
    def compress(
        self,
        pixel_values: Tensor | None = None,
        patch_features: Tensor | None = None,
        image_codes: Tensor | None = None,
        path: str = "auto",
        n_entries: int | None = None,
        maps: bool = False,
        image_processor: Any = None,
        **inputs: Any,
    ) -> CompressedImages:
        """(N, 3, height, width) -> N images as kv, one cache entry (K for K bottleneck tokens) per layer each.

        inputs: what else the model's processor returns of images (image_sizes, image_grid_thw, ...).
        path: "auto", "fast" or "general", see `compressing.compress`. n_entries: fewer than K, where the compressor
        was trained with nested budgets (`Compressor.budgets`).
        maps: keep where the bottleneck looked, too (`CompressedImages.maps`); a second pass over the image.
        image_processor: what made the pixels, where it is not the model's own.
        ValueError for methods without a bottleneck (they have nothing smaller to keep), and for other budgets.
        """
        self._need_bottleneck()
        budgets = self._compressor.budgets
        if n_entries is not None and n_entries not in budgets:
            raise ValueError(
                f"n_entries is {n_entries}; {self._compressor.name!r} with these settings compresses an image into "
                f"{', '.join(map(str, budgets))}"
            )
        made_by = self.recipe(image_processor).digest  # refuses weights that are not here, before anything is computed
        features = {"patch_features": patch_features, "image_codes": image_codes}
        given = {name: value for name, value in features.items() if value is not None}
        groups = self.image_groups(pixel_values=pixel_values, **given, **inputs)
        embeds = compressing.bottleneck_embeds(self, self._compressor, groups[0].visual)
        kv = compressing.compress_groups(self.get_decoder(), self._compressor, groups, embeds, path, n_entries)
        n_visual = [group.cost for group, _ in compressing.in_order(groups)]
        seen = self._maps(groups) if maps else None
        return CompressedImages(kv, made_by, n_visual, seen)

    @torch.no_grad()
    def bottleneck_attention(self, pixel_values: Tensor | None = None, **inputs: Any) -> Tensor:
        """What each bottleneck token looked at: (N, layers, H, K, C + K), rows sum to 1; from `compress`'s pass."""
        self._need_bottleneck("so nothing looked at the image")
        return self._attention_over(self.image_groups(pixel_values=pixel_values, **inputs))

    def _attention_over(self, groups: list[Group]) -> Tensor:
        """(N, layers, H, K, C + K) of images of one size; ValueError for others."""
        if len(groups) > 1:
            raise ValueError(f"these pictures have {len(groups)} sizes, and what was looked at has one shape; give one size")
        embeds = compressing.bottleneck_embeds(self, self._compressor, groups[0].visual)
        return compressing.attention(self.get_decoder(), self._compressor, groups[0], embeds)

    def _maps(self, groups: list[Group]) -> Tensor:
        """(N, P) uint8, where the bottleneck looked."""
        return byte_maps(self.config.compressor, self._attention_over(groups))

    def _need_bottleneck(self, lacks: str = "so there are no kv to keep") -> None:
        if not self._compressor.n_bottleneck:
            raise ValueError(
                f"compressor {self._compressor.name!r} has no bottleneck, {lacks}; "
                "use voco, htc or readers, or call generate with pixel_values"
            )

    def recipe(self, image_processor: Any = None) -> Recipe:
        """What decides how a picture is compressed, see recipe.py; with the model's own image processor by default."""
        with adapter.at_work(self.get_decoder()):  # an adapter decides, too, though the text runs without it
            return recipe_of(self, self.image_processor if image_processor is None else image_processor)

    def save_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Write the compressor alone, trained as an adapter of its base model; `load(base, adapter=folder)` reads it."""
        adapter.save(self, folder)

    # ---------------------------------------------------------------- answer
    def generate(
        self, inputs: Tensor | None = None, *args: Any, compressed: CompressedImages | None = None, **kwargs: Any
    ) -> Any:
        """As transformers' generate. With a bottleneck method images are compressed first, then answered from kv.

        compressed: images compressed before, instead of pixel_values; `image_slots.place` says how prompts refer to them.
        cache_implementation: "dynamic" (default) grows with each token; "static" reserves max_new_tokens (or
        max_cache_len) at once, which transformers then compiles the decoding for, on a GPU (not measured). On a CPU
        nothing is compiled and each step attends to the whole reserve: 16 tokens of `tiny` took 1.03 times as long as
        with "dynamic", 1.17 times with 256 entries reserved (CPU time, best of four on a busy machine).
        Returned sequences start with the prompt as it was given, and max_length counts it so.
        ValueError for a prompt with places for images and none given, and for options that cannot go over images.
        """
        bottleneck = self._compressor.n_bottleneck
        pixels = {name: kwargs.pop(name, None) for name in self.IMAGE_INPUTS}
        has_pixels = pixels["pixel_values"] is not None or pixels.get("patch_features") is not None
        configs = self._configs(args, kwargs)
        if not bottleneck or not (has_pixels or compressed is not None):
            if compressed is not None:
                self._need_bottleneck()
            if self._compressor.n_fusion and has_pixels:
                check_fuses_once(self._compressor.name, configs, kwargs)
            if pixels.get("patch_features") is not None:  # generate knows pixel_values only, and would drop these silently
                kwargs["mm_encoder_outputs"] = {"image": self.model.get_image_features(**pixels)}
            elif has_pixels:
                kwargs |= {name: value for name, value in pixels.items() if value is not None}
            elif not any(kwargs.get(name) is not None for name in ("mm_encoder_outputs", "inputs_embeds", "past_key_values")):
                marks = [self.config.image_token_id, self.config.bottleneck_token_id if bottleneck else None]
                check_has_images(kwargs.get("input_ids") if inputs is None else inputs, marks)
            return super().generate(inputs, *args, **kwargs)
        if compressed is not None and (has_pixels or pixels.get("image_codes") is not None):
            raise ValueError("give pixel_values (or patch_features, image_codes) or compressed=..., not both")
        if kwargs.get("past_key_values") is not None:
            raise ValueError(
                "past_key_values cannot be combined with images; give the whole conversation and compressed=..."
            )
        check_over_images(configs, kwargs)
        prompt = kwargs.pop("input_ids", None) if inputs is None else inputs
        if prompt is None:
            raise ValueError("generate needs input_ids (the question); got images only")
        if compressed is None:
            compressed = self._compress_for(prompt, kwargs.get("attention_mask"), pixels)
        n_copies = max(generate_option(name, kwargs, *configs) or 1 for name in ("num_beams", "num_return_sequences"))
        reserve = self._reserve(configs, kwargs, prompt.shape[1], n_copies)
        inputs_over_cells = self._inputs_over_cells(prompt, kwargs.pop("attention_mask", None), compressed, reserve)
        if n_copies > 1 and reserve is None:
            inputs_over_cells["past_key_values"].batch_repeat_interleave(n_copies)
        n_placed = inputs_over_cells["input_ids"].shape[1]
        kwargs = moved_lengths(configs, kwargs, prompt.shape[1], n_placed)
        out = super().generate(None, kwargs.pop("generation_config", None), *args[1:], **inputs_over_cells, **kwargs)
        return _with_prompt(out, prompt, n_placed)

    def _compress_for(self, prompt: Tensor, attention_mask: Tensor | None, pixels: dict[str, Any]) -> CompressedImages:
        """The images of prompts."""
        return self.compress(**pixels)

    def _reserve(self, configs: Configs, kwargs: dict[str, Any], n_given: int, n_copies: int) -> Reserve | None:
        """What a static cache must have room for; None for a dynamic one. Takes `cache_implementation` and
        `max_cache_len` out of `kwargs`: generate gets a ready-made cache."""
        kind = own_cache(kwargs, configs, ("dynamic", "static"))
        n_least = generate_option("max_cache_len", kwargs, *configs)
        kwargs.pop("max_cache_len", None)
        return None if kind != "static" else Reserve(n_reserved(configs, kwargs, n_given), int(n_least or 0), n_copies)

    def _configs(self, args: tuple, kwargs: dict[str, Any]) -> Configs:
        """What a call was given as generation_config (None where it was not), and the model's own."""
        return kwargs.get("generation_config") or (args[0] if args else None), self.generation_config

    def _text_over(
        self, compressed: CompressedImages, input_ids: Tensor | None, attention_mask: Tensor | None, others: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Arguments of a forward pass over compressed images; ValueError where it was given `others` beside them."""
        given = [name for name, value in others.items() if value is not None]
        if given:
            raise ValueError(f"with compressed=..., give input_ids and attention_mask only, and leave out {', '.join(given)}")
        if input_ids is None:
            raise ValueError("compressed=... needs input_ids (the question); got images only")
        inputs = self._inputs_over_cells(input_ids, attention_mask, compressed)
        n_cells = inputs["attention_mask"].shape[1] - inputs["position_ids"].shape[1]
        return {**inputs, "input_ids": inputs["input_ids"][:, n_cells:]}

    def _inputs_over_cells(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        compressed: CompressedImages,
        reserve: Reserve | None = None,
    ) -> dict[str, Any]:
        """Prompts and compressed images -> what a forward pass or generate needs to run the text over the kv."""
        self._need_bottleneck()
        check_images(compressed)
        compressed.check_made_by(self.recipe().digest)
        compressor, decoder = self._compressor, self.get_decoder()
        mark = compressing.bottleneck_id(self.config, compressor)
        placed = place(
            input_ids,
            attention_mask,
            n_images=len(compressed),
            n_bottleneck=compressor.n_bottleneck,
            n_entries=compressed.n_bottleneck,
            image_costs=compressed.n_visual if compressor.positions == "sequential" else [0] * len(compressed),
            image_token_id=self.config.image_token_id,
            bottleneck_token_id=mark,
        )
        check_movable(compressor.name, decoder, int(placed.text_position.max()) + 1)
        keys, values = self._gather_cells(placed, compressed)
        batch, n_cells = placed.is_slot.shape[0], keys.shape[3]
        is_cell = placed.is_slot.repeat_interleave(compressed.n_bottleneck, dim=1)
        config = decoder.config
        if reserve is None:
            cache: Cache = hf_compat.cache_from_kv(keys, values, batch, config)
        else:
            n_entries = max(n_cells + placed.text_ids.shape[1] + reserve.n_new, reserve.n_least)
            cache = hf_compat.static_cache_from_cells(keys, values, batch, reserve.n_copies, n_entries, config)
        out = {
            "input_ids": torch.cat((placed.text_ids.new_full((batch, n_cells), mark), placed.text_ids), 1),
            "attention_mask": torch.cat((is_cell, placed.text_mask), dim=1).long(),
            "position_ids": placed.text_position,
            "past_key_values": cache,
        }
        if placed.interleaved:
            steps = torch.arange(compressed.n_bottleneck, device=keys.device)
            out["kv_positions"] = (placed.slot_position[:, :, None] + steps).flatten(1)
        return out

    def _gather_cells(self, placed: Placed, compressed: CompressedImages) -> tuple[Tensor, Tensor]:
        """Keys rotated to their places, and values, each (B, layers, kv heads, slots * K, head_dim); B is 1 where all
        prompts read one image at one position."""
        image, position = placed.image, placed.slot_position
        if placed.alike:
            image, position = image[:1], position[:1]
        embedding = self.get_input_embeddings()
        kv = compressed.kv.to(embedding.weight.device, hf_compat.compute_dtype(embedding, self.dtype))
        chosen = kv if placed.alike else kv[image.flatten()]  # (B * slots, layers, 2, kv heads, K, head_dim)
        inv_freq = self.get_decoder().rotary_emb.inv_freq
        keys = rope.rotate_keys(chosen[:, :, 0], inv_freq.to(kv.device), position.flatten())
        return _join_slots(keys, image.shape[1]), _join_slots(chosen[:, :, 1], image.shape[1])


def _join_slots(kv: Tensor, n_slots: int) -> Tensor:
    """(B * slots, layers, kv heads, K, head_dim) -> (B, layers, kv heads, slots * K, head_dim); one slot: no copy."""
    if n_slots == 1:
        return kv
    return kv.unflatten(0, (-1, n_slots)).permute(0, 2, 3, 1, 4, 5).flatten(3, 4)


def _with_prompt(out: Any, prompt: Tensor, n_placed: int) -> Any:
    """Sequences that start with the caller's prompt instead of the one that ran over the kv."""
    sequences = out if isinstance(out, Tensor) else out.sequences
    repeated = prompt.repeat_interleave(sequences.shape[0] // prompt.shape[0], dim=0).to(sequences.device)
    joined = torch.cat((repeated, sequences[:, n_placed:]), dim=1)
    if isinstance(out, Tensor):
        return joined
    out.sequences = joined
    return out
