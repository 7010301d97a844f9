"""Clustering tokens by density peaks (DPC-KNN) and taking the mean of each cluster.

Source:  SparseVLM (ICML 2025), "token recycling", official code 26a5f48 (`cluster_and_merge`), after Du et
         al., DPC-KNN (2016); docs/specs/baselines.md section 7.
Differs: the density noise is off unless given, and then comes from its own seed (official: the global random state,
         so two runs differ). The paper assigns by cosine and sums; the released code assigns by distance and averages,
         and so do we.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

NOISE_SCALE = 1e-6  # official: uniform(0, 1) * 1e-6


def dpc_knn_merge(x: Tensor, n_clusters: int, noise: Tensor | None = None) -> Tensor:
    """(B, N, D) -> (B, n_clusters, D), the mean of each cluster, most central first. `noise` as in `dpc_knn_assign`.

    >>> x = torch.tensor([0.0, 1.0, 1.5, 10.0, 11.0, 11.3, 20.0, 20.5, 22.0]).view(1, 9, 1)
    >>> dpc_knn_merge(x, 3).flatten().tolist()
    [10.7666..., 0.8333..., 20.8333...]
    """
    member = one_hot(dpc_knn_assign(x, n_clusters, noise), n_clusters).transpose(1, 2).float()  # (B, n_clusters, N)
    return ((member @ x.float()) / member.sum(dim=-1, keepdim=True)).to(x.dtype)


def dpc_knn_assign(x: Tensor, n_clusters: int, noise: Tensor | None = None) -> Tensor:
    """(B, N, D) -> (B, N), the cluster 0..n_clusters-1 of each token; no cluster is empty.

    A token is dense when its n_clusters nearest (itself included) are close; it is a centre when it is dense and far
    from every denser token. `noise` (B, N) is added to the density, to part tokens that are equally dense (with
    n_clusters=2 the closest two always are, and without noise both become centres); see `density_noise`.
    """
    n = x.shape[1]
    if not 1 <= n_clusters <= n:
        raise ValueError(f"cannot make n_clusters={n_clusters} clusters of {n} tokens; give 1 to {n}")
    if noise is not None and noise.shape != x.shape[:2]:
        raise ValueError(f"noise must be (B, N) = {tuple(x.shape[:2])}, got {tuple(noise.shape)}")
    points = x.float()
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")  # (B, N, N)
    distance = distance / x.shape[-1] ** 0.5
    nearest = distance.topk(n_clusters, dim=-1, largest=False).values
    density = (-nearest.square().mean(dim=-1)).exp()  # (B, N)
    if noise is not None:
        density = density + noise.to(density)

    is_denser = density[:, None, :] > density[:, :, None]  # [b, i, j]: j denser than i
    farthest = distance.amax(dim=(1, 2), keepdim=True)
    to_denser = torch.where(is_denser, distance, farthest).amin(dim=-1)  # (B, N)
    centre = (to_denser * density).argsort(dim=-1, descending=True, stable=True)[:, :n_clusters]

    to_centre = distance.gather(1, centre[..., None].expand(-1, -1, n))  # (B, n_clusters, N)
    own = torch.arange(n_clusters, device=x.device).expand_as(centre)
    return to_centre.argmin(dim=1).scatter(1, centre, own)  # a centre belongs to itself


def density_noise(n_batch: int, n_tokens: int, seed: int) -> Tensor:
    """(n_batch, n_tokens) uniform in [0, 1e-6), the same for every sample: a batch gives what its samples give.

    >>> before = torch.get_rng_state()
    >>> noise = density_noise(2, 5, seed=0)
    >>> torch.equal(noise[0], noise[1]), torch.equal(before, torch.get_rng_state())
    (True, True)
    """
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n_tokens, generator=generator) * NOISE_SCALE).expand(n_batch, n_tokens)
