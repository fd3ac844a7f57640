"""The folder of a run. Only the same experiment can resume it, on any mesh.

config.json                     the resolved experiment
plan.safetensors                the routing plan, if the run has one
run.json                        versions, devices, coverage table, fingerprints, all starts
metrics.jsonl                   one line for each step
metrics.superseded-N.jsonl      lines of steps that a resumed run repeated
skipped.jsonl, orders.json      steps that were skipped, with their records, and other orders of the data
                                (training/skips.py)
checkpoints/STEP/               training states (checkpoint/steps.py)
probe/                          routes of a fixed set of rows over training (training/probe.py)
adapter/ or model/              the trained adapters or model, at the end
wandb/                          the copy for Weights & Biases, if tracking is on
run.lock                        held by the process that writes the folder, removed at its end
"""

import contextlib
import dataclasses
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from bimedix_jax import distributed
from bimedix_jax.checkpoint.steps import newest_valid, restore_step, steps_in
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment, differences, read
from bimedix_jax.files import write_text
from bimedix_jax.models.routers import RoutingPlan
from bimedix_jax.process import folders, signals
from bimedix_jax.routing.plans import read_plan, write_plan
from bimedix_jax.training.metadata import RUN
from bimedix_jax.training.metrics_file import METRICS, readable, rewind
from bimedix_jax.training.skips import SKIPPED
from bimedix_jax.training.state import TrainState

log = logging.getLogger(__name__)

CONFIG, PLAN, CHECKPOINTS, PROBE = "config.json", "plan.safetensors", "checkpoints", "probe"


@contextlib.contextmanager
def one_writer(folder: Path, experiment: Experiment, resume: bool) -> Iterator[None]:
    """Locks the folder for this run. Of several processes of a run, only process 0 writes.

    A run that ends before its first step is logged leaves nothing: its folder is removed, if it is new.

    Raises:
      BimedixError: another process writes the folder, it cannot be written, or as `check_folder`.
    """
    with contextlib.ExitStack() as stack:
        distributed.on_process_zero(lambda: stack.enter_context(_held(folder, experiment, resume)))
        yield


@contextlib.contextmanager
def _held(folder: Path, experiment: Experiment, resume: bool) -> Iterator[None]:
    check_folder(folder, experiment, resume)  # before anything is created in a folder that is not ours
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(folders.made_parents(folder))
            stack.enter_context(folders.one_writer(folder, "trains"))
        except OSError as error:
            raise BimedixError(f"cannot write to {folder} ({error.strerror}); name a writable folder.") from error
        check_folder(folder, experiment, resume)  # again, since another run may have ended there in the meantime
        if (folder / CHECKPOINTS).is_dir():
            folders.sweep(folder / CHECKPOINTS)
        if not resume:
            stack.enter_context(signals.on_abandon(lambda: remove_failed_start(folder)))
        try:
            yield
        except BaseException:
            if not resume:
                with signals.shielded():
                    remove_failed_start(folder)
            raise


def remove_failed_start(folder: Path) -> None:
    """Removes what a new run has written, if no step of it is logged, skipped or saved."""
    metrics = folder / METRICS
    if steps_in(folder / CHECKPOINTS) or (metrics.is_file() and metrics.stat().st_size > 0):
        return
    if (folder / SKIPPED).is_file():  # the report of a run that diverged
        return
    for name in (CONFIG, PLAN, RUN, METRICS, folders.LOCK):
        (folder / name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, "wandb", PROBE):
        shutil.rmtree(folder / name, ignore_errors=True)


def check_folder(folder: Path, experiment: Experiment, resume: bool) -> None:
    """Raises BimedixError unless `folder` is empty, or, with `resume`, contains a run of the same experiment.

    The mesh may be another one: a checkpoint has whole arrays.
    """
    if not resume:
        if (folder / CONFIG).is_file():
            raise BimedixError(
                f"{folder} already exists; pass --resume to continue it, or name another folder with --out."
            )
        # a lock alone is that of a process that was killed before it began
        if folder.is_file() or (folder.is_dir() and any(path.name != folders.LOCK for path in folder.iterdir())):
            raise BimedixError(f"{folder} already exists and contains no run; name another folder with --out.")
        return
    if not (folder / CONFIG).is_file():
        raise BimedixError(f"{folder} contains no run to resume (no {CONFIG}); start one without --resume.")
    began = read(folder / CONFIG)
    same = dataclasses.replace(experiment, steps=experiment.steps or began.steps, mesh=began.mesh)
    changed = differences(same, began)
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
        warn_other_mesh(folder, experiment)
        write_text(folder / CONFIG, experiment.to_json())
        if plan is not None:
            write_plan(plan, folder / PLAN)
    except OSError as error:
        raise BimedixError(f"cannot write to {folder} ({error.strerror}); name a writable folder.") from error


def warn_other_mesh(folder: Path, experiment: Experiment) -> None:
    """Warns if the run in `folder` was on another mesh until now."""
    if not (folder / CONFIG).is_file() or (before := read(folder / CONFIG).mesh) == experiment.mesh:
        return
    dropout = experiment.lora is not None and experiment.lora.dropout > 0
    log.warning(
        "%s was trained on %s and resumes on %s: the data keep their order, and its numbers are equal up to rounding%s",
        folder,
        "one device" if before is None else before,
        "one device" if experiment.mesh is None else experiment.mesh,
        ", except that dropout draws other masks" if dropout else "",
    )


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, which may be damaged; 0 without one."""
    return max(steps_in(folder / CHECKPOINTS), default=0)


def last_logged(folder: Path) -> int:
    """The last step that has a line in metrics.jsonl or in skipped.jsonl; 0 without one.

    Both files are synced to the disk before each checkpoint, so a checkpoint of a later step means that lines were lost
    afterwards. A run that resumes from an earlier checkpoint writes them again. Warns in this case.
    """
    lines = [value for name in (METRICS, SKIPPED) for _, value in readable(folder / name)]
    last = max((line["step"] for line in lines), default=0)
    if last < newest_step(folder):
        log.warning(
            "%s ends at step %d, before the checkpoint of step %d: lines were lost; the run resumes from an earlier "
            "checkpoint, if there is one",
            folder / METRICS,
            last,
            newest_step(folder),
        )
    return last


def bound_as(restored: jax.Array, fresh: jax.Array) -> jax.Array:
    """The restored array; bound to no device if `fresh` is not, as counts are, so that they fit any mesh."""
    return restored if getattr(fresh, "committed", True) else jnp.asarray(np.asarray(restored))


def resume_state(folder: Path, fresh: TrainState, console: Console) -> TrainState:
    """The state of the newest valid checkpoint, or `fresh` without one. Truncates metrics.jsonl to that step."""
    checkpoints, began = folder / CHECKPOINTS, time.perf_counter()
    state = fresh
    if steps_in(checkpoints):
        state, _ = restore_step(checkpoints, newest_valid(checkpoints, last_logged(folder)), fresh)
        state = jax.tree.map(bound_as, state, fresh)
        seconds = time.perf_counter() - began
        console.print(f"restored the state of step {int(state.step)} in {seconds:.2f} s", highlight=False)
    else:
        console.print(f"{folder} has no checkpoint yet: starting from the beginning", highlight=False)
    step = int(state.step)
    side = rewind(folder, step) if distributed.is_process_zero() else None
    if side is not None:
        console.print(
            f"metrics of steps after {step} were moved to {side.name}; these steps are repeated", highlight=False
        )
    return state
