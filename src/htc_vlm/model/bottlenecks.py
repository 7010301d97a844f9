"""A bottleneck in other families than LLaVA: mixins over a family's own model, configuration and processor of transformers.

    prompt      [text; the picture's visual placeholders, extra ones for anchors; its bottleneck tokens; text]
    training    one masked pass over it, as LLaVA's (`readers`: compress, then text over the entries)
    inference   each picture by itself, in groups of one size; then the family's own decoder over the entries

Source:  HTC-VLM Algorithm 1; VoCo-LLaMA section 3; transformers 5.23 for the families' get_image_features and processors.
Differs: from our LLaVA: pictures have any number of visual tokens. All tiles of a picture are one image, without the marks
         that SmolVLM and Idefics3 write between tiles; anchors (htc) read the whole picture, which the tiles begin or end
         with. With M-RoPE (Qwen-VL) text and bottleneck have equal positions on all axes. The deep features that Qwen3-VL adds
         in its first layers go with their tokens; anchors have none. Videos are refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers.modeling_outputs import CausalLMOutputWithPast

from htc_vlm import compressors
from htc_vlm.applied import hf_compat
from htc_vlm.applied.families import OURS, family_of
from htc_vlm.compressors import Compressor, ImageFeatures, Sizes
from htc_vlm.model import compressing, reading
from htc_vlm.model.bottleneck_processing import OF_TEXT, check_no_video, extra_tokens, processor_class
from htc_vlm.model.compressed import CompressedImages
from htc_vlm.model.compressing import Group
from htc_vlm.model.configuration import check_settings
from htc_vlm.model.generation import GeneratesOverKv
from htc_vlm.model.movable import check_movable
from htc_vlm.model.pretrained import HoldsCompressor
from htc_vlm.ops import rope
from htc_vlm.tokens import TokenLayout

# model type -> how transformers' class names begin
STOCK = {
    "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision", "internvl": "InternVL", "smolvlm": "SmolVLM",
    "idefics3": "Idefics3", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL",
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- model
class WithBottleneck(HoldsCompressor, GeneratesOverKv):
    """Mixed in front of a family's ForConditionalGeneration."""

    HAS_MAPS = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.add_compressor()
        self.post_init()

    def add_compressor(self) -> None:
        """The compressor that the configuration names, with new weights."""
        self.model.compressor = check_method(self.config.compressor, type(self).__name__)
        self.model.compressor.setup(self._sizes(self.config))

    @staticmethod
    def _sizes(config: Any) -> Sizes:
        text = config.get_text_config()
        return Sizes(0, text.hidden_size, text.hidden_size, text.initializer_range, n_kv_heads=text.num_key_value_heads)

    # ---------------------------------------------------------------- images
    def image_groups(
        self,
        pixel_values: Tensor | None = None,
        image_lengths: Sequence[int] | Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **images: Any,
    ) -> list[Group]:
        """Pixels, as the processor returns them, -> visual tokens, those of one size together.

        images: what else get_image_features takes. Which tokens are one picture's is told by image_lengths (the processor
        returns it for pictures without text) or by the prompts; InternVL's and SmolVLM's pixels alone do not tell.
        """
        if pixel_values is None:
            raise ValueError("no image: give pixel_values, as this model's processor returns them")
        given = {"pixel_values": pixel_values}
        given |= {name: one for name, one in images.items() if one is not None and name not in OF_TEXT}
        unknown = sorted(set(given) - set(self.IMAGE_INPUTS))
        if unknown:
            raise TypeError(f"{unknown[0]} says nothing about images of {type(self).__name__}; it takes {self.IMAGE_INPUTS}")
        family, method = family_of(self), self._compressor
        encoded = self.model.get_image_features(**given, return_dict=True)
        features = encoded.pooler_output
        tokens = torch.cat([one.flatten(0, -2) for one in features])  # (all tokens, D)
        if image_lengths is not None:
            lengths = [int(n) for n in image_lengths]
        elif input_ids is not None:
            layout = self.layout(input_ids, attention_mask)
            compressing.check_bottlenecks(layout, method)
            lengths = [n - extra_tokens(method) for n in visual_lengths(layout)]
        elif family.tells_pictures:
            lengths = [len(one) for one in features]
        else:
            raise ValueError(
                f"the pixels of {type(self).__name__} do not tell which tiles are one picture; give image_lengths, which "
                "processor(images=...) returns"
            )
        if sum(lengths) != len(tokens):
            raise ValueError(
                f"the pictures have {len(tokens)} visual tokens, and {sum(lengths)} were announced ({lengths}); take prompts, "
                "pixels and image_lengths from one call of this model's processor"
            )
        tokens = tokens.to(hf_compat.compute_dtype(self.get_input_embeddings(), self.dtype))
        pixels = family.whole_pictures(lengths, given) if getattr(method, "has_code", False) else None
        deep = [torch.cat(list(layer)).to(tokens.dtype) for layer in getattr(encoded, "deepstack_features", None) or []]
        deeper = torch.stack(deep).split(lengths, dim=1) if deep else None
        sizes = [family.size_of(i, given) for i in range(len(lengths))]
        return self._grouped(tokens.split(lengths), sizes, pixels, deeper)

    def _grouped(
        self,
        patches: Sequence[Tensor],
        sizes: Sequence[tuple[int, ...]],
        pixels: Sequence[Tensor] | None,
        deep: Sequence[Tensor] | None,
    ) -> list[Group]:
        members: dict[tuple[int, ...], list[int]] = {}
        for number, (tokens, size) in enumerate(zip(patches, sizes, strict=True)):
            members.setdefault((len(tokens), *size), []).append(number)
        method, groups = self._compressor, []
        for key, numbers in members.items():
            n_patches, size = key[0], key[1:]
            seen = None if pixels is None else torch.stack([pixels[n] for n in numbers])
            given = ImageFeatures(
                features=torch.stack([patches[n] for n in numbers]),
                project=nn.Identity(),
                pixels=None if seen is None else hf_compat.in_unit_range(seen, self.config),
            )
            visual, promised = method.before_llm(given), method.n_visual(n_patches)
            if visual.shape[1] != promised:
                raise ValueError(f"{method.name} promised {promised} visual tokens and gave {visual.shape[1]}")
            positions = family_of(self).positions_of(size)
            if positions is not None:
                positions = with_anchors(positions, method).to(visual.device)
            deeper = None if deep is None else beside_anchors(torch.stack([deep[n] for n in numbers], dim=1), method)
            groups.append(Group(numbers, visual, positions, deeper))
        return groups

    def _compress_for(self, prompt: Tensor, attention_mask: Tensor | None, pixels: dict[str, Any]) -> CompressedImages:
        return self.compress(**pixels, input_ids=prompt, attention_mask=attention_mask)

    def _maps(self, groups: list[Group]) -> Tensor:
        raise ValueError(
            f"maps are laid over one square grid of patches, which pictures of {type(self).__name__} do not have; compress "
            "without maps"
        )

    # ---------------------------------------------------------------- one pass
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        compressed: CompressedImages | None = None,
        kv_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the family's. With pixels: the one masked pass that trains. compressed: answer from cached images; the logits are
        those of the text tokens, left-padded, as `image_slots.place` orders them. kv_positions: of images amid the text."""
        images = {name: kwargs.pop(name, None) for name in self.IMAGE_INPUTS}
        check_no_video(kwargs)
        if kwargs.pop("answers_only", False):
            raise ValueError(f"answers_only is known to LLaVA's models, not to {type(self).__name__}; leave it out")
        if compressed is not None:
            others = {
                "pixel_values": images["pixel_values"], "past_key_values": past_key_values, "inputs_embeds": inputs_embeds,
                "position_ids": position_ids, "kv_positions": kv_positions, "labels": labels,
            }  # fmt: skip
            inputs = self._text_over(compressed, input_ids, attention_mask, others)
            return self(**inputs, logits_to_keep=logits_to_keep, **kwargs)
        if images["pixel_values"] is not None:
            if input_ids is None or past_key_values is not None or kwargs.get("use_cache"):
                raise ValueError(
                    "a pass over images reads input_ids and keeps no cache: it would show the visual tokens to what follows. "
                    "Call model.compress(...) and pass compressed=..., or model.generate(...), which does so"
                )
            return self._with_images(input_ids, attention_mask, labels, logits_to_keep, images, kwargs)
        n_new = (inputs_embeds if input_ids is None else input_ids).shape[1]  # type: ignore[union-attr]
        has_past = hf_compat.has_past(past_key_values, n_new)
        if not has_past and input_ids is not None:
            if inputs_embeds is None and kwargs.get("mm_encoder_outputs") is None:
                hf_compat.check_has_images(input_ids, [self.config.image_token_id])
            compressing.check_has_image(self.layout(input_ids, attention_mask), has_image=False)
        if has_past and kv_positions is not None and n_new > 1:
            attention_mask = compressing.mask_amid_text(
                self, self.get_decoder(), input_ids, inputs_embeds, attention_mask, past_key_values, position_ids, kv_positions
            )
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, labels=labels, logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip

    def _with_images(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        images: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> Any:
        """The masked pass, or, for methods that `reads_apart`, the passes of inference with gradients."""
        method, decoder = self._compressor, self.get_decoder()
        check_movable(method.name, decoder, input_ids.shape[1])
        layout, kwargs = self.layout(input_ids, attention_mask), {**kwargs, "use_cache": False}
        groups = self.image_groups(**images, input_ids=input_ids, attention_mask=attention_mask)
        embeds = self.get_input_embeddings()(input_ids)
        places = compressing.in_order(groups)
        if method.reads_apart:
            return self._read_apart(layout, groups, embeds, labels, logits_to_keep, kwargs)
        visual = [group.visual[row].to(embeds.device, embeds.dtype) for group, row in places]
        deep = [group.deep[:, row] for group, row in places if group.deep is not None]  # (n, C, D) each
        if not deep:
            embeds = embeds.masked_scatter(layout.is_visual[..., None], torch.cat(visual))
            given: dict[str, Any] = {"inputs_embeds": embeds}
        else:  # only the family's own forward hands deep features on, with what it encoded itself
            encoded = Encoded(visual, [list(layer) for layer in zip(*deep, strict=True)])
            given = {"input_ids": input_ids, "mm_encoder_outputs": {"image": encoded}}
        costs = [group.cost if method.positions == "sequential" else 0 for group, _ in places]
        visible = compressing.mask_around(method, layout)
        ids = rope.with_images(layout, [group.place.to(embeds.device) for group, _ in places], costs)
        return super().forward(
            **given, attention_mask=hf_compat.ready_mask(decoder.config, embeds, attention_mask, visible),
            position_ids=ids[0] if len(ids) == 1 else ids, labels=labels, logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip

    def _read_apart(
        self,
        layout: TokenLayout,
        groups: list[Group],
        embeds: Tensor,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        kwargs: dict[str, Any],
    ) -> CausalLMOutputWithPast:
        method, decoder = self._compressor, self.get_decoder()
        layout, n_entries = reading.of_budget(layout, method, self.training)
        kv = compressing.compress_groups(decoder, method, groups, None, "auto", n_entries)
        is_sequential = method.positions == "sequential"
        places = compressing.in_order(groups)
        costs = [group.cost if is_sequential else 0 for group, _ in places]
        ids = rope.with_images(layout, [rope.around_image(group.visual.shape[1], 0) for group, _ in places], costs)[0]
        out = reading.run_text(decoder, embeds, layout, ids.to(embeds.device), kv, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(out.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            n_words, counted = self.config.get_text_config().vocab_size, kwargs.get("num_items_in_batch")
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=n_words, num_items_in_batch=counted)
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions)

    def layout(self, input_ids: Tensor, attention_mask: Tensor | None) -> TokenLayout:
        """What each token of a prompt is."""
        bottleneck = compressing.bottleneck_id(self.config, self._compressor)
        return TokenLayout.from_input_ids(input_ids, attention_mask, self.config.image_token_id, bottleneck)


def visual_lengths(layout: TokenLayout) -> list[int]:
    """Visual tokens of each image, in order of appearance.

    >>> visual_lengths(TokenLayout.from_string("tvvbtvb", "ptvvvbt"))
    [2, 1, 3]
    """
    rows = torch.arange(len(layout.image), device=layout.image.device)[:, None] * (layout.image.shape[1] + 1)
    return (layout.image + rows)[layout.is_visual].unique_consecutive(return_counts=True)[1].tolist()


def with_anchors(positions: Tensor, method: Compressor) -> Tensor:
    """(axes, P) -> (axes, C): anchors have equal positions on all axes, before the picture or between it and the bottleneck."""
    n_extra = extra_tokens(method)
    after = getattr(method.settings, "fusion", "pre") == "post"
    if after:
        positions = positions - n_extra
    first = -n_extra if after else int(positions.min()) - n_extra
    anchors = torch.arange(first, first + n_extra).expand(positions.shape[0], -1)
    return torch.cat((positions, anchors) if after else (anchors, positions), dim=1)


def beside_anchors(deep: Tensor, method: Compressor) -> Tensor:
    """(n, N, P, D) -> (n, N, C, D): nothing is added to anchors."""
    n_extra = extra_tokens(method)
    after = getattr(method.settings, "fusion", "pre") == "post"
    return torch.nn.functional.pad(deep, (0, 0, 0, n_extra) if after else (0, 0, n_extra, 0))


@dataclass(frozen=True)
class Encoded:
    """Images as a family's forward takes them in `mm_encoder_outputs`: of each image its tokens (C, D), and of each of the
    first layers what it adds to them."""

    pooler_output: list[Tensor]
    deepstack_features: list[list[Tensor]]


def check_method(options: Mapping[str, Any], model: str) -> Compressor:
    """The compressor. ValueError for one that cannot be put into other families than LLaVA."""
    method = compressors.build(**options)
    if not method.n_bottleneck:
        raise ValueError(
            f"{method.name} cannot be {model}'s own compressor: beyond LLaVA that must be a bottleneck (voco, htc, readers); "
            "methods without weights act by htc_vlm.apply on the stock model"
        )
    if any(method.n_visual(n) - n != extra_tokens(method) for n in (7, 100)):
        raise ValueError(
            f"{method.name} with these settings puts other tokens in the place of a picture's, for which all pictures must "
            "have one size (LLaVA); use channels: hybrid or continuous"
        )
    return method


# --------------------------------------------------------------------------------------------------------------- classes
@dataclass(frozen=True)
class Classes:
    """Of one family: transformers' own model class, and ours."""

    stock: Any
    config: Any
    model: Any
    processor: Any


