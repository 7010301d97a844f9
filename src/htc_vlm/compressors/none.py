"""No compression: the language model sees every patch. The upper bound of the paper's tables.

Source:  LLaVA-1.5 (Liu et al. 2024, arXiv:2310.03744) as in transformers' LlavaForConditionalGeneration.
Differs: nothing; a test checks equal logits and generations on the same checkpoint.
"""

from __future__ import annotations

from typing import Any

from htc_vlm.compressors.base import COMPRESSORS, Compressor


@COMPRESSORS.register("none")
class NoCompression(Compressor):
    name = "none"
    PAPER = "LLaVA-1.5, arXiv:2310.03744"
    ACTS = "nowhere"
    TRAINED = False

    @classmethod
    def for_budget(cls, budget: float, n_patches: int, n_layers: int) -> dict[str, Any]:
        return {}  # all patches, whatever the budget
