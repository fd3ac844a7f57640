"""Runs a study: makes its inputs, starts the runs that are not finished, and writes the report.

This process imports no JAX, so that the devices belong to the runs.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bimedix_jax import files
from bimedix_jax.errors import BimedixError, listed
from bimedix_jax.process import signals
from bimedix_jax.sweeps import folder as place
from bimedix_jax.sweeps import inputs
from bimedix_jax.sweeps.folder import Run, log_incident, run_of, study_folder, write_json, write_study
from bimedix_jax.sweeps.inputs import Fingerprints
from bimedix_jax.sweeps.queue import BUSY, Job, machine, reason_of, run_jobs, shares
from bimedix_jax.sweeps.study import Size, Study
from bimedix_jax.training import dry_run
from bimedix_jax.training.stopping import Interrupted, StopRequest

WORKER = (sys.executable, "-m", "bimedix_jax.sweeps.worker")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A study at a size in a folder, with the options of the command line applied.

    Attributes:
      changes: fields of every arm, by dotted name, that the command line sets.
      arms, seeds: of the runs that this command wants.
    """

    study: Study
    name: str
    size: Size
    out: Path
    changes: Mapping[str, Any]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def folder(self) -> Path:
        return study_folder(self.out, self.study.name, self.name)

    @property
    def inputs_folder(self) -> Path | None:
        """Where the inputs of the runs are; None if the experiments name their own."""
        if self.size.inputs is None:
            return None
        return self.size.inputs.folder((self.out / place.INPUTS).resolve(), self.length)

    @property
    def length(self) -> int:
        """Tokens of a row, which all arms share where the rows are packed for them."""
        lengths = {self.study.experiment(arm, 0, self.name).data.sequence_length for arm in self.study.arms}
        if len(lengths) > 1:
            raise BimedixError(f"{self.study.path}: arms with inputs need one data.sequence_length, not {lengths}.")
        return lengths.pop()

    def all_changes(self) -> dict[str, Any]:
        """Every field that differs from the arm: those of the inputs, then those of the command line."""
        made = {}
        if self.size.inputs is not None and self.inputs_folder is not None:
            made = self.size.inputs.changes(self.inputs_folder)
        return {**made, **self.changes}

    def grid(self, keep: bool = False) -> tuple[list[Run], list[Run]]:
        """(all runs of the study, those that this command wants). The inputs must exist.

        All are those of every arm with the seeds of this command or of earlier ones in the folder.

        Args:
          keep: keep the hashes of large files in the folder.
        """
        prints, known = Fingerprints(self.out / "fingerprints.json"), {*self.seeds}
        known |= {run["seed"] for run in files.peek_json(self.folder / place.STUDY).get("runs", ())}
        changes = self.all_changes()
        runs = [
            run_of(self.study, self.name, arm, seed, self.out.resolve(), changes, prints, self.size)
            for arm in self.study.arms
            for seed in sorted(known)
        ]
        if keep:
            self.out.mkdir(parents=True, exist_ok=True)
            prints.save()
        return runs, [run for run in runs if run.arm in self.arms and run.seed in self.seeds]


def prepare_inputs(plan: Plan, console: Console) -> None:
    """Makes what the runs read, unless it is there. Raises BimedixError if a command fails."""
    if plan.size.inputs is None or plan.inputs_folder is None:
        return

    def command(words: Sequence[str], log: Path) -> None:
        console.print(f"bimedix {' '.join(words)}", highlight=False)
        job = Job("inputs", [*WORKER, "command", *words], log)
        with stopping(console) as stop:
            for _, code, _ in run_jobs([job], shares(1, {}, 0, []), environment(plan), stop, lambda job: None):
                if stop():
                    raise Interrupted("the same command continues it")
                if code:
                    raise BimedixError(f"the inputs cannot be made: {reason_of(log, code)} (all output is in {log})")

    def waiting() -> None:
        console.print(f"another process makes the inputs in {plan.inputs_folder}; waiting for it", highlight=False)

    inputs.prepare(plan.size.inputs, plan.inputs_folder, plan.length, command, waiting)


