"""Official MGVQ weights -> `htc_vlm.quantizers.mgvq.MGVQ` weights: a renaming, and qkv split in three.

Source: key names as the official code (github.com/MKJia/MGVQ, efficientvit/models/tokenizer/mgvq.py) builds them.
Differs: the usage records `quantize.codebook_used` and `quantize.embed_prob` are not weights and are dropped; codes
are stored normalised (the official quantizer normalises them at every look-up).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_DROPPED = ("quantize.codebook_used", "quantize.embed_prob")
# Inside a stage, official -> diffusers, tried in order.
_BLOCK = (
    (r"context_module\.main\.proj\.conv\.", "attn.to_out."),
    (r"context_module\.main\.proj\.norm\.", "attn.norm_out."),
    (r"local_module\.main\.inverted_conv\.conv\.", "conv_out.conv_inverted."),
    (r"local_module\.main\.depth_conv\.conv\.", "conv_out.conv_depth."),
    (r"local_module\.main\.point_conv\.conv\.", "conv_out.conv_point."),
    (r"local_module\.main\.point_conv\.norm\.", "conv_out.norm."),
    (r"main\.conv1\.conv\.", "conv1."),
    (r"main\.conv2\.conv\.", "conv2."),
    (r"main\.conv2\.norm\.", "norm."),
    (r"main\.conv\.conv\.", "conv."),  # the halving or doubling layer
)
# Outside the stages. A first stage of depth 0 changes the size in project_in / project_out: one more `conv`.
_ENDS = (
    (r"encoder\.project_in\.conv\.conv\.", "encoder.conv_in.conv."),
    (r"encoder\.project_in\.conv\.", "encoder.conv_in."),
    (r"encoder\.project_out\.main\.op_list\.0\.conv\.", "encoder.conv_out."),
    (r"decoder\.project_in\.main\.conv\.", "decoder.conv_in."),
    (r"decoder\.project_out\.op_list\.0\.", "decoder.norm_out."),
    (r"decoder\.project_out\.op_list\.2\.conv\.conv\.", "decoder.conv_out.conv."),
    (r"decoder\.project_out\.op_list\.2\.conv\.", "decoder.conv_out."),
    (r"quant_conv\.", "quant_conv."),
    (r"post_quant_conv\.", "post_quant_conv."),
)
_QKV = "context_module.main.qkv.conv.weight"


def mgvq_state_dict(official: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename an official state dict (bare, or under `model` or `state_dict` as the released files have it).

    Weights without a decoder are taken as they are: `MGVQ.load_state_dict` then gives an encoder-only model.
    Raises ValueError for a key that is not MGVQ's.

    >>> ours("encoder.stages.2.op_list.0.main.conv2.norm.weight")
    'encoder.down_blocks.2.0.norm.weight'
    """
    for wrapper in ("model", "state_dict"):
        if wrapper in official and not isinstance(official[wrapper], Tensor):
            official = official[wrapper]
    if "quantize.embedding.weight" not in official or "quant_conv.weight" not in official:
        raise ValueError(
            f"not an official MGVQ state dict: no quantize.embedding.weight or quant_conv.weight among "
            f"{len(official)} keys such as {sorted(official)[:3]}"
        )
    result: dict[str, Tensor] = {}
    for key, value in official.items():
        if key in _DROPPED:
            continue
        if key == "quantize.embedding.weight":
            channels, per_group = official["quant_conv.weight"].shape[:2]
            result.update(_codebook(value, groups=channels // per_group))
        elif key.endswith(_QKV):
            block = ours(key.replace(_QKV, "context_module.main.proj.conv.weight")).removesuffix("to_out.weight")
            for name, part in zip(("to_q", "to_k", "to_v"), value.flatten(1).chunk(3), strict=True):
                result[f"{block}{name}.weight"] = part.clone()
        else:
            new_key = ours(key)
            is_linear_here = new_key.endswith("attn.to_out.weight")  # there a 1x1 convolution
            result[new_key] = value.flatten(1) if is_linear_here else value
    return result


def ours(key: str) -> str:
    """The name here of one official encoder, decoder or (post_)quant_conv key; ValueError when it is none."""
    stage = re.fullmatch(r"(encoder|decoder)\.stages\.(\d+)\.op_list\.(\d+)\.(.+)", key)
    prefix, rest = "", key
    if stage:
        blocks = "down_blocks" if stage[1] == "encoder" else "up_blocks"
        prefix, rest = f"{stage[1]}.{blocks}.{stage[2]}.{stage[3]}.", stage[4]
    for pattern, new in _BLOCK if stage else _ENDS:
        match = re.match(pattern, rest)
        if match:
            return prefix + new + rest[match.end() :]
    raise ValueError(f"{key!r} is no key of an official MGVQ state dict")


def _codebook(weight: Tensor, groups: int) -> dict[str, Tensor]:
    """(codes of all groups, dims of a group) -> the library's buffers, (groups, codes per group, dims)."""
    codes = F.normalize(weight, dim=-1).unflatten(0, (groups, -1))
    return {
        "quantizer._codebook.embed": codes,
        "quantizer._codebook.embed_avg": codes.clone(),
        "quantizer._codebook.cluster_size": torch.ones(codes.shape[:2]),
        "quantizer._codebook.initted": torch.tensor(True),
    }
