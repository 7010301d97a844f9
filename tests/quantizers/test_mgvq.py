"""MGVQ against the official implementation, its sizes, its codebook, and training that survives a kill.

Golden: tests/golden/mgvq_f16_g4.safetensors, recorded from github.com/MKJia/MGVQ (a small random f16 g4 encoder).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from htc_vlm.quantizers import signed_pixels
from htc_vlm.quantizers.mgvq import MGVQ, PRESETS, code_statistics
from htc_vlm.quantizers.mgvq_official import mgvq_state_dict, ours
from htc_vlm.train import train_quantizer as training
from htc_vlm.train.train_quantizer import TokenizerTraining, stack_pictures, train_tokenizer

from .. import processes

GOLDEN = Path(__file__).parents[1] / "golden" / "mgvq_f16_g4.safetensors"
SMALL = {
    "widths": (8, 8, 16),
    "depths": (0, 1, 1),
    "latent_channels": 4,
    "codebook_size": 32,
    "groups": 2,
    "attention_from": 3,
}
SHORT = TokenizerTraining(
    changes={**SMALL, "decoder_depths": (0, 1, 1)}, steps=12, batch_size=4, crop=16, warmup_steps=2,
    checkpoint_every=4, log_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def official(golden: dict[str, Tensor]) -> MGVQ:
    """Built from the golden file's own metadata and weights."""
    with safe_open(GOLDEN, "pt") as file:
        sizes = {key: json.loads(value) for key, value in file.metadata().items()}
    model = MGVQ(**sizes)
    model.load_state_dict(mgvq_state_dict(_state_dict(golden)))
    return model.eval()


def _state_dict(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("state_dict."): value for key, value in golden.items() if key.startswith("state_dict.")}


def _pictures(n: int = 12, side: int = 32) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (n, side // 8, side // 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)


def test_codes_latents_and_quantized_equal_the_official_implementation(
    official: MGVQ, golden: dict[str, Tensor]
) -> None:
    """Prevents any drift from the published tokenizer: a code off by one means another vector in every channel."""
    encoding = official.encode(golden["pixels"])
    assert torch.equal(encoding.indices, golden["codes"])
    torch.testing.assert_close(encoding.latents, golden["latents"], atol=1e-4, rtol=0)
    torch.testing.assert_close(encoding.quantized, golden["quantized"], atol=1e-4, rtol=0)


def test_each_group_of_a_quantized_vector_has_length_one(official: MGVQ, golden: dict[str, Tensor]) -> None:
    """Prevents returning the raw codebook row, or the latent's length times the code."""
    quantized = official.encode(golden["pixels"]).quantized
    lengths = quantized.unflatten(1, (4, 2)).norm(dim=2)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=1e-5, rtol=0)


def test_looking_codes_up_gives_the_quantized_vectors_back(official: MGVQ, golden: dict[str, Tensor]) -> None:
    """Prevents groups and channels being laid out differently in `look_up` and `encode`."""
    torch.testing.assert_close(official.look_up(golden["codes"]), golden["quantized"], atol=1e-4, rtol=0)


def test_weights_without_a_decoder_load_strictly_and_decode_refuses(official: MGVQ, golden: dict[str, Tensor]) -> None:
    """Prevents reconstructing with a randomly initialised decoder after loading an encoder-only file."""
    with pytest.raises(ValueError, match="without a decoder"):
        official.decode(golden["quantized"])


