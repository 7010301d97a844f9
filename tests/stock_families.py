"""Tiny random checkpoints of families beyond LLaVA, in folders as the hub has them, with their own processors."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

import htc_vlm
from htc_vlm.testing.families import PINPOINTS, tiny_model

SPLIT: dict[str, Any] = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}}
HALF: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PROCESSORS: dict[str, tuple[Any, dict[str, Any]]] = {  # image processor, and what processor_config.json says besides
    "llava_next": (
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=PINPOINTS
        ),
        {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava_onevision": (
        LlavaOnevisionImageProcessorPil(size={"height": 16, "width": 16}, image_grid_pinpoints=PINPOINTS),
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    ),
    "internvl": (
        GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, min_patches=1, max_patches=4), {"image_seq_length": 16}
    ),
    "smolvlm": (SmolVLMImageProcessorPil(**SPLIT), {"image_seq_len": 9}),
    "idefics3": (Idefics3ImageProcessorPil(**SPLIT), {"image_seq_len": 9}),
    "qwen2_5_vl": (
        Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 2304}), {}
    ),
    "qwen3_vl": (  # the same image processor, with its own normalisation
        Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 2304}, **HALF), {}
    ),
}  # fmt: skip
MARKS = {
    "internvl": {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<image>",
                 "video_token": "<video>"},
    "smolvlm": {"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"},
    "idefics3": {"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"},
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}what <image> {% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %} "
)


def save(family: str, folder: Path) -> Path:
    """A checkpoint as the hub has it: no file of ours, and no `<voco>` in its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = copy.deepcopy(htc_vlm.load("tiny-upper")[1].tokenizer)
    rows = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)] if family in ("smolvlm", "idefics3") else []
    marks = MARKS.get(family, {})
    tokenizer.add_special_tokens({"extra_special_tokens": [*marks.values(), *rows]}, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    kept = json.loads(file.read_text())
    named = {"image_token": "<image>", **marks}
    file.write_text(json.dumps({**kept, "extra_special_tokens": named, "voco_token": None, "padding_side": "left"}))
    image_processor, options = PROCESSORS[family]
    image_processor.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(options))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    model, _ = tiny_model("smolvlm" if family == "idefics3" else family)
    if family == "idefics3":
        options = {key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "architectures")}
        options["vision_config"] = {**options["vision_config"], "model_type": "idefics3_vision"}
        torch.manual_seed(0)
        model = transformers.Idefics3ForConditionalGeneration(transformers.Idefics3Config(**options))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model.generation_config.suppress_tokens = None
    model.save_pretrained(folder)
    return folder
