"""Moving keys, and numbering prompts. Positions counted by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from htc_vlm.ops.rope import position_ids, rotate_keys
from htc_vlm.tokens import TokenLayout


def ids(row: str, positions: str = "sequential") -> list[int]:
    return position_ids(TokenLayout.from_string(row), positions)[0].tolist()


def test_moved_keys_are_the_keys_that_llama_would_have_made_there() -> None:
    """The layout of pairs differs between implementations (halves against neighbours); transformers' is the judge."""
    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=8))
    raw = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))  # (B, heads, N, head_dim)

    def at(start: int) -> torch.Tensor:
        cos, sin = rotary(raw, position_ids=torch.arange(start, start + 5)[None])
        return apply_rotary_pos_emb(raw, raw, cos, sin)[1]

    for source, target in ((0, 7), (3, 1000), (600, 2)):
        moved = rotate_keys(at(source), rotary.inv_freq, torch.tensor([target - source] * 2))
        torch.testing.assert_close(moved, at(target), atol=2e-4, rtol=0)


def test_each_sample_is_moved_by_its_own_shift() -> None:
    """A quarter turn: (1, 0) becomes (0, 1) where the shift is 1 and the frequency pi / 2; the other stays."""
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    moved = rotate_keys(keys, torch.tensor([torch.pi / 2]), torch.tensor([1, 0]))
    torch.testing.assert_close(moved, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), atol=1e-6, rtol=0)


def test_half_precision_keys_are_turned_in_full_precision() -> None:
    """An angle of 1000 radians in bfloat16 is off by 4."""
    keys = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    inv_freq = torch.tensor([1.0, 0.1, 0.01, 0.001])
    there = rotate_keys(keys, inv_freq, torch.tensor([1000]))
    assert there.dtype == torch.bfloat16
    exact = rotate_keys(keys.float(), inv_freq, torch.tensor([1000]))
    torch.testing.assert_close(there.float(), exact, atol=0.01, rtol=0.01)


def test_frequencies_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="4 frequency pairs, inv_freq has 3"):
        rotate_keys(torch.zeros(1, 8), torch.ones(3), torch.tensor([1]))


def test_sequential_counts_every_token() -> None:
    """The paper: after 580 visual tokens and the bottleneck, the text goes on at 581."""
    assert ids("tvvbt") == [0, 1, 2, 3, 4]
    assert ids("v" * 580 + "bt")[-2:] == [580, 581]


def test_compact_counts_text_and_bottlenecks_only() -> None:
    """t 0; v v just before b, which stands at 1; t 2; v before b at 3; t 4."""
    assert ids("tvvbtvbt", "compact") == [0, -1, 0, 1, 2, 2, 3, 4]
    assert ids("v" * 580 + "bt", "compact")[-2:] == [0, 1]


def test_padding_does_not_count() -> None:
    for positions in ("sequential", "compact"):
        assert ids("ppvbt", positions)[2:] == ids("vbt", positions)
        assert ids("vbtpp", positions)[:3] == ids("vbt", positions)


def test_the_distance_from_patch_to_bottleneck_is_the_same_everywhere() -> None:
    """Cells are stored as if the image stood alone: any other distance would make them wrong."""
    for positions in ("sequential", "compact"):
        row = "vvvbttvvvbt"
        found = ids(row, positions)
        first = [found[3] - x for x in found[:4]]
        assert first == [found[9] - x for x in found[6:10]] == [3, 2, 1, 0]


def test_packed_questions_all_start_after_the_image() -> None:
    """v v b | t t t | t t: both start at 3 (compact: at 1)."""
    kind = TokenLayout.from_string("vvbttttt").kind
    layout = TokenLayout.from_kind(kind, question=torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]]))
    assert position_ids(layout)[0].tolist() == [0, 1, 2, 3, 4, 5, 3, 4]
    assert position_ids(layout, "compact")[0].tolist() == [-2, -1, 0, 1, 2, 3, 1, 2]


def test_an_unknown_numbering_is_refused() -> None:
    with pytest.raises(ValueError, match="positions is 'packed'; known: sequential, compact"):
        ids("vbt", "packed")
