"""htc-vlm serve: refusals before anything is loaded, and a real process that is asked and ended."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

import htc_vlm_cli as cli
from htc_vlm.batch.steps import Settings, store_of
from htc_vlm.cli.serve import TOKEN

ROOT = Path(__file__).parents[2]


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


def test_where_nobody_can_listen_is_told_before_a_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Port 70000 was a traceback after loading; one that is taken, exit code 1 after "... is the page"."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = str(taken.getsockname()[1])
        for words, message in {
            ("--port", number): f"127.0.0.1:{number}: nobody can listen there",
            ("--port", "70000"): "--port is 70000; give a number of 1 to 65535",
            ("--grace", "-1"): "--grace is -1",
        }.items():
            assert cli.main(["serve", "--store", str(tmp_path / "album"), *words]) == 2
            captured = capsys.readouterr()
            assert message in captured.err and "is the page" not in captured.err, captured.err
    assert not (tmp_path / "album").exists()


def test_int2_without_levels_is_refused_before_a_store_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The server started, and every new picture was a 400 that blamed the client."""
    assert cli.main(["serve", "--store", str(tmp_path / "album"), "--dtype", "int2"]) == 2
    assert "begin the store with `htc-vlm store add" in capsys.readouterr().err and not (tmp_path / "album").exists()
    with pytest.raises(ValueError, match="int2 has no levels yet; begin the store with"):
        store_of(Settings("tiny", str(tmp_path / "album"), "int2"), None, None)


def test_the_commands_of_the_compose_file_in_the_docs_are_ours() -> None:
    """It was written without a run: a renamed option or folder would be found by whoever copies it."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    block = re.search(r"```yaml\n(# compose.yaml.*?)```", page, re.S)
    assert block is not None
    services = yaml.safe_load(block[1])["services"]
    assert set(services) == {"store", "batch", "server"}
    options: dict[str, Any] = {}
    for name, service in services.items():
        command, *words = shlex.split(service["command"])
        options[name] = importlib.import_module(f"htc_vlm.cli.{command}").parser().parse_args(words)
        mounted = [one.split(":")[1] for one in service["volumes"]]
        paths = [word for word in words if word.startswith("/")]
        assert paths and all(any(path.startswith(place) for place in mounted) for path in paths)
        assert set(service.get("depends_on", {})) <= set(services)
        dockerfile = service["build"]["dockerfile_inline"]
        extras = re.search(r"/src\[(.*?)\]", dockerfile)
        assert extras is not None and 'ENTRYPOINT ["htc-vlm"]' in dockerfile
        known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
        assert set(extras[1].split(",")) <= set(known)
    assert str(options["store"].store) == options["batch"].store == str(options["server"].store) == "/album"
    python, flag, code = shlex.split(services["server"]["healthcheck"]["test"])
    compile(code, "healthcheck", "exec")
    assert (python, flag) == ("python", "-c") and f":{options['server'].port}/health" in code
    assert services["server"]["ports"] == [f"127.0.0.1:8000:{options['server'].port}"]
    assert list(services["server"]["environment"]) == [TOKEN]  # the server refuses 0.0.0.0 without one


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=600) as response:
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
        assert asked.communicate(timeout=600)[0].strip() == b"200"
        assert process.wait(timeout=600) == 0
    finally:
        process.kill()
