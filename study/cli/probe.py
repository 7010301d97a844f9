"""`python -m study probe MODEL`: what can be read linearly off the anchors, the patches and the bottleneck (Table 3)."""

from __future__ import annotations

import argparse
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="python -m study probe", description=__doc__)
    arguments.add_argument("model", help="a shipped checkpoint's name or a path")
    arguments.add_argument("--output", type=Path, required=True, metavar="OUT.json", help="the result file")
    arguments.add_argument("--compressor", metavar="NAME", help="another method for these weights (or JSON with settings)")
    arguments.add_argument("--images", type=int, default=1500, help="scenes to train probes on (default: 1500)")
    arguments.add_argument("--test-images", type=int, default=1000, help="scenes to test them on (default: 1000)")
    arguments.add_argument("--split", default="test", choices=("val", "test", "test-unseen"), help="the test scenes")
    arguments.add_argument(
        "--scenes", default="alone", choices=("alone", "in-scenes"),
        help="every thing alone on its background, or whole scenes and the thing at the top left (default: alone)",
    )  # fmt: skip
    arguments.add_argument("--batch-size", type=int, default=32, help="pictures encoded at once")
    arguments.add_argument("--device", default="cpu", help="cpu, cuda, ...; the probes are always fitted on the CPU")
    arguments.add_argument("--seed", type=int, default=0, help="of the held-out pictures and the intervals")
    return arguments


def run(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    from htc_vlm import load
    from htc_vlm.cli._method import parse_method
    from htc_vlm.eval.run_info import provenance
    from htc_vlm.files import write_json
    from study.probe import as_markdown, run_probe

    model, processor = load(options.model, compressor=parse_method(options.compressor))
    result = run_probe(
        model.to(options.device), processor, n_train_scenes=options.images, n_test_scenes=options.test_images,
        test_split=options.split, scenes=options.scenes.replace("-", " "), batch_size=options.batch_size, seed=options.seed,
    )  # fmt: skip
    about = {
        "model": options.model, "compressor": model.config.compressor, "recipe": model.recipe().digest,
        "device": options.device,
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, about | result | provenance())
    print(as_markdown(result), end="")
    print(options.output)
    return 0
