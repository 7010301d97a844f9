"""Builds tiny random models of every family that `apply` knows, with prompts and pictures for them.

Source:  transformers 5.23, the configuration and the prompt format of each family (what its processor writes).
Differs: no processor, tokenizer, torchvision or network: ids are numbers below 100, pictures are noise. A model is made in
         a fraction of a second, with seeded weights that are large enough for logits to differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from htc_vlm.model.add_to_family import put_in

IMAGE, VIDEO, PAD, START, END, MARK = 99, 98, 0, 97, 96, 95  # token ids: a visual placeholder, ..., an image's first and last
N_LAYERS = 4
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 120,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
PINPOINTS = [[16, 32], [32, 16], [32, 32]]
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class TinyFamily:
    """How to make one family's model, and what its processor would make of pictures.

    pictures: numbers of sizes (see `sizes`), one list for each prompt -> the arguments that carry the pixels.
    prompt: a size's number -> the ids of one picture in a prompt, with the marks around its placeholders.
    """

    make: Callable[[], Any]
    pictures: Callable[[Sequence[Sequence[int]]], Inputs]
    prompt: Callable[[int], list[int]]
    sizes: int  # pictures of so many different sizes exist; 1 where every picture is resized to one


def noise(size: int, *shape: int) -> Tensor:
    """The pixels of the picture of that size number; always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 + size))


def stock(name: str, config: Any) -> Any:
    return getattr(transformers, name + "ForConditionalGeneration")(config)


# ---------------------------------------------------------------- one family after the other
def make_llava() -> Any:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE, image_seq_length=16,
    )  # fmt: skip
    return stock("Llava", config)


def llava_pictures(prompts: Sequence[Sequence[int]]) -> Inputs:
    return {"pixel_values": torch.stack([noise(i, 3, 16, 16) for i in sum(map(list, prompts), [])])}


def make_llava_next() -> Any:
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    return stock("LlavaNext", config)


TILED = [(16, 32), (32, 32), (32, 16)]  # height and width; with the whole picture 3, 5 and 3 tiles


def tiled_pictures(prompts: Sequence[Sequence[int]]) -> Inputs:
    sizes = sum(map(list, prompts), [])
    tiles = [noise(i, 1 + TILED[i][0] * TILED[i][1] // 256, 3, 16, 16) for i in sizes]
    longest = max(map(len, tiles))
    padded = [torch.cat((part, part.new_zeros(longest - len(part), 3, 16, 16))) for part in tiles]
    return {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor([TILED[i] for i in sizes])}


def next_tokens(size: int) -> int:
    """The whole picture, then the tiles with a newline after each row."""
    height, width = (side // 4 for side in TILED[size])
    return 16 + height * (width + 1)


def make_llava_onevision() -> Any:
    vision = transformers.SiglipVisionConfig(**VISION, vision_use_head=False)
    config = transformers.LlavaOnevisionConfig(
        vision_config=vision, text_config=transformers.Qwen2Config(**TEXT), image_token_index=IMAGE,
        video_token_index=VIDEO, image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    return stock("LlavaOnevision", config)


def make_internvl() -> Any:
    vision = {**VISION, "image_size": [32, 32], "patch_size": [4, 4]}
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=transformers.Qwen2Config(**TEXT), image_token_id=IMAGE, downsample_ratio=0.5
    )
    return stock("InternVL", config)


TILES = [1, 3, 2]  # of each size


def internvl_pictures(prompts: Sequence[Sequence[int]]) -> Inputs:
    return {"pixel_values": torch.cat([noise(i, TILES[i], 3, 32, 32) for i in sum(map(list, prompts), [])])}


def make_smolvlm() -> Any:
    config = transformers.SmolVLMConfig(
        vision_config={**VISION, "image_size": 24}, text_config=transformers.LlamaConfig(**TEXT), image_token_id=IMAGE,
        scale_factor=2, pad_token_id=PAD,
    )  # fmt: skip
    return stock("SmolVLM", config)


def smolvlm_pictures(prompts: Sequence[Sequence[int]]) -> Inputs:
    tiles = [[noise(i, TILES[i], 3, 24, 24) for i in sizes] for sizes in prompts]
    rows = [torch.cat(parts) if parts else torch.zeros(0, 3, 24, 24) for parts in tiles]
    longest = max(map(len, rows))
    return {"pixel_values": torch.stack([torch.cat((row, row.new_zeros(longest - len(row), 3, 24, 24))) for row in rows])}


def smolvlm_prompt(size: int) -> list[int]:
    """The same mark opens each tile, before the tile's name, and closes the picture."""
    return [*([START, MARK] + [IMAGE] * 9) * TILES[size], START]


GRIDS = [(8, 8), (4, 8), (8, 12)]  # patches; 16, 8 and 24 tokens


def qwen_pictures(prompts: Sequence[Sequence[int]]) -> Inputs:
    grids = [(1, *GRIDS[i]) for i in sum(map(list, prompts), [])]
    pixels = [noise(i, GRIDS[i][0] * GRIDS[i][1], 3 * 2 * 4 * 4) for i in sum(map(list, prompts), [])]
    return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids)}


QWEN: dict[str, Any] = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
QWEN_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "depth": 3, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
    "out_hidden_size": 32, "in_channels": 3, "temporal_patch_size": 2, "initializer_range": 0.3,
}  # fmt: skip


