"""MGVQ: a picture becomes a grid of codes, one code per group of channels (the discrete channel of HTC-VLM).

Source: "MGVQ: Could VQ-VAE Beat VAE?", arXiv 2507.07997; official code github.com/MKJia/MGVQ (efficientvit/models/
tokenizer/mgvq.py); HTC-VLM section 4.1.2 (8 groups, 16384 codes, 16x downsampling: q has 21 * 21 * 32 = 14112 values).
Encoder and decoder are the DC-AE ones of `diffusers`, the grouped quantizer is `vector-quantize-pytorch` with one
codebook per head; `mgvq_official.mgvq_state_dict` renames official weights.
Differs: the official codebook learns by gradient and is resampled by use; ours follows the library (moving averages,
since its cosine codebooks do not take gradients; rarely used codes are replaced by latents of the batch). The nested
masking of groups in the official first stage is left out. Encoding never changes the codebook, in train mode either.

Pixels are RGB in [-1, 1], (B, 3, H, W), sides divisible by `downsample` (official evaluation: `(x / 255 - 0.5) * 2`);
`signed_pixels` makes them from pixels in [0, 1]. Latents are not normalised; each group of a quantized vector has
length 1: the official quantizer divides latents and codes by their length and returns the divided code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from htc_vlm.files import replacing, write_text
from htc_vlm.quantizers.base import QUANTIZERS, Quantizer
from htc_vlm.quantizers.mgvq_official import mgvq_state_dict

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class MGVQSettings:
    """Everything that rebuilds an `MGVQ`; field meanings in `MGVQ.__init__`."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    latent_channels: int
    codebook_size: int
    groups: int
    decoder_depths: tuple[int, ...]
    attention_from: int
    decay: float
    dead_below: float


@dataclass(frozen=True)
class MGVQEncoding:
    """`latents` and `quantized` (B, C, h, w), `indices` (B, h, w, groups), counted from 0 inside each group."""

    latents: Tensor
    quantized: Tensor
    indices: Tensor


@dataclass(frozen=True)
class MGVQStep:
    """One training pass: `reconstruction` (B, 3, H, W), scalar `commitment`, `indices` (B, h, w, groups)."""

    reconstruction: Tensor
    commitment: Tensor
    indices: Tensor


@dataclass(frozen=True)
class CodeStatistics:
    """Per group: `usage`, the share of codes seen at least once, and `perplexity`, exp(entropy) of how often."""

    usage: tuple[float, ...]
    perplexity: tuple[float, ...]


# widths, depths and block types: read in the official mgvq_f8c32 / f16c32 / f32c32; total codebook sizes (32768 with 4
# groups, 16384 with 8): the official README's model zoo, which has no f32 g4 checkpoint (that preset is the pattern).
_OFFICIAL_SIZES: dict[str, dict[str, Any]] = {
    "f8c32": {"widths": (128, 256, 512, 512), "depths": (0, 4, 8, 2), "decoder_depths": (0, 5, 10, 2)},
    "f16c32": {"widths": (128, 256, 512, 512, 1024), "depths": (0, 4, 8, 2, 2), "decoder_depths": (0, 5, 10, 2, 2)},
    "f32c32": {
        "widths": (128, 256, 512, 512, 1024, 1024),
        "depths": (0, 4, 8, 2, 2, 2),
        "decoder_depths": (0, 5, 10, 2, 2, 2),
    },
}
PRESETS: dict[str, dict[str, Any]] = {
    f"{name}g{groups}": dict(**sizes, latent_channels=32, codebook_size=codebook_size, groups=groups)
    for name, sizes in _OFFICIAL_SIZES.items()
    for groups, codebook_size in ((4, 32768), (8, 16384))
}
# Ours, for the tiny model: 160 x 160 pixels -> 10 x 10 x 16, convolutions only.
PRESETS["tiny"] = {
    "widths": (16, 16, 32, 64, 128),
    "depths": (0, 1, 1, 1, 1),
    "latent_channels": 16,
    "codebook_size": 1024,
    "groups": 4,
    "attention_from": 5,
}


