"""htc-vlm heatmap: draw what the bottleneck token looked at in each picture, one model or several side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from htc_vlm.files import MAX_PIXELS, pixel_limit, positive

HOW = ("pictures", "rows")


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="htc-vlm heatmap", description=__doc__)
    arguments.add_argument("pictures", nargs="*", type=Path)
    arguments.add_argument("--output", type=Path, required=True, metavar="OUT.png")
    arguments.add_argument(
        "--model", action="append", help="a shipped checkpoint's name or a folder; repeat to compare (default: tiny)"
    )
    arguments.add_argument("--label", action="append", help="what to call the models, in their order (default: as given)")
    arguments.add_argument("--samples", type=int, metavar="N", help="the first N test scenes of pictograms, instead of files")
    arguments.add_argument(
        "--as", dest="how", choices=HOW, default="pictures",
        help="the attention over each picture, or the paper's Figure 3: a row per picture, a column per token, all layers",
    )  # fmt: skip
    arguments.add_argument("--numbers", type=Path, metavar="OUT.json", help="write the shares per layer, too")
    arguments.add_argument("--max-pixels", type=positive, metavar="N", help=MAX_PIXELS)
    arguments.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    arguments.add_argument("--force", action="store_true", help="replace files that htc-vlm did not write")
    return arguments


def run(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    models = options.model or ["tiny"]
    labels = options.label or (models if len(models) > 1 else [""])
    if len(labels) != len(models):
        raise ValueError(f"{len(labels)} labels for {len(models)} models; give one for each")
    if bool(options.pictures) == (options.samples is not None):
        raise ValueError("give picture files or --samples N, not both and not neither")
    from htc_vlm.files import FIGURES, check_output

    check_output(options.output, options.force, options.pictures, FIGURES)
    if options.numbers is not None:
        check_output(options.numbers, options.force, [*options.pictures, options.output], (".json",))
    from htc_vlm import load
    from htc_vlm.model.loading import to_device
    from htc_vlm.viz import attention_map

    pictures, names = _pictures(options)
    looks = []
    for label, name in zip(labels, models, strict=True):
        model, processor = load(name)
        looks.append(attention_map.look(label, to_device(model, options.device), processor, pictures))
    if options.how == "pictures":
        attention_map.draw_pictures(looks, pictures, names, options.output)
    else:
        attention_map.draw_rows(looks, names, options.output)
    if options.numbers is not None:
        _write_numbers(options.numbers, models, looks, names)
    print(options.output)
    return 0


def _pictures(options: argparse.Namespace) -> tuple[list[Any], list[str]]:
    """The pictures and what to call them."""
    from htc_vlm.data.images import load_for_model
    from htc_vlm.tiny import pictograms

    if options.samples is None:
        pictures = [load_for_model(path, **pixel_limit(options)) for path in options.pictures]
        return pictures, [path.name for path in options.pictures]
    names = list(pictograms.images("test")[: options.samples])
    if len(names) != options.samples or not names:
        raise ValueError(f"--samples is {options.samples}; give 1 to {len(pictograms.images('test'))}")
    return [pictograms.picture(name) for name in names], names


def _write_numbers(file: Path, models: list[str], looks: list[Any], names: list[str]) -> None:
    """Mean shares per layer, and what the tokens would get if attention were spread evenly."""
    from htc_vlm.eval.run_info import provenance
    from htc_vlm.files import MAKER, write_json
    from htc_vlm.viz.attention_map import shares

    rows = []
    for model, one in zip(models, looks, strict=True):
        n_anchors, n_patches = one.maps.anchors.shape[-1], one.maps.patches.shape[-1] ** 2
        mean = {name: sum(row) / len(row) for name, row in shares(one.maps).items()}
        rows.append({
            "model": model, "label": one.label, "n_anchors": n_anchors, "n_patches": n_patches,
            "even_share_of_anchors": n_anchors / (n_anchors + n_patches + 1), "mean_of_layers": mean,
            "layers": shares(one.maps),
        })  # fmt: skip
    write_json(file, {"made_by": MAKER, "pictures": names, "models": rows} | provenance())
