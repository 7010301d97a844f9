"""The sockets of a compressor: what a method may change between the vision tower and the answer.

A method overrides only what it changes; every default does nothing. The places, from pixels to answer:

    tower_merges patches, blocks -> list  how many patches each block of the vision tower merges (ToMe)
    before_llm   (B, P, D) -> (B, C, D)   which visual tokens the language model receives (pool, queries, anchors)
    fusion_layers decoder layers          in which the prompt reads all patches first (LLaVA-Mini)
    visible      TokenLayout -> (B, L, L) who may look at whom (the bottleneck)
    drops        patches, layers -> Drop  between which layers visual tokens leave (FastV, PyramidDrop, SparseVLM)
    queries      embeddings -> (B, L)     whose attention decides there
    after_layer  AttentionView -> Keep | Merge     which visual tokens go on to the next layer

Source:  docs/design.md (the sockets); each method's file names its paper.
Differs: a trained model's own forward serves `before_llm`, `fusion_layers` and `visible`. The other places need
         `htc_vlm.apply(model, name, ...)`, which serves `before_llm` too and works on any LLaVA checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor, nn

from htc_vlm.ops.merge import TokenMerge
from htc_vlm.registry import Registry
from htc_vlm.settings import check_complete, typed
from htc_vlm.tokens import TokenLayout


@dataclass(frozen=True)
class Sizes:
    """What a compressor with weights needs to know of the model around it."""

    n_patches: int  # P, of one image
    vision_width: int  # width of the vision tower's features
    llm_width: int  # D
    initializer_range: float = 0.02
    new_decoder_layer: Callable[[int], nn.Module] | None = None  # number -> an untrained layer as the LLM's
    n_kv_heads: int | None = None  # key-value heads of each decoder layer


@dataclass(frozen=True)
class TowerView:
    """What a vision transformer with a class token knows of its patches, at the block whose output LLaVA reads."""

    keys: Tensor  # (B, P, head_dim), mean over heads
    class_feature: Tensor  # (B, 1, vision width)
    class_attention: Tensor  # (B, P), what the class token gives each patch, summed over heads


@dataclass(frozen=True)
class ImageFeatures:
    """A batch of images on its way to the language model. B counts images here, not samples."""

    features: Tensor  # (B, P, vision width), as the vision tower gives them
    project: Callable[[Tensor], Tensor]  # (B, N, vision width) -> (B, N, D), the model's projector
    pixels: Tensor | None = None  # (B, 3, height, width) in [0, 1]; None where codes were computed before
    codes: Tensor | None = None  # (B, h, w, channels) quantized latents computed before; None: from pixels
    tower: TowerView | None = None  # for methods that ask for it by `reads_tower`
    grid: tuple[int, int] | None = None  # rows and columns of the patches; None: a square
    merged: TokenMerge | None = None  # what `tower_merges` did; `features` are then the merged ones

    @property
    def patches(self) -> Tensor:
        """(B, P, D)"""
        return self.project(self.features)


@dataclass(frozen=True)
class PruneStep:
    """Visual tokens leave at the input of `layer` (counted from 0).

    scores: "attention" of layer - 1, or "next": what this layer's own queries and keys would give, before it runs.
    renumber: later layers count positions 0, 1, ... without the tokens that left; otherwise everybody keeps its own.
    """

    layer: int
    scores: str = "attention"
    renumber: bool = False


@dataclass(frozen=True)
class AttentionView:
    """What a method knows, between two layers, of I images with n_now visual tokens each; R rows are the queries'."""

    n_patches: int  # P, with which each image entered the language model
    attention: Tensor  # (I, H, R, n_now), softmax over all that a query sees, cut to its image's columns
    is_row: Tensor  # (I, R) bool; the others are padding
    states: Tensor  # (I, n_now, D)
    distance: Tensor  # (I, R, n_now), position of the query minus position of the visual token
    inv_freq: Tensor  # (head_dim / 2,) of the rotary embedding

    @property
    def scores(self) -> Tensor:
        """(I, n_now), mean over heads and rows."""
        rows = self.attention.mean(dim=1) * self.is_row[..., None]
        return rows.sum(dim=1) / self.is_row.sum(dim=1, keepdim=True)


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
    TRAINED: ClassVar[bool] = True  # does it need training? Most that do not can be trained, too
    VARIANTS: ClassVar[tuple[dict[str, Any], ...]] = ()  # shown beside the method in tables: what is set besides the budget
    QUESTION_INDEPENDENT: ClassVar[bool] = True  # may its result be cached and shared by all questions?
    NEEDS_GRID: ClassVar[bool] = False  # does `before_llm` need to know where in the picture a patch is?

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.settings = settings

    @classmethod
    def for_budget(cls, budget: float, n_patches: int, n_layers: int) -> dict[str, Any]:
        """The settings with which the method has `budget` visual tokens, mean over layers.

        budget: a number of tokens, or a share of the patches between 0 and 1 (`budget_tokens` reads both). ValueError
        where none are known.
        """
        known = ", ".join(field.name for field in fields(cls.Settings)) or "none"
        raise ValueError(f"{cls.name} has no settings for a budget; give its own settings instead: {known}")

    def setup(self, sizes: Sizes) -> None:
        """Create the weights, if any. Called once by the model."""

    def init_own_weights(self) -> None:
        """Initialise parameters that are not inside standard layers. Called by the model's initialisation."""

    @property
    def n_bottleneck(self) -> int:
        """K, bottleneck tokens of one image; 0 for methods without a bottleneck."""
        return 0

    @property
    def budgets(self) -> tuple[int, ...]:
        """Into how many entries an image may be compressed, ascending; the last is K."""
        return (self.n_bottleneck,)

    @property
    def reads_apart(self) -> bool:
        """Is an image compressed in passes of its own in training too, instead of in one masked pass with the text?

        Then `n_readers`, `n_looks` and `reader_rows` say how (model/reading.py).
        """
        return False

    @property
    def n_readers(self) -> int:
        """Rows that read the image for one cache entry; each writes its share of the entry's key-value heads."""
        return 1

    @property
    def n_looks(self) -> int:
        """How often the rows go through the language model; the last time is cached."""
        return 1

    def reader_rows(self, n_entries: int, states: Tensor | None) -> Tensor:
        """(N or 1, n_entries * n_readers, D), what enters the first layer; `states`: the rows' output of the look before."""
        raise NotImplementedError(f"{self.name} does not read images apart from the text")

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

    def source(self, images: ImageFeatures) -> Tensor | None:
        """(B, C, P) of 0 and 1, which patches went into each token of `before_llm`; None: that is not told."""
        return None

    @property
    def n_fusion(self) -> int:
        """How many fusion_layers there are."""
        return 0

    @property
    def fusion_layers(self) -> Sequence[nn.Module]:
        """Decoder layers of the method's own, in which the prompt reads all patches before the language model."""
        return ()

    def fusion_schedule(self, n_patches: int) -> list[int]:
        """Visual tokens of one image that enter each of fusion_layers: its patches and what `before_llm` gives."""
        return [n_patches + self.n_visual(n_patches)] * self.n_fusion

    @property
    def question_independent(self) -> bool:
        """QUESTION_INDEPENDENT, with these settings."""
        return self.QUESTION_INDEPENDENT

    def visible(self, layout: TokenLayout) -> Tensor | None:
        """(B, L, L) bool, True = may look; None = plain causal."""
        return None

    @property
    def merges_in_tower(self) -> bool:
        """Do blocks of the vision tower merge patches, as `tower_merges` says?"""
        return False

    def tower_merges(self, n_patches: int, n_blocks: int) -> list[int]:
        """Patches to merge in each block of the vision tower that comes before LLaVA's features."""
        return [0] * n_blocks

    @property
    def reads_tower(self) -> bool:
        """Does `before_llm` need ImageFeatures.tower?"""
        return False

    @property
    def picture_side(self) -> int | None:
        """Patches on each side of the picture that the vision tower is to read, shrunk to them; None: as it is."""
        return None

    @property
    def acts_in_tower(self) -> bool:
        """Must pixels be given, because the tower's output is not enough?"""
        return self.reads_tower or self.merges_in_tower or self.picture_side is not None

    def drops(self, n_patches: int, n_layers: int) -> tuple[PruneStep, ...]:
        """Where inside the language model visual tokens leave."""
        return ()

    def queries(self, embeds: Tensor, layout: TokenLayout) -> Tensor:
        """(B, L, D) input embeddings of the prompt -> (B, L) bool: whose attention scores the visual tokens."""
        return last_token(layout)

    def after_layer(self, layer: int, seen: AttentionView) -> Keep | Merge | None:
        """Which visual tokens enter layer `layer` + 1, asked where `drops` says; None = all."""
        return None

    @property
    def needs_distance(self) -> bool:
        """Does `after_layer` read AttentionView.distance, which M-RoPE does not have as one number?"""
        return False

    def check_heads(self, n_heads: int) -> None:
        """ValueError for settings that a language model with so many attention heads cannot meet."""

    def schedule(self, n_patches: int, n_layers: int) -> list[int]:
        """Visual and bottleneck tokens of one image entering each layer, when it is first read: a promise."""
        return [self.n_visual(n_patches) + self.n_bottleneck] * n_layers

    def cached_tokens(self, n_patches: int, n_layers: int) -> list[int]:
        """Tokens of one image whose keys and values each layer keeps for the questions."""
        return [self.n_bottleneck] * n_layers if self.n_bottleneck else self.schedule(n_patches, n_layers)

    def authors_tokens(self, schedule: Sequence[int]) -> float | None:
        """What the method's authors call its number of tokens, where they do not take the mean of `schedule`."""
        return float(self.n_bottleneck) if self.n_bottleneck else None

    def to_dict(self) -> dict[str, Any]:
        """Name and every setting, ready for JSON; `build(**that)` gives the same method."""
        return {"name": self.name, **asdict(self.settings)}


