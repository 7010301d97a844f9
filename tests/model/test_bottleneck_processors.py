"""Checkpoints of other families in folders as the hub has them, with their own processors: convert, load, compress, ask."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

import htc_vlm
import htc_vlm_cli

from .. import stock_families

QUESTION = "what is at the top left ?"
QUICK = ("qwen3_vl", "internvl", "idefics3")
families = pytest.mark.parametrize(
    "family", [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in stock_families.PROCESSORS]
)
PICTURES = [Image.new("RGB", (40, 30), "red"), Image.effect_noise((30, 90), 80).convert("RGB")]


@families
def test_a_stock_folder_gets_a_bottleneck_and_answers_from_what_it_kept(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """convert, load, compress, ask; the same from a file; and as one asks with the pictures themselves."""
    folder, out = stock_families.save(family, tmp_path / "stock"), tmp_path / "out"
    code = htc_vlm_cli.main(["convert", str(folder), "--compressor", "voco", "--output", str(out)])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert json.loads(said.out)["cached_tokens"] == 1
    model, processor = htc_vlm.load(out)
    kept = htc_vlm.compress(model, processor, PICTURES)
    assert len(kept) == 2 and kept.n_bottleneck == 1
    kept.save(tmp_path / "kept")
    again = htc_vlm.CompressedImages.load(tmp_path / "kept")
    answers = htc_vlm.generate(model, processor, compressed=again, text=[QUESTION] * 2, max_new_tokens=3)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = [processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)] * 2
    inputs = processor(images=[[one] for one in PICTURES], text=text, return_tensors="pt", padding=True)
    prompt = processor(text=text, return_tensors="pt", padding=True)
    assert int((inputs["input_ids"] == model.config.bottleneck_token_id).sum()) == 2
    with torch.no_grad():
        whole = model(**inputs).logits
        over = model(**prompt, compressed=again).logits
    n_behind = len(processor.tokenizer(QUESTION, add_special_tokens=False)["input_ids"])
    torch.testing.assert_close(whole[:, -n_behind:], over[:, -n_behind:], atol=1e-4, rtol=0)
    mark = processor.image_token  # two pictures in one prompt, each read as it is read alone
    both = [f"what {mark} is at {mark} {QUESTION}"]
    with torch.no_grad():
        whole = model(**processor(images=PICTURES, text=both, return_tensors="pt")).logits
        over = model(**processor(text=both, return_tensors="pt"), compressed=again).logits
    torch.testing.assert_close(whole[:, -n_behind:], over[:, -n_behind:], atol=1e-4, rtol=0)
    new = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert [one.strip() for one in processor.tokenizer.batch_decode(new, skip_special_tokens=True)] == answers


def test_a_pipeline_finds_model_and_processor_by_the_folder(tmp_path: Path) -> None:
    """`import htc_vlm` is enough: the Auto classes ask the configuration."""
    folder = stock_families.save("qwen2_5_vl", tmp_path / "stock")
    htc_vlm_cli.main(["convert", str(folder), "--compressor", "voco", "--output", str(tmp_path / "out")])
    pipe = transformers.pipeline("image-text-to-text", model=str(tmp_path / "out"))
    assert type(pipe.model).__name__ == "HtcVlmQwen2_5_VLForConditionalGeneration"
    content = [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": QUESTION}]
    (said,) = pipe([{"role": "user", "content": content}], max_new_tokens=3, return_full_text=False)
    model, processor = htc_vlm.load(tmp_path / "out")
    kept = htc_vlm.compress(model, processor, PICTURES[:1])
    assert [said["generated_text"].strip()] == htc_vlm.generate(
        model, processor, compressed=kept, text=[QUESTION], max_new_tokens=3
    )
