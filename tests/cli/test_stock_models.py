"""The commands on a checkpoint of another family: a tiny LLaVA-NeXT with its own processor, saved to a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

import htc_vlm_cli
from htc_vlm import CompressedImages, load
from htc_vlm.testing.families import PINPOINTS, TEXT, VISION

QUESTION = "what is at the top left ?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("next")
    tokenizer = load("tiny-upper")[1].tokenizer
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=PINPOINTS
    )
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template="{% for m in messages %}<image>{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
        "{% endif %}{% endfor %}{% endfor %} ",
    )  # fmt: skip
    processor.save_pretrained(path)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**{**TEXT, "vocab_size": len(tokenizer)}),
        image_token_index=image_id, image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    torch.manual_seed(0)
    LlavaNextForConditionalGeneration(config).save_pretrained(path)
    Image.new("RGB", (40, 30), "red").save(path / "a.png")
    return path


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    code = htc_vlm_cli.main([str(word) for word in words])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_pictures_of_any_family_are_kept_and_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--save and --from needed a bottleneck; what is answered from the file is what is answered at once."""
    ask = ("ask", "--model", folder, "--json")
    method = ("--method", "divprune", "--budget", "8")
    code, out, err = run(capsys, *ask, *method, "--save", folder / "kept", folder / "a.png", QUESTION)
    assert code == 0, err
    kept = CompressedImages.load(folder / "kept")
    assert kept.prompt is not None and kept.prompt["method"] == {"name": "divprune", "budget": 8}
    code, again, _ = run(capsys, *ask, "--from", folder / "kept", QUESTION)
    assert code == 0
    first, second = (json.loads(text)["pictures"][0]["answers"] for text in (out, again))
    assert first == second
    code, _, _ = run(capsys, *ask, "--method", '{"name": "fastv", "n_keep": 8, "layer": 1}', folder / "a.png", QUESTION)
    assert code == 0
    code, _, err = run(capsys, *ask, "--method", "fastv", "--save", folder / "other", folder / "a.png", QUESTION)
    assert code == 2 and "chooses by the question" in err
    code, _, err = run(capsys, *ask, "--heatmap", folder / "map.png", folder / "a.png")
    assert code == 2 and "about a bottleneck" in err


def test_benchmarks_run_on_any_family(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """`eval MODEL --method ... --budget` took LLaVA only."""
    arguments = ("--task", "pictograms", "--limit", "2", "--output", tmp_path, "--method", "divprune", "--budget", "0.25")
    code, out, err = run(capsys, "eval", folder, *arguments)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["n_questions"] == 2
    settings = json.loads(next(tmp_path.glob("*/settings.json")).read_text(encoding="utf-8"))
    assert settings["model"]["method"] == {"name": "divprune", "budget": 0.25}
