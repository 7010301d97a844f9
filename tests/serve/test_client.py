"""The official `openai` client against a real server: the lines that docs/serving.md shows, streams and errors."""

from __future__ import annotations

import asyncio
import io
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .conftest import QUESTION, Server, listening, scene

if TYPE_CHECKING:
    import openai

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with listening(Server()) as one:
        yield one


@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_the_lines_of_the_docs_run(
    page: str, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a reader would paste them, from the root of a checkout. The picture is one cached token."""
    text = (REPO / page).read_text(encoding="utf-8")
    (block,) = (one for one in re.findall(r"```python\n(.*?)```", text, re.S) if "http://127.0.0.1:8000" in one)
    monkeypatch.chdir(REPO)
    exec(compile(block.replace("http://127.0.0.1:8000", address), page, "exec"), {})
    assert re.fullmatch(r"\w+ 1\n", capsys.readouterr().out)


def test_several_clients_stream_at_once(address: str, tmp_path: Path) -> None:
    """Each stream says what its picture's answer says in one piece; ids work, and unknown ones are NotFoundError."""
    import openai  # takes two seconds, so not in every process that collects tests

    keys = [add(address, number) for number in range(4)]

    async def streamed(client: openai.AsyncOpenAI, key: str) -> str:
        content = [{"type": "image_url", "image_url": {"url": f"htc:{key}"}}, {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": content}]
        whole = await client.chat.completions.create(model="tiny", messages=messages)  # type: ignore[call-overload]
        stream = await client.chat.completions.create(model="tiny", messages=messages, stream=True)  # type: ignore[call-overload]
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(pieces) == whole.choices[0].message.content
        return "".join(pieces)

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.NotFoundError, match="no image"):
                await streamed(client, "0" * 64)
            assert [one.id async for one in await client.models.list()] == ["tiny"]
            return await asyncio.gather(*(streamed(client, key) for key in keys))

    assert len(set(asyncio.run(all_at_once()))) > 1


def add(address: str, number: int) -> str:
    """A scene into the store, by plain HTTP."""
    out = io.BytesIO()
    scene(number).save(out, "png")
    request = urllib.request.Request(f"{address}/v1/images", out.getvalue(), {"Content-Type": "image/png"})
    with urllib.request.urlopen(request, timeout=600) as response:
        return str(json.load(response)["id"])
