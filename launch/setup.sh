# Sourced by the other scripts: changes to the repository root and enters its virtual environment
# (.venv, or $VENV), made and installed when missing or when requirements.txt or setup.py have changed.
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

enter_venv() {
    local wanted
    wanted=$(cat requirements.txt setup.py | cksum)
    if [ "$(cat "$VENV/installed" 2>/dev/null)" != "$wanted" ]; then
        local python
        python=$(find_python) || exit 1
        echo "== installing into $VENV"
        "$python" -m venv "$VENV"
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[test]' || exit 1
        echo "$wanted" >"$VENV/installed"
    fi
    # shellcheck disable=SC1091
    . "$VENV/bin/activate"
    export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/xla}
}

enter_venv
