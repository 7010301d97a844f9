"""Clients that go away, and the end of the server."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from htc_vlm.serve.rows import Row

from .conftest import QUESTION, Server, ask, eventually, text


def scope_of(body: bytes) -> dict[str, Any]:
    headers = [(b"host", b"127.0.0.1:8000"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    return {
        "type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/chat/completions", "query_string": b"",
        "raw_path": b"/v1/chat/completions", "headers": headers, "scheme": "http", "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 1), "root_path": "", "asgi": {"version": "3.0", "spec_version": "2.3"},
    }  # fmt: skip


async def ask_and_go(app: Any, gone: asyncio.Event, sent: list[Any], **options: Any) -> None:
    """A request as uvicorn hands it on, whose client goes away at `gone`."""
    body = json.dumps(ask(QUESTION, **options)).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope_of(body), receive, send)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_who_hangs_up_while_waiting_frees_the_row(client: Server, is_streamed: bool) -> None:
    """The row never runs; the next in the queue does."""
    before = client.metric("hang_ups_total"), client.metric("completion_tokens_total")

    async def scenario() -> list[Any]:
        gone, sent = asyncio.Event(), []
        task = asyncio.create_task(ask_and_go(client.app, gone, sent, stream=is_streamed))
        while client.server.engine.n_waiting == 0:
            await asyncio.sleep(0.005)
        gone.set()
        await asyncio.wait_for(task, 10)
        return sent

    with client.held():
        client.portal.call(scenario)
    assert text(client.chat(QUESTION, max_tokens=1))
    assert client.metric("hang_ups_total") == before[0] + 1
    assert client.metric("completion_tokens_total") == before[1] + 1


def test_who_hangs_up_in_the_middle_ends_the_row(client: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that would go on for 400 tokens stops at the next step, and with it the batch."""
    monkeypatch.setattr(client.server.engine, "_ends", frozenset())
    monkeypatch.setattr(client.server.engine._config, "eos_token_id", None)
    rows: list[Row] = []
    submit = client.server.engine.submit
    monkeypatch.setattr(client.server.engine, "submit", lambda new: (rows.extend(new), submit(new)))

    async def scenario() -> None:
        gone = asyncio.Event()
        task = asyncio.create_task(ask_and_go(client.app, gone, [], stream=True, max_tokens=400))
        while not rows or rows[0].n_tokens < 2:
            await asyncio.sleep(0.002)
        gone.set()
        await asyncio.wait_for(task, 10)

    client.portal.call(scenario)
    eventually(lambda: rows[0].is_done)
    assert 2 <= rows[0].n_tokens < 400


def test_the_end_finishes_what_waits() -> None:
    """Shutdown (SIGTERM) while three rows wait: all are answered."""
    ending = Server()
    engine = ending.server.engine
    with ThreadPoolExecutor(4) as pool, ending:
        with ending.held():
            answers = [pool.submit(ending.chat, QUESTION, max_tokens=1) for _ in range(3)]
            ending.wait_for_rows(3)
            stopped = pool.submit(ending.portal.call, engine.stop)
            eventually(lambda: engine._is_stopping)
        assert all(text(one.result()) for one in answers)
        stopped.result()
        assert not engine.is_alive