@QUANTIZERS.register("mgvq")
class MGVQ(Quantizer):
    """DC-AE encoder, grouped cosine quantizer, DC-AE decoder.

    Args:
        widths: channels of each stage; the picture is halved `len(widths) - 1` times.
        depths: blocks of each encoder stage; 0 only in the first, which then halves the picture in its first layer.
        latent_channels: channels of a latent, split into `groups` equal parts.
        codebook_size: codes of all groups together, as the official code counts (16384 with 8 groups is 2048 each).
        groups: codebooks, and codes per grid cell.
        decoder_depths: blocks of each decoder stage; `depths` when not given.
        attention_from: first stage made of attention blocks instead of residual convolutions (official: 3).
        decay: of the codebook's moving averages.
        dead_below: in training a code with fewer uses per batch (moving average) is replaced; 0 switches it off.
    """

    name = "mgvq"
    PRESETS = PRESETS

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        latent_channels: int,
        codebook_size: int,
        groups: int,
        decoder_depths: Sequence[int] | None = None,
        attention_from: int = 3,
        decay: float = 0.99,
        dead_below: float = 0.1,
    ) -> None:
        super().__init__()
        self.settings = MGVQSettings(
            tuple(widths), tuple(depths), latent_channels, codebook_size, groups,
            tuple(depths if decoder_depths is None else decoder_depths), attention_from, decay, dead_below,
        )  # fmt: skip
        _check(self.settings)
        self.encoder, self.decoder = _encoder_and_decoder(self.settings)
        self.quant_conv = nn.Conv2d(latent_channels, latent_channels, 1, groups=groups)
        self.post_quant_conv: nn.Module | None = nn.Conv2d(latent_channels, latent_channels, 1, groups=groups)
        self.quantizer: Any = _quantizer(self.settings)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> MGVQ:
        """A named size, e.g. `f16c32g8` (the paper's) or `tiny`; `changes` override its arguments."""
        if name not in PRESETS:
            raise ValueError(f"no MGVQ preset {name!r}; choose from {', '.join(sorted(PRESETS))}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def pixels_per_cell(cls, **options: Any) -> int:
        return int(2 ** (len(options["widths"]) - 1))

    @property
    def channels(self) -> int:
        return self.settings.latent_channels

    def drop_decoder(self) -> None:
        self.decoder = self.post_quant_conv = None

    @property
    def downsample(self) -> int:
        """Pixels per grid cell and side."""
        return int(2 ** (len(self.settings.widths) - 1))

    @property
    def codes_per_group(self) -> int:
        return self.settings.codebook_size // self.settings.groups

    def encode(self, pixels: Tensor) -> MGVQEncoding:
        """(B, 3, H, W) in [-1, 1] -> latents and quantized (B, C, H / f, W / f), indices (B, H / f, W / f, groups).

        Runs in the weights' own dtype, outside autocast, and leaves the codebook alone: the same picture has the same
        codes in training, in inference and in a stored file.
        """
        with _no_autocast(pixels):
            latents = self._latents(pixels.to(self.quant_conv.weight.dtype))
            quantized, indices, _ = self.quantizer(latents, freeze_codebook=True)
        return MGVQEncoding(latents, quantized, indices)

    def decode(self, quantized: Tensor) -> Tensor:
        """(B, C, h, w) -> pixels (B, 3, h * f, w * f), about [-1, 1], not clipped."""
        if self.decoder is None or self.post_quant_conv is None:
            raise ValueError("this MGVQ was loaded from weights without a decoder: it can encode, not decode")
        pixels: Tensor = self.decoder(self.post_quant_conv(quantized))
        return pixels

    def look_up(self, indices: Tensor) -> Tensor:
        """Codes (B, h, w, groups) -> quantized (B, C, h, w), what `encode` gave with them."""
        quantized: Tensor = self.quantizer.get_codes_from_indices(indices)
        return quantized

    def forward(self, pixels: Tensor) -> MGVQStep:
        """The training pass: in train mode it moves the codebook, revives dead codes, and is straight-through."""
        latents = self._latents(pixels)
        with _no_autocast(pixels):  # the library switches autocast off on CUDA only; bf16 distances change codes
            quantized, indices, _, losses = self.quantizer(latents.float(), return_loss_breakdown=True)
        return MGVQStep(self.decode(quantized), losses.commitment, indices)

    def _latents(self, pixels: Tensor) -> Tensor:
        is_picture = pixels.ndim == 4 and pixels.shape[1] == 3
        if not is_picture or any(side % self.downsample or not side for side in pixels.shape[2:]):
            raise ValueError(
                f"pixels have shape {tuple(pixels.shape)}; MGVQ takes (B, 3, H, W) with H and W divisible by "
                f"{self.downsample}; resize with signed_pixels(pixels, size)"
            )
        latents: Tensor = self.quant_conv(self.encoder(pixels))
        return latents

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch, but weights without any decoder key give an encoder-only model, whose `decode` refuses."""
        if not any(key.startswith(("decoder.", "post_quant_conv.")) for key in state_dict):
            self.decoder = self.post_quant_conv = None
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @classmethod
    def read_weights(cls, path: Path) -> dict[str, Tensor]:
        """Of a folder or file of ours as they are; of an official file renamed."""
        state = super().read_weights(path / WEIGHTS_FILE if path.is_dir() else path)
        return state if any(name.startswith("quantizer.") for name in state) else mgvq_state_dict(state)

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / WEIGHTS_FILE) as partial:
            save_file({key: value.contiguous() for key, value in self.state_dict().items()}, partial)
        write_text(folder / CONFIG_FILE, json.dumps(asdict(self.settings), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> MGVQ:
        """Read what `save` wrote; in eval mode."""
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} has no {name}; give a folder written by MGVQ.save")
        model = cls(**json.loads((folder / CONFIG_FILE).read_text()))
        model.load_state_dict(load_file(folder / WEIGHTS_FILE))
        return model.eval()


def code_statistics(indices: Tensor, codes_per_group: int) -> CodeStatistics:
    """How a codebook is used, from codes (..., groups).

    >>> code_statistics(torch.tensor([[0, 3], [1, 3], [2, 3], [3, 3]]), codes_per_group=4)
    CodeStatistics(usage=(1.0, 0.25), perplexity=(4.0, 1.0))
    """
    usage, perplexity = [], []
    for codes in indices.reshape(-1, indices.shape[-1]).T:
        counts = torch.bincount(codes, minlength=codes_per_group).double()
        share = counts[counts > 0] / counts.sum()
        usage.append(len(share) / codes_per_group)
        perplexity.append(round(float(torch.exp(-(share * share.log()).sum())), 6))
    return CodeStatistics(tuple(usage), tuple(perplexity))


def _check(s: MGVQSettings) -> None:
    """Refuse settings that DC-AE's shortcuts or the grouped codebook cannot take."""
    stages = len(s.widths)
    if stages < 2 or len(s.depths) != stages or len(s.decoder_depths) != stages:
        raise ValueError(
            f"widths {s.widths}, depths {s.depths}, decoder_depths {s.decoder_depths}: need equal lengths, 2 or more"
        )
    if any(depth < 1 for depth in s.depths[1:] + s.decoder_depths[1:]):
        raise ValueError(f"depths {s.depths} / {s.decoder_depths}: only the first stage may have 0 blocks")
    if bool(s.depths[0]) != bool(s.decoder_depths[0]):
        raise ValueError(f"depths {s.depths} / {s.decoder_depths}: both first stages need blocks, or neither")
    if s.latent_channels % s.groups or s.codebook_size % s.groups or s.widths[-1] % s.latent_channels:
        raise ValueError(
            f"groups {s.groups} must divide latent_channels {s.latent_channels} and codebook_size {s.codebook_size}, "
            f"and latent_channels the last width {s.widths[-1]}"
        )
    used = s.widths if s.depths[0] else s.widths[1:]
    for narrow, wide in zip(used, used[1:], strict=False):
        if (4 * narrow) % wide:
            raise ValueError(f"widths {s.widths}: 4 * {narrow} is no multiple of {wide}; double or keep the width")


def _encoder_and_decoder(s: MGVQSettings) -> tuple[nn.Module, nn.Module | None]:
    """DC-AE halves. Official decoder: batch norm and relu with convolutions, rms norm and silu with attention."""
    from diffusers.models.autoencoders.autoencoder_dc import Decoder, Encoder

    is_attention = [stage >= s.attention_from for stage in range(len(s.widths))]
    common: dict[str, Any] = {
        "in_channels": 3,
        "latent_channels": s.latent_channels,
        "attention_head_dim": 32,
        "block_type": tuple("EfficientViTBlock" if attends else "ResBlock" for attends in is_attention),
        "block_out_channels": s.widths,
        "qkv_multiscales": ((),) * len(s.widths),
    }
    encoder = Encoder(layers_per_block=s.depths, downsample_block_type="pixel_unshuffle", **common)
    decoder = Decoder(
        layers_per_block=s.decoder_depths,
        norm_type=tuple("rms_norm" if attends else "batch_norm" for attends in is_attention),
        act_fn=tuple("silu" if attends else "relu" for attends in is_attention),
        upsample_block_type="pixel_shuffle",
        **common,
    )
    return encoder, decoder


def _quantizer(s: MGVQSettings) -> Any:
    """One cosine codebook per group; takes (B, C, h, w), gives (B, C, h, w), (B, h, w, groups), loss."""
    from vector_quantize_pytorch import VectorQuantize

    quantizer = VectorQuantize(
        dim=s.latent_channels,
        codebook_dim=s.latent_channels // s.groups,
        codebook_size=s.codebook_size // s.groups,
        heads=s.groups,
        separate_codebook_per_head=True,
        use_cosine_sim=True,
        accept_image_fmap=True,
        decay=s.decay,
        threshold_ema_dead_code=s.dead_below,
        rotation_trick=False,  # straight-through, as the official code
    )
    # The library reads this flag in every forward, which a meta tensor does not allow; it is always true here.
    quantizer._codebook.initted = torch.tensor(True, device="cpu")
    # A new code counts as unused, so the first training batch replaces all of them by its own latents.
    quantizer._codebook.cluster_size.zero_()
    return quantizer


def _no_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    if tensor.device.type == "meta":
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
