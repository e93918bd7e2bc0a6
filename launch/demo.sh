#!/usr/bin/env bash
# Trains the three stages (tokenizer, token predictor, ADDP) at demo size and draws pictures.
usage() {
    cat <<'HELP'
launch/demo.sh [--data FOLDER] [--size PIXELS] [--out FOLDER] [--config.FIELD=VALUE...]

  --data FOLDER    your own images (class sub-folders or a flat folder) instead of generated shapes
  --size PIXELS    side of the images, a multiple of 8 (default 48)
  --out FOLDER     where runs and pictures go (default runs/demo); a stopped demo goes on from there
  --config.*       fields of configs/base.py for all three stages

Relative paths are relative to the present folder.
HELP
}
set -euo pipefail
data="" size=48 out=runs/demo flags=()
while [ $# -gt 0 ]; do
    case $1 in
        --data | --size | --out)
            [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
            printf -v "${1#--}" %s "$2"
            shift 2 ;;
        --config.*=*) flags+=("$1"); shift ;;
        -h | --help) usage; exit 0 ;;
        *) echo "error: unknown option $1" >&2; usage >&2; exit 2 ;;
    esac
done
case $size in '' | *[!0-9]*) echo "error: --size $size is not a number of pixels" >&2; exit 2 ;; esac
if [ $((size % 8)) -ne 0 ] || [ "$size" -lt 32 ]; then
    echo "error: --size $size: use a multiple of 8, at least 32" >&2
    exit 2
fi
[ -z "$data" ] || [ -d "$data" ] || { echo "error: --data $data: no such folder" >&2; exit 2; }
# shellcheck source=launch/here.sh
. "$(dirname "$0")/here.sh"

source=()
[ -z "$data" ] || source=(--config.data.source=image_folder "--config.data.path=$data")
started=$SECONDS

main() { # mode, config, run folder, more flags
    python -m addp_jax.main --mode="$1" --config="$root/configs/$2.py:$size" --workdir="$out/$3" "${@:4}" "${flags[@]}"
}

echo "== 1 of 3: tokenizer"
main train demo_tokenizer tokenizer "${source[@]}"
echo "== 2 of 3: token predictor"
main train demo_predictor predictor "${source[@]}" --config.model.tokenizer_weights="$out/tokenizer"
echo "== 3 of 3: ADDP"
weights=(--config.model.tokenizer_weights="$out/tokenizer" --config.model.predictor_weights="$out/predictor")
main train demo_addp addp "${source[@]}" "${weights[@]}"
echo "== samples"
main generate demo_addp addp "${source[@]}" "${weights[@]}"
if [ -z "$data" ]; then
    echo "== a classifier trained on real shapes looks at the samples"
    main train demo_judge judge
    python -m addp_jax.measuring.judge --judge="$out/judge" --samples="$out/addp/generated/samples.npz" \
        --output="$out/addp/generated/judged.png"
fi

mkdir -p "$out/pictures"
newest() { find "$out/$1/pictures" -name "$2_*.png" | sort | tail -n 1; }
cp "$(newest tokenizer reconstructions)" "$out/pictures/reconstructions.png"
cp "$(newest predictor samples)" "$out/pictures/samples_token_predictor.png"
cp "$(newest addp denoising)" "$out/pictures/denoising.png"
cp "$out/addp/generated/grid.png" "$out/pictures/samples.png"
cp "$out/addp/generated/strip.png" "$out/pictures/film_strip.png"
[ -n "$data" ] || cp "$out/addp/generated/judged.png" "$out/pictures/judged.png"
for stage in tokenizer predictor addp; do cp "$out/$stage/curves.png" "$out/pictures/curves_$stage.png"; done
echo
echo "Done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s. Pictures:"
ls "$out"/pictures/*.png
