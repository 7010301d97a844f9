"""The sockets of the vision tower: what LLaVA's features were made from, and merging between blocks.

Source:  transformers 5.23, CLIPVisionModel and CLIPEncoderLayer (read); ToMe's block (af95e4b) and VisionZip's reading
         of the class token (3151f6d); docs/specs/baselines.md sections 4, 9, 12. Touches transformers' internals, as
         applied/hf_compat does.
Differs: no hook and no attention of our own: the class token's row and the keys are computed again from the block's
         input; sizes enter attention as a float mask, which sdpa and eager add to the logits.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import CLIPVisionModel, LlavaModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from htc_vlm.applied.hf_compat import compute_dtype
from htc_vlm.compressors import Compressor, ImageFeatures, TowerView
from htc_vlm.ops.merge import TokenMerge, bipartite_soft_matching

ADDS_MASKS = ("sdpa", "eager")  # backends of the tower that add a float mask to the logits


class TowerRun:
    """The merges of each block, and what became of the patches in the pass that runs now."""

    def __init__(self, merges: list[int]) -> None:
        self.merges = merges
        self.merged: TokenMerge | None = None  # class token included
        self.size: Tensor | None = None  # (B, N, 1), patches in each token; None before the first merge

    def start(self, states: Tensor) -> None:
        n = states.shape[1]
        self.merged = TokenMerge(torch.arange(n, device=states.device).expand(states.shape[0], n), n)
        self.size = None

    def of_patches(self) -> TokenMerge:
        """What went where, without the class token, which is first on both sides."""
        if self.merged is None:
            raise ValueError("the vision tower has not run yet")
        return TokenMerge(self.merged.destination[:, 1:] - 1, self.merged.n_out - 1)


class Merging(CLIPEncoderLayer):
    """A CLIP block that merges patches between attention and MLP, weighing what attention sees by size."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        run: TowerRun = self.__dict__["_run"]
        index: int = self.__dict__["_index"]
        if index == 0:
            run.start(hidden_states)
        normed = self.layer_norm1(hidden_states)
        if run.size is not None:
            attention_mask = run.size[:, None, None, :, 0].log().to(hidden_states.dtype)  # (B, 1, 1, N)
        attended, _ = self.self_attn(hidden_states=normed, attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + attended
        r = run.merges[index] if index < len(run.merges) else 0
        if r and run.merged is not None:
            matching = bipartite_soft_matching(mean_keys(self, normed), r, class_token=True)
            size = torch.ones_like(hidden_states[..., :1], dtype=torch.float32) if run.size is None else run.size
            merged, run.size = matching.merge(hidden_states.float(), size)
            hidden_states = merged.to(hidden_states.dtype)
            run.merged = run.merged.then(matching)
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


@functools.cache
def merging_class(cls: Any) -> type:
    """`cls`, a CLIP block, with merging; under the same name, by which transformers finds what it may record."""
    return type(cls.__name__, (Merging, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def tower_swaps(llava: LlavaModel, run: TowerRun) -> list[tuple[nn.Module, type, dict[str, Any]]]:
    """(module, class to give it, state to give it) for every block of the tower."""
    blocks: Any = llava.vision_tower.encoder.layers
    cls: Any = type(blocks[0])
    return [(block, merging_class(cls), {"_run": run, "_index": index}) for index, block in enumerate(blocks)]


def n_blocks_read(llava: LlavaModel, method: Compressor) -> int:
    """Blocks of the tower before the features; ValueError where `method` cannot act in or read this tower."""
    tower, config = llava.vision_tower, llava.config
    if not isinstance(tower, CLIPVisionModel):
        raise ValueError(
            f"{method.name} needs a CLIP vision tower (class token, keys), this model has {type(tower).__name__}; use "
            "divprune, or tome with place='after_tower' and metric='features'"
        )
    layer = config.vision_feature_layer
    if not isinstance(layer, int) or config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"{method.name} works on the patches of one layer; this model reads vision_feature_layer={layer} with "
            f"strategy {config.vision_feature_select_strategy!r} (one whole number and 'default' work)"
        )
    n_blocks = len(tower.encoder.layers)
    index = layer % (n_blocks + 1)
    if index == 0:
        raise ValueError(f"{method.name}: vision_feature_layer={layer} are the embeddings, before any block")
    return index


def check_merging(llava: LlavaModel, method: Compressor) -> None:
    """ValueError where sizes cannot enter the tower's attention."""
    backend = llava.vision_tower.config._attn_implementation
    if backend not in ADDS_MASKS:
        raise ValueError(
            f"{method.name} adds a mask to the vision tower's attention, which {backend!r} does not take; load with "
            f"attn_implementation={{'vision_config': 'sdpa'}}, or use place='after_tower'"
        )


def image_features(
    llava: LlavaModel,
    method: Compressor,
    pixel_values: Tensor,
    layer: int | list[int] | None,
    strategy: str | None,
    run: TowerRun | None,
) -> ImageFeatures:
    """What LLaVA's tower gives (as LlavaModel.get_image_features has it), and what `method` wants to know besides."""
    layer = llava.config.vision_feature_layer if layer is None else layer
    strategy = llava.config.vision_feature_select_strategy if strategy is None else strategy
    layers = [layer] if isinstance(layer, int) else list(layer)
    is_inside = method.reads_tower or method.merges_in_tower
    index = n_blocks_read(llava, method) if is_inside else 0
    if is_inside and (layer != llava.config.vision_feature_layer or strategy != "default"):
        raise ValueError(f"{method.name} reads the layer of the model's configuration; leave out vision_feature_layer")
    wanted = [index - 1, index] if method.reads_tower else layer
    pixel_values, options = shrunk(llava, method, pixel_values)
    states = llava.vision_tower(pixel_values, return_dict=True, output_hidden_states=wanted, **options).hidden_states
    chosen = [states[index] if is_inside else states[i] for i in layers]
    if strategy == "default":  # leave out the class token
        chosen = [state[:, 1:] for state in chosen]
    view = None
    if method.reads_tower:
        view = class_view(llava.vision_tower.encoder.layers[index - 1], states[index - 1], states[index])
    return ImageFeatures(
        features=torch.cat(chosen, dim=-1).to(compute_dtype(llava.multi_modal_projector, llava.dtype)),
        project=llava.multi_modal_projector,
        tower=view,
        merged=None if run is None else run.of_patches(),
    )


def shrunk(llava: LlavaModel, method: Compressor, pixel_values: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The picture that the tower reads, and what the tower must be told of it."""
    if method.picture_side is None:
        return pixel_values, {}
    side = method.picture_side * llava.config.vision_config.patch_size
    small = interpolate(pixel_values.float(), size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return small.to(pixel_values.dtype), {"interpolate_pos_encoding": True}


def check_shrinking(llava: LlavaModel, method: Compressor) -> None:
    """ValueError where the tower reads pictures of one size only."""
    tower = llava.vision_tower
    if method.picture_side is not None and "interpolate_pos_encoding" not in inspect.signature(tower.forward).parameters:
        raise ValueError(
            f"{method.name} shrinks the picture, and {type(tower).__name__} reads pictures of one size only; use avg_pool"
        )


def class_view(block: CLIPEncoderLayer, entering: Tensor, leaving: Tensor) -> TowerView:
    """States (B, 1 + P, width) before and after a block -> its keys and its class token's attention."""
    attention = block.self_attn
    normed = block.layer_norm1(entering)
    heads = (attention.num_heads, attention.head_dim)
    keys = attention.k_proj(normed).unflatten(-1, heads)  # (B, N, H, head_dim)
    query = attention.q_proj(normed[:, 0]).unflatten(-1, heads)  # (B, H, head_dim)
    row = torch.einsum("bhd,bnhd->bhn", query, keys).float().mul(attention.scale).softmax(dim=-1)
    return TowerView(keys=keys.mean(dim=2)[:, 1:], class_feature=leaving[:, :1], class_attention=row.sum(dim=1)[:, 1:])


def mean_keys(block: CLIPEncoderLayer, normed: Tensor) -> Tensor:
    """(B, N, width) after the first norm -> (B, N, head_dim), ToMe's metric."""
    attention = block.self_attn
    return attention.k_proj(normed).unflatten(-1, (attention.num_heads, attention.head_dim)).mean(dim=2)