def environment(plan: Plan) -> dict[str, str]:
    """Variables of the runs: they share compiled programs, which a user's own setting replaces."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str((plan.out / place.CACHE).resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    return {**cache, **os.environ}


@contextlib.contextmanager
def stopping(console: Console) -> Iterator[Any]:
    """Within the block the first Ctrl-C or SIGTERM makes the yielded function true; a second one interrupts."""
    with StopRequest(console) as stop:
        yield lambda: stop.requested


def run_all(plan: Plan, runs: Sequence[Run], jobs: int, retry: bool, console: Console) -> set[str]:
    """Runs what is not finished. Returns the identities of the runs that another process is running.

    Raises:
      Interrupted: Ctrl-C or SIGTERM; the runs have saved their state.
    """
    todo = [run for run in runs if run.state() in ("waiting", "unfinished") or (retry and run.state() == "crashed")]
    tell(plan, runs, todo, jobs, console)
    by_folder = {str(run.folder): run for run in todo}
    queue = [Job(str(run.folder), [*WORKER, "run", str(run.folder)], run.folder / place.LOG) for run in todo]
    gpus, cores = machine()
    divided, elsewhere, ended = shares(jobs, os.environ, gpus, cores), set[str](), 0

    def started(job: Job) -> None:
        run = by_folder[job.name]
        console.print(f"{run.label}: {'resumes' if run.state() == 'unfinished' else 'starts'}", highlight=False)
        (run.folder / place.CRASH).unlink(missing_ok=True)
        run.write()
        log_incident(run, "start")

    with stopping(console) as stop:
        for job, code, seconds in run_jobs(queue, divided, environment(plan), stop, started):
            run, ended = by_folder[job.name], ended + 1
            if code == BUSY:
                elsewhere.add(run.identity)
            how = settle(run, code, seconds, stop())
            console.print(f"[{ended}/{len(todo)}] {run.label}: {how}", highlight=False, markup=False)
        if stop():
            raise Interrupted("the same command continues the sweep")
    return elsewhere


def settle(run: Run, code: int, seconds: float, stopped: bool) -> str:
    """Writes down how a run ended. Returns it for a message."""
    if run.state() == "finished":
        log_incident(run, "finish", seconds=round(seconds, 1))
        problem = reason_of(run.folder / place.LOG, code) if code else None
        return f"finished in {seconds:.0f} s" + (f", but then: {problem}" if problem else "")
    if code == BUSY:
        log_incident(run, "elsewhere")
        return "another process is running it"
    if code == signals.INTERRUPTED or stopped:
        log_incident(run, "interrupt", seconds=round(seconds, 1))
        return "interrupted"
    reason = reason_of(run.folder / place.LOG, code)
    write_json(run.folder / place.CRASH, {"reason": reason, "exit_code": code})
    log_incident(run, "crash", seconds=round(seconds, 1), reason=reason)
    return f"crashed: {reason}"


def tell(plan: Plan, runs: Sequence[Run], todo: Sequence[Run], jobs: int, console: Console) -> None:
    """Prints what will run, and which runs will not because they crashed."""
    console.print(announcement(plan, len(runs), len(todo), jobs), highlight=False)
    crashed = [run.label for run in runs if run.state() == "crashed" and run not in todo]
    if crashed:
        console.print(f"{listed(crashed)} crashed earlier; --retry starts them again", highlight=False)


def announcement(plan: Plan, runs: int, todo: int, jobs: int) -> str:
    """What will run, and how long it takes at most."""
    shown = f"{plan.study.name} at size {plan.name}: {len(plan.arms)} arms x {len(plan.seeds)} seeds = {runs} runs"
    shown += f", {todo} to do" if todo < runs else ""
    undeclared = sorted({*plan.seeds} - {*plan.study.seeds_of(plan.study.size(plan.name))})
    if undeclared:
        shown += f" (seeds that the study does not declare: {listed([str(seed) for seed in undeclared])})"
    if plan.size.minutes is None or not todo:
        return shown
    total = plan.size.minutes * -(-todo // jobs)
    in_all = f"{total / 60:.1f} hours" if total >= 90 else f"{total:.0f} minutes"
    shown += f"; at most {plan.size.minutes:g} minutes each on 2 cores, {in_all} in all"
    return shown + (f" with {jobs} at a time" if jobs > 1 else "")


def check_data(plan: Plan) -> None:
    """Raises BimedixError if the runs have nothing to train on."""
    for arm in plan.arms:
        data = plan.study.experiment(arm, plan.seeds[0], plan.name, plan.all_changes()).data
        if data.path is None and not data.synthetic_rows:
            raise BimedixError(f"{plan.study.path} names no data at size {plan.name}; pass --data, a packed folder.")


def check_interventions(plan: Plan) -> None:
    """Raises BimedixError if the rules of an arm cannot be read or do not fit its model, as far as that is known."""
    for arm in plan.arms:
        for seed in plan.seeds:
            try:
                dry_run.check_interventions(plan.study.experiment(arm, seed, plan.name, plan.all_changes()))
            except BimedixError as error:
                raise BimedixError(f"arm {arm}: {error}") from None


def dry_rows(plan: Plan) -> list[dict[str, Any]]:
    """The runs that the command wants, as they would be resolved; nothing is written."""
    made = plan.size.inputs is None or (
        plan.inputs_folder is not None and not plan.size.inputs.commands(plan.inputs_folder, plan.length)
    )
    found = {(run.arm, run.seed): run for run in plan.grid()[1]} if made else {}
    rows = []
    for arm in plan.arms:
        for seed in plan.seeds:
            run = found.get((arm, seed))
            experiment = run.experiment if run else plan.study.experiment(arm, seed, plan.name, plan.all_changes())
            state, identity = (run.state(), run.identity) if run else ("waiting", None)
            rows.append(
                {"arm": arm, "seed": seed, "state": state, "identity": identity, "experiment": experiment.to_dict()}
            )
    return rows


def unfinished(runs: Sequence[Run], elsewhere: set[str]) -> str | None:
    """One sentence about the runs that are not finished and that no other process is running."""
    left = [run for run in runs if run.state() != "finished" and run.identity not in elsewhere]
    if not left:
        return None
    crashed = [f"{run.label}: {run.reason()}" for run in left if run.state() == "crashed"]
    if crashed:
        return f"{len(crashed)} of {len(runs)} runs crashed ({listed(crashed)}); correct the cause and pass --retry."
    return f"{len(left)} of {len(runs)} runs are not finished; run the same command again."


def prepare_folder(plan: Plan, console: Console) -> list[Run]:
    """Writes study.json and returns the runs that this command wants. The inputs must exist."""
    runs, wanted = plan.grid(keep=True)
    *_, last = write_study(plan.study, plan.name, runs, wanted, plan.out)
    if last["begun"]:
        console.print(
            f"warning: {plan.study.path} declared another contrast or other seeds before {last['begun']} runs had "
            "begun; the report says so",
            highlight=False,
        )
    return wanted
