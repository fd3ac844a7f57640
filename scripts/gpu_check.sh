#!/usr/bin/env bash
# Everything that one NVIDIA GPU can check, in at most 8 minutes after the installation. One JSON document on stdout.
#     scripts/gpu_check.sh                       installs into .venv, then checks
#     scripts/gpu_check.sh --budget 300          stops starting new checks after 300 seconds
#     scripts/gpu_check.sh --only kernels        one check: kernels, step, train or decode
# Without a GPU it says so and exits with 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! command -v nvidia-smi >/dev/null || ! nvidia-smi --query-gpu=name --format=csv,noheader >/dev/null 2>&1; then
    echo "No NVIDIA GPU was found (nvidia-smi does not answer): nothing to check." >&2
    exit 0
fi
source scripts/setup_env.sh
ensure_env gpu "[dev,data,eval,serve,aot,cuda12]" "about 6 GB to download and 12 GB on disk, CUDA builds of jax and torch included"
exec "$VENV/bin/python" scripts/gpu_check.py "$@"