def is_ours(model_type: str) -> bool:
    """Is it a family with a bottleneck of its own? (LLaVA's is "htc_vlm".)"""
    return model_type.startswith(OURS)


def classes_of(model_type: str) -> Classes:
    """The classes for a stock model type or one of ours, known to the Auto classes. ValueError for families without."""
    return _classes_of(model_type.removeprefix(OURS))


@functools.cache
def _classes_of(stock: str) -> Classes:
    if stock not in STOCK:
        raise ValueError(
            f"no bottleneck can be put into a model of type {stock!r}: how its pictures stand in prompts is not known here; it "
            f"can into llava, {', '.join(STOCK)}"
        )
    model, config = getattr(transformers, STOCK[stock] + "ForConditionalGeneration"), _config_class(stock)
    classes = Classes(model, config, _model_class(model, config), _named(processor_class(STOCK[stock])))
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto.register(classes.config, classes.model, exist_ok=True)
    AutoProcessor.register(classes.config, classes.processor, exist_ok=True)
    return classes


@functools.cache
def _config_class(stock: str) -> Any:
    base = getattr(transformers, STOCK[stock] + "Config")

    class Config(base):  # type: ignore[misc, valid-type]
        """The family's configuration with `compressor`, `bottleneck_token_id`, `image_mean` and `image_std` of HtcVlmConfig."""

        model_type = OURS + stock

        compressor: dict = field(default_factory=lambda: {"name": "voco"})
        bottleneck_token_id: int | None = None
        image_mean: list[float] | None = None
        image_std: list[float] | None = None

        def __post_init__(self, **kwargs: Any) -> None:
            super().__post_init__(**kwargs)
            check_settings(self)
            classes_of(stock)  # the Auto classes ask for a configuration first

    Config.__name__ = f"HtcVlm{STOCK[stock]}Config"
    return strict(_named(Config))


def _model_class(stock: Any, config: Any) -> Any:
    parameters = inspect.signature(stock.get_image_features).parameters
    names = tuple(name for name in parameters if name not in ("self", "kwargs"))
    own = {"config_class": config, "IMAGE_INPUTS": (*names, "image_lengths", *OF_TEXT)}
    made = type(f"HtcVlm{stock.__name__}", (WithBottleneck, stock), {"__module__": __name__, **own})
    return _named(made)


def _named(cls: Any) -> Any:
    """The class, kept under its name in this module, where pickle finds it."""
    cls.__qualname__ = cls.__name__
    globals()[cls.__name__] = cls
    return cls


for _stock in STOCK:
    AutoConfig.register(OURS + _stock, _config_class(_stock))
