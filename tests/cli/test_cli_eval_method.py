"""`htc-vlm eval --method`: a method applied to a LLaVA checkpoint while a benchmark's own files are asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from htc_vlm.cli.eval import run

from .. import tinies
from ..eval import miniatures


@pytest.mark.parametrize(
    "method",
    [["--method", "fastv", "--budget", "8"], ["--method", '{"name": "visionzip", "n_dominant": 3, "n_contextual": 1}']],
    ids=["inside the LLM", "reads the tower"],
)
def test_a_method_is_applied_and_recorded(method: list[str], tmp_path: Path) -> None:
    """Without it no official benchmark could be asked of FastV; one that reads the tower needs pixels, not features."""
    llava = tinies.save_llava(tmp_path / "llava")
    miniatures.gqa(tmp_path / "data")
    common = [str(llava), "--task", "gqa", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    assert run([*common, *method]) == 0
    result = json.loads((tmp_path / "out" / "gqa-testdev_balanced" / "result.json").read_text())
    assert result["config"]["model"]["method"]["name"] in method[1] and result["n_questions"] == 12
    assert result["config"]["model"]["method"] != {"name": "fastv"}  # the budget became settings


def test_a_budget_without_a_method_is_refused(tmp_path: Path) -> None:
    """It would be ignored, and a full model reported as a compressed one."""
    with pytest.raises(ValueError, match="name one, e.g. --method fastv"):
        run([str(tinies.save_llava(tmp_path / "llava")), "--task", "gqa", "--data", str(tmp_path), "--budget", "8"])
