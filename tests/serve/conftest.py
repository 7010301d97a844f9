"""A server on the shipped tiny model."""

from __future__ import annotations

import base64
import functools
import io
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from htc_vlm import load
from htc_vlm.model.answering import Answerer
from htc_vlm.serve.app import make_app
from htc_vlm.store import ImageStore
from htc_vlm.tiny import pictograms

QUESTION = "what is at the top left ?"


@functools.cache
def tiny() -> tuple[Any, Any]:
    return load("tiny")


def scene(number: int) -> Image.Image:
    """A test scene of the pictograms."""
    return pictograms.picture(f"test/{number}")


def png(number: int) -> bytes:
    """The same as a file."""
    out = io.BytesIO()
    scene(number).save(out, "png")
    return out.getvalue()


def data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def ask(question: str, *urls: str, **options: Any) -> dict[str, Any]:
    """The body of a chat request."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*images, {"type": "text", "text": question}]
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **options}


def choices(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def text(response: Any) -> str:
    return choices(response)[0]["message"]["content"]


class Server(TestClient):
    """A test client that also reaches into the server."""

    def __init__(self, loaded: tuple[Any, Any] | None = None, method: Any = None, **options: Any) -> None:
        model, processor = loaded or tiny()
        self.folder = tempfile.TemporaryDirectory(prefix="htc-vlm-serve-")
        self.store = ImageStore.open(self.folder.name, model, processor, maps=method is None, method=method)
        app = make_app(model, processor, self.store, "tiny", **options)
        super().__init__(app, base_url="http://127.0.0.1:8000")
        self.server = app.state.server

    def chat(self, question: str, *urls: str, **options: Any) -> Any:
        return self.post("/v1/chat/completions", json=ask(question, *urls, **options))

    def keep(self, number: int, **params: str) -> str:
        """Adds a scene to the store; `htc:ID`."""
        response = self.post("/v1/images", content=png(number), headers={"Content-Type": "image/png"}, params=params)
        assert response.status_code == 200, response.text
        return "htc:" + response.json()["id"]

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split()[0] == f"htc_vlm_{name}")

    @contextmanager
    def held(self) -> Iterator[None]:
        """The model's thread does nothing inside, so that rows pile up."""
        begun, go_on = threading.Event(), threading.Event()

        def wait(items: list[Any]) -> list[Any]:
            begun.set()
            go_on.wait(30)
            return items

        self.portal.start_task_soon(self.server.engine.together, wait, None)
        assert begun.wait(30)
        try:
            yield
        finally:
            go_on.set()

    def wait_for_rows(self, n_rows: int) -> None:
        eventually(lambda: self.server.engine.n_waiting == n_rows)


@contextmanager
def listening(server: Server) -> Iterator[str]:
    """The address of a server on a free port of this machine, for clients that need sockets."""
    import uvicorn

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = uvicorn.Server(uvicorn.Config(server.app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=one.run)
    thread.start()
    eventually(lambda: one.started)
    yield f"http://127.0.0.1:{port}"
    one.should_exit = True
    thread.join(600)


def eventually(holds: Any, seconds: float = 600) -> None:
    """Fails unless `holds()` becomes true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def client() -> Iterator[Server]:
    with Server() as one:
        yield one


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(*tiny())
