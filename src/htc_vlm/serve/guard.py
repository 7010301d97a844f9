"""What stands before the routes: who may ask, how much may be sent, and how much at once."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from htc_vlm.serve.errors import Refusal, busy
from htc_vlm.serve.limits import Limits
from htc_vlm.serve.metrics import Metrics

OPEN = {"/", "/health"}  # the page holds nothing secret; it asks for the token itself
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def check_token(given: str, token: str | None) -> None:
    """Refusal 401 unless the Authorization header says `Bearer TOKEN`; compared in constant time."""
    sent = given.encode("latin-1")  # headers are bytes, which Starlette reads as Latin-1
    if token is not None and not hmac.compare_digest(sent, f"Bearer {token}".encode()):
        raise Refusal(401, "a wrong or no token; send the header `Authorization: Bearer TOKEN`", "invalid_api_key")


def check_origin(host: str, origin: str | None, only_local: bool) -> None:
    """Refusal 403 for what a page of another site makes a browser send, also by a name that it points at this machine.

    >>> check_origin("127.0.0.1:8000", "http://127.0.0.1:8000", only_local=True)
    >>> check_origin("evil.example:8000", None, only_local=True)
    Traceback (most recent call last):
    htc_vlm.serve.errors.Refusal: this server answers to localhost, not to 'evil.example:8000'
    """
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if only_local and name.lower() not in LOOPBACK:
        raise Refusal(403, f"this server answers to localhost, not to {host!r}", "wrong_host")
    if origin is not None and origin.split("://", 1)[-1].lower() != host.lower():
        raise Refusal(403, f"requests of pages of another site ({origin}) are refused", "wrong_origin")


class Guard:
    """ASGI middleware. Takes a request's body in, so that a limit holds whatever the headers say."""

    def __init__(self, app: Any, limits: Limits, metrics: Metrics, token: str | None, only_local: bool) -> None:
        self.app, self.limits, self.metrics, self.token, self.only_local = app, limits, metrics, token, only_local
        self._n_requests = self._n_bytes = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, n_held = "hung up", 0

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        def hold(n_bytes: int) -> None:
            nonlocal n_held
            if self._n_bytes + n_bytes > self.limits.max_bodies:
                raise busy(1, "too many large requests at once")
            n_held += n_bytes
            self._n_bytes += n_bytes

        self._n_requests += 1
        try:
            self._check(scope)
            body = await self._body(scope, receive, hold)
            if body is not None:
                await self.app(scope, _replay(body, receive), counted)
        except Refusal as refusal:
            response = JSONResponse(refusal.body(), refusal.status, {**refusal.headers, "Connection": "close"})
            await response(scope, receive, counted)
        finally:
            self._n_requests -= 1
            self._n_bytes -= n_held
            route = scope.get("route")
            self.metrics.requests.labels(getattr(route, "path", "other"), status).inc()

    def _check(self, scope: Any) -> None:
        headers = Headers(scope=scope)
        check_origin(headers.get("host", ""), headers.get("origin"), self.only_local)
        if scope["path"] not in OPEN:
            check_token(headers.get("authorization", ""), self.token)
        if self._n_requests > self.limits.max_requests:
            raise busy(1, f"{self.limits.max_requests} requests are being answered")

    async def _body(self, scope: Any, receive: Any, hold: Callable[[int], None]) -> bytes | None:
        """The body; None where the client went away. Refusal 413, 408 or 429."""
        too_large = Refusal(413, f"the body is larger than {self.limits.max_body:,} bytes", "body_too_large")
        promised = Headers(scope=scope).get("content-length", "")
        if promised.isdigit() and int(promised) > self.limits.max_body:
            raise too_large
        parts: list[bytes] = []
        n_bytes, end = 0, time.monotonic() + self.limits.body_seconds
        while True:
            try:
                message = await asyncio.wait_for(receive(), end - time.monotonic())
            except TimeoutError:
                raise Refusal(408, f"the body did not arrive in {self.limits.body_seconds} s", "timeout") from None
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            n_bytes += len(part)
            if n_bytes > self.limits.max_body:
                raise too_large
            hold(len(part))
            parts.append(part)
            if not message.get("more_body"):
                return b"".join(parts)


def _replay(body: bytes, receive: Any) -> Callable[[], Any]:
    """A `receive` that gives the whole body first, and then what really comes: the end of the connection."""
    left = [body]

    async def again() -> Any:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return again
