#!/usr/bin/env bash
# One run on a Cloud TPU slice that is made, made again when it is taken away, and kept until told otherwise.
usage() {
    cat <<'HELP'
launch/tpu_pod.sh OPTION... CONFIG WORKDIR [FLAG...]

  --name NAME          of the slice; one with this name is used as it is
  --zone ZONE          such as us-west4-a
  --type TYPE          such as v5litepod-256 or v4-256
  --version VERSION    runtime, such as v2-alpha-tpuv5-lite (v5e), v2-alpha-tpuv5 (v5p), v2-alpha-tpuv6e, tpu-ubuntu2204-base (v4)
  --spot               cheaper, and may be taken away at any moment
  --prepare COMMAND    run on every worker before each start: mounts the folder with the data and WORKDIR
  --delete             delete the slice when the run has ended, also when it has failed
  CONFIG               such as configs/vitl.py
  WORKDIR              folder of the run that all workers share
  FLAG...              for python -m addp_jax.main

Waits in the queue for the slice, copies the committed state of this repository to all workers, installs, runs. A slice
that is taken away is asked for again, and the run goes on where it was. A run that fails on a slice that is still there
is started again up to 3 times; one with a mistake in its flags (exit status 2) is not. Ctrl-C: the run saves and stops.
The project is gcloud's: gcloud config set project PROJECT.
HELP
}
set -euo pipefail
name="" zone="" type="" version="" prepare=true spot=() delete=no
while [[ ${1:-} == -* ]]; do
    case $1 in
        --name | --zone | --type | --version | --prepare)
            [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
            printf -v "${1#--}" %s "$2"
            shift 2 ;;
        --spot) spot=(--spot); shift ;;
        --delete) delete=yes; shift ;;
        -h | --help) usage; exit 0 ;;
        *) echo "error: unknown option $1" >&2; usage >&2; exit 2 ;;
    esac
done
for option in name zone type version; do
    [ -n "${!option}" ] || { echo "error: --$option is missing" >&2; usage >&2; exit 2; }
done
[ $# -ge 2 ] || { usage >&2; exit 2; }
config=$1 workdir=$2
shift 2
cd "$(dirname "$0")/.."
POLL=${POLL:-30} # seconds between two looks at the queue
RETRIES=3        # on a slice that is still there

tpus() { gcloud compute tpus "$@" --zone="$zone"; }
on_all() { tpus tpu-vm ssh "$name" --worker=all --command="$1"; }
request_state() { tpus queued-resources describe "$name" --format='value(state.state)' 2>/dev/null || true; }
node_state() { tpus tpu-vm describe "$name" --format='value(state)' 2>/dev/null || true; }

remove() {
    if [ -n "$(request_state)" ]; then
        tpus queued-resources delete "$name" --force --quiet
    elif [ -n "$(node_state)" ]; then
        tpus tpu-vm delete "$name" --quiet
    fi
}

acquire() { # returns once the slice is there
    local node request
    while node=$(node_state) && [ "$node" != READY ]; do
        request=$(request_state)
        case $request in
            "" | FAILED | SUSPENDED)
                echo "== asking for $type as $name${request:+, was $request}"
                remove
                tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
                    --runtime-version="$version" "${spot[@]}" ;;
            *) echo "== $name: $request" ;;
        esac
        sleep "$POLL"
    done
}

install() { # the images' own Python is too old
    local archive
    archive=$(mktemp -d)
    git archive --output="$archive/addp_jax.tar.gz" HEAD &&
        tpus tpu-vm scp "$archive/addp_jax.tar.gz" "$name:" --worker=all &&
        on_all "set -e; mkdir -p addp_jax; tar xzf addp_jax.tar.gz -C addp_jax; cd addp_jax; python3 -m pip install --quiet --user uv
            [ -d .venv ] || ~/.local/bin/uv venv --quiet --python 3.12
            ~/.local/bin/uv pip install --quiet -e '.[tpu]'"
    local status=$?
    rm -r "$archive"
    return $status
}

signal() { on_all "pkill -$1 -f '[a]ddp_jax.main' || true"; } # the brackets: not the shell that runs this

run() {
    signal KILL # what an earlier, cut off connection left running would hold the chips
    on_all "set -e; $prepare; cd addp_jax
        exec .venv/bin/python -u -m addp_jax.main --distributed$(printf ' %q' --config="$config" --workdir="$workdir" "$@")"
}

trap 'signal TERM; exit 143' INT TERM # the run saves and stops
failures=0 status=1
while [ $failures -le $RETRIES ]; do
    acquire
    status=0
    { install && run "$@"; } || status=$?
    case $status in 0 | 2) break ;; esac
    sleep "$POLL" # a slice that is taken away says so a little later
    if [ "$(node_state)" = READY ]; then
        failures=$((failures + 1))
        echo "== the run ended with status $status ($failures of at most $RETRIES restarts)"
    else
        echo "== $name was taken away"
    fi
done
if [ $delete = yes ]; then
    remove
else
    echo "== $name is kept and costs money; to end it: gcloud compute tpus queued-resources delete $name --force --zone=$zone"
fi
exit $status
