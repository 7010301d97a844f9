"""htc-vlm serve: refusals before anything is loaded, and a real process that is asked and ended."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import htc_vlm_cli as cli


def test_another_host_needs_a_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.0.0.0 without a token gives every machine of the network a model and a store."""
    monkeypatch.delenv("HTC_VLM_TOKEN", raising=False)
    assert cli.main(["serve", "--store", str(tmp_path / "album"), "--host", "0.0.0.0"]) == 2
    assert "HTC_VLM_TOKEN" in capsys.readouterr().err
    assert not (tmp_path / "album").exists()


def test_limits_must_be_possible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--store", str(tmp_path / "album"), "--max-batch", "0"]) == 2
    assert "max_batch is 0" in capsys.readouterr().err


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=60) as response:
        return json.load(response)


@pytest.mark.slow
def test_a_server_starts_answers_and_finishes_what_runs(tmp_path: Path) -> None:
    """SIGTERM during a question: the answer still comes, and the exit code is 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "import sys, htc_vlm_cli; sys.exit(htc_vlm_cli.main())", "serve", "--wait-ms", "1500"]
    command += ["--store", str(tmp_path / "album"), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        assert any(f"http://127.0.0.1:{port}/ is the page" in line.decode() for line in process.stderr)
        while True:
            try:
                assert get(f"http://127.0.0.1:{port}/health")["status"] == "ok"
                break
            except OSError:
                time.sleep(0.1)
        body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "is there a cat ?"}]})
        ask = (
            "import sys, urllib.request as u; "
            "r = u.Request(sys.argv[1], sys.argv[2].encode(), {'Content-Type': 'application/json'}); print(u.urlopen(r).status)"
        )
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        asked = subprocess.Popen([sys.executable, "-c", ask, url, body], stdout=subprocess.PIPE)
        while get(f"http://127.0.0.1:{port}/health")["waiting"] == 0:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert asked.communicate(timeout=60)[0].strip() == b"200"
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
