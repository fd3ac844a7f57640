#!/usr/bin/env bash
# From nothing to a fine-tuned bilingual mixture of experts, on a laptop. Arguments go to `bimedix quickstart`:
#     scripts/quickstart.sh             the real thing
#     scripts/quickstart.sh --smoke     the same way on a tiny random model, without further downloads
#     scripts/quickstart.sh --resume    continue after Ctrl-C
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

ensure_env run "" "about 0.25 GB to download, 1 GB on disk"

exec "$VENV/bin/bimedix" quickstart "$@"
