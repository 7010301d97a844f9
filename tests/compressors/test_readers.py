"""Readers: several rows write the heads of one cache entry, in several looks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from htc_vlm.compressors import build
from htc_vlm.data.collate import Collator, Sample
from htc_vlm.data.conversations import pack
from htc_vlm.model import HtcVlmForConditionalGeneration
from htc_vlm.model.add_compressor import meta_model
from htc_vlm.ops import cost, rope
from htc_vlm.tokens import TokenLayout

from .. import tinies
from ..tinies import BOTTLENECK, N_PATCHES, assert_close, batch, image_ids, pixels, rows, shared, text_logits


def readers(**settings: Any) -> dict[str, Any]:
    return {"name": "readers", "n_readers": 2, **settings}


@torch.no_grad()
@pytest.mark.parametrize("visual_attention", ["self", "causal"])
def test_one_reader_with_one_look_is_voco(visual_attention: str) -> None:
    """The ladder from VoCo to readers has another first step than it says."""
    options = {"n_bottleneck": 3, "visual_attention": visual_attention}
    voco = shared({"name": "voco", **options})
    one = tinies.build(readers(n_readers=1, n_looks=1, **options))
    one.load_state_dict(voco.state_dict(), strict=False)
    embedding = voco.get_input_embeddings().weight[BOTTLENECK]
    one.model.compressor.embedding.copy_(embedding.expand(3, -1))
    expected = voco.compress(pixel_values=pixels(2), path="general").kv
    torch.testing.assert_close(one.compress(pixel_values=pixels(2)).kv, expected, atol=1e-5, rtol=0)
    inputs = batch(rows(voco))
    assert_close(text_logits(one, inputs, pixel_values=pixels(3)), text_logits(voco, inputs, pixel_values=pixels(3)))


def seen_by_heads(n_visual: int, n_entries: int, n_text: int, n_heads: int, n_readers: int) -> Tensor:
    """(H, L, L) additive mask of ONE pass over [visual; rows; text]: each head of the text sees its own rows only."""
    n_rows = n_entries * n_readers
    length = n_visual + n_rows + n_text
    seen = torch.ones(length, length, dtype=torch.bool).tril().expand(n_heads, -1, -1).clone()
    seen[:, n_visual + n_rows :, : n_visual + n_rows] = False
    for head in range(n_heads):
        for entry in range(n_entries):
            row = n_visual + entry * n_readers + head * n_readers // n_heads
            seen[head, n_visual + n_rows :, row] = True
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


@torch.no_grad()
@pytest.mark.parametrize("n_entries", [1, 3])
def test_one_look_equals_one_pass_whose_mask_differs_by_head(n_entries: int) -> None:
    """Heads that end up in an entry from another row than the one that wrote them, or at another position."""
    model = shared(readers(n_looks=1, n_bottleneck=n_entries))
    image, text = pixels(1), torch.tensor([[5, 6, 7]])
    inputs = batch([[*image_ids(model), *text[0].tolist()]])
    (expected,) = text_logits(model, inputs, pixel_values=image)
    inner = model.model
    visual, n_rows = model.visual_tokens(image), n_entries * 2
    embeds = torch.cat((visual, inner.compressor.embedding[None], inner.get_input_embeddings()(text)), dim=1)
    entry = torch.arange(n_rows) // 2
    positions = torch.cat((torch.arange(N_PATCHES), N_PATCHES + entry, N_PATCHES + n_entries + torch.arange(3)))
    mask = seen_by_heads(N_PATCHES, n_entries, 3, n_heads=4, n_readers=2)[None]
    out = inner.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions[None], use_cache=False)
    assert_close([model.lm_head(out.last_hidden_state[0, -3:])], [expected])


@torch.no_grad()
def test_another_look_begins_with_what_the_last_one_found() -> None:
    """M that multiplies something else than the last look's final states, by hand for two looks."""
    one, two = (tinies.build(readers(n_looks=n)) for n in (1, 2))
    one.load_state_dict(two.state_dict(), strict=False)
    visual = two.visual_tokens(pixels(1))
    inner, method = one.model.language_model, two.model.compressor
    before = torch.cat((visual, method.embedding[None]), dim=1)
    positions = torch.tensor([[*range(-N_PATCHES, 0), 0, 0]])
    ended = inner(inputs_embeds=before, attention_mask=torch.ones(1, N_PATCHES + 2), position_ids=positions).last_hidden_state
    one.model.compressor.embedding.copy_(method.embedding + ended[0, -2:] @ method.look_again.weight.T)
    expected = one.compress(pixel_values=pixels(1)).kv
    torch.testing.assert_close(two.compress(pixel_values=pixels(1)).kv, expected, atol=1e-4, rtol=0)


def test_m_begins_as_a_third_of_the_identity() -> None:
    """A second look that begins with noise, or with nothing of the first."""
    weight = tinies.build(readers()).model.compressor.look_again.weight
    assert weight.equal(0.3 * torch.eye(32))


