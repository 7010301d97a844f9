"""What every part needs: the model, its shape, the device and what the device can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from htc_vlm.model import HtcVlmForConditionalGeneration
from htc_vlm.ops.cost import DecoderShape
from real_size.clock import captured, entry, relative_difference, time_in_turn
from real_size.floors import Ceilings, Work
from real_size.shapes import Shape, dtype_of


@dataclass(frozen=True)
class Bench:
    """model in eval mode on `device`, without gradients."""

    model: HtcVlmForConditionalGeneration
    shape: Shape
    device: torch.device
    ceilings: Ceilings

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.shape)

    @property
    def decoder(self) -> DecoderShape:
        return DecoderShape.from_config(self.model.config.text_config)

    @property
    def n_patches(self) -> int:
        vision = self.model.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2)

    @property
    def n_visual(self) -> int:
        return int(self.model.model.compressor.n_visual(self.n_patches))

    @property
    def n_bottleneck(self) -> int:
        return int(self.model.model.compressor.n_bottleneck)

    @property
    def layer_bytes(self) -> int:
        """Bytes of the decoder's layers: a pass through them reads each weight at least once."""
        return bytes_of(self.model.model.language_model.layers)

    @property
    def head_bytes(self) -> int:
        return bytes_of(self.model.lm_head)

    def random(self, *size: int) -> Tensor:
        """Standard normal values on the device."""
        return torch.randn(*size, device=self.device, dtype=self.dtype)

    def question(self, batch: int) -> Tensor:
        """(batch, n_question) ids below all placeholders."""
        highest = min(self.model.config.image_token_index, self.decoder.n_vocabulary) - 3
        return torch.randint(3, highest, (batch, self.shape.n_question), device=self.device)

    def time(
        self, calls: dict[str, Callable[[], Tensor]], work: dict[str, Work], graphs: bool = True
    ) -> dict[str, Any]:
        """name -> entry. On CUDA also NAME_graph: the same work replayed as a CUDA graph, checked against the plain call;
        where it cannot be captured, NAME_graph_not_measured says why."""
        out: dict[str, Any] = {}
        shape = self.shape
        for name, times in time_in_turn(calls, self.device, shape.warmup, shape.repeats).items():
            out[name] = entry(times, work[name], self.ceilings)
        if self.device.type == "cuda" and graphs:
            for name, call in calls.items():
                try:
                    out[f"{name}_graph"] = self._time_graph(call, work[name])
                except RuntimeError as error:  # capture refuses host work; out of memory is one, too
                    out[f"{name}_graph_not_measured"] = str(error).splitlines()[0][:300]
                torch.cuda.empty_cache()
        return out

    def _time_graph(self, call: Callable[[], Tensor], work: Work) -> dict[str, Any]:
        expected = call()
        replay, result = captured(call)
        replay()
        difference = relative_difference(result, expected)
        times = time_in_turn({"graph": replay}, self.device, self.shape.warmup, self.shape.repeats)["graph"]
        return entry(times, work, self.ceilings, difference_from_plain=difference)


def bytes_of(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())
