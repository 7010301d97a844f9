"""The feature cache: what it returns is what the tower says, it resumes, and it refuses what is not its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from htc_vlm.tiny.features import FeatureCache, fill, fingerprint, load_picture, meta_for
from htc_vlm.tiny.tower import EfficientNetLiteConfig, EfficientNetLiteModel


def tiny_tower(seed: int = 0) -> EfficientNetLiteModel:
    torch.manual_seed(seed)
    config = EfficientNetLiteConfig(
        image_size=64,
        position_dim=8,
        stem_width=8,
        stage_widths=[8, 8, 8, 8, 8],
        stage_depths=[1, 1, 1, 1, 1],
        stage_strides=[1, 2, 2, 2, 2],
        stage_kernels=[3, 3, 3, 3, 3],
        stage_expansions=[1, 2, 2, 2, 2],
        head_width=16,
    )
    return EfficientNetLiteModel(config).eval()


def noise(index: int) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_filled_cache_gives_the_towers_forward_in_bfloat16_in_the_order_asked(tmp_path: Path) -> None:
    """Positions are not stored: they must come back in the last channels, and rows must not be sorted."""
    tower = tiny_tower()
    cache = FeatureCache(tmp_path, meta_for(tower, 5))
    report = fill(cache, tower, noise, batch_size=2)
    pixel_values = torch.stack([load_picture(noise(i), 64).pixel_values for i in (3, 0, 3)])
    with torch.inference_mode():
        expected = tower(pixel_values).last_hidden_state
    got = cache.get([3, 0, 3])
    assert (got.dtype, got.shape, report.n_computed) == (torch.bfloat16, (3, 4, 16 + 32 + 8), 5)
    assert torch.allclose(got.float(), expected, atol=0.02, rtol=0.01)


def test_the_small_pictures_are_stored_beside_the_patches(tmp_path: Path) -> None:
    """The pixel tokenizer needs (n, 3, s, s) RGB; a picture that already has that size must be unchanged."""
    tower = tiny_tower()
    cache = FeatureCache(tmp_path, meta_for(tower, 3, picture_size=40))
    fill(cache, tower, noise)
    assert np.array_equal(cache.pictures([2])[0].permute(1, 2, 0).numpy(), np.asarray(noise(2)))


def test_filling_again_computes_only_what_is_missing(tmp_path: Path) -> None:
    """A killed run must not start over, and must not leave holes."""
    tower = tiny_tower()
    asked: list[int] = []

    def stops_at_four(index: int) -> Image.Image:
        if index == 4:
            raise KeyboardInterrupt
        asked.append(index)
        return noise(index)

    with pytest.raises(KeyboardInterrupt):
        fill(FeatureCache(tmp_path, meta_for(tower, 6)), tower, stops_at_four, batch_size=2)
    assert FeatureCache(tmp_path).missing() == [4, 5]
    asked.clear()
    cache = FeatureCache(tmp_path, meta_for(tower, 6))
    fill(cache, tower, lambda index: asked.append(index) or noise(index), batch_size=2)  # type: ignore[func-returns-value]
    assert (asked, cache.missing(), cache.n_done) == ([4, 5], [], 6)
    assert fill(cache, tower, noise).n_computed == 0


def test_shares_are_disjoint_and_together_complete(tmp_path: Path) -> None:
    """Two processes fill one cache; overlapping shares would do the work twice."""
    tower = tiny_tower()
    first, second = FeatureCache(tmp_path, meta_for(tower, 7)), FeatureCache(tmp_path, meta_for(tower, 7))
    counts = [fill(c, tower, noise, share=(i, 2)).n_computed for i, c in enumerate((first, second))]
    whole = FeatureCache(tmp_path)
    assert (counts, whole.missing()) == ([4, 3], [])


def test_a_cache_of_another_tower_is_refused(tmp_path: Path) -> None:
    """Features of other weights look the same and train to nonsense."""
    tower, other = tiny_tower(0), tiny_tower(1)
    cache = FeatureCache(tmp_path, meta_for(tower, 2))
    with pytest.raises(ValueError, match="fingerprint"):
        FeatureCache(tmp_path, meta_for(other, 2))
    with pytest.raises(ValueError, match="n_images"):
        FeatureCache(tmp_path, meta_for(tower, 3))
    with pytest.raises(ValueError, match=fingerprint(other)):
        fill(cache, other, noise)


def test_images_that_are_not_filled_are_refused(tmp_path: Path) -> None:
    """A sparse file reads as zeros: silently training on black features."""
    tower = tiny_tower()
    cache = FeatureCache(tmp_path, meta_for(tower, 4))
    fill(cache, tower, noise, share=(0, 2))
    assert cache.get([0, 2]).shape[0] == 2
    with pytest.raises(ValueError, match=r"1 of 2 .* \[1\]"):
        cache.get([0, 1])
    with pytest.raises(ValueError, match="0 to 3"):
        cache.get([4])
    with pytest.raises(ValueError, match="without pictures"):
        cache.pictures([0])


def test_a_folder_without_a_cache_is_refused(tmp_path: Path) -> None:
    """A mistyped folder must not become a new, empty cache."""
    with pytest.raises(ValueError, match="holds no cache"):
        FeatureCache(tmp_path)


def test_the_fingerprint_survives_saving_and_channels_last(tmp_path: Path) -> None:
    """It must name the weights, not their memory layout, or a resumed run would refuse its own cache."""
    tower = tiny_tower()
    before = fingerprint(tower)
    tower.save_pretrained(tmp_path)
    loaded = EfficientNetLiteModel.from_pretrained(tmp_path).to(memory_format=torch.channels_last)
    assert fingerprint(loaded) == before
