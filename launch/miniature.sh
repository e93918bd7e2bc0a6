#!/usr/bin/env bash
# Installs if need be, then launch/miniature.py: see there, or --help.
set -euo pipefail
# shellcheck source=launch/here.sh
. "$(dirname "$0")/here.sh"
exec python "$root/launch/miniature.py" "$@"
