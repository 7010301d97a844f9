"""Apply a method for a while: `with htc_vlm.apply(model, "fastv", n_keep=98, layer=2): model.generate(...)`.

Source:  docs/specs/baselines.md section 12 (tested recipe for transformers 5.23); each method's file names its paper.
Differs: modules change their class inside the block and get it back, whatever happens; no hooks, weights or globals.
         Any vision-language model works that `families` finds its way in. Prompts stay as the stock processor makes them:
         visual tokens leave at the decoder's door (`door`) or between its layers (`pruning`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from htc_vlm import compressors
from htc_vlm.applied import door, pruning, vision_tower
from htc_vlm.applied.door import Prompt, Run
from htc_vlm.applied.families import Family, Llava, family_of
from htc_vlm.applied.hf_compat import check_has_images, compute_dtype, generate_option, has_past, unwrapped
from htc_vlm.applied.pruning import DropRun
from htc_vlm.applied.vision_tower import TowerRun
from htc_vlm.compressors import AppliedOnly, Compressor
from htc_vlm.ops.schedules import PUBLISHED_PATCHES

STATE = "_applied"
ANY_NUMBER = 2**20  # tokens of an image, for checks where pictures differ in size
# Options of generate that guess tokens ahead, read the prompt in parts, or reserve a cache for a prompt that is not cut.
NOT_WHILE_DROPPING = (
    "assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp", "prefill_chunk_size",
    "cache_implementation",
)  # fmt: skip
Swap = tuple[nn.Module, type, dict[str, Any]]  # module, class inside the block, what its __dict__ holds meanwhile


class Applied:
    """What `with apply(...) as applied` gives: the method, and what the last prompt with an image went through."""

    def __init__(self, family: Family, name: str, settings: dict[str, Any], budget: float | None) -> None:
        self.family = family
        self.n_patches = family.n_patches  # P, by the configuration; None where pictures differ
        self.n_layers = family.n_layers
        self._build = functools.cache(lambda n: build_for(name, settings, budget, n, family.n_layers))
        least = budget if isinstance(budget, int) else 0  # LLaVA-NeXT's 2,880 tokens have budgets above LLaVA-1.5's 576
        self.n_nominal = self.n_patches or (ANY_NUMBER if budget is None else max(PUBLISHED_PATCHES, least))
        self.method = self._build(self.n_nominal)
        check(family, self.method, self.n_nominal)
        options: dict[str, Any] = {
            "method_of": self._build, "image_token_id": family.model.config.image_token_id,
            "n_nominal": self.n_nominal, "has_axes": family.has_axes, "has_tile_marks": family.tile_marks,
        }  # fmt: skip
        drops = self.method.drops(self.n_nominal, self.n_layers)
        self.drop_run = DropRun(**options) if drops else None
        if isinstance(family, Llava) or not self.changes_features:
            options["in_place"] = self.n_patches or 0
        options |= {"grid_matters": self.method.NEEDS_GRID, "grid_of": family.grid_of}
        self.run: Run = self.drop_run or Run(**options)
        self.tower_run: TowerRun | None = None
        if self.method.picture_side is not None:
            vision_tower.check_shrinking(family.headless, self.method)
        elif self.method.acts_in_tower and self.n_patches is not None:
            n_blocks = vision_tower.n_blocks_read(family.headless, self.method)
            if self.method.merges_in_tower:
                self.tower_run = TowerRun(self.method.tower_merges(self.n_patches, n_blocks))
        self.n_placeholders: int | None = None  # of the prompts that are being read
        self.images: compressors.ImageFeatures | None = None  # LLaVA's last ones, of which `source` can be computed

    @property
    def changes_features(self) -> bool:
        """Does the method act between the vision tower and the language model?"""
        return type(self.method).before_llm is not Compressor.before_llm or self.method.picture_side is not None

    @property
    def schedules(self) -> list[list[int]]:
        """Measured: visual tokens that entered each layer, one list for each image of the last prompts; [] before."""
        if self.drop_run is not None:
            return self.drop_run.schedules
        by_image: dict[int, list[int]] = {}
        for group, _, method in self.run.seen:
            n = group.n_patches if self.run.is_done(group) else method.n_visual(group.n_patches)
            by_image.update({i: [n] * self.n_layers for i in group.images.tolist()})
        return [by_image[i] for i in sorted(by_image)]

    @property
    def schedule(self) -> list[int] | None:
        """Measured: visual tokens of one image that entered each layer; None before the first image. ValueError where
        images had schedules of their own."""
        found = self.schedules
        if any(one != found[0] for one in found):
            raise ValueError("the last images had different numbers of tokens; read `schedules`, which has one for each")
        return found[0] if found else None

    @property
    def source(self) -> Tensor | None:
        """(I, C, P) which patches went into each token that reached the last layer (FastV, PyramidDrop, SparseVLM), or
        the language model (methods before it); rows of shares or of 0 and 1. None: no image yet."""
        sources = self.sources
        return sources[max(sources)] if sources else None

    @property
    def sources(self) -> dict[int, Tensor]:
        """Layer -> (I, C, P), `source` of the tokens that enter it, for layer 0 and each where tokens left. ValueError
        where images came with different numbers of tokens."""
        if self.drop_run is not None:
            return self.drop_run.sources
        if self.images is not None:
            found = self.method.source(self.images)
        else:
            seen = [(images, method) for _, images, method in self.run.seen if images is not None]
            parts = [method.source(images) for images, method in seen]
            if len({None if part is None else part.shape[1:] for part in parts}) > 1:
                raise ValueError("the last images had different numbers of tokens; ask about one picture at a time")
            found = torch.cat([part for part in parts if part is not None]) if parts and parts[0] is not None else None
        return {} if found is None else {0: found}

    @contextmanager
    def reading(self, prompt: Tensor | None, prompt_length: int | None) -> Iterator[None]:
        """In this block `prompt` (B, L) is read: its first prompt_length columns choose, whatever stands behind them
        (generate without a cache sends its answer along)."""
        before = self.run.prompt_length, self.n_placeholders
        if prompt_length is not None:
            self.run.prompt_length = prompt_length
        if prompt is not None and prompt.ndim == 2:
            self.n_placeholders = int((prompt == self.run.image_token_id).sum())
        try:
            yield
        finally:
            self.run.prompt_length, self.n_placeholders = before

    def give(self, images: compressors.ImageFeatures) -> BaseModelOutputWithPooling:
        """LLaVA's features (I, C, D) for the language model; zeros behind them where the prompt has P places for each
        image, which are cut at the decoder's door. ValueError for prompts with another number."""
        tokens = self.method.before_llm(images)
        n_images, n_patches = len(tokens), self.n_patches or images.features.shape[1]
        n_wanted = self.method.n_visual(n_patches)
        door.checked(self.method, tokens, n_wanted)
        self.images = images
        if n_wanted > n_patches:
            raise ValueError(f"{self.method.name} makes {n_wanted} tokens of {n_patches} patches; take fewer")
        if self.n_placeholders not in (None, n_images * n_wanted):
            if self.n_placeholders != n_images * n_patches:
                raise ValueError(
                    f"the prompts have {self.n_placeholders} image placeholders for {n_images} images; {self.method.name} "
                    f"takes {n_patches} for each (or the {n_wanted} that it needs)"
                )
            tokens = nn.functional.pad(tokens, (0, 0, 0, n_patches - n_wanted))
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=list(tokens))


