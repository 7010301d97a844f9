"""`htc_vlm.apply`: what a model, a cache or a call cannot do is refused by name, before anything is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, MistralConfig, SiglipVisionConfig, StaticCache

import htc_vlm
from htc_vlm import HtcVlmConfig, HtcVlmForConditionalGeneration, load

from .applying import TEXT, applied, traces


def own_config(compressor: dict[str, Any]) -> HtcVlmConfig:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    text = LlamaConfig(**TEXT)
    return HtcVlmConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=50, compressor=compressor)


def refused(model: Any, message: str, name: str, **settings: Any) -> None:
    before = traces(model)
    with pytest.raises(ValueError, match=message), htc_vlm.apply(model, name, **settings):
        raise AssertionError("entered")
    assert traces(model) == before


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("fastv", {"n_keep": 17, "layer": 2}, "n_keep is 17; there are only 16"),
        ("fastv", {"n_keep": 4, "layer": 6}, "the model has 6"),
        ("fastv", {"n_kept": 4}, "known: n_keep, layer"),
        ("pyramid_drop", {}, "the model has 6"),
        ("sparse_vlm", {"budget": 64}, "576 patches and 32 layers"),
        ("visionzip", {}, "there are 16"),
        ("divprune", {"n_keep": 17}, "only 16"),
        ("random_drop", {"n_keep": 17}, "only 16"),
        ("avg_pool", {"n_tokens": 25}, "only 16"),
        ("tome", {}, "only 16"),
        ("tome", {"n_keep": 17}, "n_keep is 17; there are only 16"),
        ("tome", {"merges": (2, 2)}, "one for each of the 3 blocks"),
        ("tome", {"merges": (9, 0, 0)}, "block 0 is asked to merge 9 of 16"),
        ("tome", {"n_keep": 1}, "n_keep must be at least 2"),
        ("pyramid_drop", {"stages": (2, 6)}, "the model has 6"),
        ("pyramid_drop", {"stages": (2,), "ratio": 1.5}, "at most 1"),
        ("pyramid_drop", {"stages": (2,), "ratio": 0.01}, "cannot keep 0 of 16"),
        ("sparse_vlm", {"layers": (1,), "keep": (17,)}, "cannot keep 17 of 16"),
        ("sparse_vlm", {"layers": (5,), "keep": (4,)}, "the model has 6"),
        ("sparse_vlm", {"layers": (1,), "keep": (4,), "plus": True}, "n_heads is 14; the model has 4"),
        ("visionzip", {"n_dominant": 16, "n_contextual": 2}, "need 17 patches; there are 16"),
        ("voco", {}, "must be trained"),
        ("qformer", {}, "must be trained"),
        ("htc", {}, "must be trained"),
        ("llava_mini", {}, "must be trained"),
        ("fastvlm", {}, "unknown compressor 'fastvlm'; known: avg_pool"),
    ],
)
def test_what_this_model_cannot_do_is_refused_by_name(llava: Any, name: str, settings: dict[str, Any], message: str) -> None:
    """Before anything is changed, not in the middle of an evaluation."""
    refused(llava, message, name, **settings)


def test_models_that_lack_what_a_method_needs_are_refused(new_llava: Any) -> None:
    """SigLIP has no class token; a sliding window has a mask of its own."""
    siglip = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14
    )
    model = new_llava(vision_config=siglip.to_dict(), vision_feature_select_strategy="full")
    refused(model, "needs a CLIP vision tower", "visionzip", n_dominant=4, n_contextual=2)
    refused(model, "needs a CLIP vision tower", "tome", n_keep=4)
    model = new_llava(text_config=MistralConfig(**TEXT, sliding_window=8).to_dict())
    refused(model, "sliding-window", "fastv", n_keep=4, layer=2)
    refused(new_llava(vision_feature_layer=[-2, -3]), "patches of one layer", "tome", n_keep=4)
    with pytest.raises(ValueError, match="got Linear"), htc_vlm.apply(torch.nn.Linear(2, 2), "fastv"):
        pass


def test_applying_twice_and_over_a_compressor_is_refused(llava: Any) -> None:
    """Two methods at once have no schedule."""
    with applied(llava, "fastv"):
        refused(llava, "fastv is applied", "divprune", n_keep=4)
    config = own_config({"name": "divprune", "n_keep": 4})
    refused(HtcVlmForConditionalGeneration(config), "compressor 'divprune' of its own", "fastv")


def test_a_forward_that_hides_the_class_is_refused(new_llava: Any) -> None:
    """model.forward = torch.compile(model.forward) is found before the class's: the method would not be asked."""
    for part in (lambda model: model, lambda model: model.model, lambda model: model.get_decoder()):
        model = new_llava()
        part(model).forward = part(model).forward
        refused(model, "has a `forward` of its own that hides it", "divprune", n_keep=4)
        refused(model, "fastv changes the class of Lla(ma|va)", "fastv", n_keep=4, layer=2)


