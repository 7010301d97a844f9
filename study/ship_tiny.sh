#!/usr/bin/env bash
# Ship a run of `python -m study train-tiny` as NAME: checkpoint and record committed, all test sets from that commit, their
# results, pages and plots. From a clean checkout; an evaluation that was cut off goes on.
#
#     DATA=DIR study/ship_tiny.sh NAME RUN [RECORD]      (NAME: tiny, tiny-upper, tiny-htc; DIR: docs/data.md)
#
# RECORD, where a model has been trained in several runs: the folder of this one's record (default: training).
set -euo pipefail
name=$1 run=$2 record=${3:-training}
work=${WORK:-$run/eval}
python -m study ship-tiny "$name" --run "$run" --record "$record"
git add "src/htc_vlm/checkpoints/$name" study/results/tiny
git diff --cached --quiet || git commit -q -m "Ship $name: checkpoint and training record"
ask() { python -m study ship-tiny "$name" --evaluate --data "$DATA" --work "$work" --tests "$1"; }
ask 0 &
ask 1,2,3
wait %1
python -m study ship-tiny "$name" --collect --data "$DATA" --work "$work"
python -m study.pages
