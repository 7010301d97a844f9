#!/usr/bin/env bash
# benchmarks/real_size.py on a GPU machine that reaches no package registry, in one command.
#
#   here    scripts/gpu_real_size.sh wheels [FOLDER]        download what the machine lacks: 21 MB into FOLDER (default .whl)
#   there   scripts/gpu_real_size.sh run COMMIT [OPTIONS]   install it beside the machine's own torch, measure, and write
#                                                           $OUT/DEVICE.json, log.txt, nvidia-smi.txt ($OUT: default runs/gpu)
#
# The machine needs Linux, Python 3.11 or newer, torch 2.8 or newer for CUDA, and accelerate, huggingface_hub (1.32 or newer),
# matplotlib, numpy, pillow, psutil, pyyaml, regex, requests, safetensors, tokenizers, typer. COMMIT: what `git rev-parse HEAD`
# says here, with -dirty behind it if the tree is: a copied tree has no git. OPTIONS are those of benchmarks/real_size.py.
# About 6 minutes on an H100; nothing is begun after 480 s.
set -euo pipefail
cd "$(dirname "$0")/.."

WHEELS=${WHEELS:-.whl}
PACKAGES="transformers diffusers vector-quantize-pytorch einops einx frozendict loguru torch-einops-utils importlib_metadata peft"

wheels() {
    local folder=${1:-$WHEELS} pinned=() name
    mkdir -p "$folder"
    for name in $PACKAGES; do pinned+=("$(grep -i "^$name==" constraints.txt)"); done
    python3 -m pip download --quiet --no-deps --only-binary=:all: --platform any --python-version 3.12 --implementation py \
        -d "$folder" "${pinned[@]}"
    ls -l "$folder"
}

run() {
    local commit=$1 out=${OUT:-runs/gpu} site
    shift
    site=$(mktemp -d)
    mkdir -p "$out"
    python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH="$site:src" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
    if ! command -v git > /dev/null; then # provenance asks git, and takes a failure for "no repository"
        mkdir "$site/bin" && printf '#!/bin/sh\nexit 1\n' > "$site/bin/git" && chmod +x "$site/bin/git"
        export PATH="$PATH:$site/bin"
    fi
    nvidia-smi > "$out/nvidia-smi.txt" || true # a look at the card's state; the result does not need it
    local device
    device=$(python3 -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
    python3 benchmarks/real_size.py --shape 7b --commit "$commit" --output "$out/$device.json" "$@" 2>&1 | tee "$out/log.txt"
}

case ${1:-} in
    wheels) shift; wheels "$@" ;;
    run) shift; run "$@" ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