def test_a_model_cannot_have_an_applied_method_as_its_compressor() -> None:
    """It would run without dropping anything, and call itself FastV."""
    config = own_config({"name": "fastv"})
    with pytest.raises(ValueError, match="use `with htc_vlm.apply"):
        HtcVlmForConditionalGeneration(config)


def test_caches_that_cannot_hold_layers_of_different_length_are_refused(llava: Any, prompts: Any) -> None:
    """A static cache, a copied one, a half-filled one: silently wrong otherwise."""
    inputs = prompts.one(0)
    with applied(llava, "fastv"):
        with pytest.raises(ValueError, match="DynamicCache"):
            llava(**inputs, past_key_values=StaticCache(llava.config.text_config, max_cache_len=64), use_cache=True)
        with pytest.raises(ValueError, match="cache_implementation='static'"):
            llava.generate(**inputs, max_new_tokens=1, cache_implementation="static")
        pruned = llava(**inputs, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="give the whole conversation"):
            llava(**inputs, past_key_values=pruned)
    with applied(llava, "fastv"), pytest.raises(ValueError, match="continue inside the `with` block"):
        llava(torch.tensor([[5]]), past_key_values=pruned)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 2},
        {"assistant_early_exit": 2},
        {"prefill_chunk_size": 8},
        {"cache_implementation": "static"},
    ],
)
def test_guessing_ahead_and_reading_in_parts_are_refused(llava: Any, new_llava: Any, prompts: Any, options: Any) -> None:
    """A guessed token would choose the patches, and a rejected one would stay in what is known of the cache."""
    message = f"does not go with {next(iter(options))}"
    with applied(llava, "fastv"):
        with pytest.raises(ValueError, match=message):
            llava.generate(**prompts.one(0), max_new_tokens=1, **options)
        with pytest.raises(ValueError, match=message):
            llava.generate(**prompts.one(0), generation_config=GenerationConfig(max_new_tokens=1, **options))
    model = new_llava()
    for name, value in options.items():
        setattr(model.generation_config, name, value)
    with applied(model, "fastv"), pytest.raises(ValueError, match=message):
        model.generate(**prompts.one(0), max_new_tokens=1)
    with applied(model, "fastv"), pytest.raises(ValueError, match=message):  # transformers fills the given one from it
        model.generate(**prompts.one(0), generation_config=GenerationConfig(max_new_tokens=1))


def test_calls_that_the_methods_cannot_take_are_refused_by_name(llava: Any, prompts: Any) -> None:
    """A mask, numbering or embedding that is silently not used."""
    inputs = prompts.one(0)
    n = inputs["input_ids"].shape[1]
    embeds, ids = llava.get_input_embeddings()(inputs["input_ids"]), torch.tensor([[1, 50, 50, 50, 7]])
    two = torch.cat((prompts.pixels[0], prompts.pixels[2]))
    calls: list[tuple[str, dict[str, Any], str]] = [
        ("fastv", {"attention_mask": torch.ones(1, 1, n, n)}, "fastv masks by itself; give a 2-D attention_mask, got 4-D"),
        ("fastv", {"input_ids": None, "inputs_embeds": embeds}, "give input_ids, not embeddings"),
        ("fastv", {"input_ids": ids, "pixel_values": two}, "3 image placeholders for 2 images"),
        ("divprune", {"input_ids": ids, "pixel_values": two}, "3 image placeholders for 2 images"),
        ("divprune", {"position_ids": torch.arange(n)[None]}, "cuts the prompt; leave out position_ids"),
        ("divprune", {"image_sizes": torch.tensor([[56, 56]])}, "images of different sizes"),
    ]
    for case, changes, message in calls:
        with applied(llava, case), pytest.raises(ValueError, match=message):
            llava(**{**inputs, **changes})
    with applied(llava, "divprune"), pytest.raises(ValueError, match="leave position_ids to generate"):
        llava.generate(**inputs, position_ids=torch.arange(n)[None], max_new_tokens=1)
    own = HtcVlmForConditionalGeneration(own_config({"name": "none"})).eval()
    with applied(own, "visionzip"), pytest.raises(ValueError, match="visionzip acts in the vision tower; give pixel_values"):
        own(inputs["input_ids"], patch_features=torch.zeros(1, 16, 16))


def test_a_tower_without_a_class_token_has_no_patch_too_many() -> None:
    """`full` once counted a class token for every tower, so 37 of tiny-upper's 36 patches were accepted."""
    model, _ = load("tiny-upper")
    with (
        pytest.raises(ValueError, match="n_keep is 37; there are only 36"),
        htc_vlm.apply(model, "random_drop", n_keep=37),
    ):
        pass
