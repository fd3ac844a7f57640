#!/usr/bin/env bash
# From nothing to a fine-tuned bilingual mixture of experts, on a laptop. Arguments go to `bimedix quickstart`:
#     scripts/quickstart.sh             the full run
#     scripts/quickstart.sh --smoke     the same pipeline on a tiny random model, which is not downloaded
#     scripts/quickstart.sh --resume    resume after Ctrl-C
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

ensure_env run "" "about 0.25 GB to download, 1 GB on disk"

exec "$VENV/bin/bimedix" quickstart "$@"