def build_for(name: str, settings: dict[str, Any], budget: float | None, n_patches: int, n_layers: int) -> Compressor:
    """The method for an image of n_patches tokens. budget: see `Compressor.for_budget`."""
    if budget is None:
        return compressors.build(name, **settings)
    cls: Any = compressors.COMPRESSORS.get(name)
    if isinstance(budget, int) and "budget" in (own.name for own in fields(cls.Settings)):
        return compressors.build(name, budget=budget, **settings)  # SparseVLM's published tables
    return compressors.build(name, **compressors.at_budget(name, budget, n_patches, n_layers, settings))


@contextmanager
def apply(model: Any, name: str, *, budget: float | None = None, **settings: Any) -> Iterator[Applied]:
    """Run `model` with a method inside the block; outside it is what it was, bit for bit.

    model: any vision-language model of transformers that `families` finds its way in (LLaVA, LLaVA-NeXT,
    LLaVA-OneVision, InternVL, SmolVLM, Qwen2.5-VL, Qwen3-VL; ours with compressor none). Images of different sizes,
    batches, left padding, several images, beams and any number of calls work; logits of a forward pass are those of the
    tokens that reached the end, left-padded. `forward(..., prompt_length=n)` says that columns from n on are an answer,
    which takes no part in a choice that the prompt makes (as in generate).
    budget: instead of the method's own settings, the visual tokens of an image, mean over layers: 64, or as a share 0.11.
    ValueError for settings that this model cannot meet.
    """
    model = unwrapped(model)
    family = family_of(model)
    check_free(model)
    applied = Applied(family, name, settings, budget)
    swaps = [(module, cls, state | inside_hook(module, cls, name)) for module, cls, state in plan_swaps(applied)]
    before = [(type(module), {key: vars(module)[key] for key in state if key in vars(module)}) for module, _, state in swaps]
    try:
        for module, cls, state in swaps:
            module.__dict__.update(state)
            module.__class__ = cls
        yield applied
    finally:
        for (module, _, state), (cls, held) in zip(swaps, before, strict=True):
            module.__class__ = cls
            for key in state:
                module.__dict__.pop(key, None)
            module.__dict__.update(held)


