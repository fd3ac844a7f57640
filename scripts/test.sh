#!/usr/bin/env bash
# Everything that must pass: ruff, pyright, pytest. Arguments go to pytest:
#     scripts/test.sh                                  all, on all cores
#     scripts/test.sh tests/test_files.py -x           one file
#     scripts/test.sh --python 3.12 tests/models       on Python 3.12, in .venv-py3.12: there and on 3.13 with the newest JAX
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

if [[ "${1:-}" == --python ]]; then
    (($# > 1)) || stop "--python needs a version, one of ${VERSIONS[*]}"
    use_python "$2"
    shift 2
fi
# the size of the CUDA build is that of torch's wheel on PyPI for Linux
ensure_env test "[dev,data,eval,serve,aot]" "about 1.2 GB to download and 4 GB on disk, or 4 and 8 GB where torch is a CUDA build"

cd "$ROOT"
export JAX_PLATFORMS=cpu
export PATH="$VENV/bin:$PATH"

echo "== ruff" >&2
ruff check
echo "== pyright" >&2
pyright --pythonpath "$VENV/bin/python"
echo "== pytest" >&2
if (($# == 0)); then
    set -- -n auto --dist worksteal
fi
exec pytest "$@"
