"""The recipe of compressed images: cheap to ask for again, never out of date, the same for every dtype of one checkpoint."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from htc_vlm.model import HtcVlmForConditionalGeneration
from htc_vlm.model import recipe as module
from htc_vlm.model.recipe import recipe_of
from htc_vlm.model.weights_digest import weights_digest

from ..tinies import batch, build, image_processor, pixels

VOCO = {"name": "voco"}


def small() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 2, bias=False), nn.LayerNorm(2)))


@torch.no_grad()
def test_every_change_of_a_weight_is_noticed() -> None:
    """Entries of a model as it was before its training step would answer for the trained one."""
    model = small()
    seen = [recipe_of(model).digest]

    def look() -> None:
        seen.append(recipe_of(model).digest)

    model[0].weight.mul_(2)  # an optimizer's step
    look()
    model[0].weight = nn.Parameter(torch.ones(4, 3))  # replaced
    look()
    model[0].weight.data = torch.zeros(4, 3)  # replaced behind torch's back
    look()
    model[1][0] = nn.Linear(4, 2, bias=False)  # a module replaced, as adapters do
    look()
    model[1][0].register_parameter("bias", nn.Parameter(torch.zeros(2)))
    look()
    model.load_state_dict({name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()})
    look()
    model[1][1].eps = 1e-2  # 25 % of the entries of `tiny`
    look()
    model.register_buffer("codes", torch.zeros(3))  # a codebook is a buffer
    look()
    model.codes[1] = 1
    look()
    assert len(set(seen)) == len(seen) and all(len(digest) == 64 for digest in seen)


def test_one_changed_weight_among_many_is_noticed() -> None:
    """1,024 sampled values of each weight, and nothing else, left most single weights unwatched."""
    weight = torch.linspace(-1, 1, 50_000)
    holder, other = nn.Linear(1, 1), nn.Linear(1, 1)
    for one in (holder, other):
        one.weight = nn.Parameter(weight.clone())
        one.bias = None
    with torch.no_grad():
        other.weight[12_345] += 0.5
    assert recipe_of(holder) != recipe_of(other)


def test_an_unchanged_model_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading 7 billion weights, and writing out three configurations, before each answer."""
    model, processor = build(VOCO), image_processor()
    first, real = recipe_of(model, processor), weights_digest
    calls: list[int] = []
    monkeypatch.setattr(module, "weights_digest", lambda model: calls.append(1) or real(model))  # type: ignore[func-returns-value]
    monkeypatch.setattr(module, "_settings", lambda *sources: pytest.fail("settings were written out again"))
    model.compress(pixel_values=pixels(1), image_processor=processor)  # nor does compressing write to anything
    assert recipe_of(model, processor) is first and not calls
    monkeypatch.undo()
    assert recipe_of(model.to(torch.bfloat16), processor) == first  # the digest is of rounded values


@pytest.mark.parametrize("wider", [torch.float32, torch.bfloat16])
def test_a_checkpoint_has_one_recipe_in_every_dtype(wider: torch.dtype, tmp_path: Path) -> None:
    """float16 gave another one: it rounds elsewhere than bfloat16, and holds nothing below 6e-8 or above 65,504."""
    model = build(VOCO)
    with torch.no_grad():
        weight = model.model.multi_modal_projector.linear_1.weight
        weight.view(-1)[:6] = torch.tensor([1e-3 + 1e-7, 3.1e-6, 1e-9, -1e-12, 7e4, -1e30])
    model.to(wider).save_pretrained(tmp_path)
    dtypes = ("float32", "bfloat16", "float16")
    loads = [HtcVlmForConditionalGeneration.from_pretrained(tmp_path, dtype=name) for name in dtypes]
    assert len({one.recipe().digest for one in loads}) == 1
    half = loads[2].model.multi_modal_projector.linear_1.weight
    assert half.dtype == torch.float16 and half.view(-1)[3] == 0 and half.view(-1)[5].isinf()
    with torch.no_grad():
        half.view(-1)[2] = 0.5  # no longer what the file says
    assert loads[2].recipe() != loads[0].recipe()


