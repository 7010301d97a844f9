#!/usr/bin/env bash
# Run the default tests again and again, to find those that fail now and then: scripts/repeat_tests.sh [RUNS] [FOLDER]
# FOLDER (build/repeat) gets a log for each run, and runs.csv: run, exit code, wall and CPU seconds, last line. Started again, it
# goes on counting. TEST_COMMAND replaces `make --silent test`. Exit code 1 when any run failed.
set -uo pipefail
cd "$(dirname "$0")/.."
runs=${1:-10} folder=${2:-build/repeat} failed=0
mkdir -p "$folder"
[ -s "$folder/runs.csv" ] || echo "run,exit,wall_s,cpu_s,commit,result" > "$folder/runs.csv"
first=$(wc -l < "$folder/runs.csv")
TIMEFORMAT="%R %U %S"
for run in $(seq "$first" $((first + runs - 1))); do
    { time ${TEST_COMMAND:-make --silent test} > "$folder/$run.log" 2>&1; } 2> "$folder/time"
    code=$?
    read -r wall user system < <(tail -1 "$folder/time")
    result=$(grep -E "(passed|failed|error).* in " "$folder/$run.log" | tail -1 | tr -d ',=')
    echo "$run,$code,$wall,$(awk "BEGIN { print $user + $system }"),$(git rev-parse --short HEAD),$result" | tee -a "$folder/runs.csv"
    [ "$code" = 0 ] || { failed=1; grep -E "^(FAILED|ERROR)" "$folder/$run.log"; }
done
exit "$failed"
