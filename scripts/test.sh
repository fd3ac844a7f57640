#!/usr/bin/env bash
# Everything that must pass: ruff, pyright, pytest. Arguments go to pytest:
#     scripts/test.sh                            all, on all cores
#     scripts/test.sh tests/test_files.py -x     one file
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

ensure_env test "[dev,data,serve,aot]" "about 1.2 GB to download and 4 GB on disk, or 4 and 8 GB where torch is a CUDA build"

cd "$ROOT"
export JAX_PLATFORMS=cpu
export PATH="$VENV/bin:$PATH"

echo "== ruff" >&2
ruff check
echo "== pyright" >&2
pyright
echo "== pytest" >&2
if (($# == 0)); then
    set -- -n auto --dist worksteal
fi
exec pytest "$@"
