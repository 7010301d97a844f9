"""benchmarks/first_token.py: which rows it times, what it counts, numbers by hand."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
TASKS = {
    "scenes": {"task": "pictograms", "split": "test", "limit": 3000},
    "more": {"task": "pictograms", "split": "test-unseen"},
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("script_first_token", REPO / "benchmarks" / "first_token.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_rows_of_all_tables_once(script: ModuleType) -> None:
    """A row that shows another one's results is that row; each is asked 32 questions of one task."""
    rows = script.rows_of(REPO / "study" / "experiments")
    assert "table1/upper" in rows and "table2/fastv-192" in rows and "table2/upper" not in rows
    for one in rows.values():
        (task,) = one.tasks.values()
        assert one.same_as is None and task["limit"] == 32


def test_median_and_quartiles_without_the_first_round(script: ModuleType) -> None:
    """9 s is the warm-up; of 1, 2, 3, 4, 5 s the median is 3 and the quartiles 2 and 4."""
    seconds, order = {"a": iter([9, 5, 1, 3, 2, 4]), "b": iter([9, 1, 1, 1, 1, 1])}, []

    def timer(name: str):  # type: ignore[no-untyped-def]
        return lambda: (order.append(name), float(next(seconds[name])))[1]

    found = script.measure({name: timer(name) for name in seconds}, 5)
    assert found["a"] == {"ms": 3000.0, "low": 2000.0, "high": 4000.0} and found["b"]["ms"] == 1000.0
    assert order == ["a", "b"] * 6  # in turns
    with pytest.raises(ValueError, match="--rounds is 1; quartiles need at least 2"):
        script.measure({}, 1)


def test_methods_of_every_sort_are_timed_and_a_refused_one_is_left_out(script: ModuleType, tmp_path: Path) -> None:
    """An upper bound, a bottleneck that is trained, one applied inside the language model; VisionZip needs a class token."""
    rows = {
        "upper": {"start": "tiny-upper"},
        "voco": {"start": "tiny-upper", "stage": "compress", "compressor": {"name": "voco"}},
        "fastv": {"start": "tiny-upper", "method": {"name": "fastv", "share": 192}},
        "visionzip": {"start": "tiny-upper", "method": {"name": "visionzip", "share": 192}},
        "again": {"same_as": "table9/voco"},
    }
    for name, content in rows.items():
        file = tmp_path / "experiments" / "table9" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(content))
    (tmp_path / "experiments" / "defaults.yaml").write_text(yaml.safe_dump({"tasks": TASKS}))
    table = {"table9": {"title": "T", "rows": list(rows), "columns": {"all": ["scenes/*"]}}}
    (tmp_path / "experiments" / "tables.yaml").write_text(yaml.safe_dump(table))
    output = tmp_path / "first_token.json"
    words = ["--experiments", str(tmp_path / "experiments"), "--data", str(tmp_path), "--device", "cpu", "--rounds", "2"]
    assert script.main([*words, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert set(found["rows"]) == {"table9/upper", "table9/voco", "table9/fastv"}
    assert all(0 < one["low"] <= one["ms"] <= one["high"] for one in found["rows"].values())
    assert found["n_questions"] == 32 and found["rounds"] == 2 and found["device"] == "cpu" and len(found["commit"]) == 40
