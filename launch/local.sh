#!/usr/bin/env bash
# One run as several processes on this machine.
usage() {
    cat <<'HELP'
launch/local.sh PROCESSES CONFIG WORKDIR [FLAG...]

  PROCESSES   how many; on a machine with GPUs each gets one of its own
  CONFIG      such as configs/vitb.py
  WORKDIR     folder of the run; the same command goes on where a stopped run was
  FLAG...     for python -m addp_jax.main: --mode=evaluate, --config.batch_size=256, ...

Relative paths, those in flags as well, are relative to the present folder; CONFIG that is not there is one of this repository.
Ctrl-C or SIGTERM: all processes save at one step and stop, exit status 143. When a process dies the others end too;
the exit status is the highest of theirs. PYTHON: the interpreter (default .venv/bin/python).
HELP
}
set -euo pipefail
case ${1:-} in -h | --help) usage; exit 0 ;; esac
[ $# -ge 3 ] || { usage >&2; exit 2; }
count=$1 config=$2 workdir=$3
shift 3
case $count in '' | 0 | *[!0-9]*) echo "error: $count is not a number of processes" >&2; exit 2 ;; esac
root=$(cd "$(dirname "$0")/.." && pwd)
[ -e "${config%:*}" ] || [ ! -e "$root/${config%:*}" ] || config=$root/$config
python=${PYTHON:-$root/.venv/bin/python}
# The repository's modules, wherever this is run; SAFEPATH: not those of a present folder with such names.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
GRACE=45 # seconds that the others have after one has failed; jax ends them after 30

export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(dirname "$workdir")/xla_cache}
# With GPUs here, a jax that cannot use them is an error.
if nvidia-smi >/dev/null 2>&1; then export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}; fi

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < count; i++)); do
    JAX_LOCAL_DEVICE_IDS=$i "$python" -m addp_jax.main --config="$config" --workdir="$workdir" "$@" \
        --coordinator="localhost:$port" --num_processes="$count" --process_id="$i" &
    pids+=($!)
done

status=0
while [ ${#pids[@]} -gt 0 ]; do
    for i in "${!pids[@]}"; do
        if kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
        ended=0
        wait "${pids[i]}" || ended=$?
        [ $ended -ge 0 ] || ended=1 # bash has been seen to say -1
        unset "pids[i]"
        [ $ended -ne 0 ] || continue
        [ $status -ne 0 ] || deadline=$((SECONDS + GRACE))
        [ $ended -le $status ] || status=$ended
        # 2: it has said what to put right; 143: it was asked to stop.
        case $ended in 2 | 143) ;; *) echo "error: process $i of $count ended with status $ended" >&2 ;; esac
    done
    if [ $status -ne 0 ] && [ $SECONDS -ge "$deadline" ]; then kill -KILL "${pids[@]}" 2>/dev/null || true; fi
    sleep 0.5 &
    wait $! 2>/dev/null || true # a signal ends this wait, not a plain sleep; bash would print the whole command of a killed process
done
case $status in 0 | 2 | 143) ;; *) echo "the same command goes on from the newest checkpoint" >&2 ;; esac
exit $status
