"""LLaVA-Mini's compression, and its pre-fusion against layers run by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from htc_vlm import compressors
from htc_vlm.compressors import Compressor, ImageFeatures, Sizes

from .. import tinies
from ..tinies import IMAGE, N_PATCHES, assert_close, batch, pixels, shared

WIDTH = 8
MINI = {"name": "llava_mini", "n_tokens": 4, "n_fusion": 2}


def mini(**settings: Any) -> Compressor:
    torch.manual_seed(0)
    method = compressors.build("llava_mini", **{"n_tokens": 4, "n_fusion": 0, "n_heads": 2, **settings})
    method.setup(Sizes(n_patches=16, vision_width=WIDTH, llm_width=12))
    method.init_own_weights()
    return method.eval()


def features(n: int = 2) -> Tensor:
    return torch.randn(n, 16, WIDTH, generator=torch.Generator().manual_seed(1))


def place(row: float, column: float) -> list[float]:
    """Sine and cosine of both coordinates at the frequencies 1 and 1/100 of eight channels, the column's first."""
    return [f(x * w) for x in (column, row) for f in (math.sin, math.cos) for w in (1.0, 0.01)]


def test_places_are_stretched_over_the_grid_with_columns_first() -> None:
    """2 x 2 places over 4 x 4 patches by the bicubic kernel of -0.75 at 1/4 and 3/4 between two samples, edges repeated."""
    from htc_vlm.compressors.llava_mini import grid_positions, resized

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    share = torch.zeros(4, 2)  # of the two samples in each of four places, at -0.25, 0.25, 0.75 and 1.25
    for i in range(4):
        at = (i + 0.5) / 2 - 0.5
        for sample in range(-2, 4):
            share[i, min(max(sample, 0), 1)] += kernel(at - sample)
    small = grid_positions(2, WIDTH).view(2, 2, WIDTH)
    expected = torch.einsum("yr,xc,rcd->yxd", share, share, small)
    assert_close(resized(small.view(4, WIDTH), 16), expected.view(16, WIDTH))
    assert not torch.equal(small[0, 1], small[1, 0])  # rows and columns can be told apart


