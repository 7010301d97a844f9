"""What is refused, and how: always {"error": {"message", "type", "code"}}, and nobody else suffers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from htc_vlm.serve.guard import check_origin
from htc_vlm.serve.limits import Limits

from .conftest import QUESTION, Server, ask, data_uri, eventually, png, text

UNKNOWN = "htc:" + "0" * 64
CHAT = "/v1/chat/completions"


def error(response: Any, status: int, code: str) -> str:
    """The message."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"} and set(response.json()["error"]) == {"message", "type", "code"}
    assert response.json()["error"]["code"] == code
    return response.json()["error"]["message"]


def broken_png() -> str:
    return data_uri(png(0)[:300])


def thin_png() -> str:
    out = io.BytesIO()
    Image.new("RGB", (60_000, 1)).save(out, "png")
    return data_uri(out.getvalue())


@pytest.mark.parametrize(
    ("url", "status", "code", "words"),
    [
        (UNKNOWN, 404, "image_not_found", "POST /v1/images"),
        ("htc:../../etc/passwd", 404, "image_not_found", "no image"),
        ("https://example.org/a.png", 400, "invalid_image", "fetches nothing"),
        ("file:///etc/passwd", 400, "invalid_image", "fetches nothing"),
        ("data:image/png;base64,@@@", 400, "invalid_image", "not base64"),
        ("data:image/png;base64,", 400, "invalid_image", "empty"),
        ("data:image/png;base64," + base64.b64encode(b"hello").decode(), 400, "invalid_image", "not a picture"),
        (broken_png, 400, "invalid_image", "damaged"),
        (thin_png, 400, "invalid_image", "60000 x 1"),
    ],
)
def test_a_picture_that_cannot_be_used_is_named(client: Server, url: Any, status: int, code: str, words: str) -> None:
    assert words in error(client.chat(QUESTION, url if isinstance(url, str) else url()), status, code)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"model": "gpt-5"}, "model_not_found", "'tiny'"),
        ({"messages": []}, "invalid_request", "messages"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "invalid_request", "messages.0.role"),
        ({"messages": [{"role": "system", "content": "hi"}]}, "invalid_request", "known roles"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "invalid_request", "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": UNKNOWN}]}]}, "invalid_request",
         "messages.0.content.0.image_url.image_url: Input should be a valid dict"),
        ({"messages": [{"role": "user", "content": " "}]}, "invalid_request", "nothing is asked"),
        ({"messages": [{"role": "user", "content": []}]}, "invalid_request", "nothing is asked"),
        ({"messages": [{"role": "user", "content": "\ud800 cat"}]}, "invalid_request", "half a letter"),
        ({"max_tokens": 0}, "invalid_request", "max_tokens"),
        ({"max_tokens": 100_000}, "invalid_request", "at most"),
        ({"temperature": -1}, "invalid_request", "temperature"),
        ({"top_p": -0.1}, "invalid_request", "top_p"),
        ({"n": 1000}, "invalid_request", "at most"),
        ({"n": True}, "invalid_request", "n: "),
        ({"max_tokens": "4"}, "invalid_request", "max_tokens: "),
        ({"temperature": False}, "invalid_request", "temperature: "),
        ({"stream": "yes"}, "invalid_request", "stream: "),
        ({"stop": ""}, "invalid_request", "stop"),
        ({"stop": [1]}, "invalid_request", "stop.0: "),
        ({"stop": "\udc00"}, "invalid_request", "half a letter"),
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"frequency_penalty": 0.5}, "unsupported_parameter", "frequency_penalty"),
        ({"logprobs": True}, "unsupported_parameter", "logprobs"),
    ],
)
def test_a_request_that_cannot_be_done_is_refused(client: Server, change: dict[str, Any], code: str, words: str) -> None:
    """An option that is silently ignored gives an answer to another request."""
    status = 404 if code == "model_not_found" else 400
    body = ask(QUESTION, **change) if "messages" not in change else {"model": "tiny", **change}
    response = client.post(CHAT, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert words in error(response, status, code)


def test_options_at_their_neutral_values_are_fine(client: Server) -> None:
    """Clients send them all the time."""
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False, "response_format": {"type": "text"},
               "function_call": "none"}  # fmt: skip
    assert text(client.chat(QUESTION, **neutral, top_logprobs=None, user="me"))


@pytest.mark.parametrize("mark", ["<image>", "<voco>"])
def test_words_cannot_stand_for_pictures(client: Server, mark: str) -> None:
    """A placeholder in a question would take another row's picture, or shift those of the whole batch."""
    assert mark in error(client.chat(f"{mark} {QUESTION}", client.keep(0)), 400, "invalid_request")


def test_a_prompt_longer_than_the_context_is_refused(client: Server) -> None:
    error(client.chat("cat " * 2100), 400, "context_length_exceeded")
    error(client.chat("cat " * 2000, max_tokens=60), 400, "context_length_exceeded")


def test_bad_json_and_unknown_routes(client: Server) -> None:
    for body in (b"{", b"[" * 100_000, b'{"model": "\xff"}', b'{"n": ' + b"9" * 5000 + b"}", b"null"):
        error(client.post(CHAT, content=body, headers={"Content-Type": "application/json"}), 400, "invalid_request")
    error(client.get("/v1/nothing"), 404, "no_such_route")
    error(client.get(CHAT), 405, "no_such_route")
    error(client.get("/docs"), 404, "no_such_route")  # it would load scripts of other hosts


