"""htc-vlm train: run one stage of a preset; started again with the same output, it goes on where it was."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="htc-vlm train", description=__doc__)
    arguments.add_argument("--preset", default="tiny", help="a shipped preset's name or a YAML file (default: tiny)")
    arguments.add_argument("--stage", required=True, help="tokenizer, align, instruct or compress")
    arguments.add_argument(
        "--output", type=Path, required=True, help="folder for checkpoints, metrics and the trained model"
    )
    arguments.add_argument("--start", help="checkpoint to start from (a stage's output/model, or a LLaVA checkpoint)")
    arguments.add_argument("--mgvq", help="weights of the quantizer, for compressors with anchors")
    arguments.add_argument(
        "--teacher", help="uncompressed checkpoint to distil from (with stages.STAGE.distill_weight)"
    )
    arguments.add_argument("--vision", help="CLIP folder, for original LLaVA checkpoints without their vision tower")
    arguments.add_argument(
        "--lora", type=int, metavar="RANK", help="adapters of this rank in place of the language model's weights (needs PEFT)"
    )
    arguments.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto, a GPU where there is one)")
    arguments.add_argument("--cache", type=Path, help="folder of the tower's features (default: beside the output)")
    arguments.add_argument("--data", type=Path, help="folder of the data sets (default: $HTC_VLM_DATA)")
    arguments.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of the preset"
    )
    return arguments


def run(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    from htc_vlm.train import presets

    lora = [f"stages.{options.stage}.lora={{rank: {options.lora}}}"] if options.lora is not None else []
    preset = presets.read(presets.find(options.preset), [*options.set, *lora])
    if options.stage == "tokenizer":
        unread = [name for name in ("start", "mgvq", "teacher", "vision", "cache") if getattr(options, name) is not None]
        unread += ["device"] if options.device not in ("auto", "cpu") else []
        if unread:
            raise ValueError(
                f"--{unread[0]} {getattr(options, unread[0])} is not read by stage 'tokenizer', which trains a quantizer from "
                "pictures on the CPU; leave it out (stages.tokenizer.start_from: an earlier tokenizer)"
            )
        from htc_vlm.train.quantizer_stage import train_tokenizer_stage

        report = train_tokenizer_stage(preset, options.output, options.data)
    else:
        from htc_vlm.train.setup import train_stage

        report = train_stage(
            preset,
            options.stage,
            options.output,
            options.start,
            options.cache,
            options.data,
            options.mgvq,
            options.teacher,
            options.vision,
            options.device,
        )
    print(json.dumps(report, indent=1))
    return 0
