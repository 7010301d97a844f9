"""A method with settings on a tiny model, as the contract's checks are given it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from htc_vlm.compressors import Compressor, build
from htc_vlm.model import HtcVlmForConditionalGeneration
from htc_vlm.testing import tiny_llava

BACKENDS = ("sdpa", "eager")


@dataclass(frozen=True)
class Case:
    """compressor: the method's name and settings. attention: the language model's backend."""

    compressor: dict[str, Any]
    attention: str

    @property
    def model(self) -> HtcVlmForConditionalGeneration:
        """A model whose own compressor the method is; shared by all checks, do not change it."""
        return tiny_llava.shared(self.compressor, self.attention)

    @property
    def plain(self) -> HtcVlmForConditionalGeneration:
        """The same model without compressor; shared by all checks."""
        return tiny_llava.shared({"name": "none"}, self.attention)

    @property
    def host(self) -> HtcVlmForConditionalGeneration:
        """A model without compressor, to apply the method to; shared by all checks."""
        return tiny_llava.host(self.attention)

    @property
    def method(self) -> Compressor:
        return build(**self.compressor)

    @property
    def settings(self) -> dict[str, Any]:
        return {key: value for key, value in self.compressor.items() if key != "name"}


def entering_lengths(model: HtcVlmForConditionalGeneration, run: Callable[[], object]) -> list[int]:
    """Tokens that entered each decoder layer while `run()` ran, all passes together."""
    layers = list(model.model.language_model.layers)
    lengths = [0] * len(layers)

    def note(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        lengths[layers.index(module)] += (args[0] if args else kwargs["hidden_states"]).shape[1]

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return lengths
