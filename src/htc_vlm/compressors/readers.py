"""Readers: several rows read the image for one cache entry, each writing its share of the entry's heads, in several looks.

All keys and values of a bottleneck token are linear in one state. Here R rows stand at the one position of an entry, see the
image and the rows before them, and are cut up where they are cached: of the H key-value heads of each layer, the first H / R
are those of the first row, and so on. The entry costs the bytes of one token, and the heads of the text look at what
different rows have read. Who writes and who reads, for 4 heads (letters: the row that wrote the head):

    >>> print(draw(writers(n_heads=4, n_readers=2), n_entries=2))
    head    0 1 2 3
    entry 0 a a b b
    entry 1 c c d d

In another look the rows go through the layers once more: they begin with their embedding and M times the (normalised) states
that they ended with. Only the last look is cached. The visual tokens are computed once, so a look costs R rows an entry.

Source:  ours.
Differs: from VoCo-LLaMA, which is `n_readers: 1, n_looks: 1` (but for the embedding: here each row has its own, there all
         share the bottleneck token's). What stands before the bottleneck is HTC-VLM's: `channels: hybrid` adds its
         anchors. The compress pass has R * looks rows where VoCo's has one: 8 beside 576 patches by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from htc_vlm.compressors.base import COMPRESSORS, Sizes, check_count
from htc_vlm.compressors.htc import Htc, HtcSettings

FIRST_GLANCE = 0.3  # M begins as this times the identity


@dataclass(frozen=True)
class ReadersSettings(HtcSettings):
    """n_bottleneck: cache entries of an image. elastic: also the first 1, 2, 4, ... of them are an image (nested budgets)."""

    channels: str = "continuous"
    visual_attention: str = "causal"
    n_readers: int = 4
    n_looks: int = 2
    elastic: bool = False


@COMPRESSORS.register("readers")
class Readers(Htc):
    name = "readers"
    Settings = ReadersSettings
    EXAMPLES = (
        {"n_readers": 2},
        {"n_readers": 1, "n_looks": 3, "n_bottleneck": 2, "positions": "compact"},
        {"n_readers": 2, "n_bottleneck": 4, "elastic": True, "visual_attention": "self"},
    )
    PAPER = "ours, on VoCo-LLaMA"

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        check_count(self.name, "n_readers", settings.n_readers)
        check_count(self.name, "n_looks", settings.n_looks)
        if settings.elastic and settings.n_bottleneck & (settings.n_bottleneck - 1):
            raise ValueError(f"readers: elastic halves n_bottleneck down to 1; {settings.n_bottleneck} is no power of two")

    def setup(self, sizes: Sizes) -> None:
        super().setup(sizes)
        n_readers = self.settings.n_readers
        if sizes.n_kv_heads is not None and sizes.n_kv_heads % n_readers:
            divisors = [n for n in range(1, sizes.n_kv_heads + 1) if sizes.n_kv_heads % n == 0]
            raise ValueError(
                f"readers: n_readers is {n_readers}, but each layer has {sizes.n_kv_heads} key-value heads to share out "
                f"(with grouped queries fewer than attention heads); give one of {', '.join(map(str, divisors))}"
            )
        self.initializer_range = sizes.initializer_range
        self.embedding = nn.Parameter(torch.empty(self.n_bottleneck * n_readers, sizes.llm_width))
        if self.settings.n_looks > 1:
            self.look_again = nn.Linear(sizes.llm_width, sizes.llm_width, bias=False)  # M

    def init_own_weights(self) -> None:
        nn.init.normal_(self.embedding, std=self.initializer_range)
        if self.settings.n_looks > 1:
            nn.init.eye_(self.look_again.weight).mul_(FIRST_GLANCE)

    @property
    def budgets(self) -> tuple[int, ...]:
        if not self.settings.elastic:
            return (self.n_bottleneck,)
        return tuple(2**i for i in range(self.n_bottleneck.bit_length()))

    @property
    def reads_apart(self) -> bool:
        return True

    @property
    def n_readers(self) -> int:
        return int(self.settings.n_readers)

    @property
    def n_looks(self) -> int:
        return int(self.settings.n_looks)

    def reader_rows(self, n_entries: int, states: Tensor | None) -> Tensor:
        rows = self.embedding.narrow(0, 0, n_entries * self.n_readers)[None].clone()  # the counter of FLOPs takes no view
        return rows if states is None else rows + self.look_again(states)

    def schedule(self, n_patches: int, n_layers: int) -> list[int]:
        n_rows = self.n_bottleneck * self.n_readers * self.n_looks
        return [self.n_visual(n_patches) + n_rows] * n_layers


def writers(n_heads: int, n_readers: int) -> Tensor:
    """(H,) which of an entry's rows writes each key-value head.

    >>> writers(n_heads=8, n_readers=4).tolist()
    [0, 0, 1, 1, 2, 2, 3, 3]
    """
    return torch.arange(n_heads) * n_readers // n_heads


def join(kv: Tensor, n_readers: int) -> Tensor:
    """Rows' keys and values (..., H, entries * R, head_dim) -> entries (..., H, entries, head_dim).

    >>> rows = torch.arange(4.0).view(1, 4, 1).expand(2, 4, 1)    # 2 heads, 4 rows
    >>> join(rows, n_readers=2)[..., 0].tolist()                  # head 0: rows 0 and 2; head 1: rows 1 and 3
    [[0.0, 2.0], [1.0, 3.0]]
    """
    heads = torch.arange(kv.shape[-3], device=kv.device)
    by_reader = kv.unflatten(-2, (-1, n_readers))  # (..., H, entries, R, head_dim)
    return by_reader[..., heads, :, writers(len(heads), n_readers).to(kv.device), :].movedim(0, -3)


def draw(row_of_head: Tensor, n_entries: int) -> str:
    """A picture of `writers`: each cache entry, and a letter for the row that wrote each of its heads."""
    n_readers = int(row_of_head.max()) + 1
    lines = ["head    " + " ".join(str(head) for head in range(len(row_of_head)))]
    for entry in range(n_entries):
        letters = [chr(ord("a") + entry * n_readers + int(row)) for row in row_of_head]
        lines.append(f"entry {entry} " + " ".join(letters))
    return "\n".join(lines)
