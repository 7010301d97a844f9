"""A tiny HTC-VLM with only what training needs: the language model's layers, written out for one image and a tree of questions.

Source:  ours; transformers' Llama, and the compressors none, avg_pool, voco, htc and readers of the library.
Differs: the same logits (study/tests/test_fast_trainer.py), fewer operations: questions are nodes of a tree (tree.py), the last
         layer runs only where something is answered, and for patches not at all beyond its keys and values. Projections
         that read the same states are one matrix. Everything has one static shape, so that the whole model compiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from htc_vlm import compressors
from htc_vlm.compressors.readers import join

KNOWN = (
    "the fast trainer knows none, avg_pool before the projector, voco, htc and readers; channels hybrid or continuous, fusion "
    "pre, positions sequential"
)
KV = tuple[Tensor, Tensor]  # keys and values of one layer, each (B, kv heads, n, head_dim)
N_TURNS = 4


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. code_width: channels of an image's code, flattened; 0: no anchors."""

    width: int
    mlp_width: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_words: int
    eps: float
    rope_theta: float
    feature_width: int
    bottleneck_id: int
    code_width: int = 0
    anchor_width: int = 0


@dataclass(frozen=True)
class Method:
    """How an image becomes what the text reads. n_entries 0: the patches, or the means of n_pooled cells of them; own_rows: the
    rows do not share the token's embedding."""

    n_entries: int
    n_readers: int
    n_looks: int
    own_rows: bool
    patches_look_back: bool
    budgets: tuple[int, ...]
    has_anchors: bool
    n_pooled: int = 0


def method_of(settings: Mapping[str, Any]) -> Method:
    """A compressor's settings as this model runs them; ValueError for what it does not know."""
    built: Any = compressors.build(**settings)
    if built.name == "none":
        return Method(0, 1, 1, False, True, (0,), False)
    if built.name == "avg_pool" and built.settings.place == "before_projector":
        return Method(0, 1, 1, False, True, (0,), False, n_pooled=built.settings.n_tokens)
    given, default = built.settings, {"channels": "continuous", "fusion": "pre", "anchor_source": "quantized"}
    found = {name: getattr(given, name, value) for name, value in default.items()}
    known = built.name in ("voco", "htc", "readers") and found["channels"] in ("hybrid", "continuous")
    known = known and found["fusion"] == "pre" and found["anchor_source"] != "shuffled"
    known = known and getattr(given, "positions", "") == "sequential"
    has_anchors = found["channels"] == "hybrid"
    if not known or (has_anchors and found["anchor_source"] == "learnt"):
        raise ValueError(f"{dict(settings)}: {KNOWN}; train others with htc-vlm train")
    is_readers = built.name == "readers"
    return Method(
        n_entries=built.n_bottleneck,
        n_readers=built.n_readers if is_readers else 1,
        n_looks=built.n_looks if is_readers else 1,
        own_rows=is_readers,
        patches_look_back=given.visual_attention == "causal",
        budgets=tuple(built.budgets) if is_readers else (built.n_bottleneck,),
        has_anchors=has_anchors,
    )


class Layer(nn.Module):
    """The weights of one Llama layer, in our form: queries, keys and values in one matrix, gate and up in one."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        n_q, n_kv = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
        self.qkv = nn.Parameter(torch.zeros(n_q + 2 * n_kv, shape.width))
        self.out = nn.Parameter(torch.zeros(shape.width, n_q))
        self.gate_up = nn.Parameter(torch.zeros(2 * shape.mlp_width, shape.width))
        self.down = nn.Parameter(torch.zeros(shape.width, shape.mlp_width))
        self.attention_norm = nn.Parameter(torch.ones(shape.width))
        self.mlp_norm = nn.Parameter(torch.ones(shape.width))


class Weights(NamedTuple):
    """The weights of a layer as an image is read through it: `Layer`'s, changed."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    attention_norm: Tensor
    mlp_norm: Tensor


class Lora(nn.Module):
    """Low-rank changes of one layer's seven matrices, by the name that the matrix has in a Llama."""

    def __init__(self, shape: Shape, rank: int, scale: float) -> None:
        super().__init__()
        self.scale, n_q, n_kv = scale, shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
        self.sizes = {
            "q_proj": (n_q, shape.width), "k_proj": (n_kv, shape.width), "v_proj": (n_kv, shape.width),
            "o_proj": (shape.width, n_q), "down_proj": (shape.width, shape.mlp_width),
            "gate_proj": (shape.mlp_width, shape.width), "up_proj": (shape.mlp_width, shape.width),
        }  # fmt: skip
        for name, (n_out, n_in) in self.sizes.items():
            self.register_parameter(f"{name}_a", nn.Parameter(torch.zeros(rank, n_in)))
            self.register_parameter(f"{name}_b", nn.Parameter(torch.zeros(n_out, rank)))

    def change(self, *names: str) -> Tensor:
        """What is added to matrices that stand one below the other."""
        return torch.cat([getattr(self, f"{name}_b") @ getattr(self, f"{name}_a") for name in names]) * self.scale

    def of(self, layer: Any) -> Weights:
        """The layer with the changes added."""
        return Weights(
            layer.qkv + self.change("q_proj", "k_proj", "v_proj"), layer.out + self.change("o_proj"),
            layer.gate_up + self.change("gate_proj", "up_proj"), layer.down + self.change("down_proj"),
            layer.attention_norm, layer.mlp_norm,
        )  # fmt: skip


