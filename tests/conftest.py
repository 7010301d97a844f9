"""Every test runs offline, on one torch thread, and without a display."""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports transformers, torch or matplotlib: they read these once. Not torch itself here: the process that only
# hands out the tests would wait for it before it starts the others.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", MPLBACKEND="Agg", OMP_NUM_THREADS="1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402

REPO = Path(__file__).resolve().parents[1]
LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


def pytest_collection_finish() -> None:
    """What the imports made stays: else each full collection walks through it, and Trainer asks for one after each run."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_configurations_in_logs() -> Iterator[None]:
    """transformers writes every configuration that it reads as JSON, for a line of its log that nobody sees."""
    read = sys.modules.get("transformers.configuration_utils")  # tests of files alone do without it
    with pytest.MonkeyPatch.context() as patch:
        if read is not None:
            patch.setattr(read.PreTrainedConfig, "__repr__", object.__repr__)
        yield


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of inputs and outputs recorded from the official implementations."""
    return REPO / "tests" / "golden"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for the network fails at once, also on a machine that has one."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and not str(address[0]).startswith(LOOPBACK):
            raise RuntimeError(f"a test tried to connect to {address[0]}; tests run offline")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
