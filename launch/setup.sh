# Sourced by the other scripts: changes to the repository root and enters its virtual environment (.venv, or $VENV).
# It is made when missing, updated when requirements.txt, setup.py or $EXTRAS change, and made anew for another
# accelerator. `bash launch/setup.sh` only installs.
#   ACCELERATOR   cpu, cuda12, cuda13 or tpu: whose jax is installed (default: what this machine has)
#   EXTRAS        further extras of setup.py (default test)
# shellcheck shell=bash
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
VENV=${VENV:-$PWD/.venv}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 python3.13 python3.11 python3 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11, 3.12 or 3.13 with venv found; install one, or set PYTHON" >&2
    return 1
}

find_accelerator() { # prints its name and why
    local root=${HARDWARE_ROOT:-} report version oldest # HARDWARE_ROOT: whose /dev and /sys
    case ${ACCELERATOR:-} in
        cpu | cuda12 | cuda13 | tpu) echo "$ACCELERATOR ACCELERATOR is set" && return ;;
        ?*) echo "error: ACCELERATOR=$ACCELERATOR: use cpu, cuda12, cuda13 or tpu" >&2 && return 1 ;;
    esac
    if report=$(timeout 60 nvidia-smi 2>/dev/null); then # it takes long where many GPUs wake up
        version=$(sed -n 's/.*CUDA[A-Z ]* Version: *\([0-9]*\).*/\1/p' <<<"$report" | head -n 1)
        oldest=$(timeout 60 nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -dc '0-9\n' | sort -n | head -n 1)
        # CUDA 13 has left out the GPUs before compute capability 7.5, which the drivers still serve.
        if [ "${version:-12}" -ge 13 ] && [ "${oldest:-75}" -ge 75 ]; then
            echo "cuda13 nvidia-smi says CUDA $version"
        else
            echo "cuda12 nvidia-smi says CUDA ${version:-of no version}, compute capability ${oldest:-unknown}"
        fi
    elif has_tpu "$root"; then
        echo "tpu this machine has one"
    else
        echo "cpu neither an NVIDIA GPU nor a TPU was found"
    fi
}

has_tpu() { # other machines have such devices too: Kubernetes sets TPU_*, and a TPU VM is one of Compute Engine
    { compgen -G "$1/dev/accel[0-9]*" || compgen -G "$1/dev/vfio/[0-9]*"; } >/dev/null &&
        { compgen -v TPU_ >/dev/null || grep -qs 'Google Compute Engine' "$1/sys/class/dmi/id/product_name"; }
}

enter_venv() {
    local found accelerator wanted python clear="" extras=${EXTRAS:-test}
    found=$(find_accelerator) || exit 1
    accelerator=${found%% *}
    wanted="$accelerator $({ cat requirements.txt setup.py && echo "$extras"; } | cksum)"
    if [ "$(cat "$VENV/installed" 2>/dev/null)" != "$wanted" ]; then
        python=$(find_python) || exit 1
        echo "== installing into $VENV for $accelerator (${found#* }); to change: ACCELERATOR=cpu, cuda12, cuda13 or tpu"
        # Two accelerators' plugins in one environment disturb each other.
        case $(cat "$VENV/installed" 2>/dev/null) in [0-9]* | "$accelerator "* | '') ;; *) clear=yes ;; esac
        "$python" -m venv ${clear:+--clear} "$VENV"
        [ "$accelerator" = cpu ] || extras=$extras,$accelerator
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$extras]" || exit 1
        echo "$wanted" >"$VENV/installed"
    fi
    # shellcheck disable=SC1091
    . "$VENV/bin/activate"
    case $accelerator in # one that does not work is then an error: no run on the CPU instead
        cuda*) export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} ;;
        tpu) export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} ;;
    esac
    export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/xla}
    export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # huge pages: a sixth less time for a small step on a CPU
}

enter_venv