def test_adapters_are_part_of_the_recipe_as_they_act() -> None:
    """Entries made under LoRA A were accepted under LoRA B, and under none."""
    peft = pytest.importorskip("peft")
    model = build(VOCO)
    bare = model.recipe()
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora, adapter_name="a")
    wrapped.add_adapter("b", lora)
    wrapped.eval()
    wrapped.set_adapter("a")
    kept, of_a = wrapped.compress(pixel_values=pixels(1)), model.recipe()
    wrapped.set_adapter("b")
    of_b = model.recipe()
    assert len({bare.digest, of_a.digest, of_b.digest}) == 3 and kept.recipe == of_a.digest
    with pytest.raises(ValueError, match="compressed by another model or with other settings"):
        model(**batch([[5, 6]]), compressed=kept)
    with wrapped.disable_adapter():
        assert model.recipe() == bare  # what acts is the model without adapters
        with pytest.raises(ValueError, match="compressed by another model or with other settings"):
            model(**batch([[5, 6]]), compressed=kept)
    wrapped.set_adapter("a")
    assert model.recipe() == of_a
    wrapped.merge_adapter()
    merged = model.recipe()
    assert merged not in (bare, of_a, of_b)
    wrapped.unmerge_adapter()
    layer = model.model.language_model.layers[0].self_attn.q_proj
    layer.set_scale("a", 3.0)
    assert model.recipe() not in (of_a, merged)


def test_settings_of_model_and_processor_are_part_of_the_recipe() -> None:
    """Another `image_mean` moved the entries by 17 %, another norm epsilon by 25 %, both under the same name."""
    model, processor = build(VOCO), image_processor()
    recipes = [recipe_of(model), recipe_of(model, processor)]
    processor.image_mean = [0.5, 0.5, 0.5]
    recipes.append(recipe_of(model, processor))
    processor.size["shortest_edge"] = 40
    recipes.append(recipe_of(model, processor))
    model.config.text_config.rms_norm_eps = 1e-2
    recipes.append(recipe_of(model, processor))
    model.config.text_config.rope_parameters["rope_theta"] = 5.0
    recipes.append(recipe_of(model, processor))
    recipes.append(recipe_of(model, processor, extra={"prefix": [1, 2]}))
    assert len({one.digest for one in recipes}) == len(recipes)
    assert recipes[2].differences(recipes[3].parts) == ["processor.size.shortest_edge"]
    assert recipes[1].differences(recipes[2].parts) == ["processor.image_mean"]


def test_what_changes_no_number_changes_no_recipe(tmp_path: Path) -> None:
    """A store that a new version of transformers, or a copy in another folder, could no longer open."""
    model, processor = build(VOCO), image_processor()
    first = recipe_of(model, processor)
    model.config._name_or_path = "elsewhere"
    model.config.text_config.use_cache = False
    processor.device = "cpu"
    assert recipe_of(model, processor) == first
    assert recipe_of(copy.deepcopy(model), processor) == first
    processor.save_pretrained(tmp_path)
    assert recipe_of(model, type(processor).from_pretrained(tmp_path)) == first


def test_models_that_were_asked_can_still_be_copied_and_pickled() -> None:
    """What remembers the weights lives outside the model."""
    model = small()
    first = recipe_of(model)
    assert recipe_of(pickle.loads(pickle.dumps(model))) == first


def test_weights_that_are_not_here_are_refused_by_name() -> None:
    """Each process would cache its own share of the heads and call it the image; "Tensor on meta" names nothing."""
    model = nn.Linear(2, 2)
    model.weight.full_tensor = lambda: model.weight  # what marks a DTensor
    with pytest.raises(ValueError, match="weight is sharded over processes"):
        recipe_of(model)
    with pytest.raises(ValueError, match="bias is offloaded"):
        recipe_of(nn.Linear(2, 2, device="meta"))
