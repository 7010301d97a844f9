"""Table 3: what can be read linearly off the anchors, the patches and the bottleneck, about meaning (S) and detail (D).

Source:  HTC-VLM section 5.3, Table 3.
Differs: the paper has 776 questions of VQAv2 and GQA, 114 and 120 of them for testing, so its rows differ by 4 items or
         tie. Here a label is a fact about a thing in a scene of pictograms: thousands of items, training and test pictures
         of different splits, chance and majority shown, intervals by resampling pictures. "Pooling, followed by voco
         encoding" has two readings; both are measured: the mean token itself, and what the bottleneck makes of that mean
         token alone (`... through bottleneck`). Beyond the paper: the cells, which are all that text sees, and every layer.

`alone`: every thing of a scene on its own, on the scene's background, so that each label has one answer. `in scenes`: the
scene as it is, labels of the thing at the top left: what is read there is bound to a place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from htc_vlm.applied import hf_compat
from htc_vlm.eval.compare import paired_bootstrap
from htc_vlm.model.look_maps import split_visual
from htc_vlm.model.modeling import HtcVlmForConditionalGeneration
from htc_vlm.model.processing import HtcVlmProcessor
from htc_vlm.tiny import pictograms
from study.linear_probe import Probed, probe

GROUPS = {"S": ("concept", "category"), "D": ("style", "turn", "size", "place", "tile")}
SCENES = ("alone", "in scenes")
FIRST_TRAIN_SCENE = 50_000  # presets train on the first 12,000
MAX_WIDTH = 2**16  # wider features (all patches at 7B) are left out, which the result says
PAIRS = (("bottleneck", "anchors"), ("bottleneck", "patches"), ("anchors", "patches"), ("cells", "bottleneck"))
N_RESAMPLES = 2000


@dataclass(frozen=True)
class Item:
    """One thing to read off one picture. `picture` names the scene: items of one scene are resampled together."""

    picture: str
    scene: pictograms.Scene
    thing: pictograms.Thing

    def labels(self) -> dict[str, str | None]:
        """None: no such label (a thing that looks alike when turned)."""
        thing = self.thing
        return {
            "concept": thing.concept.label, "category": thing.concept.category, "style": thing.vendor,
            "turn": thing.turn if thing.concept.turns else None, "size": thing.size,
            "place": pictograms.PLACES[thing.cell], "tile": thing.tile,
        }  # fmt: skip


def items(split: str, n_scenes: int, scenes: str = "alone") -> list[Item]:
    """The items of the first n scenes of a split; of `train`, from a number on that no preset trains on."""
    if scenes not in SCENES:
        raise ValueError(f"scenes is one of {', '.join(SCENES)}; got {scenes!r}")
    first = FIRST_TRAIN_SCENE if split == "train" else 0
    names = pictograms.images(split)[first : first + n_scenes]
    if not 1 <= n_scenes <= len(names):
        raise ValueError(f"{n_scenes} scenes of {split} asked for; give 1 to {len(pictograms.images(split)) - first}")
    found = [(name, pictograms.scene(name)) for name in names]
    if scenes == "alone":
        return [Item(name, replace(scene, things=(thing,)), thing) for name, scene in found for thing in scene.things]
    return [Item(name, scene, thing) for name, scene in found for thing in scene.things if thing.cell == 0]


# ------------------------------------------------------------------------------------------------ features
@torch.no_grad()
def representations(model: HtcVlmForConditionalGeneration, pixel_values: Tensor) -> dict[str, Tensor]:
    """(N, 3, height, width) -> {name: (N, width)}, from one pass that compresses.

    bottleneck: the last hidden state of the bottleneck tokens (the paper's z_voco). anchors, patches: the mean token that
    enters the language model (v_d and V bar); "patches" are whatever stands in their place (pooled patches, codes).
    cells: keys and values of the bottleneck in all layers.
    """
    visual = model.visual_tokens(pixel_values)  # (N, C, D)
    anchors, patches = split_visual(model.config.compressor, visual)
    out = {name: part.mean(dim=1) for name, part in (("anchors", anchors), ("patches", patches)) if part.shape[1]}
    n_bottleneck = model.model.compressor.n_bottleneck
    if n_bottleneck:
        for name in ("anchors", "patches"):
            if name in out:
                out[f"{name} through bottleneck"] = _last(model.model.compress_pass(out[name][:, None])[0], n_bottleneck)
        run, _ = model.model.compress_pass(visual, output_hidden_states=True)
        out = {"bottleneck": _last(run, n_bottleneck)} | out
        out["cells"] = hf_compat.kv_from_cache(run.past_key_values, n_bottleneck).flatten(1)
        for i, state in enumerate(run.hidden_states[1:-1], start=1):  # [0] is the embedding, alike for all pictures
            out[f"bottleneck after layer {i}"] = state[:, -n_bottleneck:].flatten(1)
    out["all patches"] = patches.flatten(1)
    return {name: features.float() for name, features in out.items()}


def _last(run: Any, n_bottleneck: int) -> Tensor:
    state: Tensor = run.last_hidden_state
    return state[:, -n_bottleneck:].flatten(1)


@dataclass(frozen=True)
class Features:
    """Of n items: {name: (n, width)}; widths of what was left out as wider than MAX_WIDTH."""

    of: dict[str, Tensor]
    too_wide: dict[str, int]


def features(
    model: HtcVlmForConditionalGeneration, processor: HtcVlmProcessor, chosen: Sequence[Item], batch_size: int = 32
) -> Features:
    """Draw, encode and keep, on the CPU."""
    parts: dict[str, list[Tensor]] = {}
    too_wide: dict[str, int] = {}
    for start in tqdm(range(0, len(chosen), batch_size), desc="encode", unit="batch"):
        drawn = [pictograms.draw(item.scene) for item in chosen[start : start + batch_size]]
        pixels = processor(images=drawn, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
        for name, part in representations(model, pixels).items():
            if part.shape[1] > MAX_WIDTH:
                too_wide[name] = part.shape[1]
            else:
                parts.setdefault(name, []).append(part.cpu())
    return Features({name: torch.cat(rows) for name, rows in parts.items()}, too_wide)


# ------------------------------------------------------------------------------------------------ labels
@dataclass(frozen=True)
class Label:
    """One closed set: class numbers of the items that have this label, and which items those are."""

    name: str
    classes: tuple[str, ...]
    train_rows: Tensor
    train: Tensor
    test_rows: Tensor
    test: Tensor

    @property
    def chance(self) -> float:
        return 1 / len(self.classes)

    @property
    def majority(self) -> float:
        """Accuracy on the test items of always answering what is most common in training."""
        return float((self.test == self.train.bincount().argmax()).float().mean())


def closed_label(name: str, train: Sequence[Item], test: Sequence[Item]) -> Label | str:
    """The label over these items, or why there is nothing to probe."""
    values = [[item.labels()[name] for item in part] for part in (train, test)]
    kept = [[(row, value) for row, value in enumerate(part) if value is not None] for part in values]
    classes = sorted({value for _, value in kept[0]})
    missing = sorted({value for _, value in kept[1]} - set(classes))
    if missing:
        return f"{len(missing)} of the test values do not occur in training, e.g. {missing[0]}"
    if len(classes) < 2 or len({value for _, value in kept[1]}) < 2:
        return "all items have the same value"
    rows = [torch.tensor([row for row, _ in part]) for part in kept]
    numbers = [torch.tensor([classes.index(value) for _, value in part]) for part in kept]
    return Label(name, tuple(classes), rows[0], numbers[0], rows[1], numbers[1])


# ------------------------------------------------------------------------------------------------ the table
def run_probe(
    model: HtcVlmForConditionalGeneration,
    processor: HtcVlmProcessor,
    *,
    n_train_scenes: int = 1500,
    n_test_scenes: int = 1000,
    test_split: str = "test",
    scenes: str = "alone",
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """All labels off all representations -> a result that JSON can hold; accuracies in percent."""
    started = time.perf_counter()
    train, test = items("train", n_train_scenes, scenes), items(test_split, n_test_scenes, scenes)
    train_features, test_features = (features(model, processor, part, batch_size) for part in (train, test))
    found = {name: closed_label(name, train, test) for names in GROUPS.values() for name in names}
    labels = {name: label for name, label in found.items() if isinstance(label, Label)}
    if not labels:
        raise ValueError(f"nothing to probe: {found}; take more scenes")
    pictures = [item.picture for item in train]
    probed: dict[str, dict[str, Probed]] = {}
    for name, label in tqdm(labels.items(), desc="probe", unit="label"):
        probed[name] = {
            rep: probe(
                part[label.train_rows], label.train, [pictures[int(row)] for row in label.train_rows],
                test_features.of[rep][label.test_rows], label.test, seed,
            )
            for rep, part in train_features.of.items()
        }  # fmt: skip
    left_out = {name: why for name, why in found.items() if isinstance(why, str)}
    wide = {name: f"{width} numbers; at most {MAX_WIDTH}" for name, width in train_features.too_wide.items()}
    return {
        "scenes": scenes,
        "test_split": test_split,
        "n_train": {"scenes": n_train_scenes, "items": len(train)},
        "n_test": {"scenes": n_test_scenes, "items": len(test)},
        "widths": {rep: part.shape[1] for rep, part in train_features.of.items()},
        **summary(probed, labels, [item.picture for item in test], seed),
        "left_out": left_out | wide,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
    }


def summary(
    probed: Mapping[str, Mapping[str, Probed]], labels: Mapping[str, Label], pictures: Sequence[str], seed: int
) -> dict[str, Any]:
    """{label: {representation: Probed}} -> accuracies with intervals by label and by group, and differences by group.

    A group pools the test items of its labels, as the paper's "S" and "D" do.
    """
    names = {name: [pictures[int(row)] for row in label.test_rows] for name, label in labels.items()}
    out: dict[str, Any] = {"labels": {}, "groups": {}, "differences": {}}
    for name, label in labels.items():
        out["labels"][name] = {
            "group": next(group for group, members in GROUPS.items() if name in members),
            "n_classes": len(label.classes), "n_test": len(label.test),
            "chance": 100 * label.chance, "majority": 100 * label.majority,
            "accuracy": {
                rep: interval(one.correct.float(), None, names[name], seed) | {"l2": one.l2}
                for rep, one in probed[name].items()
            },
        }  # fmt: skip
    for group, members in GROUPS.items():
        here = [name for name in members if name in labels]
        if not here:
            continue
        all_names = [picture for name in here for picture in names[name]]
        pooled = {rep: torch.cat([probed[name][rep].correct for name in here]).float() for rep in probed[here[0]]}
        weights = [len(labels[name].test) for name in here]
        out["groups"][group] = {
            "n_test": len(all_names),
            "chance": 100 * _mean([labels[name].chance for name in here], weights),
            "majority": 100 * _mean([labels[name].majority for name in here], weights),
            "accuracy": {rep: interval(correct, None, all_names, seed) for rep, correct in pooled.items()},
        }
        out["differences"][group] = {
            f"{first} - {second}": interval(pooled[first], pooled[second], all_names, seed)
            for first, second in PAIRS
            if first in pooled and second in pooled
        }
    return out


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def interval(first: Tensor, second: Tensor | None, pictures: Sequence[str], seed: int) -> dict[str, float]:
    """Percent right, or the difference of two, with its 95 % interval over pictures."""
    other = torch.zeros_like(first) if second is None else second
    found = asdict(paired_bootstrap(first.tolist(), other.tolist(), pictures, n_resamples=N_RESAMPLES, seed=seed))
    return {name: found[name] for name in ("points", "low", "high")}


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table: a row per representation, a column per label and group, +- half the width of the interval."""
    columns: list[tuple[str, Mapping[str, Any]]] = []
    for group, members in GROUPS.items():
        columns += [(name, result["labels"][name]) for name in members if name in result["labels"]]
        columns += [(f"**{group}**", result["groups"][group])] if group in result["groups"] else []
    lines = [
        ["", *(name for name, _ in columns)],
        ["---", *("---:" for _ in columns)],
        ["chance", *(f"{column['chance']:.1f}" for _, column in columns)],
        ["majority", *(f"{column['majority']:.1f}" for _, column in columns)],
    ]
    for rep, width in result["widths"].items():
        cells = [column["accuracy"][rep] for _, column in columns]
        lines.append([f"{rep} ({width})", *(f"{c['points']:.1f} ± {(c['high'] - c['low']) / 2:.1f}" for c in cells)])
    text = ["| " + " | ".join(line) + " |" for line in lines]
    for group, differences in result["differences"].items():
        for name, d in differences.items():
            text.append(f"{group}: {name} = {d['points']:+.1f} points [{d['low']:+.1f}, {d['high']:+.1f}]")
    text += [f"left out: {name} ({why})" for name, why in result["left_out"].items()]
    text.insert(len(lines), "")
    return "\n".join(text) + "\n"