def test_a_batch_survives_a_row_that_fails(client: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a failed batch are tried alone; only the bad one is told."""
    engine = client.server.engine
    generate = engine._generate

    def picky(rows: list[Any]) -> None:
        if any(row.sampling.max_tokens == 3 for row in rows):
            raise RuntimeError("out of something")
        generate(rows)

    monkeypatch.setattr(engine, "_generate", picky)
    with ThreadPoolExecutor(3) as pool, client.held():
        answers = [pool.submit(client.chat, QUESTION, max_tokens=n) for n in (2, 3, 4)]
        client.wait_for_rows(3)
    first, second, third = (one.result() for one in answers)
    assert text(first) and text(third)
    assert "out of something" not in error(second, 500, "internal_error"), "what went wrong inside is for the log"


def test_a_full_queue_says_when_to_come_back(client: Server) -> None:
    small = Server(limits=Limits(max_queue=2))
    with small, ThreadPoolExecutor(2) as pool:
        with small.held():
            answers = [pool.submit(small.chat, QUESTION) for _ in range(2)]
            small.wait_for_rows(2)
            refused = small.chat(QUESTION)
            error(refused, 429, "busy")
            assert int(refused.headers["Retry-After"]) >= 1
        assert [text(one.result()) for one in answers]
        assert text(small.chat(QUESTION)), "there is room again"


def test_bodies_are_limited_whatever_their_headers_say() -> None:
    with Server(limits=Limits(max_body=20_000)) as small:

        def parts() -> Iterator[bytes]:
            yield from [b"x" * 8192] * 3

        png_type = {"Content-Type": "image/png"}
        assert "20,000" in error(small.post("/v1/images", content=b"x" * 20_001, headers=png_type), 413, "body_too_large")
        error(small.post("/v1/images", content=parts(), headers=png_type), 413, "body_too_large")
        assert text(small.chat(QUESTION))


def test_pictures_are_limited_before_they_are_decoded() -> None:
    with Server(limits=Limits(max_pixels=10_000, max_images=2)) as small:
        assert "10,000" in error(small.chat(QUESTION, data_uri(png(0))), 400, "invalid_image")
        error(small.chat(QUESTION, UNKNOWN, UNKNOWN, UNKNOWN), 400, "too_many_images")


def test_a_token_guards_everything_but_the_page_and_health() -> None:
    with Server(token="sésame") as guarded:
        for path in ("/v1/models", "/v1/images", "/metrics", "/v1/nothing", "/openapi.json"):
            error(guarded.get(path), 401, "invalid_api_key")
            error(guarded.get(path, headers={"Authorization": "Bearer sesame"}), 401, "invalid_api_key")
        error(guarded.post(CHAT, json=ask(QUESTION)), 401, "invalid_api_key")
        right = {"Authorization": "Bearer sésame".encode()}
        assert guarded.get("/v1/models", headers=right).status_code == 200
        assert guarded.get("/").status_code == guarded.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Host": "evil.example"}, "wrong_host"),
        ({"Origin": "http://evil.example"}, "wrong_origin"),
        ({"Origin": "null"}, "wrong_origin"),
    ],
)
def test_pages_of_other_sites_cannot_ask(client: Server, headers: dict[str, str], code: str) -> None:
    """A browser on this machine sends what any page tells it to, also to a name that was pointed here (DNS rebinding)."""
    error(client.post(CHAT, json=ask(QUESTION), headers=headers), 403, code)


def test_a_hosts_name_may_be_written_large() -> None:
    check_origin("LOCALHOST:8000", "http://localhost:8000", only_local=True)


def test_a_form_of_another_site_is_no_request(client: Server) -> None:
    """text/plain needs no preflight; it must not be read as JSON."""
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}]}'
    error(client.post(CHAT, content=body, headers={"Content-Type": "text/plain"}), 400, "invalid_request")
    error(client.post("/v1/images", content=png(0), headers={"Content-Type": "text/plain"}), 400, "invalid_request")


def test_a_dead_model_thread_is_503_for_those_who_wait_and_those_who_come() -> None:
    """A server that keeps its socket open and answers nothing is worse than one that is down."""
    doomed = Server(limits=Limits(max_batch=1))

    def die(rows: list[Any]) -> None:
        raise SystemExit

    with doomed, ThreadPoolExecutor(2) as pool:
        assert doomed.get("/health").json()["status"] == "ok"
        doomed.server.engine._generate = die  # type: ignore[method-assign]
        with doomed.held():
            waiting = [pool.submit(doomed.chat, QUESTION) for _ in range(2)]
            doomed.wait_for_rows(2)
        for one in waiting:
            error(one.result(), 503, "model_unavailable")
        eventually(lambda: doomed.get("/health").status_code == 503)
        error(doomed.chat(QUESTION), 503, "model_unavailable")
        error(doomed.post("/v1/images", content=png(0), headers={"Content-Type": "image/png"}), 503, "model_unavailable")
        assert doomed.metric("model_alive") == 0