def test_readers_must_divide_the_key_value_heads() -> None:
    """4 attention heads, 2 key-value heads: four readers would leave heads that nobody wrote."""
    with pytest.raises(ValueError, match="each layer has 2 key-value heads.*one of 1, 2"):
        tinies.build(readers(n_readers=4))
    with pytest.raises(ValueError, match="no power of two"):
        build("readers", elastic=True, n_bottleneck=6)


# ----------------------------------------------------------------------------------------------------- nested budgets
@torch.no_grad()
@pytest.mark.parametrize("positions", ["sequential", "compact"])
def test_fewer_entries_are_the_first_ones(positions: str) -> None:
    """A small image that is not a part of the large one, or whose text stands where it would after the large one."""
    model = shared(readers(n_bottleneck=4, elastic=True, positions=positions))
    whole, two = (model.compress(pixel_values=pixels(3), n_entries=n) for n in (None, 2))
    torch.testing.assert_close(two.kv, whole.kv[..., :2, :], atol=1e-5, rtol=0)
    small = tinies.build(readers(n_bottleneck=2, positions=positions))
    state = model.state_dict() | {"model.compressor.embedding": model.model.compressor.embedding[:4]}
    small.load_state_dict(state)
    expected = small(**batch(rows(small)), compressed=small.compress(pixel_values=pixels(3))).logits
    asked = model(**batch(rows(model)), compressed=two).logits
    for i, n_text in enumerate((5, 3, 4)):
        torch.testing.assert_close(asked[i, -n_text:], expected[i, -n_text:], atol=tinies.TOLERANCE, rtol=0)


def test_a_budget_that_was_not_trained_is_refused() -> None:
    """Three of four entries, or two of a model that never saw two: an answer from numbers nobody trained."""
    for settings, known in ({"n_bottleneck": 4, "elastic": True}, "1, 2, 4"), ({"n_bottleneck": 4}, "into 4"):
        with pytest.raises(ValueError, match=f"n_entries is 3.*{known}"):
            shared(readers(**settings)).compress(pixel_values=pixels(1), n_entries=3)


def test_training_draws_a_budget_each_step_and_asking_does_not() -> None:
    """One checkpoint for all budgets needs all of them in training, and each loss must be that of its budget."""
    model = tinies.build(readers(n_bottleneck=4, elastic=True))
    inputs = batch([[*image_ids(model), 5, 6, 7]])
    labels = inputs["input_ids"].masked_fill(~tinies.is_text(inputs), -100)

    def loss() -> float:
        return float(model(**inputs, pixel_values=pixels(1), labels=labels).loss)

    with torch.no_grad():
        of_all = {loss() for _ in range(4)}
        model.train()
        torch.manual_seed(0)
        drawn = {round(loss(), 5) for _ in range(10)}
    assert len(of_all) == 1 and len(drawn) == 3 and round(of_all.pop(), 5) in drawn


# ------------------------------------------------------------------------------------------------------------ training
def test_packed_questions_are_answered_as_each_alone() -> None:
    """Questions that see each other, or positions that run on: training would teach another prompt than is asked."""
    model = shared(readers())
    questions = [([5, 6], [7, 1]), ([8], [9, 1]), ([10, 11, 12], [13, 1])]
    together = pack("a", image_ids(model), questions)
    data = Collator(tinies.PAD)([Sample(together), Sample(pack("b", image_ids(model), questions[1:2]))])
    with torch.no_grad():
        logits = model(**data, pixel_values=pixels(1).repeat(2, 1, 1, 1)).logits
        start = len(image_ids(model))
        for ids, answer in questions:
            (alone,) = text_logits(model, batch([[*image_ids(model), *ids, *answer]]), pixel_values=pixels(1))
            torch.testing.assert_close(logits[0, start : start + len(alone)], alone, atol=tinies.TOLERANCE, rtol=0)
            start += len(alone)


@torch.enable_grad()
def test_the_loss_reaches_the_embedding_the_second_look_and_the_patches() -> None:
    """A compress pass without gradients inside the training pass: the model learns to answer blind."""
    model = tinies.build(readers())
    inputs = batch([[*image_ids(model), 5, 6, 7]])
    labels = inputs["input_ids"].masked_fill(~tinies.is_text(inputs), -100)
    model.train()
    model(**inputs, pixel_values=pixels(1), labels=labels).loss.backward()
    weights = dict(model.named_parameters())
    for name in ("compressor.embedding", "compressor.look_again.weight", "multi_modal_projector.linear_1.weight"):
        assert weights[f"model.{name}"].grad.abs().max() > 0, name