class FastModel(nn.Module):
    """The trained weights of a tiny model (weights.py names their places in the library's), zero until they are loaded.

    lora: (rank, scale) of an adapter, at work only while an image is read; then the layers and the projector do not learn.
    """

    def __init__(
        self, shape: Shape, method: Method, reads_turn: bool = False, lora: tuple[int, float] | None = None
    ) -> None:
        super().__init__()
        self.shape, self.method, width = shape, method, shape.width
        self.embedding = nn.Parameter(torch.zeros(shape.n_words, width))
        self.norm = nn.Parameter(torch.ones(width))
        if method.own_rows:
            self.rows = nn.Parameter(torch.zeros(method.n_entries * method.n_readers, width))
        if method.n_looks > 1:
            self.look_again = nn.Parameter(torch.zeros(width, width))
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.n_layers))
        self.project_1, self.project_2 = nn.Linear(shape.feature_width, width), nn.Linear(width, width)
        if method.has_anchors:
            self.anchors_1 = nn.Linear(shape.code_width, shape.anchor_width, bias=False)
            self.anchors_2 = nn.Linear(shape.anchor_width, shape.anchor_width, bias=False)
        if reads_turn:
            self.turn_head = nn.Linear(width, N_TURNS)
        self.lora = None
        if lora is not None:
            for weight in (self.embedding, self.norm, *self.layers.parameters(), *self.project_1.parameters()):
                weight.requires_grad_(False)
            self.project_2.requires_grad_(False)
            self.lora = nn.ModuleList(Lora(shape, *lora) for _ in range(shape.n_layers))

    def forward(
        self, features: Tensor, code: Tensor, ids: Tensor, depth: Tensor, visible: Tensor, at: Tensor, n_entries: int
    ) -> tuple[Tensor, Tensor]:
        """features (B, P, width); code (B, channels), unused without anchors; ids, depth (B, T) tokens of the question tree and
        how deep they stand; visible (B, 1, T, T); at (B, A) the nodes where something is answered; n_entries: of each image.

        Returns logits (B, A, words) and the patches' states before the last layer (B, P, D), normalised.
        """
        visual = self.visual_tokens(features, code)
        layers = self.layers if self.lora is None else [lora.of(one) for lora, one in zip(self.lora, self.layers, strict=True)]
        image, states = self.run_visual(visual, layers)
        n_before = visual.shape[1] + n_entries
        if n_entries:
            image = self.read(image, len(features), n_entries, layers)
        logits = self.answer(image, n_before, ids, depth, visible, at)
        return logits, self.normed(states[:, -features.shape[1] :], self.norm)

    def visual_tokens(self, features: Tensor, code: Tensor) -> Tensor:
        """(B, C, D): projected patches, the anchors before them; or the means of cells."""
        if self.method.n_pooled:
            n_side, side = math.isqrt(self.method.n_pooled), math.isqrt(features.shape[1])
            grid = features.transpose(1, 2).unflatten(2, (side, side))
            features = F.adaptive_avg_pool2d(grid, n_side).flatten(2).transpose(1, 2)
        patches = self.project_2(F.gelu(self.project_1(features)))
        if not self.method.has_anchors:
            return patches
        anchors = F.gelu(self.anchors_2(F.gelu(self.anchors_1(code)))).unflatten(1, (-1, self.shape.width))
        return torch.cat((anchors, patches), dim=1)

    def run_visual(self, visual: Tensor, layers: Sequence[Any]) -> tuple[list[KV], Tensor]:
        """Keys and values of every layer, and the states that enter the last one."""
        length, kept = visual.shape[1], []
        turn = self.rotation(torch.arange(length, device=visual.device))
        past = torch.ones(length, length, dtype=torch.bool, device=visual.device).tril()
        states = visual
        for number, layer in enumerate(layers):
            q, k, v = self.qkv(layer, states)
            k = rotate(k, turn)
            kept.append((k, v))
            if number + 1 == len(self.layers):
                break
            if self.method.patches_look_back:
                mixed = self.attend(rotate(q, turn), k, v, past)
            else:  # Eq. 6: a visual token sees itself only
                mixed = self.of_all_heads(v).transpose(1, 2).flatten(2)
            states = self.mlp(layer, states + F.linear(mixed, layer.out))
        return kept, states

    def read(self, image: list[KV], n_images: int, n_entries: int, layers: Sequence[Any]) -> list[KV]:
        """Rows that look at the visual tokens, in several looks -> the entries of every layer."""
        method = self.method
        first = self.rows if method.own_rows else self.embedding[self.shape.bottleneck_id].expand(n_entries, -1)
        n_rows, n_visual, device = n_entries * method.n_readers, image[0][0].shape[2], image[0][0].device
        first = first[:n_rows].expand(n_images, -1, -1)
        number = torch.arange(n_rows, device=device)
        turn = self.rotation(n_visual + number // method.n_readers)
        visible = torch.cat((number.new_ones(n_rows, n_visual).bool(), number[:, None] >= number), dim=1)
        rows = first
        for look in range(method.n_looks):
            if look:
                rows = first + F.linear(self.normed(rows, self.norm), self.look_again)
            kept = []
            for layer, (keys, values) in zip(layers, image, strict=True):
                q, k, v = self.qkv(layer, rows)
                k = rotate(k, turn)
                kept.append((k, v))
                if len(kept) == len(self.layers) and look + 1 == method.n_looks:
                    break
                mixed = self.attend(rotate(q, turn), torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2), visible)
                rows = self.mlp(layer, rows + F.linear(mixed, layer.out))
        return [(join(k, method.n_readers), join(v, method.n_readers)) for k, v in kept] if method.n_readers > 1 else kept

    def answer(self, image: list[KV], n_before: int, ids: Tensor, depth: Tensor, visible: Tensor, at: Tensor) -> Tensor:
        """Logits at the nodes `at`; n_before: positions before the text."""
        states = F.embedding(ids, self.embedding)
        turn = tuple(part[:, None] for part in self.rotation(depth + n_before))
        sees_image = visible.new_ones(*visible.shape[:3], image[0][0].shape[2])
        visible = torch.cat((sees_image, visible), dim=-1)
        turn_at = turn
        for number, (layer, (keys, values)) in enumerate(zip(self.layers, image, strict=True)):
            q, k, v = self.qkv(layer, states)
            if number + 1 == len(self.layers):
                q = q.gather(2, at[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
                states = states.gather(1, at[..., None].expand(-1, -1, states.shape[2]))
                turn_at = tuple(part.gather(2, at[:, None, :, None].expand(-1, -1, -1, part.shape[3])) for part in turn)
                visible = visible.gather(2, at[:, None, :, None].expand(-1, -1, -1, visible.shape[3]))
            k = torch.cat((keys, rotate(k, turn)), dim=2)
            mixed = self.attend(rotate(q, turn_at), k, torch.cat((values, v), dim=2), visible)
            states = self.mlp(layer, states + F.linear(mixed, layer.out))
        return F.linear(self.normed(states, self.norm), self.embedding)

    # ------------------------------------------------------------------------------------------------ parts of a layer
    def normed(self, states: Tensor, weight: Tensor) -> Tensor:
        """Root mean square norm."""
        return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.shape.eps) * weight

    def qkv(self, layer: Any, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, heads, n, head_dim), keys and values (B, kv heads, n, head_dim), not rotated yet."""
        n_kv = self.shape.n_kv_heads
        every = F.linear(self.normed(states, layer.attention_norm), layer.qkv).unflatten(-1, (-1, self.shape.head_dim))
        q, k, v = every.transpose(1, 2).split((self.shape.n_heads, n_kv, n_kv), dim=1)
        return q, k, v

    def of_all_heads(self, kv: Tensor) -> Tensor:
        """Grouped keys or values, repeated for each head that reads them."""
        times = self.shape.n_heads // self.shape.n_kv_heads
        return kv if times == 1 else kv.repeat_interleave(times, dim=1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """(B, n, heads * head_dim)"""
        k, v = self.of_all_heads(k), self.of_all_heads(v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2)

    def mlp(self, layer: Any, states: Tensor) -> Tensor:
        """states + MLP(norm(states))"""
        gate, up = F.linear(self.normed(states, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
        return states + F.linear(F.silu(gate) * up, layer.down)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(..., head_dim) cosines and sines."""
        size = self.shape.head_dim
        frequencies = self.shape.rope_theta ** (-torch.arange(0, size, 2, device=positions.device).float() / size)
        angles = positions.float()[..., None] * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def rotate(states: Tensor, turn: tuple[Tensor, ...]) -> Tensor:
    """RoPE, as transformers' Llama pairs the channels."""
    first, second = states.chunk(2, dim=-1)
    return states * turn[0] + torch.cat((-second, first), dim=-1) * turn[1]
