#!/usr/bin/env bash
# All result files of one tiny model, copied to study/results/tiny/NAME (NAME = last part of OUTPUT):
#     DATA=DIR study/evaluate_tiny.sh MODEL OUTPUT [htc-vlm eval options]          (DIR: docs/data.md)
set -euo pipefail
model=$1 output=$2
shift 2
htc-vlm eval "$model" --task pictograms --split test --output "$output" --data "$DATA" --batch-size 192 "$@"
htc-vlm eval "$model" --task pictograms --split test-unseen --output "$output" --data "$DATA" --batch-size 192 "$@"
htc-vlm eval "$model" --task easy-vqa --output "$output" --data "$DATA" --batch-size 192 "$@"
htc-vlm eval "$model" --task fashion-mnist --limit 2000 --output "$output" --data "$DATA" --batch-size 192 "$@"
kept=study/results/tiny/$(basename "$output")
mkdir -p "$kept"
for folder in "$output"/*/; do
    cp "$folder/result.json" "$kept/$(basename "$folder").json"
done
