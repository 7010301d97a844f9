#!/usr/bin/env bash
# The tiny models from nothing to result files, in one command; start again to go on where it was cut off.
#
#     DATA=DIR study/train_tiny.sh RUNS [--set KEY=VALUE ...]
#
# DIR holds easy-vqa/ and fashion-mnist/ (docs/data.md). On a GPU, longer and wider, e.g.:
#     DATA=data study/train_tiny.sh runs/gpu --set text.hidden_size=256 --set text.intermediate_size=704 \
#         --set stages.instruct.steps=20000 --set stages.compress.steps=40000 --set stages.compress.precision=bfloat16
set -euo pipefail
runs=$1
shift
htc-vlm train --preset tiny --stage instruct --output "$runs/tiny-upper" --cache "$runs/cache" --data "$DATA" "$@"
htc-vlm train --preset tiny --stage compress --output "$runs/tiny" --cache "$runs/cache" --data "$DATA" \
    --start "$runs/tiny-upper/model" "$@"
for model in tiny-upper tiny; do
    study/evaluate_tiny.sh "$runs/$model/model" "$runs/eval/$model"
done
