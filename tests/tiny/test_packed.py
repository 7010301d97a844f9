"""Packed questions: a sample depends on its number alone, and only asked images come."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from htc_vlm.tiny.features import FeatureCache, meta_for
from htc_vlm.tiny.packed import PackedQuestions, Source, codes_of
from htc_vlm.train.presets import word_tokenizer

from .. import tiny_runs as tiny

WORDS = ["what", "is", "a", "cat", "dog", "?"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    """Six images; features of image i are all i, its picture is all 10 i."""
    tower = tiny.loaded(tiny.NONE)[0].model.vision_tower
    made = FeatureCache(tmp_path_factory.mktemp("cache"), meta_for(tower, 6, picture_size=4))
    shape = (made.meta.n_patches, made.meta.width)
    features = torch.stack([torch.full(shape, float(i)) for i in range(6)])
    pictures = np.stack([np.full((4, 4, 3), 10 * i, dtype=np.uint8) for i in range(6)])
    made.put(range(6), features, pictures)
    return made


def ask(image: int, n: int, seed: int, progress: float) -> list[tuple[str, str]]:
    rng = np.random.default_rng((image, seed))
    return [("what is a cat ?", ["cat", "dog"][rng.integers(2)]) for _ in range(n)]


def packed(cache: FeatureCache, n_samples: int = 50, n_text: int = 21, seed: int = 0, **source: object) -> PackedQuestions:
    made = Source("made-up", cache, ask, share=1.0, **source)  # type: ignore[arg-type]
    return PackedQuestions([made], n_samples, n_text, word_tokenizer(WORDS), "<image><image>", seed)


def test_sample_k_is_the_same_whatever_was_read_before(cache: FeatureCache) -> None:
    """A resumed run begins at sample k; random state that runs along would give it other questions."""
    one = packed(cache)
    for number in range(5):
        one[number]
    there, here = one[37], packed(cache)[37]
    assert there.encoded == here.encoded
    assert torch.equal(there.images["patch_features"], here.images["patch_features"])
    others = [packed(cache, seed=1)[37].encoded, packed(cache)[36].encoded]
    assert all(other.labels != there.encoded.labels for other in others)


def test_as_many_whole_questions_as_fit(cache: FeatureCache) -> None:
    """18 tokens: three questions of 4 words (no "?"), answer and end, 6 each; a cut answer would teach to stop early."""
    encoded = packed(cache, n_text=18)[0].encoded
    assert (len(encoded.input_ids), max(encoded.question_ids or []), encoded.n_supervised) == (2 + 18, 3, 6)
    assert max(packed(cache, n_text=17)[0].encoded.question_ids or []) == 2
    with pytest.raises(ValueError, match="n_text is 5, too few"):
        packed(cache, n_text=5)[0]


def test_the_features_are_those_of_the_image_asked_about(cache: FeatureCache) -> None:
    """Off by one, the model would learn answers about another picture."""
    for number in range(10):
        sample = packed(cache)[number]
        image = int(sample.encoded.id.split("/")[1].split("#")[0])
        assert sample.images["patch_features"][0, 0, 0] == image


def test_simple_images_come_first_and_all_later(cache: FeatureCache) -> None:
    """Of 50 samples the first 25 may only be of images 1 and 2."""
    data = packed(cache, n_samples=50, simple_first=[(0.5, np.array([1, 2]))])
    seen = [int(data[i].images["patch_features"][0, 0, 0]) for i in range(50)]
    assert set(seen[:25]) == {1, 2} and set(seen[25:]) > {1, 2}


def test_shares_are_shares_of_the_samples(cache: FeatureCache) -> None:
    """3 to 1; by number of images both sources would come equally often."""
    sources = [Source("much", cache, ask, 3.0), Source("little", cache, ask, 1.0)]
    data = PackedQuestions(sources, 400, 21, word_tokenizer(WORDS), "<image>", 0)
    n_much = sum(data[i].encoded.id.startswith("much") for i in range(400))
    assert 260 < n_much < 340  # 300 expected, standard deviation 8.7


def test_no_source_is_refused() -> None:
    """An empty data set would train on nothing and report success."""
    with pytest.raises(ValueError, match="empty data set"):
        PackedQuestions([], 10, 21, word_tokenizer(WORDS), "<image>", 0)


def test_codes_are_computed_once_of_the_enlarged_pictures(cache: FeatureCache, tmp_path: Path) -> None:
    """Inference enlarges a picture to the tower's size before the quantizer sees it; training must do the same."""
    shapes = []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(pixels.shape))
        return pixels.mean(dim=(2, 3))[:, None, None, :]

    file = tmp_path / "codes.npy"
    codes = codes_of(cache, encode, file, batch_size=4)
    assert shapes == [(4, 3, 64, 64), (2, 3, 64, 64)]
    assert np.allclose(codes[:, 0, 0, 0], [10 * i / 255 for i in range(6)], atol=1e-3)
    assert np.array_equal(codes_of(cache, encode, file), codes) and len(shapes) == 2
    np.save(file, codes[:3])
    with pytest.raises(ValueError, match="codes of 3 images, the cache has 6; remove the file"):
        codes_of(cache, encode, file)