def inside_hook(module: nn.Module, cls: Any, name: str) -> dict[str, Any]:
    """What lets a class act where accelerate (offloading) has put a forward of its own on the module, which calls
    `_old_forward`. ValueError for any other forward on the module, which would be called in place of the method's."""
    held = vars(module)
    if "forward" not in held:
        return {}
    if "_hf_hook" in held and "_old_forward" in held:
        return {"_old_forward": MethodType(cls.forward, module)}
    raise ValueError(
        f"{name} changes the class of {type(module).__name__}, and this one has a `forward` of its own that hides it (as "
        "model.forward = torch.compile(model.forward) gives it); `del` that forward first. Offloading by accelerate works"
    )


def plan_swaps(applied: Applied) -> list[Swap]:
    """Which modules change their class, and to what. ValueError where a module cannot."""
    family, method = applied.family, applied.method
    modules = (family.model, family.headless, family.decoder)
    whole, headless, decoder = modules
    classes: list[Any] = [type(module) for module in modules]
    swaps: list[Swap] = [
        (whole, asking_class(classes[0]), {STATE: applied}),
        (headless, reading_class(classes[1], isinstance(family, Llava)), {STATE: applied}),
    ]
    if applied.drop_run is not None:
        pruning.check_decoder(decoder, method)
        swaps.append((decoder, pruning.dropping_class(classes[2]), {"_run": applied.drop_run}))
    else:
        swaps.append((decoder, door.door_class(classes[2]), {"_run": applied.run}))
    if applied.tower_run is not None:
        vision_tower.check_merging(headless, method)
        swaps += vision_tower.tower_swaps(headless, applied.tower_run)
    return swaps


def check_free(model: Any) -> None:
    """ValueError for a model that another method acts on."""
    if STATE in model.__dict__:
        raise ValueError(f"{model.__dict__[STATE].method.name} is applied to this model; leave its block first")
    own = model.config.to_dict().get("compressor") or {"name": "none"}
    if own["name"] != "none":
        raise ValueError(f"this model has compressor {own['name']!r} of its own; apply works on uncompressed ones")


def check(family: Family, method: Compressor, n_patches: int) -> None:
    """ValueError for families and methods that do not go together, saying what does."""
    if method.n_bottleneck or type(method).setup not in (Compressor.setup, AppliedOnly.setup):
        raise ValueError(
            f"{method.name} has weights or a bottleneck token that must be trained; load a checkpoint that has them "
            "(htc_vlm.load), apply is for methods without"
        )
    family.check(method)
    method.schedule(n_patches, family.n_layers)
    method.check_heads(family.text_config.num_attention_heads)


class Reading(nn.Module):
    """Mixed in front of the class of the model without a head: notes which image each placeholder belongs to."""

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        applied: Applied = self.__dict__[STATE]
        run, length = applied.run, kwargs.pop("prompt_length", None)
        run.has_positions = kwargs.get("position_ids") is not None
        if not has_images(kwargs):
            check_forgotten(applied, input_ids, kwargs)
            return super().forward(input_ids=input_ids, **kwargs)
        if input_ids is None:
            raise ValueError(f"{applied.method.name} finds images by their placeholders; give input_ids, not embeddings")
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        with applied.reading(input_ids, length):
            run.prompt = Prompt(input_ids, run.prompt_length, encoded)
            try:
                return super().forward(input_ids=input_ids, **kwargs)
            finally:
                run.prompt = None


def through_method(self: Any, pixel_values: Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPooling:
    """LLaVA's get_image_features, through the method. patch_features (I, P, vision width): as HtcVlmModel's."""
    applied: Applied = self.__dict__[STATE]
    method, patch_features = applied.method, kwargs.get("patch_features")
    if kwargs.get("image_sizes") is not None:
        raise ValueError(f"{method.name}: images of different sizes (image_sizes) are not supported; resize them")
    if patch_features is not None:
        if method.acts_in_tower:
            raise ValueError(f"{method.name} acts in the vision tower; give pixel_values, not patch_features")
        project = self.multi_modal_projector
        images = compressors.ImageFeatures(patch_features.to(compute_dtype(project, self.dtype)), project)
    elif pixel_values is not None:
        layer, strategy = kwargs.get("vision_feature_layer"), kwargs.get("vision_feature_select_strategy")
        images = vision_tower.image_features(self, method, pixel_values, layer, strategy, applied.tower_run)
    else:
        raise ValueError("no image: give pixel_values")
    return applied.give(images)


@functools.cache
def reading_class(cls: Any, is_llava: bool) -> type:
    """`cls`, a model without a head, that reads prompts for the method; under its own name."""

    @functools.wraps(cls.get_image_features)  # generate asks for the signature
    def get_image_features(self: Any, *args: Any, **kwargs: Any) -> Any:
        applied: Applied = self.__dict__[STATE]
        if is_llava and applied.changes_features:
            out = through_method(self, *args, **kwargs)
        else:
            known = inspect.signature(cls.get_image_features).parameters
            if "patch_features" not in known:
                kwargs.pop("patch_features", None)
            out = cls.get_image_features(self, *args, **kwargs)
        if applied.run.prompt is not None:
            applied.run.prompt.encoded = out
            applied.run.numbers()  # ValueError where the prompt has another number of placeholders
        return out

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (Reading, cls), {**names, "get_image_features": get_image_features})


