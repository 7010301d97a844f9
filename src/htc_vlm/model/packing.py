"""Pack keys and values into 8, 4 or 2 bits: int8 and int4 with a scale per head, int2 with calibrated levels.

Source:  symmetric quantization as in KIVI (arXiv:2402.02750) and KVQuant (arXiv:2401.18079), section 3; Lloyd 1982 for levels.
Differs: one bottleneck token has no neighbours to group with, so a scale covers one head of one layer's keys or values; the
         levels of int2 belong to one number of the image each (non-uniform, per channel), calibrated on other pictures.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

BITS = {"int8": 8, "int4": 4, "int2": 2}
DTYPES = ("model", *BITS)
LEAST_CALIBRATION = 64  # images; 512 were enough for 0.1 +- 0.9 points on the tiny model

Shape = tuple[int, int, int, int, int]  # layers, 2, kv heads, K, head_dim


@dataclass(frozen=True)
class Levels:
    """values (layers, 2, kv heads, K, head_dim, 4) float16, ascending: what the four codes of int2 stand for."""

    values: Tensor

    @classmethod
    def fit(cls, kv: Tensor, n_steps: int = 20, chunk: int = 1 << 14) -> Levels:
        """Lloyd's four levels of each number, from (N, layers, 2, kv heads, K, head_dim) of other pictures.

        ValueError for fewer than 64 images: with few, each level would be one image's own value.
        """
        if len(kv) < LEAST_CALIBRATION:
            raise ValueError(
                f"int2 needs {LEAST_CALIBRATION} images or more to calibrate its levels (512 are better), got {len(kv)}"
            )
        parts = [_lloyd(part, n_steps) for part in kv.detach().float().cpu().flatten(1).split(chunk, dim=1)]
        return cls(torch.cat(parts).to(torch.float16).reshape(*kv.shape[1:], 4))

    @property
    def digest(self) -> str:
        """SHA-256: images of other levels cannot be put together with these."""
        return hashlib.sha256(self.values.contiguous().cpu().numpy().tobytes()).hexdigest()


def _lloyd(samples: Tensor, n_steps: int) -> Tensor:
    """(M, V) -> (V, 4) levels, ascending; starts from the octiles."""
    levels = samples.quantile(torch.tensor([1, 3, 5, 7]) / 8, dim=0).T.contiguous()
    for _ in range(n_steps):
        codes = _nearest(samples, levels)
        for code in range(4):
            mine = codes == code
            count = mine.sum(0)
            mean = torch.where(mine, samples, 0).sum(0) / count.clamp_min(1)
            levels[:, code] = torch.where(count > 0, mean, levels[:, code])
    return levels


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    """(M, V) values and (V, 4) ascending levels -> (M, V) codes 0 to 3."""
    between = (levels[:, 1:] + levels[:, :-1]) / 2
    return (values[..., None] > between).sum(-1)


@dataclass(frozen=True)
class Packed:
    """N images of `shape`, each a row of bytes: codes, the first in the low bits; then, for int8 and int4, the scales."""

    dtype: str
    rows: Tensor  # (N, bytes an image) uint8
    shape: Shape
    levels: Levels | None = None

    def __post_init__(self) -> None:
        if self.dtype not in BITS:
            raise ValueError(f"dtype is {self.dtype!r}; packed are {', '.join(BITS)}")
        if (self.dtype == "int2") != (self.levels is not None):
            raise ValueError(f"{self.dtype} {'needs calibrated levels' if self.dtype == 'int2' else 'has no levels'}")
        wanted = row_bytes(self.shape, self.dtype)
        if self.rows.ndim != 2 or self.rows.shape[1] != wanted:
            raise ValueError(
                f"rows of {tuple(self.rows.shape)} bytes; images of {self.shape} as {self.dtype} take {wanted} each"
            )

    def unpack(self) -> Tensor:
        """-> (N, layers, 2, kv heads, K, head_dim) float32."""
        n_values, bits = math.prod(self.shape), BITS[self.dtype]
        n_code_bytes = _n_code_bytes(n_values, bits)
        codes = _spread(self.rows[:, :n_code_bytes], bits)[:, :n_values]
        if self.levels is not None:
            levels = self.levels.values.to(self.rows.device).float().flatten(0, -2)  # (V, 4)
            return levels.expand(len(codes), -1, -1).gather(-1, codes[..., None].long()).reshape(-1, *self.shape)
        scales = self.rows[:, n_code_bytes:].contiguous().view(torch.float16).float()
        centred = codes.float() - _middle(bits)
        return centred.reshape(-1, *self.shape) * scales.reshape(-1, *self.shape[:-1], 1)


def pack(kv: Tensor, dtype: str, levels: Levels | None = None) -> Packed:
    """(N, layers, 2, kv heads, K, head_dim) -> the same images in fewer bits. ValueError for values that are not finite.

    >>> packed = pack(torch.tensor([7.0, -3.4, 0.2, 0.0]).reshape(1, 1, 1, 1, 1, 4).expand(1, 1, 2, 1, 1, 4), "int4")
    >>> packed.unpack()[0, 0, 0, 0, 0].tolist(), packed.rows.shape[1]
    ([7.0, -3.0, 0.0, 0.0], 8)
    """
    if dtype not in BITS:
        raise ValueError(f"dtype is {dtype!r}; known: {', '.join(DTYPES)}")
    if not torch.isfinite(kv).all():
        raise ValueError("images with values that are not finite cannot be packed; look at the model that made them")
    layers, two, heads, n_bottleneck, head_dim = kv.shape[1:]
    shape: Shape = (layers, two, heads, n_bottleneck, head_dim)
    values, bits = kv.detach().float(), BITS[dtype]
    if dtype == "int2":
        if levels is None:
            raise ValueError("int2 needs calibrated levels; give levels=Levels.fit(kv of 64 or more other pictures)")
        if levels.values.shape[:-1] != kv.shape[1:]:
            raise ValueError(f"levels are for images of {tuple(levels.values.shape[:-1])}, these are {shape}")
        codes = _nearest(values.flatten(1), levels.values.to(kv.device).float().flatten(0, -2))
        return Packed(dtype, _squeeze(codes.to(torch.uint8), bits), shape, levels)
    top = _middle(bits) - 1  # 127 or 7: as many steps below zero as above
    scales = (values.abs().amax(-1, keepdim=True) / top).to(torch.float16)
    steps = (values / scales.float().clamp_min(torch.finfo(torch.float16).tiny)).round().clamp(-top, top)
    codes = (steps + _middle(bits)).to(torch.uint8).flatten(1)
    return Packed(dtype, torch.cat((_squeeze(codes, bits), scales.flatten(1).contiguous().view(torch.uint8)), 1), shape)


def row_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes that one packed image takes.

    >>> [row_bytes((6, 2, 8, 1, 16), dtype) for dtype in BITS], row_bytes((32, 2, 32, 1, 128), "int4")
    ([1728, 960, 384], 135168)
    """
    n_values = math.prod(shape)
    return _n_code_bytes(n_values, BITS[dtype]) + (0 if dtype == "int2" else 2 * n_values // shape[-1])


def _middle(bits: int) -> int:
    return 1 << (bits - 1)


def _n_code_bytes(n_values: int, bits: int) -> int:
    return -(-n_values * bits // 8)


def _squeeze(codes: Tensor, bits: int) -> Tensor:
    """(N, V) uint8 codes below 2**bits -> (N, bytes)"""
    if bits == 8:
        return codes
    each = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each)).unflatten(1, (-1, each))
    out = codes[..., 0].clone()
    for place in range(1, each):
        out |= codes[..., place] << (bits * place)
    return out


def _spread(rows: Tensor, bits: int) -> Tensor:
    """(N, bytes) -> (N, codes) uint8"""
    if bits == 8:
        return rows
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=rows.device)
    return ((rows[..., None] >> places) & ((1 << bits) - 1)).flatten(1)