def test_every_weight_of_an_official_model_with_decoder_has_a_name_here() -> None:
    """Prevents a forgotten decoder key. The official names are built by hand from the official module tree."""
    model = MGVQ((16, 16, 32, 32), (0, 1, 1, 1), 8, 32, 2)
    state = model.state_dict()
    conv, norm = ("weight", "bias"), ("weight", "bias")
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    keys = [f"{name}.{leaf}" for name in ("quant_conv", "post_quant_conv") for leaf in conv]
    for half, resize, first in (("encoder", 1, 0), ("decoder", 0, 1)):
        for stage in (1, 2, 3):
            block = f"{half}.stages.{stage}.op_list.{0 if stage == 3 else first}"
            if stage == 3:
                keys += [
                    f"{block}.context_module.main.qkv.conv.weight",
                    f"{block}.context_module.main.proj.conv.weight",
                ]
                keys += [f"{block}.context_module.main.proj.norm.{leaf}" for leaf in norm]
                keys += [
                    f"{block}.local_module.main.{c}.conv.{x}" for c in ("inverted_conv", "depth_conv") for x in conv
                ]
                keys += [f"{block}.local_module.main.point_conv.conv.weight"]
                keys += [f"{block}.local_module.main.point_conv.norm.{leaf}" for leaf in norm]
                continue
            keys += [f"{block}.main.conv1.conv.{leaf}" for leaf in conv] + [f"{block}.main.conv2.conv.weight"]
            keys += [f"{block}.main.conv2.norm.{leaf}" for leaf in (*norm, *(statistics if half == "decoder" else ()))]
            keys += [f"{half}.stages.{stage}.op_list.{resize}.main.conv.conv.{leaf}" for leaf in conv]
    for leaf in conv:
        keys += [f"encoder.project_in.conv.conv.{leaf}", f"encoder.project_out.main.op_list.0.conv.{leaf}"]
        keys += [f"decoder.project_in.main.conv.{leaf}", f"decoder.project_out.op_list.0.{leaf}"]
        keys += [f"decoder.project_out.op_list.2.conv.conv.{leaf}"]
    fake = {key: _like(key, state) for key in keys}
    fake["quantize.embedding.weight"] = torch.randn(32, 4)
    fake["quantize.codebook_used"] = torch.zeros(2, 65536)
    result = MGVQ((16, 16, 32, 32), (0, 1, 1, 1), 8, 32, 2).load_state_dict(mgvq_state_dict({"model": fake}))
    assert not result.missing_keys and not result.unexpected_keys


def _like(key: str, state: dict[str, Tensor]) -> Tensor:
    """A tensor of the official shape of `key`."""
    if "qkv" in key:
        return torch.randn(96, 32, 1, 1)
    value = state[ours(key)]
    return value[..., None, None] if "proj.conv" in key else value