@torch.enable_grad()
@pytest.mark.parametrize("how", ["plain", "wrapped", pytest.param("reentrant", marks=pytest.mark.slow)])
def test_activation_checkpointing_gives_equal_loss_and_gradients(how: str) -> None:
    """transformers takes the cache from checkpointed layers: the text would not see the image. Written twice, in the backward
    pass too, entries would double; with reentry no gradient would reach the picture."""
    found, runs = [], []
    for checkpointing in (False, True):
        model = tinies.build(readers())
        model.train()
        model.model.language_model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
        if checkpointing and how == "wrapped":  # as FSDP does
            apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
        elif checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": how == "reentrant"})
        inputs = batch([[*image_ids(model), 5, 6, 7], [*image_ids(model), 8]])
        labels = inputs["input_ids"].masked_fill(~tinies.is_text(inputs), -100)
        loss = model(**inputs, pixel_values=pixels(2), labels=labels).loss
        loss.backward()
        grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        found.append((loss.detach(), {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in grads.items()}))
    (loss, grads), (loss_again, grads_again) = found
    assert len(runs) == 3 * 4, "patches, two looks and text: once, and twice where activations are computed again"
    assert loss.equal(loss_again) and grads.keys() == grads_again.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_again[name], atol=1e-6, rtol=1e-5)
    with torch.no_grad():  # in the middle of training, say to look at an answer
        assert model.compress(pixel_values=pixels(1)).kv.equal(model.eval().compress(pixel_values=pixels(1), path="general").kv)


@torch.no_grad()
def test_anchors_stand_before_the_patches_as_htc_s_do() -> None:
    """`channels: hybrid` that reads other visual tokens than HTC-VLM does."""
    options = {"channels": "hybrid", "quantizer": tinies.TINY_CODE, "visual_attention": "causal"}
    htc, ours = shared({"name": "htc", **options}), tinies.build(readers(**options))
    ours.load_state_dict(htc.state_dict(), strict=False)
    assert ours.visual_tokens(pixels(2)).equal(htc.visual_tokens(pixels(2)))
    inputs = batch([[*image_ids(ours), 5, 6]])
    two = ours(**inputs, compressed=ours.compress(pixel_values=pixels(1))).logits[0]
    assert_close([two], text_logits(ours, inputs, pixel_values=pixels(1)))


@torch.no_grad()
def test_attention_of_an_entry_adds_up_and_is_the_mean_of_its_rows() -> None:
    """A heatmap whose shares do not add up to one, or that shows the first row alone."""
    model = shared(readers(n_bottleneck=3))
    seen = model.bottleneck_attention(pixel_values=pixels(2))
    assert seen.shape == (2, 3, 4, 3, N_PATCHES + 3)
    torch.testing.assert_close(seen.sum(-1), torch.ones(2, 3, 4, 3))
    assert seen[..., 0, N_PATCHES + 1 :].abs().max() == 0  # the first entry does not see later ones
    assert seen[..., 0, N_PATCHES].min() > 0


@pytest.mark.parametrize("settings", [{}, {"n_bottleneck": 3, "positions": "compact"}], ids=str)
def test_placeholders_and_positions_are_those_of_voco(settings: dict[str, Any]) -> None:
    """Prompts, processors and stores must not care how many rows wrote an entry."""
    ours, voco = build("readers", **settings), build("voco", **settings)
    assert (ours.n_bottleneck, ours.positions, ours.cached_tokens(576, 32)) == (
        voco.n_bottleneck, voco.positions, voco.cached_tokens(576, 32),
    )  # fmt: skip
    layout = TokenLayout.from_string("vvvv" + "b" * ours.n_bottleneck + "tt")
    assert rope.position_ids(layout, ours.positions).equal(rope.position_ids(layout, voco.positions))


# --------------------------------------------------------------------------------------------------------- size of 7B
def compress_flops(compressor: dict[str, Any]) -> int:
    """FLOPs of compressing one image in the language model at LLaVA-1.5-7B's widths, counted in 4 of its 32 equal layers."""
    model: HtcVlmForConditionalGeneration = meta_model(compressor)
    del model.model.language_model.layers[4:]
    model.model.language_model.config.num_hidden_layers = 4
    visual = torch.empty(1, 576, 4096, device="meta", dtype=model.dtype)
    return cost.count_flops(lambda: model.model.compress_visual(visual, path="general"))


def test_at_7b_an_image_is_512_kib_and_the_pass_costs_two_percent_more_than_voco() -> None:
    """A gain in quality that was bought with bytes, or with time that nobody counted."""
    ours, voco = compress_flops({"name": "readers"}), compress_flops({"name": "voco"})
    assert 1 < ours / voco < 1.02
    cached = build("readers").cached_tokens(576, 32)
    assert cost.cache_bytes(cost.LLAMA_7B, cached) == 512 * 1024
    promised = [cost.prefill_flops(cost.LLAMA_7B, build(name).schedule(576, 32), n_text=0) for name in ("readers", "voco")]
    assert promised[0] / promised[1] == pytest.approx(ours / voco, abs=0.003)
