#!/usr/bin/env bash
# Trains over hosts that ssh reaches without a password, one process a host with all its devices.
#
#   scripts/launch/ssh.sh "host1 host2" \
#       bimedix-mixtral-8x7b --model /shared/Mixtral-8x7B-nf4 --data /shared/packed --out /shared/runs/bimedix
#
# The project must be in the same folder on all hosts (BIMEDIX_HOME, default: here). The first host coordinates on
# BIMEDIX_PORT (default 7733), which the others must reach. When one process ends, the others are stopped.
set -euo pipefail

if (($# < 2)); then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
read -r -a hosts <<<"$1"
shift
home=${BIMEDIX_HOME:-$(cd "$(dirname "$0")/../.." && pwd)}
printf -v options ' %q' "$@"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
for number in "${!hosts[@]}"; do
    # -tt: the remote process gets SIGHUP when this ssh ends
    ${BIMEDIX_SSH:-ssh -tt} "${hosts[number]}" "cd $(printf %q "$home") && BIMEDIX_COORDINATOR=${hosts[0]}:${BIMEDIX_PORT:-7733} \
BIMEDIX_PROCESSES=${#hosts[@]} BIMEDIX_PROCESS=$number .venv/bin/bimedix train$options --distributed" &
done
code=0
for _ in "${hosts[@]}"; do
    wait -n || { code=$?; break; }
done
exit "$code"
