"""The server under load, asked with the official `openai` package: right answers, requests a second, and a soak.

    python benchmarks/serving.py [--clients 32] [--pictures 64] [--seconds 20] [--soak 600] \
        [--output study/results/serve/cpu.json]

`answers` asks every client about every picture, all with the same question, and compares with one picture asked alone.
The rates are of three ways that take turns in slices of the same run, so that a busy machine disturbs them alike: `batched`
(all clients, pictures in the store), `one_at_a_time` (one client), and `reencoded` (all clients, each sends the picture with
its question to a server that forgets it). The soak asks, hangs up in the middle of streams, sends what is no request, and
overfills the queue; the server's memory is read from outside. Clients and server share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

QUESTION = "what is at the top left ?"
N_SLICES = 3


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog=Path(sys.argv[0]).name, description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("--clients", type=int, default=32)
    arguments.add_argument("--pictures", type=int, default=64)
    arguments.add_argument("--seconds", type=float, default=20.0, help="of each of the three ways")
    arguments.add_argument("--soak", type=float, default=600.0, metavar="SECONDS", help="0: without")
    arguments.add_argument("--only-soak", action="store_true", help="add a soak to the result file that is there")
    arguments.add_argument("--output", type=Path, default=Path("study/results/serve/cpu.json"))
    return arguments


# -------------------------------------------------------------------------------------------------------- the server
class ServerProcess:
    """`htc-vlm serve` in a process of its own."""

    def __init__(self, store: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-c", "import sys, htc_vlm_cli; sys.exit(htc_vlm_cli.main())", "serve", *options]
        command += ["--store", str(store), "--port", str(self.port)]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{self.port}"
        while self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"{' '.join(command)} ended with {self.process.returncode}")

    def metrics(self) -> dict[str, float]:
        """Those without labels."""
        lines = urllib.request.urlopen(f"{self.url}/metrics", timeout=60).read().decode().splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#") and "{" not in line]
        return {name.removeprefix("htc_vlm_"): float(value) for name, value in pairs}

    def state(self) -> dict[str, float]:
        """Resident MiB, threads, open files and sockets."""
        import psutil

        process = psutil.Process(self.process.pid)
        with process.oneshot():
            return {
                "mib": process.memory_info().rss / 2**20, "threads": process.num_threads(), "files": process.num_fds(),
            }  # fmt: skip

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(120)


@contextmanager
def running(store: Path, *options: str) -> Any:
    server = ServerProcess(store, *options)
    try:
        yield server
    finally:
        server.stop()


def client_of(server: ServerProcess) -> Any:
    from openai import AsyncOpenAI

    return AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


def message(url: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]}]


async def answer(client: Any, url: str) -> str:
    done = await client.chat.completions.create(model="tiny", messages=message(url), max_tokens=8)
    return str(done.choices[0].message.content)


# -------------------------------------------------------------------------------------------------------- answers and rates
async def right_answers(clients: list[Any], urls: list[str], alone: list[str]) -> dict[str, Any]:
    """Every client asks about every picture, each beginning elsewhere."""

    async def ask_all(number: int) -> list[bool]:
        order = [(number * len(urls) // len(clients) + i) % len(urls) for i in range(len(urls))]
        return [await answer(clients[number], urls[i]) == alone[i] for i in order]

    equal = [one for row in await asyncio.gather(*map(ask_all, range(len(clients)))) for one in row]
    return {"requests": len(equal), "equal_to_alone": sum(equal), "different_answers": len(set(alone))}


async def timed(clients: list[Any], urls: list[str], seconds: float) -> list[float]:
    """Seconds of each request of clients that ask one after another until the time is over."""
    end, times = time.perf_counter() + seconds, []

    async def ask_on(number: int) -> None:
        i = number
        while time.perf_counter() < end:
            start = time.perf_counter()
            await answer(clients[number], urls[i % len(urls)])
            times.append(time.perf_counter() - start)
            i += len(clients)

    await asyncio.gather(*map(ask_on, range(len(clients))))
    return times


def quantiles(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {f"p{q}_ms": round(1000 * ordered[min(len(ordered) - 1, len(ordered) * q // 100)], 1) for q in (50, 95, 99)}


async def rates(ways: dict[str, tuple[list[Any], list[str]]], seconds: float) -> dict[str, Any]:
    """Requests a second of each way, in turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    spent = dict.fromkeys(ways, 0.0)
    for _ in range(N_SLICES):
        for name, (clients, urls) in ways.items():
            start = time.perf_counter()
            times[name] += await timed(clients, urls, seconds / N_SLICES)
            spent[name] += time.perf_counter() - start
    out: dict[str, Any] = {}
    for name, all_ in times.items():
        per_s = round(len(all_) / spent[name], 1)
        out[name] = {"clients": len(ways[name][0]), "requests": len(all_), "per_s": per_s} | quantiles(all_)
    return out


