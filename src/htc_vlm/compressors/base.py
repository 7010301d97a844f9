"""The sockets of a compressor: what a method may change between the vision tower and the answer.

A method overrides only what it changes; every default does nothing. Three places:

    before_llm   (B, P, D) -> (B, C, D)   which visual tokens the language model receives (pool, queries, anchors)
    visible      TokenLayout -> (B, L, L) who may look at whom (the bottleneck)
    after_layer  scores -> Keep | Merge   which visual tokens go on to the next layer (FastV, PyramidDrop, SparseVLM)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from htc_vlm.registry import Registry
from htc_vlm.tokens import TokenLayout

COMPRESSORS = Registry("compressor")


@dataclass(frozen=True)
class Sizes:
    """What a compressor with weights needs to know of the model around it."""

    n_patches: int  # P, of one image
    vision_width: int  # width of the vision tower's features
    llm_width: int  # D
    initializer_range: float = 0.02


@dataclass(frozen=True)
class ImageFeatures:
    """A batch of images on its way to the language model. B counts images here, not samples."""

    features: Tensor  # (B, P, vision width), as the vision tower gives them
    project: Callable[[Tensor], Tensor]  # (B, N, vision width) -> (B, N, D), the model's projector
    pixels: Tensor | None = None  # (B, 3, height, width) in [0, 1]; None where codes were computed before
    codes: Tensor | None = None  # (B, h, w, channels) quantized latents computed before; None: from pixels

    @property
    def patches(self) -> Tensor:
        """(B, P, D)"""
        return self.project(self.features)


@dataclass(frozen=True)
class Keep:
    """Go on with these tokens only. positions (B, n_keep), ascending, counted among the visual tokens so far."""

    positions: Tensor


@dataclass(frozen=True)
class Merge:
    """Go on with weighted sums. weights (B, n_now, n_before): token i of the next layer is weights[i] @ tokens."""

    weights: Tensor


@dataclass(frozen=True)
class NoSettings:
    """For methods without a setting."""


class Compressor(nn.Module):
    """One method. Subclasses are registered by name, hold frozen `settings`, and get weights (if any) from `setup`."""

    name: ClassVar[str]
    Settings: ClassVar[type] = NoSettings
    EXAMPLES: ClassVar[tuple[dict[str, Any], ...]] = ({},)  # settings the contract tests run, mildest first
    PAPER: ClassVar[str] = ""  # for the README's table of methods
    ACTS: ClassVar[str] = ""  # where: "before the LLM", "bottleneck", "inside the LLM"
    TRAINED: ClassVar[bool] = True
    QUESTION_INDEPENDENT: ClassVar[bool] = True  # may its result be cached and shared by all questions?

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def setup(self, sizes: Sizes) -> None:
        """Create the weights, if any. Called once by the model."""

    def init_own_weights(self) -> None:
        """Initialise parameters that are not inside standard layers. Called by the model's initialisation."""

    @property
    def n_bottleneck(self) -> int:
        """K, bottleneck tokens of one image; 0 for methods without a bottleneck."""
        return 0

    @property
    def positions(self) -> str:
        """How the tokens of an image are numbered: see ops.rope.position_ids."""
        return "sequential"

    def n_visual(self, n_patches: int) -> int:
        """C, visual tokens of one image that the language model receives."""
        return n_patches

    def before_llm(self, images: ImageFeatures) -> Tensor:
        """-> (B, C, D), in sequence order."""
        return images.patches

    def visible(self, layout: TokenLayout) -> Tensor | None:
        """(B, L, L) bool, True = may look; None = plain causal."""
        return None

    def after_layer(self, layer: int, scores: Tensor | None, n_now: int) -> Keep | Merge | None:
        """Which visual tokens enter layer `layer` + 1 (layers count from 0); None = all."""
        return None

    def schedule(self, n_patches: int, n_layers: int) -> list[int]:
        """Visual and bottleneck tokens of one image entering each layer, when it is first read: a promise."""
        return [self.n_visual(n_patches) + self.n_bottleneck] * n_layers

    def cached_tokens(self, n_patches: int, n_layers: int) -> list[int]:
        """Tokens of one image whose keys and values each layer keeps for the questions."""
        return [self.n_bottleneck] * n_layers if self.n_bottleneck else self.schedule(n_patches, n_layers)

    def to_dict(self) -> dict[str, Any]:
        """Name and every setting, ready for JSON; `build(**that)` gives the same method."""
        return {"name": self.name, **asdict(self.settings)}


def build(name: str, **settings: Any) -> Compressor:
    """A compressor by name. ValueError for an unknown name or setting, naming what is known."""
    cls = COMPRESSORS.get(name)
    known = [field.name for field in fields(cls.Settings)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"{name} has no setting {unknown[0]!r}; known: {', '.join(known) or 'none'}")
    return cls(cls.Settings(**settings))


def check_count(method: str, what: str, value: int, at_least: int = 1, at_most: int | None = None) -> None:
    """ValueError unless `value` is a whole number within bounds."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{method}: {what} is {value!r}; give a whole number of at least {at_least}")
    if at_most is not None and value > at_most:
        raise ValueError(f"{method}: {what} is {value}; there are only {at_most} to choose from")


def check_choice(method: str, what: str, value: str, known: tuple[str, ...]) -> None:
    """ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{method}: {what} is {value!r}; known: {', '.join(known)}")