class AppliedOnly(Compressor):
    """Methods that act where the model class has no socket: `htc_vlm.apply` gives them one, on any LLaVA model."""

    TRAINED = False

    def setup(self, sizes: Sizes) -> None:
        raise ValueError(
            f"{self.name} cannot be a model's own compressor (it has no weights and acts inside the vision tower or "
            f"the language model); load with compressor none and use `with htc_vlm.apply(model, {self.name!r}):`"
        )


def check_class(cls: type[Compressor]) -> None:
    """ValueError for a class with a place that nothing would ask, or two that do not go together, saying what to change."""

    def own(*places: str) -> str:
        return ", ".join(place for place in places if getattr(cls, place) is not getattr(Compressor, place))

    name, in_tower = getattr(cls, "name", cls.__qualname__), ("reads_tower", "merges_in_tower", "tower_merges", "picture_side")
    applied, masked = own("drops", "queries", "after_layer", *in_tower), own("visible", "positions", "reads_apart", "budgets")
    if applied and not issubclass(cls, AppliedOnly):
        raise ValueError(
            f"{name}: {applied} would do nothing in a model's own forward, only under htc_vlm.apply; inherit "
            "htc_vlm.compressors.AppliedOnly"
        )
    if masked and not own("n_bottleneck"):
        raise ValueError(f"{name}: {masked} would do nothing without bottleneck tokens; inherit compressors.voco.Bottleneck")
    if not own("drops"):
        if applied := own("queries", "after_layer"):
            raise ValueError(f"{name}: {applied} would never be asked; override drops, which says between which layers")
        return
    if before := own("before_llm", *in_tower):
        raise ValueError(
            f"{name}: drops and {before}: htc_vlm.apply acts inside the language model or before it, not in both places; "
            "make two methods of it"
        )
    if cls.QUESTION_INDEPENDENT:
        raise ValueError(
            f"{name}: drops leaves layers of different lengths, chosen by the prompt, which no other question can share; set "
            "QUESTION_INDEPENDENT = False"
        )


