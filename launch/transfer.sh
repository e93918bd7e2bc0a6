#!/usr/bin/env bash
# What the demo's ADDP encoder is worth to a classifier of the generated shapes with few labels: fine-tuned against the
# same network from scratch (at the learning rate that suits it best), three seeds each, and frozen (linear probe, k-NN)
# against an untrained encoder.
# Needs launch/demo.sh first.
#
#   launch/transfer.sh [ADDP_WORKDIR [OUTPUT]] [--config.FIELD=...]    default: runs/demo/addp runs/transfer
#
# Relative paths are relative to the present folder.
# Trailing flags go to every run. Prints one line per run: its accuracies on 2,000 held-out pictures.
set -euo pipefail
encoder=runs/demo/addp output=runs/transfer
[[ ${1:--} == -* ]] || { encoder=$1; shift; }
[[ ${1:--} == -* ]] || { output=$1; shift; }
flags=("$@")
# shellcheck source=launch/here.sh
. "$(dirname "$0")/here.sh"
mkdir -p "$output"

run() { # name, config, encoder, more flags
    local folder=$output/$1
    python -m addp_jax.main --config="$root/configs/$2.py" --workdir="$folder" --config.model.encoder_weights="$3" "${@:4}" \
        "${flags[@]}" > "$folder.txt" 2>&1 || { cat "$folder.txt" >&2; exit 1; }
    echo "$1: $(grep '"eval/' "$folder/log.jsonl" | tail -n 1 | grep -o '[a-z_]*top1": [0-9.]*' | tr -d '":' | tr '\n' ' ')"
}

for seed in 0 1 2; do
    run "finetuned_$seed" demo_classification "$encoder" --config.seed=$seed
    run "scratch_$seed" demo_classification "" --config.seed=$seed --config.optim.base_lr=0.008
done
run probe demo_probe "$encoder" --config.model.cache="$output/features"
run probe_random demo_probe random --config.model.cache="$output/features"
