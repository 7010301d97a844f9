"""DPC-KNN against the official outputs, and by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from htc_vlm.ops.cluster import NOISE_SCALE, density_noise, dpc_knn_assign, dpc_knn_merge


def test_merging_equals_the_official_one(golden: Path) -> None:
    """The paper's text (cosine, sums) gives other tokens than the code behind its numbers."""
    official = load_file(golden / "dpc_knn.safetensors")
    merged = dpc_knn_merge(official["x"], 4)
    torch.testing.assert_close(merged, official["merged"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dpc_knn_merge(official["x"], 4, noise=torch.zeros(1, 40)), merged)


def test_three_heaps_are_three_clusters() -> None:
    """Two of the heaps in one cluster: the distance to denser tokens was not used."""
    x = torch.tensor([0.0, 1.0, 1.5, 10.0, 11.0, 11.3, 20.0, 20.5, 22.0]).view(1, 9, 1)
    assert dpc_knn_assign(x, 3).tolist() == [[1, 1, 1, 0, 0, 0, 2, 2, 2]]


def test_a_batch_gives_what_its_samples_give() -> None:
    """The official caller indexes [0]; noise drawn per batch would change with the batch."""
    x = torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(0))
    together = dpc_knn_merge(x, 5, density_noise(3, 20, seed=3))
    alone = [dpc_knn_merge(sample[None], 5, density_noise(1, 20, seed=3)) for sample in x]
    torch.testing.assert_close(together, torch.cat(alone))


def test_no_cluster_is_empty_even_when_all_tokens_are_equal() -> None:
    """A cluster without members is a division by zero."""
    x = torch.ones(1, 6, 3)
    assert dpc_knn_assign(x, 4).unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(dpc_knn_merge(x, 4), torch.ones(1, 4, 3))
    assert torch.equal(dpc_knn_merge(x, 1), torch.ones(1, 1, 3))


def test_half_precision_is_clustered_in_float32() -> None:
    """exp(-distance) in bfloat16 has three digits: most tokens would tie."""
    x = torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    merged = dpc_knn_merge(x, 4)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, dpc_knn_merge(x.float(), 4).bfloat16())


def test_noise_has_its_own_seed_and_the_official_size() -> None:
    """Noise from the global random state makes two runs differ and shifts every later random number."""
    state = torch.get_rng_state()
    noise = density_noise(1, 1000, seed=5)
    assert torch.equal(noise, density_noise(1, 1000, seed=5))
    assert not torch.equal(noise, density_noise(1, 1000, seed=6))
    assert float(noise.min()) >= 0 and float(noise.max()) < NOISE_SCALE == 1e-6
    assert torch.equal(state, torch.get_rng_state())


def test_what_cannot_be_met_is_refused() -> None:
    """More clusters than tokens would repeat tokens; noise of another shape would broadcast."""
    x = torch.zeros(2, 5, 3)
    for n_clusters in (0, 6):
        with pytest.raises(ValueError, match=f"n_clusters={n_clusters} clusters of 5 tokens"):
            dpc_knn_merge(x, n_clusters)
    with pytest.raises(ValueError, match=r"noise must be \(B, N\) = \(2, 5\)"):
        dpc_knn_merge(x, 2, noise=torch.zeros(5))
