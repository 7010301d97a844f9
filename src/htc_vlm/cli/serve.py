"""htc-vlm serve: answer questions about the pictures of a store, for any OpenAI client, and on a page."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from htc_vlm.cli._method import add_method, kept_method
from htc_vlm.cli._toys import tell_toy

LOOPBACK = {"127.0.0.1", "localhost", "::1"}
TOKEN = "HTC_VLM_TOKEN"
# uvicorn's own 5 s is when httpx gives up idle connections, too: a request sent at that moment was answered by a reset.
KEEP_ALIVE_SECONDS = 75


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="htc-vlm serve", description=__doc__)
    arguments.add_argument("--store", type=Path, required=True, metavar="DIR", help="pictures; made if it is not there")
    arguments.add_argument("--model", default="tiny", help="a shipped checkpoint's name or a folder (default: tiny)")
    arguments.add_argument("--name", help="what clients call the model (default: as --model, without folders)")
    arguments.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    dtypes = ("model", "int8", "int4", "int2")
    arguments.add_argument("--dtype", default="model", choices=dtypes, help="how the store keeps new pictures (default: model)")
    add_method(arguments)
    arguments.add_argument("--no-maps", action="store_true", help="do not keep where the model looked in new pictures")
    arguments.add_argument("--host", default="127.0.0.1", help="another than 127.0.0.1 needs a token")
    arguments.add_argument("--port", type=int, default=8000)
    arguments.add_argument("--token", help=f"what clients must send as API key; better ${TOKEN}, which `ps` does not show")
    arguments.add_argument("--grace", type=int, default=30, metavar="SECONDS", help="at the end, for what runs (default: 30)")
    limits = arguments.add_argument_group("limits")
    for name, default in _limits().items():
        limits.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, metavar="N", help=f"default: {default}")
    return arguments


def _limits() -> dict[str, int]:
    from htc_vlm.serve.limits import Limits

    return {field.name: getattr(Limits(), field.name) for field in fields(Limits)}


def run(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    token = options.token or os.environ.get(TOKEN) or None
    if options.host not in LOOPBACK and token is None:
        raise ValueError(f"--host {options.host} lets others ask; set ${TOKEN} (or --token), which they must then send")
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed; pip install 'htc-vlm[serve]'") from error
    if options.grace < 0:
        raise ValueError(f"--grace is {options.grace}; give 0 or more seconds")
    app = make_app(options, token)
    tell_toy("serve", options.model)
    shown = f"[{options.host}]" if ":" in options.host else options.host
    at = f"http://{shown}:{options.port}"
    print(f"{at}/ is the page, {at}/v1 is for OpenAI clients", file=sys.stderr)
    where = {"host": options.host, "port": options.port, "timeout_graceful_shutdown": options.grace}
    where["timeout_keep_alive"] = KEEP_ALIVE_SECONDS
    # uvicorn finishes what runs, and then raises the signal again as it was handled before: the end is no failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server = uvicorn.Server(uvicorn.Config(app, **where, log_level="warning", server_header=False))
    server.run()
    return 0 if server.started else 2


def check_address(host: str, port: int) -> None:
    """OSError or ValueError for where nobody can listen, before a model is loaded."""
    if not 1 <= port <= 65535:
        raise ValueError(f"--port is {port}; give a number of 1 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        told = f"nobody can listen there ({error.strerror or error}); give another --port or --host"
        raise OSError(error.errno, told, f"{host}:{port}") from error


def make_app(options: argparse.Namespace, token: str | None) -> Any:
    """The application with its model and store."""
    from htc_vlm import load
    from htc_vlm.model.loading import to_device
    from htc_vlm.model.prefix_cache import own_bottleneck
    from htc_vlm.serve.app import make_app
    from htc_vlm.serve.limits import Limits
    from htc_vlm.store import ImageStore
    from htc_vlm.store.about import check_levels

    limits, method = Limits(**{name: getattr(options, name) for name in _limits()}), kept_method(options)
    check_levels(options.store, options.dtype)
    check_address(options.host, options.port)
    model, processor = load(options.model)
    to_device(model, options.device)
    maps = own_bottleneck(model) and model.HAS_MAPS and not options.no_maps
    store = ImageStore.open(options.store, model, processor, dtype=options.dtype, method=method, maps=maps)
    name = options.name or Path(os.path.abspath(options.model)).name
    return make_app(model, processor, store, name, limits, token, only_local=options.host in LOOPBACK)
