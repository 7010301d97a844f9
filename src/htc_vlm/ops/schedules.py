"""How many visual tokens enter each layer of the language model, per method: the promise behind `schedule()`.

Source:  FastV d165972, PyramidDrop 6444f30, SparseVLMs 26a5f48, each to its rounding rule; docs/specs/baselines.md sections
         5-7.
Differs: settings that cannot be met are refused (the official code clips them, or fails later). All methods count
         tokens *entering* a layer; SparseVLM's authors count those leaving it, so its "64" is 82: see `leaving`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PUBLISHED_PATCHES = 576  # CLIP-L/14 at 336 pixels
PUBLISHED_LAYERS = 32  # a 7B decoder


def constant(n_tokens: int, n_layers: int) -> list[int]:
    """Methods that act before the language model: the same number in every layer."""
    return [n_tokens] * n_layers


def fastv(n_patches: int, n_layers: int, n_keep: int, layer: int) -> list[int]:
    """All patches enter layers 0..layer-1, `n_keep` of them the rest; attention of layer-1 decides.

    >>> fastv(576, 4, n_keep=166, layer=2)
    [576, 576, 166, 166]
    """
    return _drop(n_patches, n_layers, [layer], [n_keep])


def fastv_keep(n_patches: int, n_layers: int, mean_tokens: float, layer: int) -> int:
    """The `n_keep` whose mean over layers is nearest to `mean_tokens`.

    The paper's K = 2, for 192, 128 and 64 (docs/specs/baselines.md section 5):

    >>> [fastv_keep(576, 32, mean, layer=2) for mean in (192, 128, 64)]
    [166, 98, 30]
    """
    _check_layers([layer], n_layers)
    n_keep = round((mean_tokens * n_layers - n_patches * layer) / (n_layers - layer))
    if not 1 <= n_keep <= n_patches:
        least = (n_patches * layer + n_layers - layer) / n_layers
        raise ValueError(
            f"dropping at layer {layer} of {n_layers} cannot give a mean of {mean_tokens} of {n_patches} tokens; "
            f"the mean must be between {least:.1f} and {n_patches}"
        )
    return n_keep


def pyramid_drop(n_patches: int, n_layers: int, stages: Sequence[int], ratio: float | Sequence[float]) -> list[int]:
    """At the input of each layer in `stages`, int(n_patches * share) tokens stay.

    ratio: the shares, one per stage; or one number whose powers are the shares, as the authors advise.

    >>> pyramid_drop(576, 8, stages=(2, 4, 6), ratio=0.5)
    [576, 576, 288, 288, 144, 144, 72, 72]
    """
    return _drop(n_patches, n_layers, stages, pyramid_drop_keep(n_patches, len(stages), ratio))


def pyramid_drop_keep(n_patches: int, n_stages: int, ratio: float | Sequence[float]) -> list[int]:
    """Tokens kept at each stage.

    >>> pyramid_drop_keep(576, 3, 0.1927)
    [110, 21, 4]
    """
    if isinstance(ratio, (int, float)):
        ratio = [ratio ** (stage + 1) for stage in range(n_stages)]
    if len(ratio) != n_stages:
        raise ValueError(f"{n_stages} stages need as many ratios, got {list(ratio)}; or give one number")
    if not all(0 < share <= 1 for share in ratio):
        raise ValueError(f"ratios must be above 0 and at most 1, got {list(ratio)}")
    return [int(n_patches * share) for share in ratio]


def pyramid_drop_ratio(n_patches: int, n_layers: int, stages: Sequence[int], mean_tokens: float) -> float:
    """The single ratio, to four digits, whose mean over layers is nearest to `mean_tokens`; the least among equals.

    For small models; PYRAMID_DROP has the settings for 576 patches. ValueError when it misses by more than 2 %.

    >>> pyramid_drop_ratio(100, 8, stages=(1, 2, 4), mean_tokens=33.3)          # 100, 53, 28, 28 and four times 14
    0.53
    """
    _check_layers(stages, n_layers)
    best, best_error, least = None, float("inf"), float(n_patches)
    last: list[int] = []
    for step in range(1, 10001):
        kept = pyramid_drop_keep(n_patches, len(stages), step / 10000)
        if kept[-1] < 1 or kept == last:  # several steps give the same whole numbers
            continue
        last = kept
        reached = sum(_drop(n_patches, n_layers, stages, kept)) / n_layers
        least = min(least, reached)
        error = abs(reached - mean_tokens)
        if error < best_error:
            best, best_error = step / 10000, error
    if best is None or best_error > 0.02 * mean_tokens:
        raise ValueError(
            f"no ratio with stages {list(stages)} of {n_layers} layers gives a mean of {mean_tokens} of {n_patches} "
            f"tokens; the least is {least:.1f}. Later stages have a larger mean, earlier ones a smaller, never one of "
            f"{n_patches / n_layers:.1f} or less, since all patches enter the first layer"
        )
    return best


# Stages and ratio for a mean of 192, 128 and 64 of 576 in 32 layers (192.1, 128.4, 63.9). Solved in docs/specs/baselines.md
# section 6: the settings behind the published tables were never given (PyramidDrop issues 10, 22, 27). The paper's own
# setting, stages (8, 16, 24) and ratio 0.5, has a mean of 270 and cannot go below 144.
PYRAMID_DROP: dict[int, tuple[tuple[int, ...], float]] = {
    192: ((2, 8, 16), 0.5606),
    128: ((2, 8, 16), 0.4211),
    64: ((2, 8, 16), 0.1927),
}


@dataclass(frozen=True)
class SparseVlmSettings:
    """At the *output* of each layer in `layers`, keep[i] tokens stay, plus those recycled from the dropped ones."""

    layers: tuple[int, ...]
    keep: tuple[int, ...]
    recycle: bool = True


# Official tables (SparseVLMs 26a5f48), for 576 patches and 32 layers: v1.5 recycles, "+" does not.
SPARSE_VLM = {
    192: SparseVlmSettings((2, 6, 15), (300, 200, 110)),
    128: SparseVlmSettings((2, 6, 15), (303, 110, 36)),
    96: SparseVlmSettings((2, 6, 15), (238, 48, 26)),
    64: SparseVlmSettings((2, 6, 15), (66, 30, 17)),
}
SPARSE_VLM_PLUS = {
    192: SparseVlmSettings((2, 6, 15), (300, 200, 118), recycle=False),
    128: SparseVlmSettings((2, 6, 15), (238, 108, 60), recycle=False),
    96: SparseVlmSettings((2, 6, 15), (246, 54, 28), recycle=False),
    64: SparseVlmSettings((2, 6, 15), (66, 34, 20), recycle=False),
}


def sparse_vlm_budget(budget: int, n_patches: int, n_layers: int, plus: bool = False) -> SparseVlmSettings:
    """The official table for a budget; refused for other than 576 patches and 32 layers, for which it was made."""
    tables = SPARSE_VLM_PLUS if plus else SPARSE_VLM
    if budget not in tables:
        known = ", ".join(str(known) for known in tables)
        raise ValueError(f"no SparseVLM table for budget={budget}; known: {known}; or give layers and keep")
    if (n_patches, n_layers) != (PUBLISHED_PATCHES, PUBLISHED_LAYERS):
        raise ValueError(
            f"SparseVLM's table for budget={budget} is for {PUBLISHED_PATCHES} patches and {PUBLISHED_LAYERS} layers, "
            f"not {n_patches} and {n_layers}; give layers and keep (sparse_vlm_scaled computes the same shares)"
        )
    return tables[budget]


def sparse_vlm_scaled(budget: int, n_patches: int, n_layers: int, plus: bool = False) -> SparseVlmSettings:
    """The table at the same shares of patches and of depth: for small models, not a published setting.

    >>> sparse_vlm_scaled(192, n_patches=100, n_layers=8)
    SparseVlmSettings(layers=(0, 1, 3), keep=(52, 35, 19), recycle=True)
    """
    published = sparse_vlm_budget(budget, PUBLISHED_PATCHES, PUBLISHED_LAYERS, plus)
    layers = tuple(max(round((layer + 1) * n_layers / PUBLISHED_LAYERS) - 1, 0) for layer in published.layers)
    keep = tuple(max(1, round(kept * n_patches / PUBLISHED_PATCHES)) for kept in published.keep)
    if len(set(layers)) != len(layers):
        raise ValueError(
            f"{n_layers} layers are too few for SparseVLM's three stages; give layers and keep (their mean is above "
            f"{n_patches / n_layers:.1f}, since all patches enter the first layer)"
        )
    return SparseVlmSettings(layers, keep, published.recycle)


def n_recycled(n_dropped: int) -> int:
    """How many cluster means replace the dropped tokens: of the best 30 % (plus one), a tenth (plus one).

    >>> n_recycled(276), n_recycled(109)                        # 576 -> 300 and 309 -> 200
    (9, 4)
    """
    return n_recyclable(n_dropped) // 10 + 1


def n_recyclable(n_dropped: int) -> int:
    """How many of the dropped tokens, best first, are clustered.

    >>> n_recyclable(276), n_recyclable(10)
    (83, 4)
    """
    return int(0.3 * n_dropped) + 1


def sparse_vlm(n_patches: int, n_layers: int, settings: SparseVlmSettings) -> list[int]:
    """Tokens entering each layer; a drop at the output of layer l shows at layer l + 1.

    >>> sparse_vlm(576, 5, SparseVlmSettings((1, 3), (300, 200)))
    [576, 576, 309, 309, 204]

    Where all are kept none is recycled:

    >>> sparse_vlm(576, 3, SparseVlmSettings((1,), (576,)))
    [576, 576, 576]
    """
    if len(settings.layers) != len(settings.keep):
        raise ValueError(f"layers {settings.layers} and keep {settings.keep} must be equally long")
    entering, now = [], n_patches
    for layer, keep in zip(settings.layers, settings.keep, strict=True):
        if not 1 <= keep <= now:
            raise ValueError(f"SparseVLM cannot keep {keep} of {now} tokens at layer {layer}; give 1 to {now}")
        now = keep + (n_recycled(now - keep) if settings.recycle and keep < now else 0)
        entering.append(now)
    return _drop(n_patches, n_layers, [layer + 1 for layer in settings.layers], entering)


def leaving(schedule: Sequence[int]) -> list[int]:
    """Tokens leaving each layer: SparseVLM's own way to count, which gives its published 192, 128 and 64.

    >>> leaving([576, 576, 309, 309])
    [576, 309, 309, 309]
    """
    return [*schedule[1:], schedule[-1]]


def _drop(n_patches: int, n_layers: int, layers: Sequence[int], keep: Sequence[int]) -> list[int]:
    """From the input of layers[i] on there are keep[i] tokens."""
    _check_layers(layers, n_layers)
    now = n_patches
    for layer, kept in zip(layers, keep, strict=True):
        if not 1 <= kept <= now:
            raise ValueError(f"cannot keep {kept} of {now} visual tokens at layer {layer}; give 1 to {now}")
        now = kept
    schedule = []
    for layer in range(n_layers):
        passed = [kept for start, kept in zip(layers, keep, strict=True) if start <= layer]
        schedule.append(passed[-1] if passed else n_patches)
    return schedule


def _check_layers(layers: Sequence[int], n_layers: int) -> None:
    increasing = all(first < second for first, second in zip(layers, layers[1:], strict=False))
    if not layers or not increasing or layers[0] < 1 or layers[-1] >= n_layers:
        raise ValueError(
            f"tokens cannot be dropped at the input of layers {list(layers)}; "
            f"give increasing layers between 1 and {n_layers - 1} (the model has {n_layers})"
        )
