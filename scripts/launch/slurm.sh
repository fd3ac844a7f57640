#!/usr/bin/env bash
# Trains over several hosts under SLURM, one process a GPU; JAX finds the processes from SLURM's environment.
#
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-task 1 --cpus-per-task 8 scripts/launch/slurm.sh \
#       bimedix-mixtral-8x7b --model /shared/Mixtral-8x7B-nf4 --data /shared/packed --out /shared/runs/bimedix
#
# --out must be on a file system that all hosts share. The same command with --resume resumes a run.
#SBATCH --job-name=bimedix
#SBATCH --output=bimedix-%j.log
#SBATCH --signal=B:TERM@120
set -euo pipefail

if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    echo "error: this is no SLURM job; submit it with sbatch (the first lines of $0 show how)" >&2
    exit 2
fi
# SLURM runs a copy of this script, so the project is in the folder from which the job was submitted
cd "${BIMEDIX_HOME:-$SLURM_SUBMIT_DIR}"
# SLURM warns 120 s before the time limit; every process then saves its part of a checkpoint
srun --kill-on-bad-exit=1 .venv/bin/bimedix train "$@" --distributed &
trap 'kill -TERM %1' TERM
wait %1 || { code=$?; wait %1 || exit "$code"; }