# -------------------------------------------------------------------------------------------------------- soak
async def raw(server: ServerProcess, body: bytes, read: int) -> str:
    """A request by hand, whose client goes away after `read` bytes; the status, or "hung up"."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        got = await reader.read(read) if read else b""
        return got.split(b" ")[1].decode() if read > 12 and got else "hung up"
    finally:
        writer.close()


async def soak(server: ServerProcess, clients: list[Any], urls: list[str], alone: list[str], seconds: float) -> dict[str, Any]:
    """What came back, by kind; times of good requests; the server's state every few seconds."""
    from openai import APIConnectionError, APIStatusError

    end, said, times, wrong, states = time.perf_counter() + seconds, Counter[str](), [], 0, []
    long = {"model": "tiny", "stream": True, "max_tokens": 64, "temperature": 2, "n": 2}
    picture = "data:image/png;base64," + base64.b64encode(b"\x89PNG no picture" * 2000).decode()
    bad = [
        b"{", b"[]", json.dumps({"model": "other", "messages": message(urls[0])}).encode(),
        json.dumps({"model": "tiny", "messages": message(picture)}).encode(),
        json.dumps({"model": "tiny", "messages": message("htc:" + "0" * 64)}).encode(), b"\x00" * 100_000,
    ]  # fmt: skip

    async def good(number: int, random_: random.Random) -> None:
        nonlocal wrong
        i, start = random_.randrange(len(urls)), time.perf_counter()
        try:
            wrong += await answer(clients[number], urls[i]) != alone[i]
            times.append(time.perf_counter() - start)
            said["200"] += 1
        except APIStatusError as error:
            said[str(error.status_code)] += 1
        except APIConnectionError as error:
            said[type(error).__name__] += 1

    async def one(number: int) -> None:
        random_ = random.Random(number)
        while time.perf_counter() < end:
            kind = random_.random()
            if kind < 0.7:
                await good(number, random_)
            elif kind < 0.8:
                body = json.dumps({**long, "messages": message(random_.choice(urls))}).encode()
                said["hang-up: " + await raw(server, body, random_.choice([0, 1, 12]))] += 1
            elif kind < 0.95:
                said["bad body: " + await raw(server, random_.choice(bad), 200)] += 1
            else:  # at once more than the queue holds
                await asyncio.gather(*(good(number, random_) for _ in range(24)))

    async def watch() -> None:
        while time.perf_counter() < end:
            states.append(await asyncio.to_thread(server.state))
            await asyncio.sleep(min(5.0, seconds / 20))

    await asyncio.gather(watch(), *map(one, range(len(clients))))
    await asyncio.sleep(1)
    states.append(server.state())
    after = server.metrics()
    third = max(1, len(states) // 3)
    return {
        "seconds": seconds, "said": dict(sorted(said.items())), "wrong_answers": wrong, **quantiles(times),
        "mib": {part: round(statistics.mean(s["mib"] for s in rows), 1) for part, rows in
                {"first_third": states[:third], "second_third": states[third:-third], "last_third": states[-third:]}.items()
                if rows},
        "threads_first_last": [states[0]["threads"], states[-1]["threads"]],
        "files_first_last": [states[0]["files"], states[-1]["files"]],
        "left_behind": {name: after[name] for name in ("waiting_rows", "running_rows")},
        "hang_ups": after["hang_ups_total"], "mean_batch": round(after["batch_rows_sum"] / after["batch_rows_count"], 1),
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- all of it
async def answers_and_rates(
    options: argparse.Namespace, store: Path, urls: list[str], data: list[str], alone: list[str]
) -> dict[str, Any]:
    with running(store) as server, running(store.with_name("empty"), "--memory", "0") as forgetful:
        clients = [client_of(server) for _ in range(options.clients)]
        others = [client_of(forgetful) for _ in range(options.clients)]
        ways = {"batched": (clients, urls), "one_at_a_time": (clients[:1], urls), "reencoded": (others, data)}
        for one, some in ways.values():
            await timed(one, some, 1)
        out: dict[str, Any] = {"answers": await right_answers(clients, urls, alone)}
        out["rates"] = await rates(ways, options.seconds)
        await _closed([*clients, *others])
    return out


async def soaked(options: argparse.Namespace, store: Path, urls: list[str], alone: list[str]) -> dict[str, Any]:
    with running(store, "--max-queue", "48") as server:
        clients = [client_of(server) for _ in range(options.clients)]
        await timed(clients, urls, 2)
        files_before = server.state()["files"]
        out = await soak(server, clients, urls, alone, options.soak)
        await _closed(clients)
        await asyncio.sleep(2)
        out |= {"files_before": files_before, "files_when_clients_had_closed": server.state()["files"]}
    return out


async def _closed(clients: list[Any]) -> None:
    closing: list[Callable[[], Awaitable[None]]] = [client.close for client in clients]
    await asyncio.gather(*(close() for close in closing))


def main() -> int:
    options = parser().parse_args()
    from htc_vlm import ImageStore, load
    from htc_vlm.eval.run import write_json
    from htc_vlm.eval.run_info import provenance
    from htc_vlm.tiny import pictograms

    model, processor = load("tiny")
    files = []
    for i in range(options.pictures):
        out = io.BytesIO()
        pictograms.picture(f"test/{i}").save(out, "png")
        files.append(out.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        with ImageStore.open(Path(folder) / "store", model, processor) as store:
            ids = store.add(files)
        from htc_vlm.model.answering import Answerer

        answerer = Answerer(model, processor)
        pictures = [pictograms.picture(f"test/{i}") for i in range(len(ids))]
        alone = [answerer.answer(str(i), lambda one=one: one, [QUESTION], 8)[0] for i, one in enumerate(pictures)]
        urls = [f"htc:{one}" for one in ids]
        data = ["data:image/png;base64," + base64.b64encode(one).decode() for one in files]
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        result: dict[str, Any]
        if options.only_soak:
            result = json.loads(options.output.read_text())
        else:
            result = {"model": "tiny", "question": QUESTION, "pictures": options.pictures}
            result |= asyncio.run(answers_and_rates(options, Path(folder) / "store", urls, data, alone))
            result |= {"machine": machine | {"load_average": os.getloadavg()}} | provenance()
            options.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(options.output, result)
        if options.soak:
            result["soak"] = asyncio.run(soaked(options, Path(folder) / "store", urls, alone))
            result["soak"] |= {"load_average": os.getloadavg(), "command": provenance()["command"]}
            write_json(options.output, result)
    print(options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
