"""htc-vlm ask: compress each picture once, then answer every question from what was kept of it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htc_vlm.files import FIGURES, check_output

SUFFIXES = set(".png .jpg .jpeg .jfif .webp .gif .bmp .tif .tiff .avif .ppm .heic .svg .mpo".split())


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
    is_picture = [Path(word).suffix.lower() in SUFFIXES or _exists(word) for word in words]
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
    example = 'e.g. htc-vlm ask cat.png "what is at the top left ?"'
    if not request.pictures and options.load is None:
        raise ValueError(f"no picture given; {example}")
    if request.pictures and options.load is not None:
        raise ValueError("give pictures or --from FILE, not both")
    if not all(question.strip() for question in request.questions):
        raise ValueError(f"an empty question; {example}")
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {options.max_new_tokens}; give at least 1")
    read = [*request.pictures, *([options.load] if options.load is not None else [])]
    if options.save is not None:
        check_output(options.save, options.force, read)
    if options.heatmap is not None:
        check_output(options.heatmap, options.force, read, FIGURES)
    if not request.questions and options.save is None and options.heatmap is None:
        raise ValueError(f"no question given; {example}")
    if options.heatmap is not None and options.load is not None:
        raise ValueError("--heatmap needs the picture itself; leave out --from")
    if options.verbose and options.load is not None:
        raise ValueError("--verbose compares with the uncompressed path, which needs the picture itself; leave out --from")


def run(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    request = sort_words(options.words)
    check(request, options)
    from htc_vlm.data.images import ImageError, load_for_model

    pictures, names, refused = [], [], []
    for path in request.pictures:
        try:
            pictures.append(load_for_model(path))
            names.append(str(path))
        except (ImageError, OSError) as error:
            refused.append({"picture": str(path), "error": " ".join(str(error).split())})
            print(f"htc-vlm ask: {refused[-1]['error']}", file=sys.stderr)
    if pictures or options.load is not None:
        report = answer(options, request.questions, pictures, names)
    else:
        report = {"model": str(options.model), "pictures": []}
    report["refused"] = refused
    if not options.json and not report["pictures"]:
        return 2
    print(json.dumps(report, indent=1) if options.json else as_text(report))
    return 2 if refused else 0


def answer(options: argparse.Namespace, questions: list[str], pictures: list[Any], names: list[str]) -> dict[str, Any]:
    """Compress (or load), answer, and measure if that was asked for."""
    from htc_vlm import CompressedImages, load
    from htc_vlm.model.answering import Answerer

    model, processor = load(options.model)
    answerer = Answerer(model, processor)
    if (options.save or options.load or options.heatmap) and not model.model.compressor.n_bottleneck:
        raise ValueError(f"model {options.model!r} has no bottleneck, which --save, --from and --heatmap need; use e.g. tiny")
    for question in questions:
        unknown = answerer.unknown_words(question)
        if unknown:
            print(f"htc-vlm ask: {options.model} has never seen the words: {', '.join(unknown)}", file=sys.stderr)
    if options.load is not None:
        encoded: Any = CompressedImages.load(options.load)
        encoded.check_made_by(model.recipe().digest)
        names = [f"{options.load.name}[{i}]" for i in range(len(encoded))]
    else:
        encoded = answerer.encode(pictures)
    if options.save is not None:
        encoded.save(options.save)
    rows = []
    for i, name in enumerate(names):
        given = answerer.ask(encoded[[i]], [0] * len(questions), questions, options.max_new_tokens) if questions else []
        row: dict[str, Any] = {
            "picture": name,
            "answers": [{"question": q, "answer": a} for q, a in zip(questions, given, strict=True)],
        }
        if options.verbose:
            row["cost"] = measure(answerer, pictures[i], (questions or ["what is this ?"])[0], options.max_new_tokens)
        rows.append(row)
    if options.heatmap is not None:
        from htc_vlm.viz import attention_map

        attention_map.draw(model, processor, pictures, [Path(name).name for name in names], options.heatmap)
    return {"model": str(options.model), "pictures": rows}


def measure(answerer: Any, picture: Any, question: str, max_new_tokens: int, repeats: int = 5) -> dict[str, Any]:
    """Tokens, bytes and milliseconds (medians) of one picture and one question, from the cache and without compression."""
    from htc_vlm.model.answering import Answerer
    from htc_vlm.model.loading import without_compression

    model = answerer.model
    twin = without_compression(model)
    plain = answerer.processor.fitted_to(twin.config)
    return {
        "compressed": cost(answerer, picture, question, max_new_tokens, repeats),
        "uncompressed": cost(Answerer(twin, plain), picture, question, max_new_tokens, repeats),
    }


def cost(answerer: Any, picture: Any, question: str, max_new_tokens: int, repeats: int) -> dict[str, Any]:
    """What one picture and one question cost this model."""
    from htc_vlm.model.modeling import sizes_of

    model = answerer.model
    text = model.config.text_config
    compressor = model.model.compressor
    n_patches = sizes_of(model.config).n_patches
    encoded = answerer.encode([picture])
    kept = compressor.cached_tokens(n_patches, text.num_hidden_layers)
    head_dim = text.head_dim or text.hidden_size // text.num_attention_heads
    bytes_per_token = 2 * text.num_key_value_heads * head_dim * model.dtype.itemsize
    return {
        "visual_tokens_read": compressor.schedule(n_patches, text.num_hidden_layers)[0],
        "cached_tokens": kept[0],
        "cache_bytes": sum(kept) * bytes_per_token,
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
