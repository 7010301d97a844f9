"""Q-Former: n learned queries cross-attend to the vision tower's features.

Source:  BLIP-2 (Li et al. 2023, arXiv:2301.12597), as the baseline of VoCo-LLaMA section 3.5 ("number of queries set
         to 1").
Differs: Hugging Face's Blip2QFormerModel; no text enters it; initialised at random (neither paper says otherwise);
         the queries' own projection replaces LLaVA's projector, as in BLIP-2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from htc_vlm.compressors.base import COMPRESSORS, Compressor, ImageFeatures, Sizes, budget_tokens, check_count


@dataclass(frozen=True)
class QFormerSettings:
    n_queries: int = 1
    n_layers: int = 12
    width: int = 768
    n_heads: int = 12
    cross_attention_frequency: int = 2


@COMPRESSORS.register("qformer")
class QFormer(Compressor):
    name = "qformer"
    Settings = QFormerSettings
    EXAMPLES = (
        {"n_queries": 4, "n_layers": 2, "width": 16, "n_heads": 2},
        {"n_queries": 1, "n_layers": 2, "width": 16, "n_heads": 2},
    )
    PAPER = "BLIP-2, arXiv:2301.12597"
    ACTS = "before the LLM"

    @classmethod
    def for_budget(cls, budget: float, n_patches: int, n_layers: int) -> dict[str, Any]:
        return {"n_queries": budget_tokens(cls.name, budget, n_patches)}

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        for what in ("n_queries", "n_layers", "width", "n_heads", "cross_attention_frequency"):
            check_count(self.name, what, getattr(settings, what))

    def setup(self, sizes: Sizes) -> None:
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        config = Blip2QFormerConfig(
            hidden_size=self.settings.width,
            num_hidden_layers=self.settings.n_layers,
            num_attention_heads=self.settings.n_heads,
            intermediate_size=4 * self.settings.width,
            encoder_hidden_size=sizes.vision_width,
            cross_attention_frequency=self.settings.cross_attention_frequency,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.norm = nn.LayerNorm(sizes.vision_width)
        self.qformer = Blip2QFormerModel(config)
        self.query_tokens = nn.Parameter(torch.empty(1, self.settings.n_queries, self.settings.width))
        self.to_llm = nn.Linear(self.settings.width, sizes.llm_width)
        self._init_std = sizes.initializer_range

    def init_own_weights(self) -> None:
        nn.init.normal_(self.query_tokens, std=self._init_std)

    def n_visual(self, n_patches: int) -> int:
        return int(self.settings.n_queries)

    def before_llm(self, images: ImageFeatures) -> Tensor:
        features = self.norm(images.features)
        queries = self.query_tokens.expand(features.shape[0], -1, -1)
        out = self.qformer(query_embeds=queries, encoder_hidden_states=features)
        return self.to_llm(out.last_hidden_state)
