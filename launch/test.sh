#!/usr/bin/env bash
# Sets everything up and runs the tests.
usage() {
    cat <<'HELP'
launch/test.sh [--fast] [--slow] [ARGUMENT...]

  --fast        under three minutes: leaves out the tests that are marked medium or slow
  --slow        also those marked slow; the default leaves only these out
  ARGUMENT...   for pytest: -k sampling, -x, ...
HELP
}
set -euo pipefail
case ${1:-} in -h | --help) usage; exit 0 ;; esac
# shellcheck source=launch/setup.sh
. "$(dirname "$0")/setup.sh"
exec python -m pytest tests --numprocesses=2 --dist=loadfile "$@"
