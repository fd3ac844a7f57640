#!/usr/bin/env bash
# Trains on a TPU pod slice: the same command on every host of the slice; JAX finds the hosts from the TPU's metadata.
#
#   scripts/launch/tpu_pod.sh NAME ZONE \
#       bimedix-mixtral-8x7b --model /mnt/shared/Mixtral-8x7B-nf4 --data /mnt/shared/packed --out /mnt/shared/runs/bimedix
#
# NAME and ZONE are those of the TPU VM; BIMEDIX_HOME is the project's folder on its hosts (default ~/bimedix_jax).
set -euo pipefail

if (($# < 3)); then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
name=$1 zone=$2
shift 2
printf -v options ' %q' "$@"
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all \
    --command "cd ${BIMEDIX_HOME:-\~/bimedix_jax} && .venv/bin/bimedix train$options --distributed"