def make_qwen2_5_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [2]}
    text = {**TEXT, "rope_parameters": rope}
    return stock("Qwen2_5_VL", transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **QWEN))


def make_qwen3_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    vision = {**QWEN_VISION, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 144}
    text = {**TEXT, "rope_parameters": rope}
    return stock("Qwen3VL", transformers.Qwen3VLConfig(vision_config=vision, text_config=text, **QWEN))


def plain(n: int) -> list[int]:
    return [IMAGE] * n + [3]


def marked(n: int) -> list[int]:
    return [START] + [IMAGE] * n + [END]


def qwen_prompt(size: int) -> list[int]:
    return marked(GRIDS[size][0] * GRIDS[size][1] // 4)


FAMILIES: dict[str, TinyFamily] = {
    "llava": TinyFamily(make_llava, llava_pictures, lambda _: plain(16), 1),
    "llava_next": TinyFamily(make_llava_next, tiled_pictures, lambda size: plain(next_tokens(size)), 3),
    "llava_onevision": TinyFamily(make_llava_onevision, tiled_pictures, lambda size: plain(next_tokens(size)), 3),
    "internvl": TinyFamily(make_internvl, internvl_pictures, lambda size: marked(16 * TILES[size]), 3),
    "smolvlm": TinyFamily(make_smolvlm, smolvlm_pictures, smolvlm_prompt, 3),
    "qwen2_5_vl": TinyFamily(make_qwen2_5_vl, qwen_pictures, qwen_prompt, 3),
    "qwen3_vl": TinyFamily(make_qwen3_vl, qwen_pictures, qwen_prompt, 3),
}


def tiny_model(family: str, attention: str = "sdpa") -> tuple[Any, Inputs]:
    """A tiny random model of a family, in eval mode, and one prompt about one picture (a batch of 1).

    family: one of FAMILIES. attention: the backend of its decoder and tower. ValueError for an unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[family].make().eval()
    model.set_attn_implementation(attention)
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id, settings.suppress_tokens = None, PAD, [IMAGE, VIDEO]
    return model, tiny_inputs(family, [[0]])


def tiny_inputs(family: str, prompts: Sequence[Sequence[int]]) -> Inputs:
    """Left-padded prompts about pictures: for each prompt the sizes of its pictures, by number; [] is text only.

    >>> batch = tiny_inputs("qwen2_5_vl", [[0], [], [1, 2]])
    >>> batch["input_ids"].shape, batch["image_grid_thw"].tolist()
    (torch.Size([3, 43]), [[1, 8, 8], [1, 4, 8], [1, 8, 12]])
    """
    known = FAMILIES[family]
    sizes = [[size % known.sizes if known.sizes > 1 else size for size in row] for row in prompts]
    parts = [sum((known.prompt(size) for size in pictures), []) for pictures in sizes]
    batch = left_padded([[1, 5 + i, *part, *range(10, 13 + i)] for i, part in enumerate(parts)])
    if any(sizes):
        batch |= known.pictures(sizes)
    if family.startswith("qwen"):
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()
    return batch


def n_tokens(batch: Inputs) -> list[int]:
    """Visual placeholders of each prompt.

    >>> n_tokens(tiny_inputs("qwen3_vl", [[0], [], [1]]))
    [16, 0, 8]
    """
    return [int(n) for n in (batch["input_ids"] == IMAGE).sum(dim=1)]


# ---------------------------------------------------------------- with a bottleneck
BOTTLENECK = 94


def tiny_bottleneck(family: str, compressor: dict[str, Any], attention: str = "sdpa") -> Any:
    """The tiny random model of a family with a compressor of its own (voco, htc, readers), in eval mode."""
    model, _ = tiny_model(family, attention)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = put_in(model, compressor)
    model.config.bottleneck_token_id = BOTTLENECK
    model.generation_config.suppress_tokens = [IMAGE, VIDEO, BOTTLENECK]
    return model.eval()


def bottleneck_inputs(family: str, model: Any, prompts: Sequence[Sequence[int]], is_compressed: bool = False) -> Inputs:
    """As `tiny_inputs`, as the processor of such a model writes them: the tiles of a picture together, then its bottleneck
    tokens; is_compressed: these alone, without pixels."""
    known, method = FAMILIES[family], model.model.compressor
    sizes = [[size % known.sizes if known.sizes > 1 else size for size in row] for row in prompts]

    def picture(size: int) -> list[int]:
        ids = known.prompt(size)
        first, behind = ids.index(IMAGE), len(ids) - ids[::-1].index(IMAGE)
        visual = [] if is_compressed else [IMAGE] * method.n_visual(ids.count(IMAGE))
        return [*ids[:first], *visual, *[BOTTLENECK] * method.n_bottleneck, *ids[behind:]]

    rows = [
        [1, 5 + i, *sum((picture(size) for size in row), []), *range(10, 13 + i)] for i, row in enumerate(sizes)
    ]  # fmt: skip
    batch = left_padded(rows)
    return batch | known.pictures(sizes) if any(sizes) and not is_compressed else batch


def left_padded(rows: Sequence[Sequence[int]]) -> Inputs:
    """Prompts of any lengths as input_ids and attention_mask."""
    longest = max(map(len, rows))
    ids = [[PAD] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
