#!/usr/bin/env bash
# What a GPU of this machine makes of ViT-B and ViT-L, in some ten minutes: seconds, MFU and memory of the training step
# and of the sampler, whole and by part, at the largest batch that fits, and the kernels of a training step.
#
#   launch/gpu_check.sh [OUTPUT] [--config.FIELD=...]    default: gpu_check
#
# OUTPUT/vitb.json and .txt are the tables, OUTPUT/vitb/tensorboard has the kernels, for TensorBoard's profiler. If the
# tables are there already, the new ones are compared with them. Trailing flags go to every run. CONFIGS and BATCHES are
# what is tried. Weights and images are random: they change no time.
set -euo pipefail
output=gpu_check
[[ ${1:--} == -* ]] || { output=$1; shift; }
flags=(--config.model.tokenizer_weights=random --config.model.predictor_weights=random --config.mesh.fsdp=1 "$@")
# shellcheck source=launch/here.sh
. "$(dirname "$0")/here.sh"
mkdir -p "$output"

for config in ${CONFIGS:-vitb.py vitl.py}; do
    name=$output/${config%.py*}
    run() { python -m addp_jax.main --config="$root/configs/$config" "${flags[@]}" --config.batch_size="$batch" "$@"; }
    measured=""
    for batch in ${BATCHES:-512 256 128 64 32 16}; do
        baseline=()
        [ ! -s "$name.json" ] || baseline=(--baseline="$name.json")
        if run --mode=benchmark --output="$name.new" "${baseline[@]}" > "$name.txt" 2> "$name.problems"; then
            measured=$batch
            break
        fi
        echo "$config: a batch of $batch does not run: $(grep -m 1 -o 'RESOURCE_EXHAUSTED.*\|error: .*' "$name.problems" | cut -c1-150)"
    done
    [ -n "$measured" ] || { tail -n 5 "$name.problems" >&2; exit 1; }
    mv "$name.new" "$name.json"
    cat "$name.txt"
    rm -rf "$name"
    run --workdir="$name" --config.data.source=shapes --config.epochs=0 --config.steps=12 --config.optim.warmup_steps=1 \
        --config.profile=6 --config.log_every=4 --config.eval_every=12 --config.eval_batches=1 --config.model.num_samples=1 \
        --config.data.num_train="$((measured * 2))" --config.data.num_eval="$measured" > "$name.training" 2>&1 ||
        { tail -n 5 "$name.training" >&2; exit 1; }
    tail -n 1 "$name.training"
done