def test_keys_of_another_model_are_refused() -> None:
    """Prevents converting a plain DC-AE or LLaVA file into a half-empty tokenizer."""
    with pytest.raises(ValueError, match="not an official MGVQ"):
        mgvq_state_dict({"encoder.project_in.conv.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="no key of an official MGVQ"):
        ours("language_model.lm_head.weight")


@pytest.mark.parametrize(
    ("name", "downsample", "codes_per_group", "groups"),
    [(f"f{f}c32g{g}", f, n, g) for f in (8, 16, 32) for g, n in ((4, 8192), (8, 2048))],
)
def test_official_presets_have_the_official_grid_and_codebooks(
    name: str, downsample: int, codes_per_group: int, groups: int
) -> None:
    """Prevents reading 16384 or 32768 codes as per group: the official count is of all groups together."""
    with torch.device("meta"):
        model = MGVQ.preset(name).eval()
        encoding = model.encode(torch.empty(1, 3, 64, 64))
        pixels = model.decode(encoding.quantized)
    assert (model.downsample, model.codes_per_group) == (downsample, codes_per_group)
    assert encoding.quantized.shape == (1, 32, 64 // downsample, 64 // downsample)
    assert encoding.indices.shape == (1, 64 // downsample, 64 // downsample, groups)
    assert pixels.shape == (1, 3, 64, 64)


def test_the_papers_picture_has_14112_quantized_values() -> None:
    """Prevents a W1 of the wrong width: HTC-VLM's q is 21 x 21 x 32 at 336 pixels (section 4.1.2)."""
    with torch.device("meta"):
        encoding = MGVQ.preset("f16c32g8").eval().encode(torch.empty(1, 3, 336, 336))
    assert encoding.quantized.numel() == 14112 == 21 * 21 * 32


def test_the_tiny_preset_is_small_and_gives_ten_by_ten_cells() -> None:
    """Prevents the tiny model's tokenizer from outgrowing its checkpoint: encoder under 0.6 M parameters."""
    model = MGVQ.preset("tiny").eval()
    assert sum(weight.numel() for weight in model.encoder.parameters()) < 600_000
    assert model.encode(torch.zeros(1, 3, 160, 160)).indices.shape == (1, 10, 10, 4)


def test_encoding_leaves_the_codebook_and_the_random_state_alone_even_in_train_mode() -> None:
    """Prevents `model.train()` on the big model from drifting the frozen tokenizer's codes."""
    torch.manual_seed(0)
    model = MGVQ(**SMALL).train()
    before = {key: value.clone() for key, value in model.state_dict().items() if key.startswith("quantizer")}
    pixels = torch.randn(2, 3, 16, 16)
    random_state = torch.get_rng_state()
    in_train = model.encode(pixels)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(in_train.indices, model.eval().encode(pixels).indices)


def test_autocast_does_not_change_codes() -> None:
    """Prevents codes stored from a float32 run from disagreeing with those of a bf16 training run."""
    torch.manual_seed(0)
    model, pixels = MGVQ(**SMALL).eval(), torch.randn(2, 3, 32, 32)
    plain = model.encode(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.encode(pixels).indices, plain.indices)


def test_a_training_pass_sends_gradient_through_the_codes_to_the_encoder() -> None:
    """Prevents a quantizer without straight-through: the reconstruction loss would never reach the encoder."""
    torch.manual_seed(0)
    model = MGVQ(**SMALL).train()
    model(torch.randn(4, 3, 16, 16)).reconstruction.square().mean().backward()
    first_weight = next(iter(model.encoder.parameters()))
    assert first_weight.grad is not None and first_weight.grad.abs().sum() > 0


def test_dead_codes_are_revived_by_latents_of_the_batch() -> None:
    """Prevents codebook collapse: codes pointing away from every latent are never chosen and never move."""
    torch.manual_seed(0)
    model = MGVQ(**SMALL).train()
    codebook = model.quantizer.get_buffer("_codebook.embed")
    codebook.copy_(torch.tensor([-1.0, 0.0]))  # every code the same: at most one of 16 can be in use
    model.quantizer.get_buffer("_codebook.cluster_size").fill_(0.0)
    pixels = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        first = code_statistics(model(pixels).indices, 16)
        second = code_statistics(model(pixels).indices, 16)
    assert first.usage == (1 / 16, 1 / 16)
    assert min(second.usage) > 0.9


@pytest.mark.parametrize("shape", [(1, 3, 17, 16), (1, 4, 16, 16), (3, 16, 16), (1, 3, 0, 16)])
def test_pixels_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    """Prevents a picture from being cropped or broadcast silently."""
    with pytest.raises(ValueError, match="divisible by 4"):
        MGVQ(**SMALL).encode(torch.zeros(shape))


@pytest.mark.parametrize(
    "change",
    [{"groups": 3}, {"depths": (0, 0, 1)}, {"widths": (8, 8, 24)}, {"depths": (0, 1)}, {"latent_channels": 6}],
)
def test_sizes_that_cannot_be_built_are_refused_by_name(change: dict[str, object]) -> None:
    """Prevents a view error deep inside DC-AE's shortcuts instead of a sentence."""
    with pytest.raises(ValueError, match="|".join(change) + "|must divide"):
        MGVQ(**{**SMALL, **change})  # type: ignore[arg-type]


def test_an_unknown_preset_is_refused_with_the_list() -> None:
    """Prevents a typo from training some default tokenizer."""
    with pytest.raises(ValueError, match="f16c32g8"):
        MGVQ.preset("f16")
    assert len(PRESETS) == 7


def test_a_saved_tokenizer_loads_with_the_same_codes(tmp_path: Path) -> None:
    """Prevents settings or codebook buffers missing from the saved folder."""
    torch.manual_seed(0)
    model, pixels = MGVQ(**SMALL).eval(), torch.randn(1, 3, 16, 16)
    model.save(tmp_path)
    again = MGVQ.load(tmp_path)
    assert again.settings == model.settings
    assert torch.equal(again.decode(again.encode(pixels).quantized), model.decode(model.encode(pixels).quantized))
    with pytest.raises(ValueError, match=r"no config\.json"):
        MGVQ.load(tmp_path / "nowhere")


def test_unit_pixels_become_signed_and_halving_averages_blocks_of_four() -> None:
    """Prevents feeding [0, 1] pixels to a tokenizer trained on [-1, 1]. By hand: mean(0, 1, 1, 1) = 0.75 -> 0.5."""
    unit = torch.tensor([[0.0, 1.0], [1.0, 1.0]]).expand(1, 3, 2, 2)
    assert signed_pixels(unit, 1)[0, 0].item() == 0.5
    assert signed_pixels(unit)[0, 0].tolist() == [[-1.0, 1.0], [1.0, 1.0]]


# ---- training


def test_training_learns_and_reports(tmp_path: Path) -> None:
    """Prevents a loop that runs and learns nothing, and metrics without the two codebook numbers."""
    report = train_tokenizer(_pictures(), replace(SHORT, steps=60, learning_rate=3e-3), tmp_path, _pictures(4))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["reconstruction"] < 0.8 * rows[0]["reconstruction"]
    assert len(rows[-1]["usage"]) == len(rows[-1]["perplexity"]) == 2
    assert report.held_out is not None and report.held_out.n_pictures == 4
    assert json.loads((tmp_path / "report.json").read_text())["trained"]["psnr_db"] == report.trained.psnr_db
    assert MGVQ.load(tmp_path).settings.groups == 2


def test_a_run_that_starts_from_an_earlier_tokenizer_begins_with_its_weights(tmp_path: Path) -> None:
    """Prevents `start_from` from being accepted and ignored. A learning rate of 0 keeps the loaded weights."""
    train_tokenizer(_pictures(), SHORT, tmp_path / "first")
    still = replace(SHORT, start_from=str(tmp_path / "first"), learning_rate=0.0, weight_decay=0.0, steps=1)
    train_tokenizer(_pictures(), still, tmp_path / "second")
    first, second = MGVQ.load(tmp_path / "first"), MGVQ.load(tmp_path / "second")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.slow
def test_a_run_killed_with_sigkill_and_resumed_ends_with_the_same_weights_and_metrics(tmp_path: Path) -> None:
    """Prevents a resume that repeats or skips a batch, or loses optimizer state or the dead-code randomness."""
    train_tokenizer(_pictures(), replace(SHORT, steps=20), tmp_path / "whole")
    program = (
        "import sys; from dataclasses import replace; from tests.quantizers import test_mgvq as t;"
        "t.train_tokenizer(t._pictures(), replace(t.SHORT, steps=20), sys.argv[1])"
    )
    target = "htc_vlm.train.train_quantizer:_train_step"
    processes.killed_at(target, 12, program, str(tmp_path / "killed"), path=Path(__file__).parents[2])
    report = train_tokenizer(_pictures(), replace(SHORT, steps=20), tmp_path / "killed")
    assert report.resumed_at == 8  # a checkpoint every 4 steps; the twelfth did not end
    whole, killed = MGVQ.load(tmp_path / "whole").state_dict(), MGVQ.load(tmp_path / "killed").state_dict()
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "killed/metrics.jsonl").read_text()


def test_a_torn_metrics_line_after_a_kill_is_dropped(tmp_path: Path) -> None:
    """Prevents half a JSON line in the middle of the metrics of a resumed run."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6, "lo')
    training._keep_metrics_until(path, 2)
    assert path.read_text() == '{"step": 2}\n'


def test_a_checkpoint_of_other_settings_or_pictures_is_refused(tmp_path: Path) -> None:
    """Prevents continuing someone else's run in a reused folder."""
    train_tokenizer(_pictures(), SHORT, tmp_path)
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
        train_tokenizer(_pictures(), replace(SHORT, seed=1), tmp_path)
    with pytest.raises(ValueError, match="pictures"):
        train_tokenizer(_pictures(13), SHORT, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    """Prevents NaN weights from replacing the last good checkpoint."""
    with pytest.raises(ValueError, match="lower learning_rate"):
        train_tokenizer(_pictures(), replace(SHORT, learning_rate=1e30, warmup_steps=0, checkpoint_every=1), tmp_path)
    saved = torch.load(tmp_path / "training.pt", weights_only=True)
    assert saved["step"] >= 1


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (np.zeros((0, 32, 32, 3), np.uint8), "empty"),
        (np.zeros((2, 32, 32, 3), np.float32), "uint8"),
        (np.zeros((2, 3, 32, 32), np.uint8), "uint8"),
        (np.zeros((2, 8, 8, 3), np.uint8), "crop 16 is larger"),
    ],
)
def test_pictures_that_cannot_be_trained_on_are_refused(tmp_path: Path, pictures: np.ndarray, message: str) -> None:
    """Prevents a run over nothing that exits successfully."""
    with pytest.raises(ValueError, match=message):
        train_tokenizer(pictures, SHORT, tmp_path)


def test_no_pictures_to_stack_is_an_error() -> None:
    """Prevents an empty split from surfacing as numpy's message about stacking."""
    with pytest.raises(ValueError, match="empty"):
        stack_pictures([], 16)


def test_training_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    """Prevents tokenizer training from changing what a caller's later random numbers are."""
    before = torch.get_rng_state()
    train_tokenizer(_pictures(), replace(SHORT, steps=2), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
