#!/usr/bin/env bash
# One run on Cloud TPU slices that are made, made again when they are taken away, and kept until told otherwise.
usage() {
    cat <<'HELP'
launch/tpu_pod.sh OPTION... CONFIG WORKDIR [FLAG...]

  --name NAME              of the slice; one with this name is used as it is
  --zone ZONE              such as us-west4-a
  --type TYPE              such as v5litepod-256 or v4-256
  --version VERSION        runtime, such as v2-alpha-tpuv5-lite (v5e), v2-alpha-tpuv5 (v5p), v2-alpha-tpuv6e, tpu-ubuntu2204-base (v4)
  --slices N               so many of them as one run, called NAME-0, NAME-1, ...
  --spot                   cheaper, and may be taken away at any moment
  --prepare COMMAND        run on every worker before each start, in the trainer's shell: mounts the folder with the data
                           and WORKDIR, unless that is done already; may export variables
  --gcloud-flag FLAG       for `gcloud compute tpus queued-resources create`: --reserved, --internal-ips, --network=NET, ...
  --gcloud-ssh-flag FLAG   for `gcloud compute tpus tpu-vm ssh` and `scp`: --internal-ip, ...; both may be repeated
  --delete                 delete the slice when the run has ended, also when it has failed
  CONFIG                   such as configs/vitl.py
  WORKDIR                  folder of the run that all workers share
  FLAG...                  for python -m addp_jax.main

Waits in the queue for the slice, copies the committed state of this repository to all workers, starts the run there and
shows the first worker's log. The run does not need this program: when it dies, the same command finds the run and follows
it. Ctrl-C or SIGTERM: the run saves and stops; a second one leaves it alone.
A slice that is taken away is asked for again, and the run goes on where it was. A run that fails is started again, until
three starts in a row have brought no new checkpoint; one with a mistake in its flags (exit status 2) is not.
The project is gcloud's: gcloud config set project PROJECT.
CHIP: whose launch/flags are used (default: that of TYPE). POLL: seconds between two looks (default 30).
HELP
}
set -euo pipefail
name="" zone="" type="" version="" prepare=: slices=1 delete=no create=() ssh=()
while [[ ${1:-} == -* ]]; do
    case $1 in
        --name | --zone | --type | --version | --prepare | --slices | --gcloud-flag | --gcloud-ssh-flag)
            [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
            case $1 in
                --gcloud-flag) create+=("$2") ;;
                --gcloud-ssh-flag) ssh+=("$2") ;;
                *) printf -v "${1#--}" %s "$2" ;;
            esac
            shift 2 ;;
        --spot) create+=(--spot); shift ;;
        --delete) delete=yes; shift ;;
        -h | --help) usage; exit 0 ;;
        *) echo "error: unknown option $1" >&2; usage >&2; exit 2 ;;
    esac
done
for option in name zone type version; do
    [ -n "${!option}" ] || { echo "error: --$option is missing" >&2; usage >&2; exit 2; }
done
[ $# -ge 2 ] || { usage >&2; exit 2; }
case $slices in '' | 0* | *[!0-9]*) echo "error: --slices $slices is not a number of slices" >&2; exit 2 ;; esac
cd "$(dirname "$0")/.."
case $type in v5lite*) chip=v5e ;; *) chip=${type%%-*} ;; esac
chip=${CHIP:-$chip}
nodes=("$name") called=(--node-id="$name")
if [ "$slices" -gt 1 ]; then
    mapfile -t nodes < <(seq -f "$name-%g" 0 $((slices - 1)))
    called=(--node-count="$slices" --node-prefix="$name")
fi
POLL=${POLL:-30}
CALL_LIMIT=900                   # seconds that one call of gcloud may take
STATE_LIMIT=${STATE_LIMIT:-3600} # seconds in a state that leads to another, such as CREATING; the queue has no limit
END_LIMIT=${END_LIMIT:-60}       # seconds that the other workers have when the first has ended; jax ends them after 30
CALLS=12                         # so many calls of gcloud may fail one after the other
STARTS=3                         # so many starts in a row may bring no new checkpoint
scratch=$(mktemp -d)
over=no     # whether nothing runs on the slice any more that this program knows of
stopping=no # whether the run is asked to stop
failed=0    # calls of gcloud in a row

