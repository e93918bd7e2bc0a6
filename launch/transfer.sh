#!/usr/bin/env bash
# What the demo's ADDP encoder is worth to a classifier of the generated shapes with ten labels per class: fine-tuned
# against the same network from scratch, three seeds each, and frozen (linear probe, k-NN). Needs launch/demo.sh first.
#
#   launch/transfer.sh [ADDP_WORKDIR [OUTPUT]] [--config.FIELD=...]    default: runs/demo/addp runs/transfer
#
# Trailing flags go to every run. Prints one line per run: what it was, and its metrics on 2,000 held-out pictures.
set -euo pipefail
cd "$(dirname "$0")/.."
encoder=runs/demo/addp output=runs/transfer
[[ ${1:-} == "" || ${1:-} == -* ]] || { encoder=$1; shift; }
[[ ${1:-} == "" || ${1:-} == -* ]] || { output=$1; shift; }
python=${PYTHON:-.venv/bin/python}

run() {  # name, config, flags
    local name=$1 config=$2
    shift 2
    mkdir -p "$output"
    "$python" -m addp_jax.main --config="configs/$config.py" --workdir="$output/$name" "$@" > "$output/$name.txt" 2>&1 ||
        { cat "$output/$name.txt" >&2; exit 1; }
    echo "$name $(grep '"eval/' "$output/$name/log.jsonl" | tail -n 1)"
}

for seed in 0 1 2; do
    run "finetuned_$seed" demo_classification --config.seed=$seed --config.model.encoder_weights="$encoder" "$@"
    run "scratch_$seed" demo_classification --config.seed=$seed --config.model.encoder_weights= "$@"
done
run probe demo_probe --config.model.encoder_weights="$encoder" --config.model.cache="$output/features" "$@"
run probe_random demo_probe --config.model.encoder_weights=random --config.model.cache="$output/features" "$@"
