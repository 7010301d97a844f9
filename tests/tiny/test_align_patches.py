"""Aligning patches with words before a model is trained from scratch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from htc_vlm.tiny import pictograms
from htc_vlm.tiny.align_patches import NO_WORD, Told, WordSettings, align_words, told_by_head, word_ids, word_loss
from htc_vlm.tiny.features import CacheMeta, FeatureCache, load_picture
from htc_vlm.tiny.tower import EfficientNetLiteModel
from htc_vlm.train import presets

from .. import tiny_runs

WORDS = {"red": 0, "blue": 1, "left": 2, "right": 3}


class Projector(nn.Module):
    """LLaVA's shape: two linear layers."""

    def __init__(self, width: int, d: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, d), nn.Linear(d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(torch.nn.functional.gelu(self.linear_1(x)))


def model_of(width: int, d: int = 8) -> SimpleNamespace:
    torch.manual_seed(0)
    embedding = nn.Embedding(len(WORDS), d)
    return SimpleNamespace(
        model=SimpleNamespace(multi_modal_projector=Projector(width, d)), get_input_embeddings=lambda: embedding
    )


def two_pictures(folder: Path) -> FeatureCache:
    """Picture 0 has features along axis 0, picture 1 along axis 1; four patches each."""
    meta = CacheMeta(2, 4, width=6, position_dim=4, image_size=8, picture_size=0, fingerprint="x")
    cache = FeatureCache(folder, meta)
    features = torch.zeros(2, 4, 6)
    features[0, :, 0] = features[1, :, 1] = 3.0
    cache.put([0, 1], features)
    return cache


def test_after_alignment_the_nearest_words_are_those_of_the_patch(tmp_path: Path) -> None:
    """Guards against gathering the wrong rows: the words of another picture or patch."""
    model, cache = model_of(10), two_pictures(tmp_path)
    colours = ["red", "blue"]
    settings = WordSettings("x", steps=150, images_per_step=8, learning_rate=0.02, patch_rms=2.0)
    loss = align_words(
        model, cache, lambda i: [[colours[i], "left" if p % 2 == 0 else "right"] for p in range(4)], WORDS, settings, seed=0
    )
    patches = model.model.multi_modal_projector(cache.get([0, 1]).float())
    best = (patches @ model.get_input_embeddings().weight.T).topk(2).indices.sort().values
    assert best.tolist() == [[[0, 2], [0, 3], [0, 2], [0, 3]], [[1, 2], [1, 3], [1, 2], [1, 3]]]
    assert loss < 0.8  # two words of equal right: ln 2 = 0.693 is the floor
    assert abs(patches.pow(2).mean().sqrt().item() - 2.0) < 0.3


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    """Guards exact resume: a run killed before its first checkpoint must align to the same start."""
    cache = two_pictures(tmp_path)
    settings = WordSettings("x", steps=5)
    weights = []
    for _ in range(2):
        model = model_of(10)
        align_words(model, cache, lambda i: [["red"]] * 4, WORDS, settings, seed=3)
        weights.append(model.model.multi_modal_projector.linear_2.weight.detach().clone())
    assert torch.equal(*weights)


def test_no_word_does_not_count() -> None:
    """Guards the mean: a patch with one word weighs one word, not the width of the table."""
    patches, embedding = torch.randn(2, 4), torch.randn(5, 4)
    alone = word_loss(patches, embedding, torch.tensor([[1], [2]]))
    padded = word_loss(patches, embedding, torch.tensor([[1, NO_WORD], [2, NO_WORD]]))
    assert torch.allclose(alone, padded)


def test_an_unknown_word_is_named() -> None:
    """A word without an id would silently teach the wrong one."""
    with pytest.raises(ValueError, match="no word 'green'"):
        word_ids([[["red"], ["green"]]], WORDS)


def test_the_words_of_a_patch_are_those_of_the_thing_in_its_quarter() -> None:
    """Guards the order of rows and columns: checked against the scene's own cells."""
    image_id = next(i for i in pictograms.images("train") if pictograms.n_things(i) == 1)
    scene = pictograms.scene(image_id)
    thing = scene.things[0]
    rows = pictograms.patch_words(image_id, 6)
    assert len(rows) == 36
    shown = {p for p, words in enumerate(rows) if thing.concept.label in words}
    top, left = 3 * (thing.cell // 2), 3 * (thing.cell % 2)
    assert shown == {6 * (top + r) + left + c for r in range(3) for c in range(3)}
    assert all(scene.background in rows[p] for p in range(36) if p not in shown)
    assert rows[0][-2:] == ["top", "left"] and rows[35][-2:] == ["bottom", "right"]


def test_settings_are_checked() -> None:
    """An unknown key in the preset would otherwise be forgotten."""
    assert presets.word_settings({"task": "x", "steps": 3}) == replace(WordSettings("x"), steps=3)
    with pytest.raises(ValueError, match="unknown setting .*stepz"):
        presets.word_settings({"task": "x", "stepz": 3})


def test_patches_without_words_learn_what_the_classifier_says_of_them(tmp_path: Path) -> None:
    """Features along axis 2 are in no picture with words; the classifier calls them "left" twice as often as "right"."""
    model, cache = model_of(10), two_pictures(tmp_path)
    told = Told(torch.zeros(4, 10).index_fill(1, torch.tensor([2]), 3.0), torch.tensor([[0.0, 0.0, 2 / 3, 1 / 3]] * 4))
    settings = WordSettings("x", steps=200, images_per_step=4, learning_rate=0.02, told=1, patches_per_step=4)
    table = torch.eye(4, 8) * 5
    align_words(model, cache, lambda i: [[["red", "blue"][i]]] * 4, WORDS, settings, seed=0, table=table, told=told)
    projector = model.model.multi_modal_projector
    away = projector(told.patches) - model.get_input_embeddings().weight.mean(dim=0)
    shares = (torch.nn.functional.rms_norm(away, (8,)) @ table.T).softmax(-1)[0]
    assert shares[2] > 1.5 * shares[3] and shares[3] > 5 * shares[:2].max()


def test_each_patch_is_asked_about_alone() -> None:
    """A red left half and a blue right half: the classifier of the mean would call all patches the same."""
    picture = Image.new("RGB", (64, 64), (255, 0, 0))
    picture.paste((0, 0, 255), (32, 0, 64, 64))
    tower = EfficientNetLiteModel.from_pretrained(tiny_runs.tower()).eval()
    weight, bias = torch.randn(3, tower.config.head_width, generator=torch.Generator().manual_seed(1)), torch.zeros(3)
    told = told_by_head(tower, (weight, bias), [picture, picture.rotate(180)])
    assert told.patches.shape == (8, tower.config.hidden_size) and told.shares.shape == (8, 3)
    pixels = load_picture(picture, 64).pixel_values[None]
    torch.testing.assert_close(told.patches[:4], tower(pixels).last_hidden_state[0].bfloat16())
    last = tower.maps(pixels)[0][0, :, 1, 1]
    torch.testing.assert_close(told.shares[3].float(), (weight @ last).softmax(-1), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="no picture"):
        told_by_head(tower, (weight, bias), [])
