"""A method, a benchmark and a quantizer are one new file each: in a copy of the source, nothing else needs an edit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from . import processes

REPO = Path(__file__).resolve().parents[1]
LOOK_AT_ALL = (  # every test that looks at all methods, benchmarks or quantizers, beside the contract
    "tests/test_layers.py", "tests/test_docs.py", "tests/test_paper_map.py", "tests/test_registry.py", "tests/cli/test_cost.py",
    "tests/benchmarks/test_methods.py", "tests/quantizers/test_second_quantizer.py", "tests/eval/test_official_tasks.py",
    "study/tests/test_pages.py",
)  # fmt: skip
QUANTIZER = '''"""The mean colour of each block, rounded to so many levels.

Source:  nothing.
Differs: nothing known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import avg_pool2d

from htc_vlm.quantizers.base import QUANTIZERS, Quantizer


@dataclass(frozen=True)
class Code:
    latents: Tensor
    quantized: Tensor


@QUANTIZERS.register("colour_means")
class ColourMeans(Quantizer):
    name = "colour_means"

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    @classmethod
    def pixels_per_cell(cls, **options: Any) -> int:
        return int(options["block"])

    @property
    def channels(self) -> int:
        return 3

    def encode(self, pixels: Tensor) -> Code:
        latents = avg_pool2d(pixels, self.block)
        return Code(latents, (8 * latents).round() / 8)
'''
KNOWN = """
from htc_vlm import compressors
from htc_vlm.eval.task import make_task
from htc_vlm.quantizers import QUANTIZERS
assert "border_drop" in compressors.names() and make_task("toybench").name == "toybench"
assert compressors.build("htc", quantizer={"name": "colour_means", "block": 8, "image_size": 32}).has_code
"""


def new_files() -> dict[str, str]:
    """Path -> text: a copy of `random_drop` and of `gqa` under other names, and a quantizer."""
    package = REPO / "src" / "htc_vlm"
    method = (package / "compressors" / "random_drop.py").read_text(encoding="utf-8")
    task = (package / "eval" / "tasks" / "gqa.py").read_text(encoding="utf-8")
    return {
        "compressors/border_drop.py": method.replace("random_drop", "border_drop").replace("RandomDrop", "BorderDrop"),
        "eval/tasks/toybench.py": task.replace('"gqa"', '"toybench"').replace("class Gqa", "class Toybench"),
        "quantizers/colour_means.py": QUANTIZER,
    }


@pytest.mark.slow
def test_a_new_file_is_found_by_all_and_needs_no_other_edit(tmp_path: Path) -> None:
    """Lists of names elsewhere: a method is missing from a table, or a test of something else fails. Pages are rebuilt."""
    copy = tmp_path / "copy"
    skipped = shutil.ignore_patterns(".git", ".venv", "build", "dist", "runs", "__pycache__", "*_cache")
    shutil.copytree(REPO, copy, ignore=skipped)
    for path, text in new_files().items():
        (copy / "src" / "htc_vlm" / path).write_text(text, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(copy / "src"), str(copy)])}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *words]
        return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=processes.PATIENCE_S)

    known = run("-c", KNOWN)
    assert known.returncode == 0, known.stderr
    checked = run("-m", "study.pages", "--check")
    assert checked.returncode == 1 and "README.md" in checked.stderr and "`make table` rebuilds" in checked.stderr
    assert run("-m", "study.pages").returncode == 0
    readme = (copy / "README.md").read_text(encoding="utf-8")
    assert "[`border_drop`](src/htc_vlm/compressors/border_drop.py) | control | before LLM | all 7 | yes |" in readme
    tests = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *LOOK_AT_ALL)
    assert tests.returncode == 0, tests.stdout[-3000:]
    contract = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/contract", "-k", "border_drop")
    assert contract.returncode == 0, contract.stdout[-3000:]