COMPRESSORS: Registry[Compressor] = Registry("compressor", group="htc_vlm.compressors", base=Compressor, check=check_class)


def last_token(layout: TokenLayout) -> Tensor:
    """(B, L) bool: the last token of each sample that is not padding.

    >>> last_token(TokenLayout.from_string("pvvt", "vvtp")).int().tolist()
    [[0, 0, 0, 1], [0, 0, 1, 0]]
    """
    column = torch.arange(layout.kind.shape[1], device=layout.kind.device).expand_as(layout.kind)
    last = column.masked_fill(layout.is_padding, -1).amax(dim=1, keepdim=True)
    return column == last


def get(name: str) -> type[Compressor]:
    """The class of a method; ValueError lists what is known."""
    return COMPRESSORS.get(name)


def build(name: str, **settings: Any) -> Compressor:
    """A compressor by name. ValueError for an unknown name or setting, naming what is known, for one of a wrong type
    and for one that is left out and has no default."""
    cls: Any = get(name)
    known = [field.name for field in fields(cls.Settings)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"{name} has no setting {unknown[0]!r}; known: {', '.join(known) or 'none'}")
    check_complete(name, cls.Settings, settings)
    hints = _hints(cls.Settings)
    return cls(cls.Settings(**{key: typed(f"{name}: {key}", value, hints.get(key, Any)) for key, value in settings.items()}))


