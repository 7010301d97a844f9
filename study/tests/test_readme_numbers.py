"""The README's numbers are those of the result files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_says_what_the_result_files_say() -> None:
    """A number typed by hand, or left behind by a newer result, would be found by nobody else."""
    done = subprocess.run(
        [sys.executable, "-m", "study.readme", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
