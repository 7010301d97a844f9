"""What is probed: the items and their labels, the representations, the table."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from htc_vlm.tiny import pictograms
from study.linear_probe import Probed
from study.probe import Label, as_markdown, closed_label, items, representations, run_probe, summary
from tests import tiny_runs as tiny


def test_a_thing_alone_is_the_only_thing_in_its_picture() -> None:
    """Two things would make "which category" a question with two answers."""
    chosen = items("test", 20)
    assert all(item.scene.things == (item.thing,) for item in chosen)
    assert len(chosen) == sum(pictograms.n_things(f"test/{i}") for i in range(20))
    assert Counter(item.picture for item in chosen)["test/0"] == pictograms.n_things("test/0")


def test_in_scenes_the_labels_are_those_of_the_thing_at_the_top_left() -> None:
    """And scenes with nothing there are no items."""
    chosen = items("test", 20, "in scenes")
    assert {item.thing.cell for item in chosen} == {0} and all(item.scene is pictograms.scene(item.picture) for item in chosen)
    assert len(chosen) == sum(any(thing.cell == 0 for thing in pictograms.scene(f"test/{i}").things) for i in range(20))


def test_training_scenes_are_not_those_that_presets_train_on() -> None:
    """Features of pictures that were learnt by heart would make the probes' training set unlike their test set."""
    assert items("train", 1)[0].picture == "train/50000"
    with pytest.raises(ValueError, match="give 1 to 1000"):
        items("test", 1001)


def test_turn_is_asked_only_of_things_that_look_different_when_turned() -> None:
    """A ball is always upright: easy points for the majority."""
    chosen = items("test", 60)
    assert {item.labels()["turn"] is None for item in chosen if not item.thing.concept.turns} == {True}
    label = closed_label("turn", chosen, chosen)
    assert isinstance(label, Label) and len(label.test) == sum(item.thing.concept.turns for item in chosen)
    assert label.classes == ("down", "left", "right", "upright")


def test_labels_that_cannot_be_probed_say_why() -> None:
    """The unseen vendor's style is no class of the training items."""
    train, unseen = items("train", 60), items("test-unseen", 5)
    assert closed_label("style", train, unseen) == "1 of the test values do not occur in training, e.g. fluent"
    one_tile = [replace(item, thing=replace(item.thing, tile="red")) for item in train]
    assert closed_label("tile", one_tile, one_tile) == "all items have the same value"


@pytest.mark.parametrize(
    ("compressor", "expected"),
    [
        (tiny.HTC, {"bottleneck": 32, "anchors": 32, "patches": 32, "cells": 2 * 2 * 2 * 8, "all patches": 4 * 32,
                    "anchors through bottleneck": 32, "patches through bottleneck": 32, "bottleneck after layer 1": 32}),
        (tiny.VOCO, {"bottleneck": 32, "patches": 32, "cells": 64, "all patches": 128,
                     "patches through bottleneck": 32, "bottleneck after layer 1": 32}),
        (tiny.NONE, {"patches": 32, "all patches": 128}),
    ],
)  # fmt: skip
def test_each_method_has_the_representations_that_it_makes(compressor: dict[str, Any], expected: dict[str, int]) -> None:
    """Widths by hand: D = 32, 4 patches, 2 layers of keys and values with 2 heads of 8."""
    model, processor = tiny.loaded(compressor)
    pixels = processor(images=[tiny.noise(i) for i in range(2)], return_tensors="pt")["pixel_values"]
    found = representations(model, pixels)
    assert {name: part.shape[1] for name, part in found.items()} == expected
    torch.testing.assert_close(found["all patches"].unflatten(1, (4, 32)).mean(1), found["patches"])
    if compressor != tiny.NONE:
        torch.testing.assert_close(found["cells"], model.compress(pixel_values=pixels).kv.flatten(1))


def test_the_table_of_a_result() -> None:
    """By hand: 3 of 4 right; majority is the commonest training value, right for 1 of 4; one picture per item."""
    rows, train, test = torch.arange(4), torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 1, 1])
    label = Label("size", ("big", "small"), rows, train, rows, test)
    right = {"bottleneck": [1, 1, 1, 0], "anchors": [0, 0, 1, 0]}
    probed = {"size": {name: Probed(torch.tensor(row).bool(), 0.1) for name, row in right.items()}}
    found = summary(probed, {"size": label}, ["a", "b", "c", "d"], seed=0)
    size = found["labels"]["size"]
    assert (size["chance"], size["majority"], size["n_test"]) == (50.0, 25.0, 4)
    assert size["accuracy"]["bottleneck"]["points"] == 75.0 and found["groups"]["D"]["accuracy"]["anchors"]["points"] == 25.0
    assert found["differences"] == {"D": {"bottleneck - anchors": pytest.approx({"points": 50.0, "low": 0.0, "high": 100.0})}}
    text = as_markdown(found | {"widths": {"bottleneck": 8, "anchors": 8}, "left_out": {"style": "because"}})
    assert "| majority | 25.0 | 25.0 |" in text and "| bottleneck (8) | 75.0 ±" in text
    assert "D: bottleneck - anchors = +50.0 points" in text and "left out: style (because)" in text


def test_a_probe_runs_end_to_end_on_a_random_model() -> None:
    """With too few scenes for all 96 concepts, that label is left out and said to be."""
    model, processor = tiny.loaded(tiny.HTC)
    result = run_probe(model, processor, n_train_scenes=12, n_test_scenes=8)
    assert "concept" in result["left_out"] and {"size", "style"} <= set(result["labels"])
    assert result["n_train"]["scenes"] == 12 and result["groups"]["D"]["n_test"] > 20
    assert set(result["labels"]["size"]["accuracy"]) == set(result["widths"])
