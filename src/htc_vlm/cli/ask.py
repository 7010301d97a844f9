"""htc-vlm ask: compress each picture once, then answer every question from what was kept of it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htc_vlm.cli._method import method_of, stock_method
from htc_vlm.cli._toys import tell_toy
from htc_vlm.files import FIGURES, MAX_PIXELS, PICTURES, check_output, check_text, pixel_limit, positive
from htc_vlm.settings import budget

EXAMPLE = 'e.g. htc-vlm ask cat.png "what is at the top left ?"'


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="htc-vlm ask", description=__doc__)
    arguments.add_argument("words", nargs="*", metavar='PICTURE... "QUESTION"...', help="picture files, then questions")
    arguments.add_argument("--model", default="tiny", help="a shipped checkpoint's name or a folder (default: tiny)")
    arguments.add_argument("--verbose", action="store_true", help="tokens, bytes and times, beside the uncompressed path")
    arguments.add_argument("--json", action="store_true", help="one JSON object instead of text")
    arguments.add_argument("--save", type=Path, metavar="FILE", help="keep the compressed pictures")
    arguments.add_argument("--from", type=Path, dest="load", metavar="FILE", help="ask about pictures kept with --save")
    arguments.add_argument("--heatmap", type=Path, metavar="OUT.png", help="draw what the bottleneck looked at")
    arguments.add_argument("--force", action="store_true", help="replace files that htc-vlm did not write")
    arguments.add_argument("--max-new-tokens", type=int, default=16)
    arguments.add_argument("--max-pixels", type=positive, metavar="N", help=MAX_PIXELS)
    arguments.add_argument("--batch-size", type=int, default=16, help="pictures in memory, and questions asked, at once")
    arguments.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    arguments.add_argument(
        "--method", metavar="NAME", help="applied to an uncompressed model, e.g. fastv with --budget (or JSON with settings)"
    )
    arguments.add_argument("--budget", type=budget, help="with --method: visual tokens, mean over layers; sets its settings")
    return arguments


@dataclass(frozen=True)
class Request:
    """What is asked: picture files and questions."""

    pictures: list[Path]
    questions: list[str]


def sort_words(words: list[str]) -> Request:
    """Arguments -> pictures (existing paths, and names with a picture's ending) and questions (everything else).

    >>> sort_words(["missing.png", "what is it ?"])
    Request(pictures=[PosixPath('missing.png')], questions=['what is it ?'])
    """
    is_picture = [Path(word).suffix.lower() in PICTURES or _exists(word) for word in words]
    return Request(
        [Path(word) for word, yes in zip(words, is_picture, strict=True) if yes],
        [word for word, yes in zip(words, is_picture, strict=True) if not yes],
    )


def _exists(word: str) -> bool:
    """Is there a file or folder of that name? A question may be longer than names can be, or empty (which means `.`)."""
    try:
        return bool(word) and Path(word).exists()
    except OSError:
        return False


def check(request: Request, options: argparse.Namespace) -> None:
    """ValueError that says what to write instead, before a model is loaded."""
    if not request.pictures and options.load is None:
        raise ValueError(f"no picture given; {EXAMPLE}")
    if request.pictures and options.load is not None:
        raise ValueError("give pictures or --from FILE, not both")
    if not all(question.strip() for question in request.questions):
        raise ValueError(f"an empty question; {EXAMPLE}")
    for question in request.questions:
        check_text(question, "a question")
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {options.max_new_tokens}; give at least 1")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size is {options.batch_size}; give at least 1")
    for name in ("heatmap", "verbose"):
        if options.method is not None and getattr(options, name):
            raise ValueError(f"--{name} is about a bottleneck; leave it out with --method ({options.method})")
    if options.method is not None and options.load is not None:
        raise ValueError("what is kept in a file was made with its method; leave out --method with --from")
    read = [*request.pictures, *([options.load] if options.load is not None else [])]
    if options.save is not None:
        check_output(options.save, options.force, read)
    if options.heatmap is not None:
        check_output(options.heatmap, options.force, read, FIGURES)
    if not request.questions and options.save is None and options.heatmap is None:
        raise ValueError(f"no question given; {EXAMPLE}")
    if options.heatmap is not None and options.load is not None:
        raise ValueError("--heatmap needs the picture itself; leave out --from")
    if options.verbose and options.load is not None:
        raise ValueError("--verbose compares with the uncompressed path, which needs the picture itself; leave out --from")


def run(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    request = sort_words(options.words)
    check(request, options)
    is_any = options.load is not None or any(_could_be_read(path, pixel_limit(options)) for path in request.pictures)
    model = Asked(options, request.questions) if is_any else None
    refused: list[dict[str, str]] = []

    def refuse(path: Path, error: str) -> None:
        refused.append({"picture": str(path), "error": error})
        print(f"htc-vlm ask: {error}", file=sys.stderr)

    rows = []
    for row in answer(options, request, model, refuse):
        rows.append(row)
        if not options.json:
            print(as_text({"pictures": [row]}), flush=True)
    report = {"model": str(options.model), "pictures": rows, "refused": refused}
    if options.json:
        print(json.dumps(report, indent=1))
    return (1 if report["pictures"] else 2) if refused else 0


def _could_be_read(path: Path, limit: dict[str, int]) -> bool:
    """Is it a picture? Looked at until one is, to refuse before a model is loaded."""
    from htc_vlm.data.images import ImageError, load_image

    try:
        load_image(path, **limit)
    except (ImageError, OSError):
        return False
    return True


class Asked:
    """The model that is asked, with the method applied to it if one was named."""

    def __init__(self, options: argparse.Namespace, questions: list[str]) -> None:
        from htc_vlm import load
        from htc_vlm.model import bottlenecks, prefix_cache
        from htc_vlm.model.answering import Answerer
        from htc_vlm.model.loading import to_device
        from htc_vlm.model.stock_answering import StockAnswerer, is_stock

        self.model, self.processor = load(options.model)
        to_device(self.model, options.device)
        is_cached = options.save is not None or options.load is not None
        has_bottleneck = prefix_cache.own_bottleneck(self.model)
        if (options.heatmap or options.verbose) and is_stock(self.model):
            told = f"which {options.model!r} does not have; use e.g. tiny"
            raise ValueError(f"--heatmap and --verbose are about a bottleneck, {told}")
        if (options.heatmap or options.verbose) and bottlenecks.is_ours(self.model.config.model_type):
            raise ValueError("--heatmap and --verbose are for LLaVA, whose pictures all have one grid; leave them out")
        if options.heatmap and not has_bottleneck:
            raise ValueError(f"model {options.model!r} has no bottleneck, which --heatmap needs; use e.g. tiny")
        if is_stock(self.model) or (is_cached and not has_bottleneck):
            self.method, self.is_prefix = None, True
            method = stock_method(options.method, options.budget)
            if options.save is not None and method is not None:
                prefix_cache.check_method(method)
            self.answerer: Any = StockAnswerer(self.model, self.processor, method, one_file=options.save is not None)
        else:
            self.method, self.is_prefix = method_of(options.method, options.budget, self.model), False
            self.answerer = Answerer(self.model, self.processor)
        tell_toy("ask", options.model)
        for question in questions:
            unknown = self.answerer.unknown_words(question)
            if unknown:
                print(f"htc-vlm ask: {options.model} has never seen the words: {', '.join(unknown)}", file=sys.stderr)

    @contextmanager
    def applied(self) -> Iterator[Any]:
        """The answerer, while the method is applied."""
        from htc_vlm import apply

        if self.method is None:
            yield self.answerer
            return
        with apply(self.model, **self.method) as applied:
            self.answerer.keep_pixels = applied.method.acts_in_tower
            yield self.answerer


def answer(
    options: argparse.Namespace, request: Request, asked: Asked | None, refuse: Callable[[Path, str], None]
) -> Iterator[dict[str, Any]]:
    """A row for each picture: compressed (or loaded) and answered in batches, measured if that was asked for."""
    from htc_vlm import CompressedImages
    from htc_vlm.data.images import load_batches

    if asked is None:
        for _ in load_batches(request.pictures, options.batch_size, refuse, **pixel_limit(options)):
            pass
        return
    kept: list[Any] = []
    shown: list[tuple[str, Any]] = []
    with asked.applied() as answerer:
        if options.load is not None:
            album = CompressedImages.load(options.load)
            if album.prompt is None and asked.is_prefix:
                raise ValueError(f"{options.load} was kept by a bottleneck, and {options.model!r} has no bottleneck")
            if album.prompt is None:  # otherwise `generate` checks it, with the prompt
                album.check_made_by(asked.model.recipe().digest)
            for begin in range(0, len(album), options.batch_size):
                encoded = album[begin : begin + options.batch_size].to(asked.model.device)
                names = [f"{options.load.name}[{begin + i}]" for i in range(len(encoded))]
                yield from rows_of(answerer, encoded, names, request.questions, options)
            return
        loaded = load_batches(request.pictures, options.batch_size, refuse, **pixel_limit(options))
        for paths, pictures, encoded in _encoded(answerer, loaded, refuse):
            if options.save is not None:
                kept.append(encoded.to("cpu"))
                CompressedImages.concat([kept[0], kept[-1]])  # ValueError for another count, before more is asked
            if options.heatmap is not None:
                shown += [(path.name, picture) for path, picture in zip(paths, pictures, strict=True)]
            for i, row in enumerate(rows_of(answerer, encoded, [str(path) for path in paths], request.questions, options)):
                if options.verbose:
                    question = (request.questions or ["what is this ?"])[0]
                    row["cost"] = measure(answerer, pictures[i], question, options.max_new_tokens)
                yield row
    if options.save is not None and kept:
        CompressedImages.concat(kept).save(options.save)
    if options.heatmap is not None and shown:
        from htc_vlm.viz import attention_map

        names, pictures = [name for name, _ in shown], [picture for _, picture in shown]
        attention_map.draw(asked.model, asked.processor, pictures, names, options.heatmap)


def _encoded(
    answerer: Any, batches: Iterable[tuple[list[Path], list[Any]]], refuse: Callable[[Path, str], None]
) -> Iterator[tuple[list[Path], list[Any], Any]]:
    """(paths, pictures, what is kept of them). One that the processor or the method cannot take is refused alone."""
    from htc_vlm.model.answering import one_by_one_if_refused

    for paths, pictures in batches:
        tell = lambda i, why: refuse(paths[i], f"{paths[i]}: {' '.join(why.split())}")  # noqa: B023, E731
        for numbers, encoded in one_by_one_if_refused(answerer.encode, pictures, tell):
            yield [paths[i] for i in numbers], [pictures[i] for i in numbers], encoded


def rows_of(
    answerer: Any, encoded: Any, names: list[str], questions: list[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Every question about every picture of a batch, --batch-size of them at a time."""
    pairs = [(i, question) for i in range(len(names)) for question in questions]
    texts: list[str] = []
    for begin in range(0, len(pairs), options.batch_size):
        part = pairs[begin : begin + options.batch_size]
        texts += answerer.ask(encoded, [i for i, _ in part], [question for _, question in part], options.max_new_tokens)
    given: list[list[dict[str, str]]] = [[] for _ in names]
    for (i, question), text in zip(pairs, texts, strict=True):
        given[i].append({"question": question, "answer": text})
    return [{"picture": name, "answers": answers} for name, answers in zip(names, given, strict=True)]


def measure(answerer: Any, picture: Any, question: str, max_new_tokens: int, repeats: int = 5) -> dict[str, Any]:
    """Tokens, bytes and milliseconds (medians) of one picture and one question, from the cache and without compression."""
    from htc_vlm.model.answering import Answerer
    from htc_vlm.model.loading import without_compression

    model = answerer.model
    if model.config.compressor["name"] == "none":
        return {"uncompressed": cost(answerer, picture, question, max_new_tokens, repeats)}
    twin = without_compression(model)
    plain = answerer.processor.fitted_to(twin.config)
    return {
        "compressed": cost(answerer, picture, question, max_new_tokens, repeats),
        "uncompressed": cost(Answerer(twin, plain), picture, question, max_new_tokens, repeats),
    }


def cost(answerer: Any, picture: Any, question: str, max_new_tokens: int, repeats: int) -> dict[str, Any]:
    """What one picture and one question cost this model."""
    from htc_vlm.model.modeling import sizes_of
    from htc_vlm.ops.cost import DecoderShape, cache_bytes

    model = answerer.model
    text = model.config.text_config
    compressor = model.model.compressor
    n_patches = sizes_of(model.config).n_patches
    encoded = answerer.encode([picture])
    kept = compressor.cached_tokens(n_patches, text.num_hidden_layers)
    return {
        "visual_tokens_read": compressor.schedule(n_patches, text.num_hidden_layers)[0],
        "cached_tokens": kept[0],
        "cache_bytes": cache_bytes(DecoderShape.from_config(text), kept, bytes_per_value=model.dtype.itemsize),
        "encode_ms": median_ms(lambda: answerer.encode([picture]), repeats),
        "first_token_ms": median_ms(lambda: answerer.generate_ids(encoded, [0], [question], 1), repeats),
        "answer_ms": median_ms(lambda: answerer.generate_ids(encoded, [0], [question], max_new_tokens), repeats),
    }


def median_ms(call: Any, repeats: int) -> float:
    """Median milliseconds of a call, after one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return round(sorted(times)[len(times) // 2], 2)


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = []
    for row in report["pictures"]:
        lines.append(row["picture"])
        lines += [f"  {item['question']}  ->  {item['answer']}" for item in row["answers"]]
        for path, numbers in row.get("cost", {}).items():
            lines.append(
                f"  {path:<13} reads {numbers['visual_tokens_read']} tokens, keeps {numbers['cached_tokens']} "
                f"({numbers['cache_bytes']:,} bytes); encode {numbers['encode_ms']} ms, first token "
                f"{numbers['first_token_ms']} ms, answer {numbers['answer_ms']} ms"
            )
    return "\n".join(lines)
