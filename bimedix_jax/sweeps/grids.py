"""The runs of a sweep as work for engines that exist: a SLURM array job, and a W&B sweep. Both call `bimedix sweep`."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bimedix_jax.files import write_text
from bimedix_jax.sweeps.folder import Run, write_json

PROGRAM = (sys.executable, "-m", "bimedix_jax")

SLURM = """#!/usr/bin/env bash
# {study} at size {size}: task i is run i of the sweep. A task that is requeued or repeated resumes its run, or skips it
# if it is finished. Add what a run needs:
#
#     sbatch --cpus-per-task 8 --gpus-per-task 1 --time 4:00:00 {script}
#
# A run over several nodes has a file in {experiments}. Train it with scripts/launch/slurm.sh and its folder's
# `training` as --out; a task of this job then only evaluates it.
#SBATCH --job-name={study}-{size}
#SBATCH --array=0-{last}
#SBATCH --output={logs}/slurm-%A_%a.log
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
set -euo pipefail

if [[ -z "${{SLURM_ARRAY_TASK_ID:-}}" ]]; then
    echo "error: this is no task of a SLURM array; submit it with sbatch (its first lines show how)" >&2
    exit 2
fi
runs=(
{runs}
)
read -r arm seed <<<"${{runs[SLURM_ARRAY_TASK_ID]}}"
cd {here}
# SLURM warns 120 s before the time limit; the run then saves a checkpoint
{command} --only "$arm" --seed "$seed" &
run=$!
trap 'kill -TERM "$run"' TERM
code=0
wait "$run" || code=$?
# the signal ends the first wait, while the run still saves
if ((code > 128)) && kill -0 "$run" 2>/dev/null; then
    code=0
    wait "$run" || code=$?
fi
exit "$code"
"""


def command(study: Path, words: Sequence[str]) -> list[str]:
    """`bimedix sweep run` with absolute paths, for a process that starts elsewhere."""
    return [*PROGRAM, "sweep", "run", str(study.resolve()), *words]


def write_slurm(folder: Path, runs: Sequence[Run], study: Path, words: Sequence[str]) -> Path:
    """Writes an array job with a task for each run, and the experiment of each run as a file. Returns the job."""
    experiments = folder.resolve() / "experiments"
    experiments.mkdir(parents=True, exist_ok=True)
    for run in runs:
        write_text(experiments / f"{run.folder.name}.json", run.experiment.to_json())
    script = folder / "array.sbatch"
    text = SLURM.format(
        study=runs[0].study,
        size=runs[0].size,
        script=script,
        experiments=experiments,
        last=len(runs) - 1,
        logs=folder.resolve(),
        runs="\n".join(f'    "{run.arm} {run.seed}"' for run in runs),
        here=shlex.quote(str(Path.cwd())),
        command=shlex.join(command(study, words)),
    )
    write_text(script, text)
    return script


def write_wandb_sweep(folder: Path, runs: Sequence[Run], study: Path, words: Sequence[str]) -> Path:
    """Writes the grid as the configuration of a W&B sweep, in JSON, which is also YAML. Returns the file.

    An agent fills in `--only=ARM --seed=N`.
    """
    parameters = {
        "only": {"values": list(dict.fromkeys(run.arm for run in runs))},
        "seed": {"values": sorted({run.seed for run in runs})},
    }
    document = {
        "name": f"{runs[0].study}-{runs[0].size}",
        "program": str(study.resolve()),
        "method": "grid",
        "parameters": parameters,
        "command": [*command(study, words), "${args}"],
    }
    path = folder / "wandb-sweep.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, document)
    return path
