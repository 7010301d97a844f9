"""The server's routes: chat completions, models, images, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from htc_vlm.applied.hf_compat import unwrapped
from htc_vlm.model.prefix_cache import own_bottleneck
from htc_vlm.serve.chat import Chat, Writer
from htc_vlm.serve.engine import Engine, refusal
from htc_vlm.serve.errors import Refusal
from htc_vlm.serve.guard import Guard
from htc_vlm.serve.limits import Limits
from htc_vlm.serve.metrics import Metrics
from htc_vlm.serve.pictures import Pictures, data_of
from htc_vlm.serve.schema import ChatRequest, ImageRequest
from htc_vlm.serve.stock import StockEngine, StockWriter
from htc_vlm.store import ImageStore
from htc_vlm.store.about import check_levels
from htc_vlm.store.encoding import NO_METHOD

routes = APIRouter()
PAGE = Path(__file__).parent / "page.html"
HUNG_UP = 499  # nobody reads this status; access logs show it


@dataclass
class Server:
    """What the routes use; at `request.app.state.server`."""

    engine: Engine
    pictures: Pictures
    writer: Writer
    model_name: str
    page: str
    page_policy: str


def make_app(
    model: Any,
    processor: Any,
    store: ImageStore,
    model_name: str,
    limits: Limits | None = None,
    token: str | None = None,
    only_local: bool = True,
) -> FastAPI:
    """The ASGI application; it closes the store at its end.

    store: opened with this model; with a method, where the model has no bottleneck. token: None lets everybody ask.
    only_local: refuse Host headers other than localhost's.
    """
    model = unwrapped(model)
    is_stock = not own_bottleneck(model)
    if is_stock and "prompt" not in store.about.recipe.parts:
        raise ValueError(f"model {model_name!r} has no bottleneck, and the store was not made by it; {NO_METHOD}")
    check_levels(store.path)
    limits, metrics = limits or Limits(), Metrics()
    engine = (StockEngine if is_stock else Engine)(model, processor, limits, metrics)
    pictures = Pictures(engine, store)
    page = PAGE.read_text(encoding="utf-8")

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.stop()
        await pictures.stop()

    app = FastAPI(title="htc-vlm", lifespan=life, docs_url=None, redoc_url=None)
    writer = (StockWriter if is_stock else Writer)(engine)
    app.state.server = Server(engine, pictures, writer, model_name, page, policy_of(page))
    app.include_router(routes)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _failed)
    app.add_middleware(Guard, limits=limits, metrics=metrics, token=token, only_local=only_local)
    return app


def policy_of(page: str) -> str:
    """The Content-Security-Policy under which a page runs its own script and styles, and talks to its own server only."""
    hashes = {
        kind: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'"
            for body in re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.S)
        )
        for kind in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _server(request: Request) -> Server:
    return request.app.state.server


# -------------------------------------------------------------------------------------------------------- errors
def _respond(error: Refusal) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


async def _refused(request: Request, error: Any) -> JSONResponse:
    return _respond(error)


async def _invalid(request: Request, error: Any) -> JSONResponse:
    """Of what could have been meant (a text or a list of parts, say), the one that fits furthest."""
    first = max(error.errors(), key=lambda one: len(one["loc"]))
    where = ".".join(str(part) for part in first["loc"] if part != "body" and "[" not in str(part))
    return _respond(Refusal(400, f"{where or 'the body'}: {first['msg']}", "invalid_request"))


async def _http(request: Request, error: Any) -> JSONResponse:
    code = "no_such_route" if error.status_code in (404, 405) else "invalid_request"
    return _respond(Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}", code))


async def _failed(request: Request, error: Exception) -> JSONResponse:
    """Starlette raises it again after this answer, so that the server's log has it."""
    return _respond(refusal(error))


# -------------------------------------------------------------------------------------------------------- chat
@routes.post("/v1/chat/completions")
async def chat(body: ChatRequest, request: Request) -> Response:
    server = _server(request)
    begun = await Chat.begin(body, server.model_name, server.engine, server.pictures, server.writer)
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(begun.events(include_usage), media_type="text/event-stream", headers=headers)
    answer = asyncio.ensure_future(begun.whole())
    gone = asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return Response(status_code=HUNG_UP)
        try:
            return JSONResponse(answer.result())
        except Refusal:
            raise
        except Exception as error:
            raise refusal(error) from error
    finally:
        answer.cancel()
        gone.cancel()
        begun.cancel()


async def _hang_up(request: Request) -> None:
    """Until the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


@routes.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_model(_server(request))]}


@routes.get("/v1/models/{name:path}")
async def one_model(name: str, request: Request) -> dict[str, Any]:
    server = _server(request)
    if name != server.model_name:
        raise Refusal(404, f"no model {name!r}; this server has {server.model_name!r}", "model_not_found")
    return _model(server)


def _model(server: Server) -> dict[str, Any]:
    return {"id": server.model_name, "object": "model", "created": 0, "owned_by": "htc-vlm"}


# -------------------------------------------------------------------------------------------------------- images
@routes.post("/v1/images")
async def add_image(request: Request, name: str | None = None) -> dict[str, Any]:
    """The picture itself as the body (Content-Type: image/...), or JSON {"url": "data:...", "name": ...}."""
    server, body = _server(request), await request.body()
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "application/json":
        try:
            given = ImageRequest.model_validate_json(body)
        except ValidationError as error:
            raise RequestValidationError(error.errors(include_url=False)) from error
        body, name = await asyncio.to_thread(data_of, given.url), given.name or name
    elif not (kind.startswith("image/") or kind == "application/octet-stream"):
        raise Refusal(400, f"Content-Type is {kind!r}; send image/... or application/json", "invalid_request")
    return await server.pictures.describe(await server.pictures.add(body, name or None))


@routes.get("/v1/images")
async def list_images(
    request: Request, limit: int = Query(100, ge=1, le=1000), after: str | None = Query(None)
) -> dict[str, Any]:
    pictures = _server(request).pictures
    entries = await pictures.list(limit + 1, after)
    return {"object": "list", "data": entries[:limit], "has_more": len(entries) > limit, "total": await pictures.count()}


@routes.get("/v1/images/{key:path}")
async def get_image(key: str, request: Request) -> Any:
    if not key:
        return RedirectResponse(request.url.replace(path="/v1/images"))
    return await _server(request).pictures.describe(key)


@routes.delete("/v1/images/{key:path}")
async def delete_image(key: str, request: Request) -> dict[str, Any]:
    return {"id": await _server(request).pictures.remove(key), "object": "image", "deleted": True}


# -------------------------------------------------------------------------------------------------------- the rest
@routes.head("/health", include_in_schema=False)
@routes.get("/health")
async def health(request: Request) -> JSONResponse:
    engine = _server(request).engine
    if not engine.is_alive:
        return JSONResponse({"status": "the model's thread has ended"}, 503)
    return JSONResponse({"status": "ok", "waiting": engine.n_waiting})


@routes.get("/metrics")
async def metrics(request: Request) -> Response:
    return Response(_server(request).engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@routes.head("/", include_in_schema=False)
@routes.get("/")
async def page(request: Request) -> HTMLResponse:
    server = _server(request)
    headers = {"Content-Security-Policy": server.page_policy, "X-Content-Type-Options": "nosniff"}
    return HTMLResponse(server.page, headers=headers | {"Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"})
