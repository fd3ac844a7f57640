# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh. The virtual environment .venv at the root is made with the first Python found;
# `test.sh --python 3.12` has its own, .venv-py3.12. Each holds what a file in constraints/ pins: py3.11.txt, or py3.12.txt
# for Python 3.12 and 3.13, where JAX is newer.
# Interrupt it at any time and run it again: what is half-done is completed, what is done is skipped.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
VERSIONS=(3.11 3.12 3.13) # of Python, that an environment may have; use_python leaves one

stop() {
    echo "error: $*" >&2
    exit 1
}

# use_python X.Y: the environment of one version of Python, .venv-pyX.Y.
use_python() {
    [[ " ${VERSIONS[*]} " == *" $1 "* ]] || stop "Python '$1' is not supported; choose one of ${VERSIONS[*]}"
    VERSIONS=("$1")
    VENV="$ROOT/.venv-py$1"
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

is_supported() {
    local version
    version="$(version_of "$1")" && [[ " ${VERSIONS[*]} " == *" $version "* ]]
}

# Name of a Python of VERSIONS: $PYTHON if it is set, else the first found. Where one version was asked for, $PYTHON may
# have another, and pyenv's folder is looked into, since its commands run only the versions that were chosen.
find_python() {
    local candidate candidates=(python3 python3.12 python3.11 python3.13)
    if ((${#VERSIONS[@]} == 1)); then
        candidates=(${PYTHON:+"$PYTHON"} "python${VERSIONS[0]}" python3
            "${PYENV_ROOT:-$HOME/.pyenv}/versions/${VERSIONS[0]}".*/bin/python)
    elif [[ -n "${PYTHON:-}" ]]; then
        candidates=("$PYTHON")
    fi
    for candidate in "${candidates[@]}"; do
        if command -v "$candidate" >/dev/null && is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    stop "no Python found that is one of: ${VERSIONS[*]} (looked at: ${candidates[*]}); install one, or name one:" \
        "PYTHON=/path/to/python${VERSIONS[0]} $0"
}

# The file of constraints/ that fits the environment's Python.
constraints() {
    case "$(version_of "$VENV/bin/python")" in
        3.11) echo "$ROOT/constraints/py3.11.txt" ;;
        *) echo "$ROOT/constraints/py3.12.txt" ;;
    esac
}

# What an environment must have been made from to be current.
fingerprint() {
    "$VENV/bin/python" - "$(constraints)" "$ROOT/setup.py" <<'PYTHON'
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
        stop "$VENV has $("$VENV/bin/python" --version), which is none of: ${VERSIONS[*]}; delete that folder and start again"
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
        --constraint "$(constraints)" --editable "$ROOT$extras" >&2 ||
        stop "pip could not install the packages (its messages are above); with a connection, run this again to continue"
    echo "$stamp" >"$VENV/.ready-$kind"
}