def _hints(settings: type) -> dict[str, Any]:
    """The types of settings; none where their names are not known to the module (of a class in a function)."""
    try:
        return get_type_hints(settings)
    except NameError:
        return {}


def at_budget(name: str, budget: float, n_patches: int, n_layers: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a method has at a budget (see `for_budget`), and those given besides. ValueError where both say the
    same, or the method has none to set: one of the two would be ignored.

    >>> at_budget("tome", 12, 36, 6, {"place": "after_tower"})
    {'n_keep': 12, 'place': 'after_tower'}
    """
    made = get(name).for_budget(budget, n_patches, n_layers)
    if not made:
        raise ValueError(f"{name} has no setting for a budget ({budget}); leave it out")
    both = sorted(made.keys() & given.keys())
    if both:
        raise ValueError(f"{name}: budget {budget} sets {', '.join(made)}; leave out {', '.join(both)}, or the budget")
    return {**made, **given}


def budget_tokens(method: str, budget: float, n_patches: int) -> int:
    """A budget in tokens: a whole number of 1 to n_patches as it is, a share between 0 and 1 of n_patches, at least 1.

    >>> budget_tokens("fastv", 64, 576), budget_tokens("fastv", 0.11, 576), budget_tokens("fastv", 0.001, 576)
    (64, 63, 1)
    """
    if isinstance(budget, int) and not isinstance(budget, bool) and 1 <= budget <= n_patches:
        return budget
    if isinstance(budget, float) and 0 < budget < 1:
        return max(1, round(budget * n_patches))
    raise ValueError(f"{method}: a budget is 1 to {n_patches} tokens, or a share between 0 and 1 of them; got {budget!r}")


def check_count(method: str, what: str, value: int, at_least: int = 1, at_most: int | None = None) -> None:
    """ValueError unless `value` is a whole number within bounds."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{method}: {what} is {value!r}; give a whole number of at least {at_least}")
    if at_most is not None and value > at_most:
        raise ValueError(f"{method}: {what} is {value}; there are only {at_most} to choose from")


def check_seed(method: str, what: str, value: int) -> None:
    """ValueError unless `value` is a whole number that torch takes as a seed."""
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
        raise ValueError(f"{method}: {what} is {value!r}; give a whole number of at most 63 bits")


def check_choice(method: str, what: str, value: str, known: tuple[str, ...]) -> None:
    """ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{method}: {what} is {value!r}; known: {', '.join(known)}")