class Asking(nn.Module):
    """Mixed in front of the class of the whole model: says which prompt is read, and lets labels follow it."""

    config: Any
    generation_config: Any
    loss_function: Any

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        applied: Applied = self.__dict__[STATE]
        check_generation(applied, (generation_config, self.generation_config), kwargs)
        prompt = kwargs.pop("input_ids", None) if inputs is None else inputs
        with applied.reading(prompt, None if prompt is None else prompt.shape[1]):
            return super().generate(prompt, generation_config, *args, **kwargs)  # type: ignore[misc]


def asking_forward(cls: Any) -> Any:
    """A forward for a subclass of `cls`; with cls.forward's signature, which generate reads."""

    @functools.wraps(cls.forward)
    def forward(self: Any, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        applied: Applied = self.__dict__[STATE]
        length = kwargs.pop("prompt_length", None)
        if not has_images(kwargs):
            return cls.forward(self, input_ids=input_ids, **kwargs)
        labels = check_forward(applied, kwargs)
        with applied.reading(input_ids, length):
            out = cls.forward(self, input_ids=input_ids, **kwargs)
        if labels is not None:
            if applied.run.cut is not None:
                cut = applied.run.cut
                labels = labels.gather(1, cut.index).masked_fill(~cut.is_real, -100)
            out.loss = self.loss_function(out.logits, labels, vocab_size=self.config.get_text_config().vocab_size)
        return out

    return forward


@functools.cache
def asking_class(cls: Any) -> type:
    """`cls`, a whole model, under its own name (transformers looks things up by it)."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (Asking, cls), {**names, "forward": asking_forward(cls)})


def has_images(inputs: dict[str, Any]) -> bool:
    """Does a call bring images?"""
    given = any(inputs.get(name) is not None for name in ("pixel_values", "patch_features"))
    return given or (inputs.get("mm_encoder_outputs") or {}).get("image") is not None


def check_forgotten(applied: Applied, input_ids: Tensor | None, kwargs: dict[str, Any]) -> None:
    """ValueError for a prompt with places for images that came without one, on which no method would act."""
    if input_ids is None or kwargs.get("inputs_embeds") is not None or kwargs.get("pixel_values_videos") is not None:
        return
    if not has_past(kwargs.get("past_key_values"), input_ids.shape[1]):
        check_has_images(input_ids[:, : applied.run.prompt_length], [applied.run.image_token_id])


def check_forward(applied: Applied, kwargs: dict[str, Any]) -> Tensor | None:
    """ValueError for calls that a cut prompt cannot follow. Takes the labels out, which must follow it."""
    name, is_cut = applied.method.name, applied.drop_run is None and applied.changes_features
    if applied.drop_run is not None and kwargs.get("labels") is not None:
        raise ValueError(f"{name} drops tokens inside the model; compute the loss from the logits")
    renumbers = is_cut and not applied.family.has_axes and applied.run.prompt_length is None  # generate has its own
    for given in ("question_ids", "kv_positions", *(("position_ids",) if renumbers else ())):
        if is_cut and kwargs.get(given) is not None:
            raise ValueError(f"{name} cuts the prompt; leave out {given}")
    return kwargs.pop("labels", None) if is_cut else None


def check_generation(applied: Applied, configs: tuple[GenerationConfig | None, ...], options: dict[str, Any]) -> None:
    """ValueError for ways to generate that cannot go with tokens that leave. `options`: what generate was given, which
    counts before `configs`."""
    method, is_inside = applied.method, applied.drop_run is not None
    if not is_inside and not applied.changes_features:
        return
    for name in NOT_WHILE_DROPPING:
        value = generate_option(name, options, *configs)
        if value and value != "dynamic":
            raise ValueError(
                f"{method.name} does not go with {name}={value!r}: tokens leave its cache, and the prompt must be read in "
                "one piece, without guessed tokens"
            )
    if is_inside or not has_images(options):
        return
    if options.get("position_ids") is not None and not applied.family.has_axes:
        raise ValueError(f"{method.name} cuts the prompt; leave position_ids to generate")
