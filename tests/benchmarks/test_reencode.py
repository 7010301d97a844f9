"""benchmarks/reencode.py: equal answers both ways, pictures counted, ratios by hand."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from htc_vlm.eval.task import Item
from htc_vlm.model.answering import Answerer

from .. import tiny_runs as tiny

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("script_reencode", REPO / "benchmarks" / "reencode.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_ratios_by_hand(script: ModuleType) -> None:
    """From the cache 1 + 3 seconds, again each time 9 + 3: a ratio of 3; of asking alone, 4."""
    found = {
        "from_cache": [script.Timed(["a"], 0.5, 1.5, 2), script.Timed(["b"], 0.5, 1.5, 1)],
        "reencoded": [script.Timed(["a"], 4.0, 1.0, 20), script.Timed(["b"], 5.0, 2.0, 10)],
    }
    out = script.summary(found)
    assert out["ratios"] == {"reencoded_vs_from_cache": 3.0, "reencoded_vs_asking_alone": 4.0}
    assert out["seconds"]["reencoded"] == {"encode_s": 9.0, "ask_s": 3.0, "pictures_encoded": 30}


def test_both_ways_ask_the_same_and_only_one_encodes_again(script: ModuleType) -> None:
    """Two pictures with two questions each: two encodings against four."""
    items = [
        Item(f"q{i}", f"p{i // 2}", partial(tiny.noise, i // 2), tiny.QUESTIONS[i % 2], None) for i in range(4)
    ]  # fmt: skip
    found = script.compare(Answerer(*tiny.loaded(tiny.HTC)), items, batch_size=4, max_new_tokens=3)
    assert found["from_cache"][0].answers == found["reencoded"][0].answers and len(found["reencoded"][0].answers) == 4
    assert [found[way][0].n_encoded for way in ("from_cache", "reencoded")] == [2, 4]


def test_times_of_different_work_are_refused(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ratio between two runs that do not answer alike compares nothing."""
    monkeypatch.setattr(script, "timed", lambda answerer, asks, n: script.Timed([str(len(asks))], 1.0, 1.0, len(asks)))
    items = [Item(f"q{i}", "p", partial(tiny.noise, 0), "what ?", None) for i in range(2)]
    with pytest.raises(ValueError, match="batch 0 is answered differently"):
        script.compare(None, items, 2, 1)
