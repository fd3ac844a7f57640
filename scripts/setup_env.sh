# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh. One virtual environment, .venv at the root, holds what constraints.txt pins.
# Interrupt it at any time and run it again: what is half-done is completed, what is done is skipped.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

stop() {
    echo "error: $*" >&2
    exit 1
}

is_supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

# Name of a Python from 3.11 to 3.13: $PYTHON if it is set, else the first found.
find_python() {
    local candidate candidates=(python3 python3.12 python3.11 python3.13)
    if [[ -n "${PYTHON:-}" ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if command -v "$candidate" >/dev/null && is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    stop "no Python 3.11, 3.12 or 3.13 found (looked at: ${candidates[*]}); install one, or name one:" \
        "PYTHON=/path/to/python3.12 $0"
}

# What an environment must have been made from to be current.
fingerprint() {
    "$VENV/bin/python" - "$ROOT/constraints.txt" "$ROOT/setup.py" <<'PYTHON'
import hashlib, pathlib, sys
parts = [sys.version, sys.prefix, *(pathlib.Path(name).read_text("utf-8") for name in sys.argv[1:])]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PYTHON
}

# ensure_env KIND EXTRAS SIZE: KIND is "run" or "test"; an environment for tests serves for running too.
ensure_env() {
    local kind="$1" extras="$2" size="$3" python stamp
    if ! "$VENV/bin/python" --version >/dev/null 2>&1; then
        python="$(find_python)"
        echo "Creating $VENV with $("$python" --version)" >&2
        "$python" -m venv --clear "$VENV" ||
            stop "$python cannot create $VENV; on Debian and Ubuntu install the package python3-venv"
    fi
    is_supported "$VENV/bin/python" ||
        stop "$VENV has $("$VENV/bin/python" --version), but 3.11, 3.12 or 3.13 is needed; delete that folder and start again"
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        "$VENV/bin/python" -m ensurepip >&2 || stop "$VENV has no pip and cannot get it; delete that folder and start again"
    fi
    stamp="$(fingerprint)"
    if [[ "$(cat "$VENV/.ready-test" 2>/dev/null)" == "$stamp" || "$(cat "$VENV/.ready-$kind" 2>/dev/null)" == "$stamp" ]]; then
        return
    fi
    echo "Installing into $VENV with pip, once: $size" >&2
    rm -f "$VENV"/.ready-*
    "$VENV/bin/python" -m pip install --disable-pip-version-check \
        --constraint "$ROOT/constraints.txt" --editable "$ROOT$extras" >&2 ||
        stop "pip could not install the packages (its messages are above); with a connection, run this again to continue"
    echo "$stamp" >"$VENV/.ready-$kind"
}
