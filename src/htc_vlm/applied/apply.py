"""Apply a method for a while: `with htc_vlm.apply(model, "fastv", n_keep=98, layer=2): model.generate(...)`.

Source:  docs/specs/baselines.md section 12 (tested recipe for transformers 5.23); each method's file names its paper.
Differs: modules change their class inside the block and get it back, whatever happens; no hooks, weights or globals.
         Any LlavaForConditionalGeneration works, ours included. Prompts stay as the stock processor makes them:
         placeholders that a method does not need are cut out on the way in, and generate returns the prompt as it was
         given.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from htc_vlm import compressors
from htc_vlm.applied import pruning, vision_tower
from htc_vlm.applied.hf_compat import n_patches
from htc_vlm.applied.pruning import DropRun
from htc_vlm.applied.vision_tower import TowerRun
from htc_vlm.compressors import AppliedOnly, Compressor
from htc_vlm.ops.select import pack_left_padded

STATE = "_applied"
# Options of generate that guess tokens ahead, read the prompt in parts, or need layers of one length.
NOT_WHILE_DROPPING = (
    "assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp", "prefill_chunk_size",
    "cache_implementation",
)  # fmt: skip
Swap = tuple[nn.Module, type, dict[str, Any]]  # module, class inside the block, what its __dict__ holds meanwhile


class Applied:
    """What `with apply(...) as applied` gives: the method, and what the last prompt with an image went through."""

    def __init__(self, method: Compressor, n_patches: int, n_layers: int, llava: LlavaModel) -> None:
        self.method = method
        self.n_patches = n_patches  # P, by the configuration
        self.n_layers = n_layers
        self.drop_run = DropRun(method) if method.drops(n_patches, n_layers) else None
        self.tower_run: TowerRun | None = None
        if method.acts_in_tower:
            n_blocks = vision_tower.n_blocks_read(llava, method)
            if method.merges_in_tower:
                self.tower_run = TowerRun(method.tower_merges(n_patches, n_blocks))
        self._n_given: int | None = None
        self._images: compressors.ImageFeatures | None = None  # the last ones, of which `source` can be computed

    @property
    def changes_features(self) -> bool:
        """Does the method act between the vision tower and the language model?"""
        return type(self.method).before_llm is not Compressor.before_llm

    @property
    def schedule(self) -> list[int] | None:
        """Measured: visual tokens of one image that entered each layer; None before the first image."""
        if self.drop_run is not None:
            return self.drop_run.schedule
        return None if self._n_given is None else [self._n_given] * self.n_layers

    @property
    def source(self) -> Tensor | None:
        """(I, C, P) which patches went into each token that reached the last layer (FastV, PyramidDrop, SparseVLM), or
        the language model (methods before it); rows of shares or of 0 and 1. None: no image yet."""
        sources = self.sources
        return sources[max(sources)] if sources else None

    @property
    def sources(self) -> dict[int, Tensor]:
        """Layer -> (I, C, P), `source` of the tokens that enter it, for layer 0 and each where tokens left."""
        if self.drop_run is not None:
            return self.drop_run.sources
        found = None if self._images is None else self.method.source(self._images)
        return {} if found is None else {0: found}

    @contextmanager
    def prompt_of(self, prompt: Tensor | None) -> Iterator[None]:
        """In this block the columns of `prompt` (B, L) choose, whatever stands behind them: generate without a cache
        sends its answer along."""
        if self.drop_run is not None and prompt is not None:
            self.drop_run.prompt_length = prompt.shape[1]
        try:
            yield
        finally:
            if self.drop_run is not None:
                self.drop_run.prompt_length = None

    def give(self, images: compressors.ImageFeatures) -> BaseModelOutputWithPooling:
        """(I, C, D) for the language model, if they are as many as promised."""
        tokens = self.method.before_llm(images)
        n_patches = images.features.shape[1] if images.merged is None else images.merged.destination.shape[1]
        promised = self.method.n_visual(n_patches)
        if tokens.shape[1] != promised:
            raise ValueError(f"{self.method.name} promised {promised} visual tokens and gave {tokens.shape[1]}")
        self._n_given, self._images = promised, images
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=list(tokens))


@contextmanager
def apply(model: LlavaForConditionalGeneration, name: str, **settings: Any) -> Iterator[Applied]:
    """Run `model` with a method inside the block; outside it is what it was, bit for bit.

    model: any LlavaForConditionalGeneration, or ours with compressor none. Batches, left padding, several images,
    beams and any number of calls work; logits of a forward pass are those of the tokens that reached the end,
    left-padded. FastV, PyramidDrop, SparseVLM: `forward(..., prompt_length=n)` says that columns from n on are an
    answer, which takes no part in the choice (as in generate).
    ValueError for settings that this model cannot meet.
    """
    method = compressors.build(name, **settings)
    check(model, method)
    llava = model.model
    applied = Applied(method, n_patches(llava.config), len(llava.language_model.layers), llava)
    swaps = plan_swaps(model, applied)
    classes = [type(module) for module, _, _ in swaps]
    try:
        for module, cls, state in swaps:
            module.__dict__.update(state)
            module.__class__ = cls
        yield applied
    finally:
        for (module, _, state), cls in zip(swaps, classes, strict=True):
            module.__class__ = cls
            for key in state:
                module.__dict__.pop(key, None)


def plan_swaps(model: LlavaForConditionalGeneration, applied: Applied) -> list[Swap]:
    """Which modules change their class, and to what. ValueError where a module cannot."""
    llava, method = model.model, applied.method
    whole: Any = type(model)
    headless: Any = type(llava)
    swaps: list[Swap] = [
        (model, recutting_class(whole), {STATE: applied}),
        (llava, socketed_class(headless), {STATE: applied}),
    ]
    if applied.drop_run is not None:
        pruning.check_decoder(llava.language_model, method)
        decoder: Any = type(llava.language_model)
        swaps.append((llava.language_model, pruning.dropping_class(decoder), {"_run": applied.drop_run}))
    if applied.tower_run is not None:
        vision_tower.check_merging(llava, method)
        swaps += vision_tower.tower_swaps(llava, applied.tower_run)
    return swaps


def check(model: Any, method: Compressor) -> None:
    """ValueError for models and methods that do not go together, saying what does."""
    if not isinstance(model, LlavaForConditionalGeneration):
        raise ValueError(f"apply works on a LlavaForConditionalGeneration, got {type(model).__name__}")
    if STATE in model.__dict__:
        raise ValueError(f"{model.__dict__[STATE].method.name} is applied to this model; leave its block first")
    own = model.config.to_dict().get("compressor") or {"name": "none"}
    if own["name"] != "none":
        raise ValueError(f"this model has compressor {own['name']!r} of its own; apply works on uncompressed ones")
    if method.n_bottleneck or type(method).setup not in (Compressor.setup, AppliedOnly.setup):
        raise ValueError(
            f"{method.name} has weights or a bottleneck token that must be trained; load a checkpoint that has them "
            "(htc_vlm.load), apply is for methods without"
        )
    method.schedule(n_patches(model.config), len(model.model.language_model.layers))
    method.check_heads(model.config.text_config.num_attention_heads)


class Socketed(LlavaModel):
    """Mixed in front of the class of the model without a head."""

    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        patch_features: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """As LLaVA's, through the method. patch_features (I, P, vision width): as HtcVlmModel's."""
        applied: Applied = self.__dict__[STATE]
        if not applied.changes_features:
            given: dict[str, Any] = {
                "pixel_values": pixel_values,
                "vision_feature_layer": vision_feature_layer,
                "vision_feature_select_strategy": vision_feature_select_strategy,
                "image_sizes": image_sizes,
                "patch_features": patch_features,  # known to ours, not to transformers'
            }
            return super().get_image_features(**{k: v for k, v in given.items() if v is not None}, **kwargs)
        method = applied.method
        if image_sizes is not None:
            raise ValueError(f"{method.name}: images of different sizes (image_sizes) are not supported; resize them")
        if patch_features is not None:
            if method.acts_in_tower:
                raise ValueError(f"{method.name} acts in the vision tower; give pixel_values, not patch_features")
            project = self.multi_modal_projector
            images = compressors.ImageFeatures(patch_features.to(project.linear_1.weight.dtype), project)
        elif pixel_values is not None:
            images = vision_tower.image_features(
                self, method, pixel_values, vision_feature_layer, vision_feature_select_strategy, applied.tower_run
            )
        else:
            raise ValueError("no image: give pixel_values")
        return applied.give(images)

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        applied: Applied = self.__dict__[STATE]
        images = n_images(kwargs)
        if applied.drop_run is None or not images:
            return super().forward(input_ids=input_ids, **kwargs)
        if input_ids is None:
            raise ValueError(f"{applied.method.name} finds images by their placeholders; give input_ids, not embeddings")
        return super().forward(input_ids=input_ids, image=image_of(input_ids, self.config.image_token_id, images), **kwargs)


class Recutting(LlavaForConditionalGeneration):
    """Mixed in front of the class of the whole model: placeholders that the method does not need leave the prompt."""

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        applied: Applied = self.__dict__[STATE]
        check_generation(applied, self.generation_config if generation_config is None else generation_config, kwargs)
        prompt = kwargs.pop("input_ids", None) if inputs is None else inputs
        cut = recut(applied, prompt, kwargs, self.config.image_token_id)
        if cut is None:
            with applied.prompt_of(prompt):
                return super().generate(prompt, generation_config, *args, **kwargs)
        if kwargs.get("position_ids") is not None:
            raise ValueError(f"{applied.method.name} cuts the prompt; leave position_ids to generate")
        n_cut = prompt.shape[1] - cut.input_ids.shape[1]
        generation_config = copy.deepcopy(generation_config)
        for name in ("max_length", "min_length"):
            if kwargs.get(name) is not None:
                kwargs[name] -= n_cut
            if getattr(generation_config, name, None):
                setattr(generation_config, name, getattr(generation_config, name) - n_cut)
        kwargs["attention_mask"] = cut.attention_mask
        out = super().generate(cut.input_ids, generation_config, *args, **kwargs)
        return with_prompt(out, prompt, cut.input_ids.shape[1])


def recutting_forward(cls: Any) -> Any:
    """A forward for a subclass of `cls` that recuts its prompt; with cls.forward's signature, which generate reads."""

    @functools.wraps(cls.forward)
    def forward(self: Any, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        applied: Applied = self.__dict__[STATE]
        if applied.drop_run is not None and kwargs.get("labels") is not None and n_images(kwargs):
            raise ValueError(f"{applied.method.name} drops tokens inside the model; compute the loss from the logits")
        cut = recut(applied, input_ids, kwargs, self.config.image_token_id)
        if cut is not None:
            for name in ("position_ids", "question_ids", "cell_positions"):
                if kwargs.get(name) is not None:
                    raise ValueError(f"{applied.method.name} cuts the prompt; leave out {name}")
            if kwargs.get("labels") is not None:
                kwargs["labels"] = cut.follow(kwargs["labels"], fill=-100)
            input_ids, kwargs["attention_mask"] = cut.input_ids, cut.attention_mask
        return cls.forward(self, input_ids=input_ids, **kwargs)

    return forward


@functools.cache
def recutting_class(cls: Any) -> type:
    """`cls` with recutting, under its own name (transformers looks things up by it)."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (Recutting, cls), {**names, "forward": recutting_forward(cls)})


@functools.cache
def socketed_class(cls: Any) -> type:
    """`cls` with sockets, under its own name."""
    return type(cls.__name__, (Socketed, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def n_images(inputs: dict[str, Any]) -> int:
    """How many images a call brings; 0 for none."""
    for name in ("pixel_values", "patch_features"):
        if inputs.get(name) is not None:
            return len(inputs[name])
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
    return 0 if encoded is None else len(encoded.pooler_output)


def image_of(input_ids: Tensor, image_token_id: int, images: int) -> Tensor:
    """(B, L) ids -> (B, L): 1, 2, ... for the placeholders of the first, second, ... image of the batch, else 0.

    >>> image_of(torch.tensor([[9, 9, 1, 9, 9]]), image_token_id=9, images=2)
    tensor([[1, 1, 0, 2, 2]])
    """
    is_visual = input_ids == image_token_id
    total = int(is_visual.sum())
    if total == 0 or total % images:
        raise ValueError(f"the prompts have {total} image placeholders for {images} images; give each the same number")
    rank = (is_visual.flatten().long().cumsum(dim=0) - 1).view_as(input_ids)
    return torch.where(is_visual, rank // (total // images) + 1, 0)


@dataclass(frozen=True)
class Cut:
    """A prompt with fewer placeholders. index (B, L'): the old column of each new one; is_real: not filled in."""

    input_ids: Tensor
    attention_mask: Tensor | None
    index: Tensor
    is_real: Tensor

    def follow(self, x: Tensor, fill: int) -> Tensor:
        """(B, L) beside the old prompt -> (B, L') beside the new one."""
        return x.gather(1, self.index).masked_fill(~self.is_real, fill)


def recut(applied: Applied, input_ids: Tensor | None, inputs: dict[str, Any], image_token_id: int) -> Cut | None:
    """The prompt of a call with C placeholders per image where it has P; None where it fits as it is."""
    images = n_images(inputs)
    if input_ids is None or not images or not applied.changes_features:
        return None
    total = int((input_ids == image_token_id).sum())
    n_now, n_wanted = total // images, applied.method.n_visual(applied.n_patches)
    if n_now * images == total and n_now == n_wanted:
        return None
    if n_now * images != total or n_now != applied.n_patches:
        raise ValueError(
            f"the prompts have {total} image placeholders for {images} images; {applied.method.name} takes "
            f"{applied.n_patches} for each (or the {n_wanted} that it needs)"
        )
    return cut_placeholders(input_ids, inputs.get("attention_mask"), image_token_id, images, n_wanted)


def cut_placeholders(input_ids: Tensor, attention_mask: Tensor | None, image_token_id: int, images: int, n_wanted: int) -> Cut:
    """Keep the first n_wanted placeholders of each image; prompts with fewer images are padded on the left.

    >>> ids = torch.tensor([[9, 9, 1, 9, 9, 2], [0, 0, 9, 9, 3, 4]])
    >>> cut = cut_placeholders(ids, torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]), 9, images=3, n_wanted=1)
    >>> cut.input_ids.tolist(), cut.attention_mask.tolist()
    ([[0, 9, 1, 9, 2], [0, 0, 9, 3, 4]], [[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    """
    image = image_of(input_ids, image_token_id, images)
    n_now = int((image == 1).sum())
    rank = ((image > 0).flatten().long().cumsum(dim=0) - 1).view_as(image) % n_now
    packed = pack_left_padded((image == 0) | (rank < n_wanted))
    padding_id = 0 if image_token_id else 1  # any id but a placeholder's: it is masked
    ids = input_ids.gather(1, packed.index).masked_fill(~packed.is_real, padding_id)
    if attention_mask is not None:
        attention_mask = attention_mask.gather(1, packed.index).masked_fill(~packed.is_real, 0)
    elif not bool(packed.is_real.all()):
        attention_mask = packed.is_real.long()
    return Cut(ids, attention_mask, packed.index, packed.is_real)


def check_generation(applied: Applied, config: GenerationConfig | None, options: dict[str, Any]) -> None:
    """ValueError for ways to generate that cannot go with tokens dropped inside the language model. `options`: what
    generate was given, which counts before `config`."""
    if applied.drop_run is None:
        return
    for name in NOT_WHILE_DROPPING:
        value = options.get(name)
        if value is None:
            value = getattr(config, name, None)
        if value and value != "dynamic":
            raise ValueError(
                f"{applied.method.name} does not go with {name}={value!r}: its layers differ in length, and the prompt must "
                "be read in one piece, without guessed tokens"
            )


def with_prompt(out: Any, prompt: Tensor, n_cut_prompt: int) -> Any:
    """generate's output with the caller's prompt in front instead of the one that was cut."""
    sequences = out if isinstance(out, Tensor) else out.sequences
    repeated = prompt.repeat_interleave(sequences.shape[0] // prompt.shape[0], dim=0).to(sequences.device)
    joined = torch.cat((repeated, sequences[:, n_cut_prompt:]), dim=1)
    if isinstance(out, Tensor):
        return joined
    out.sequences = joined
    return out