leave() {
    local status=$?
    trap '' INT TERM
    if [ $over = no ]; then
        echo "== what is on $name goes on; the same command follows it, and Ctrl-C then stops it"
    elif [ $delete = no ] || ! { remove || { pause 1 && remove; } || { pause 2 && remove; }; }; then
        echo "== $name is kept and costs money; to end it: gcloud compute tpus queued-resources delete $name --force --zone=$zone"
    fi
    rm -rf "$scratch"
    [ -z "${agent:-}" ] || kill "$agent"
    exit $status
}
interrupted() {
    [ $stopping = no ] || exit 130
    stopping=yes
    echo "== the run is asked to save and stop; again: leave it alone"
}
trap leave EXIT
trap interrupted INT TERM

pause() { # after so many failures
    sleep $((POLL * (1 << ($1 < 3 ? $1 : 3)))) &
    wait $! || true # a signal ends the wait
}

tpus() { timeout --kill-after=30 $CALL_LIMIT gcloud compute tpus "$@" --zone="$zone" </dev/null; }

give_up() { # status, why
    echo "error: $2" >&2
    over=yes
    exit "$1"
}

stumble() { # after a call that failed
    failed=$((failed + 1))
    [ $failed -lt $CALLS ] || give_up 1 "gcloud has failed $failed times in a row"
    pause $failed
}

# --- the slice --------------------------------------------------------------------------------------

# In functions that `leave` calls, a plain `return` would mean the status before it.
describe() { # prints the state or ABSENT; fails if gcloud does not tell
    if tpus "$1" describe "$2" --format="value($3)" 2>"$scratch/problem"; then return 0; fi
    grep -q NOT_FOUND "$scratch/problem" && echo ABSENT && return 0
    cat "$scratch/problem" >&2
    return 1
}

slice_state() { # READY, ABSENT, or the one of the nodes' and the request's that says most
    local node state request worst=READY
    for node in "${nodes[@]}"; do
        state=$(describe tpu-vm "$node" state) || return
        case $state in
            READY) ;;
            PREEMPTED | TERMINATED) echo "$state" && return ;;
            *) worst=$state ;;
        esac
    done
    [ "$worst" = READY ] && echo READY && return
    request=$(describe queued-resources "$name" state.state) || return
    case $request:$worst in
        ABSENT:* | ACTIVE:[!A]*) echo "$worst" ;;
        *) echo "$request" ;;
    esac
}

ask() {
    echo "== asking for $type as $name"
    tpus queued-resources create "$name" "${called[@]}" --accelerator-type="$type" --runtime-version="$version" "${create[@]}"
}

each_node() { # PATTERN COMMAND: the command of tpu-vm for the nodes in such a state
    local node state
    for node in "${nodes[@]}"; do
        state=$(describe tpu-vm "$node" state) || return 1
        [[ ! $state =~ $1 ]] || tpus tpu-vm "$2" "$node" --quiet || return 1
    done
}

remove() {
    local request
    request=$(describe queued-resources "$name" state.state) || return 1
    if [ "$request" = ABSENT ]; then each_node '^[^A]' delete; else tpus queued-resources delete "$name" --force --quiet; fi
}

acquire() { # returns once the slice is there
    local state before="" since=$SECONDS
    while :; do
        state=$(slice_state) || { stumble; continue; }
        [ "$state" != READY ] || return 0
        [ $stopping = no ] || give_up 143 "stopped before the run"
        [ "$state" = "$before" ] || { echo "== $name: $state"; before=$state since=$SECONDS; }
        case $state in
            ABSENT) ask || { stumble; continue; } ;;
            STOPPED) each_node '^STOPPED' start || { stumble; continue; } ;;
            PREEMPTED | TERMINATED | FAILED | SUSPENDED) remove || { stumble; continue; } ;;
            WAITING_FOR_RESOURCES | ACCEPTED) ;;
            *) [ $((SECONDS - since)) -lt "$STATE_LIMIT" ] || remove || { stumble; continue; } ;;
        esac
        failed=0
        pause 0
    done
}

# --- the run ----------------------------------------------------------------------------------------