def norm(x: Tensor, layer: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def test_tokens_are_what_two_heads_of_attention_give() -> None:
    """docs/specs/baselines.md section 8: q = LN(Q) + PE, k = LN(x) + PE, v = LN(x) without, no residual, no MLP."""
    method: Any = mini(n_tokens=16)  # as many queries as patches: no place is interpolated
    weights, biases = method.attention.in_proj_weight.chunk(3), method.attention.in_proj_bias.chunk(3)
    nn.init.normal_(method.attention.in_proj_bias)
    pe = torch.tensor([place(row, column) for row in range(4) for column in range(4)])
    value = norm(features(), method.norm_features)
    query = norm(method.query, method.norm_query) + pe
    q, k, v = (x @ w.T + b for x, w, b in zip((query, value + pe, value), weights, biases, strict=True))
    heads = []
    for half in (slice(0, 4), slice(4, 8)):
        attention = (q[:, half] @ k[..., half].transpose(1, 2) / 4**0.5).softmax(dim=-1)
        heads.append(attention @ v[..., half])
    expected = torch.cat(heads, dim=-1) @ method.attention.out_proj.weight.T + method.attention.out_proj.bias
    torch.testing.assert_close(method.compress(features()), expected, atol=1e-5, rtol=0)


def test_the_place_decides_what_is_compressed() -> None:
    """The code compresses what the tower gives and projects the result; the paper draws it the other way round."""
    project = nn.Linear(WIDTH, 12)
    images = ImageFeatures(features(), project)
    before = mini()
    torch.testing.assert_close(before.before_llm(images), project(before.compress(features())))  # type: ignore[operator]
    assert mini(place="after_projector", n_heads=4).before_llm(images).shape == (2, 4, 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_tokens": 3}, "n_tokens is 3; give a square number"),
        ({"n_fusion": -1}, "n_fusion is -1"),
        ({"n_heads": 3}, "width of the features is 8; it must be a multiple of 4 and of n_heads, which is 3"),
        ({"place": "inside"}, "place is 'inside'; known"),
        ({"n_fusion": 1}, "layers of the language model's kind"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    """A width that does not split into heads would be an assertion of torch's, hours into a run."""
    with pytest.raises(ValueError, match=message):
        mini(**settings)


def test_more_tokens_than_patches_are_refused() -> None:
    """Before a checkpoint is made with them."""
    with pytest.raises(ValueError, match="n_tokens is 25; there are only 16"):
        mini(n_tokens=25).n_visual(16)


def test_only_the_ablation_is_question_independent() -> None:
    """The cost table would let LLaVA-Mini keep its one token for every later question."""
    assert not mini_of(4).question_independent and mini_of(0).question_independent
    assert mini_of(4).fusion_schedule(576) == [577] * 4 and mini_of(0).fusion_schedule(576) == []


def mini_of(n_fusion: int) -> Compressor:
    return compressors.build("llava_mini", n_fusion=n_fusion)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pre_fusion_is_layers_over_patches_tokens_and_words(attention: str) -> None:
    """[patches; tokens; words] through two layers, causal, numbered from 0; tokens and words go on, answers stay raw."""
    model = shared(MINI, attention)
    inner, words, answer = model.model, [5, 6, 7], [8, 9]
    images = inner.get_image_features(pixel_values=pixels(1))
    embed = model.get_input_embeddings()
    states = torch.cat((images.patches[0], images.pooler_output[0], embed(torch.tensor(words))))[None]
    n = states.shape[1]
    rotary = inner.language_model.rotary_emb(states, position_ids=torch.arange(n)[None])
    mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]
    for layer in inner.compressor.fusion_layers:
        states = layer(states, attention_mask=mask, position_embeddings=rotary)
    reads = torch.cat((states[:, N_PATCHES:], embed(torch.tensor([answer]))), dim=1)
    expected = inner.language_model(inputs_embeds=reads).last_hidden_state
    inputs = batch([[IMAGE] * 4 + words + answer])
    labels = torch.where(torch.arange(9) >= 7, inputs["input_ids"], -100)
    out = model(**inputs, pixel_values=pixels(1), labels=labels)
    assert_close([out.logits[0]], [model.lm_head(expected)[0]])


def test_packed_questions_get_what_each_gets_alone() -> None:
    """In pre-fusion, too, one question must not read another, nor its answer, and is numbered from the image on."""
    model = shared(MINI)
    questions, answers = ([5, 6, 7], [11, 12]), ([8], [9, 10])
    image = [IMAGE] * 4
    ids = torch.tensor([[*image, *questions[0], *answers[0], *questions[1], *answers[1]]])
    numbers = torch.tensor([[0] * 4 + [1] * 4 + [2] * 4])
    is_answer = torch.tensor([[False] * 4 + [False, False, False, True] + [False, False, True, True]])
    together = model(input_ids=ids, question_ids=numbers, is_answer=is_answer, pixel_values=pixels(1)).logits[0]
    for question, answer, columns in zip(questions, answers, (slice(4, 8), slice(8, 12)), strict=True):
        alone = torch.tensor([[*image, *question, *answer]])
        labels = torch.where(torch.arange(8) >= 4 + len(question), alone, -100)
        expected = model(input_ids=alone, labels=labels, pixel_values=pixels(1)).logits[0, 4:]
        assert_close([together[columns]], [expected])


def test_the_words_have_read_the_picture_and_the_ablations_have_not() -> None:
    """Pre-fusion that does nothing would be the ablation under a proud name."""
    for n_fusion, reads in ((2, True), (0, False)):
        model = shared({**MINI, "n_fusion": n_fusion})
        seen: list[Tensor] = []
        hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        for seed in (1, 2):
            model(**batch([[*[IMAGE] * 4, 5, 6]]), pixel_values=pixels(1, seed))
        hook.remove()
        assert (not torch.equal(seen[0][:, 4:], seen[1][:, 4:])) is reads


def test_words_after_a_cached_prompt_are_refused() -> None:
    """They would be raw among fused ones, silently: a second question about a picture that it never saw."""
    model = shared(MINI)
    first = model(**batch([[*[IMAGE] * 4, 5, 6]]), pixel_values=pixels(1), use_cache=True)
    with pytest.raises(ValueError, match="give the whole conversation"):
        model(torch.tensor([[7, 8]]), past_key_values=first.past_key_values)
    with pytest.raises(ValueError, match="give input_ids, not embeddings"):
        embeds = torch.zeros(1, 6, 32)
        model(inputs_embeds=embeds, pixel_values=pixels(1))


@torch.enable_grad()  # off in this folder, see conftest.py
def test_everything_in_it_learns() -> None:
    """A weight without a gradient breaks DDP; patches cut off from the loss would leave the projector half-trained."""
    model = tinies.build(MINI)
    ids = batch([[*[IMAGE] * 4, 5, 6, 7]])
    labels = torch.where(torch.arange(7) == 6, ids["input_ids"], -100)
    model(**ids, pixel_values=pixels(1), labels=labels).loss.backward()
    silent = [name for name, weight in model.model.compressor.named_parameters() if weight.grad is None]
    assert silent == []
