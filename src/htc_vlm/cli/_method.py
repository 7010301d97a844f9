"""What `--method NAME --budget N` and `--compressor NAME` stand for, in all commands."""

from __future__ import annotations

import argparse
import json
from typing import Any

from htc_vlm.settings import budget as tokens_or_share


def parse_method(text: str | None) -> dict[str, Any] | None:
    """A method by name, or with settings as JSON; None stays None.

    >>> parse_method("voco"), parse_method('{"name": "voco", "n_bottleneck": 2}')
    ({'name': 'voco'}, {'name': 'voco', 'n_bottleneck': 2})
    """
    if text is None:
        return None
    if not text.startswith("{"):
        return {"name": text}
    try:
        found = dict(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"{text!r} is neither a method's name nor JSON ({error})") from error
    if "name" not in found:
        raise ValueError(f'{text!r} names no method; write e.g. {{"name": "fastv", "n_keep": 30}}')
    return found


def check_budget(method: str | None, budget: float | None) -> None:
    """ValueError for a budget that would be ignored; before anything is loaded."""
    if method is None and budget is not None:
        raise ValueError("--budget sets the settings of a --method; name one, e.g. --method fastv")


def method_of(text: str | None, budget: float | None, model: Any) -> dict[str, Any] | None:
    """--method and --budget -> {"name": ..., and its settings} for this model; None without --method."""
    check_budget(text, budget)
    method = parse_method(text)
    if method is None or budget is None:
        return method
    from htc_vlm import compressors
    from htc_vlm.model.modeling import sizes_of

    n_layers = model.config.text_config.num_hidden_layers
    name, n_patches = method.pop("name"), sizes_of(model.config).n_patches
    return {"name": name, **compressors.at_budget(name, budget, n_patches, n_layers, method)}


def stock_method(text: str | None, budget: float | None) -> dict[str, Any] | None:
    """--method and --budget as `apply` takes them on a stock model: the budget is fitted to each picture."""
    check_budget(text, budget)
    method = parse_method(text)
    if method is None or budget is None:
        return method
    if "budget" in method:
        raise ValueError(f"--budget is {budget}, and --method says budget {method['budget']!r}; give one of them")
    return {"budget": budget, **method}


def add_method(arguments: argparse.ArgumentParser) -> None:
    """--method and --budget of the commands that keep pictures."""
    arguments.add_argument(
        "--method", metavar="NAME",
        help="of a model without a bottleneck: what is kept of a picture, e.g. divprune with --budget, or none for all of it",
    )  # fmt: skip
    told = "with --method: tokens it keeps, or a share below 1"
    arguments.add_argument("--budget", type=tokens_or_share, metavar="N", help=told)


def kept_method(options: argparse.Namespace) -> dict[str, Any] | None:
    """`stock_method`, if what it keeps does not depend on a question. ValueError, before a model is loaded."""
    method = stock_method(options.method, options.budget)
    if method is not None:
        from htc_vlm.model.prefix_cache import check_method

        check_method(method)
    return method