on_all() { # workers of all nodes
    local node pid pids=() status=0
    for node in "${nodes[@]}"; do
        tpus tpu-vm ssh "$node" --worker=all "${ssh[@]}" --command="$1" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
    return $status
}

look() { # [byte]: sets id, trainer (running or its exit status) and step (newest checkpoint) from the first worker; its log from that byte on goes to $scratch/log
    tpus tpu-vm ssh "${nodes[0]}" --worker=0 "${ssh[@]}" \
        --command="[ ! -e tpu_worker.sh ] || bash tpu_worker.sh state $*" >"$scratch/answer" || return
    read -r _ id trainer step < <(grep -a '^addp_run ' "$scratch/answer" || echo "addp_run none 255") || true
    sed '0,/^addp_run /d' "$scratch/answer" >"$scratch/log"
}

copy() {
    local node
    for node in "${nodes[@]}"; do
        tpus tpu-vm scp "$scratch/addp_jax.tar.gz" launch/newest.sh launch/tpu_worker.sh "$node:" --worker=all "${ssh[@]}" || return
    done
}

follow() { # shows the log until the first worker has ended; fails if a call does
    while :; do
        [ $stopping != yes ] || { on_all "bash tpu_worker.sh stop" && stopping=asked; } || return
        look "$shown" || return
        cat "$scratch/log"
        shown=$((shown + $(wc -c <"$scratch/log")))
        failed=0
        [ "$trainer" = running ] || return 0
        pause 0
    done
}

outcome() { # sets status: 2 if a worker says so, or the highest of all
    local deadline=$((SECONDS + END_LIMIT))
    while :; do
        on_all "bash tpu_worker.sh state" >"$scratch/states" || return
        grep -qa "^addp_run $id running" "$scratch/states" && [ $SECONDS -lt $deadline ] || break
        pause 0
    done
    status=$(sed -n "s/^addp_run $id \([0-9]*\) .*/\1/p; s/^addp_run $id running .*/137/p" "$scratch/states" |
        sort -n | awk '{ highest = $1 } $1 == 2 { mistake = 1 } END { print mistake ? 2 : highest }')
    status=${status:-255}
}

persist() { # makes a call until it succeeds; fails if the slice is taken away meanwhile
    local state
    until "$@"; do
        stumble
        ! state=$(slice_state) || [ "$state" = READY ] || return 1
    done
    failed=0
}

git archive --output="$scratch/addp_jax.tar.gz" HEAD
if [ -f ~/.ssh/google_compute_engine ]; then # gcloud reaches several workers only with this key in an agent
    [ -n "${SSH_AUTH_SOCK:-}" ] || { eval "$(ssh-agent -s)" >/dev/null; agent=$SSH_AGENT_PID; }
    ssh-add -q ~/.ssh/google_compute_engine </dev/null || true
fi
command=$(printf '%s\n' "$prepare" "$@" | cksum | cut -d ' ' -f 1)
starts=0 newest=""
while :; do
    acquire
    persist look || continue
    shown=0
    if [ "$trainer" != running ]; then
        [ $stopping = no ] || give_up 143 "stopped before the run"
        id=$command-$(date +%s%N)
    elif [[ $id == "$command"-* ]]; then
        echo "== following the run that is on $name"
    else
        echo "error: another run is on $name; end it with Ctrl-C in its own command, or use another --name" >&2
        exit 2
    fi
    persist copy || continue
    persist on_all "bash tpu_worker.sh start$(printf ' %q' "$id" "$chip" "$prepare" "$@")" || continue
    persist follow || continue
    persist outcome || continue
    over=yes
    case $status in 0 | 2) exit "$status" ;; esac
    [ $stopping = no ] || exit "$status"
    over=no
    if [ "$step" = "$newest" ]; then starts=$((starts + 1)); else starts=1; fi
    newest=$step
    pause $starts # a slice that is taken away says so a little later
    if state=$(slice_state) && [ "$state" != READY ]; then
        echo "== $name was taken away"
        starts=$((starts - 1))
    else
        echo "== the run ended with status $status; newest checkpoint: ${step:-none}"
        [ $starts -lt $STARTS ] || give_up "$status" "$STARTS starts in a row without a new checkpoint"
    fi
done
