"""The stages of training: what each one starts from, trains, and leaves frozen.

Source:  LLaVA-1.5 (align the projector, then instruct); VoCo-LLaMA and HTC-VLM section 5.1 (compress, plain LM loss,
         Eq. 9); MGVQ for the tokenizer.
Differs: HTC-VLM does not say which weights its training starts from: ours are those of the upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from htc_vlm.model.adapter import is_adapter_weight


@dataclass(frozen=True)
class Stage:
    """trains: prefixes of the parameters that learn; everything else is frozen."""

    name: str
    trains: tuple[str, ...]
    starts_from: str | None
    compresses: bool = False


# As families call them (model/bottlenecks.py): LLaVA and most; SmolVLM; Qwen2.5-VL.
PROJECTOR = ("model.multi_modal_projector.", "model.image_newline", "model.connector.", "model.visual.merger.")
LLM = ("model.language_model.", "model.text_model.", "lm_head.")
COMPRESSOR = "model.compressor."
ADAPTER = "adapter"  # in `trains`: the LoRA of model/adapter.py; with it the base stays as it is
STAGES = {
    "align": Stage("align", PROJECTOR, None),
    "instruct": Stage("instruct", (*PROJECTOR, *LLM), "align"),
    "compress": Stage("compress", (*PROJECTOR, *LLM, COMPRESSOR), "instruct", compresses=True),
}
ALWAYS_FROZEN = ("model.vision_tower.", "model.vision_model.", "model.compressor.quantizer.")


def freeze(
    model: nn.Module, trains: tuple[str, ...], adapters: frozenset[str] | None = None
) -> list[tuple[str, int, int]]:
    """Set requires_grad by prefix. Returns (module, trainable, frozen parameters); ValueError if nothing trains.

    adapters: in the language model only these parameters learn (LoRA's).
    """
    rows: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        learns = name.startswith(trains) and not name.startswith(ALWAYS_FROZEN)
        if adapters is not None and name.startswith(LLM):
            learns = learns and name in adapters
        learns |= ADAPTER in trains and is_adapter_weight(name)
        parameter.requires_grad_(learns)
        row = rows.setdefault(_group(name), [0, 0])
        row[0 if learns else 1] += parameter.numel()
    if not any(trainable for trainable, _ in rows.values()):
        raise ValueError(f"nothing would be trained: no parameter begins with one of {', '.join(trains)}")
    return [(group, trainable, frozen) for group, (trainable, frozen) in rows.items()]


def _group(name: str) -> str:
    """`model.compressor.to_anchors.w1.weight` -> `compressor.to_anchors`"""
    parts = name.removeprefix("model.").split(".")
    return ".".join(parts[:2]) if parts[0] == "compressor" and len(parts) > 2 else parts[0]


def trainable_table(rows: list[tuple[str, int, int]]) -> str:
    """
    >>> print(trainable_table([("vision_tower", 0, 3000), ("language_model", 5000, 0)]))
    module                     trainable       frozen
    vision_tower                       0        3,000
    language_model                 5,000            0
    """
    lines = [f"{'module':<22} {'trainable':>13} {'frozen':>12}"]
    lines += [f"{group:<22} {trainable:>13,} {frozen:>12,}" for group, trainable, frozen in rows]
    return "\n".join(lines)
