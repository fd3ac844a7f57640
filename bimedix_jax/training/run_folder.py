"""The folder of a run. Only the same experiment can resume it.

config.json                     the resolved experiment
plan.safetensors                the routing plan, if the run has one
run.json                        versions, devices, coverage table, fingerprints, all starts
metrics.jsonl                   one line for each step
metrics.superseded-N.jsonl      lines of steps that a resumed run repeated
checkpoints/STEP/               training states (checkpoint/steps.py)
adapter/ or model/              the trained adapters or model, at the end
wandb/                          the mirror, if tracking is on
"""

import dataclasses
from pathlib import Path

from rich.console import Console

from bimedix_jax import distributed
from bimedix_jax.checkpoint.steps import newest_valid, restore_step, steps_in
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment, differences, read
from bimedix_jax.files import write_text
from bimedix_jax.models.routers import RoutingPlan
from bimedix_jax.routing.plans import read_plan, write_plan
from bimedix_jax.training.metrics import rewind
from bimedix_jax.training.state import TrainState

CONFIG, PLAN, CHECKPOINTS = "config.json", "plan.safetensors", "checkpoints"


def check_folder(folder: Path, experiment: Experiment, resume: bool) -> None:
    """Raises BimedixError unless `folder` is empty, or, with `resume`, contains a run of the same experiment."""
    if not resume:
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise BimedixError(
                f"{folder} already exists; pass --resume to continue it, or name another folder with --out."
            )
        return
    if not (folder / CONFIG).is_file():
        raise BimedixError(f"{folder} contains no run to resume (no {CONFIG}); start one without --resume.")
    began = read(folder / CONFIG)
    changed = differences(dataclasses.replace(experiment, steps=experiment.steps or began.steps), began)
    if changed:
        raise BimedixError(
            f"{folder} is a run of another experiment ({'; '.join(changed)}); resume it with that one "
            f"(--resume --out {folder} alone reads it from the folder), or start a new run."
        )


def check_plan(folder: Path, plan: RoutingPlan | None) -> None:
    """Raises BimedixError unless the run in `folder` has the same routing plan."""
    began = read_plan(folder / PLAN) if (folder / PLAN).is_file() else None
    if (began and began.digest()) == (plan and plan.digest()):
        return
    here, there = ("no routing plan" if one is None else f"plan {one.digest()[:12]}" for one in (plan, began))
    raise BimedixError(
        f"{folder} was started with {there}, and is resumed with {here}; pass the plan of the run "
        f"(bimedix_jax.routing.plans.read_plan reads its {PLAN}), or start a new run."
    )


def begin(folder: Path, experiment: Experiment, plan: RoutingPlan | None = None) -> None:
    """Creates the folder and writes the experiment and the plan."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG, experiment.to_json())
        if plan is not None:
            write_plan(plan, folder / PLAN)
    except OSError as error:
        raise BimedixError(f"cannot write to {folder} ({error.strerror}); name a writable folder.") from error


def resume_state(folder: Path, fresh: TrainState, console: Console) -> TrainState:
    """The state of the newest valid checkpoint, or `fresh` without one. Truncates metrics.jsonl to that step."""
    checkpoints = folder / CHECKPOINTS
    state = fresh
    if steps_in(checkpoints):
        state, _ = restore_step(checkpoints, newest_valid(checkpoints), fresh)
    else:
        console.print(f"{folder} has no checkpoint yet: starting from the beginning", highlight=False)
    step = int(state.step)
    side = rewind(folder, step) if distributed.is_process_zero() else None
    if side is not None:
        console.print(
            f"metrics of steps after {step} were moved to {side.name}; these steps are repeated", highlight=False
        )
    return state
