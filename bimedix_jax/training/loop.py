"""The training loop: everything around the compiled step."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from bimedix_jax import distributed
from bimedix_jax.adapters import coverage
from bimedix_jax.checkpoint.saver import Saver
from bimedix_jax.checkpoint.store import save, save_adapter
from bimedix_jax.data import pack
from bimedix_jax.data.vocabulary import outside, require_ids
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment
from bimedix_jax.kernels import backends
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import RoutingPlan
from bimedix_jax.process import signals
from bimedix_jax.process.terminal import Screen
from bimedix_jax.routing.interventions import report
from bimedix_jax.sharding.layout import host_memory
from bimedix_jax.sharding.placement import gather_for_export, place
from bimedix_jax.sharding.rules import COMPILER_OPTIONS
from bimedix_jax.training.feed import Feed
from bimedix_jax.training.goodput import Goodput
from bimedix_jax.training.interventions import StepPlans, rules_of_run
from bimedix_jax.training.metadata import check_identity, identity, write_run
from bimedix_jax.training.metrics import MetricsLog
from bimedix_jax.training.metrics_file import METRICS, read_metrics
from bimedix_jax.training.observe import Observer
from bimedix_jax.training.optimiser import make_optimiser
from bimedix_jax.training.pipeline import LateLines, ReadAhead
from bimedix_jax.training.prepare import check_router_rate, mesh_of, plan_of_run, prepare_model
from bimedix_jax.training.probe import Probe, data_of
from bimedix_jax.training.progress import TrainingProgress, duration
from bimedix_jax.training.rows import NumpyBatch, Rows, check_tokenizer, heldout_batches, open_rows
from bimedix_jax.training.run_folder import CHECKPOINTS, begin, newest_step, one_writer, resume_state
from bimedix_jax.training.skips import (
    ORDERS,
    SKIPPED,
    Diverged,
    Skips,
    count_skips,
    read_orders,
    reordered,
    stopped,
    write_orders,
)
from bimedix_jax.training.state import Structure, TrainState, init_state, split_for_training, update_params
from bimedix_jax.training.step import make_eval_step, make_train_step
from bimedix_jax.training.stopping import Interrupted, StopRequest
from bimedix_jax.training.tracking import Mirror

Step = Callable[..., tuple[TrainState, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
      model: the model with the trained values.
      trained: folder of the adapters, or of the model if every parameter trained.
      metrics: the last line in metrics.jsonl.
      skipped: number of lines in skipped.jsonl, which has a line for each step whose loss or gradient was not finite.
    """

    model: Mixtral
    folder: Path
    trained: Path
    steps: int
    metrics: dict[str, Any]
    skipped: int = 0


def train(
    experiment: Experiment,
    out: str | Path,
    *,
    resume: bool = False,
    model: Mixtral | None = None,
    console: Console | None = None,
    resume_command: str | None = None,
    plan: RoutingPlan | None = None,
) -> TrainResult:
    """Trains an experiment and writes the run into the folder `out` (training/run_folder.py describes its files).

    Args:
      resume: continue from the newest valid checkpoint. The losses are bitwise those of an uninterrupted run.
      model: a base that is loaded already, with or without adapters; None loads it. The result has the trained model.
      plan: the routing plan for every step and for the held-out loss. Its B is 1 or the rows of a step, and its T is 1
        or the tokens of a row. The folder stores it, and a resumed run must pass the same plan.
      console, resume_command: where progress is printed (stderr), and the command that an interruption message names.

    Raises:
      BimedixError: the experiment is impossible, or losses are not finite in more steps than the experiment allows.
      Interrupted: Ctrl-C or SIGTERM; the step in progress was finished and saved.
    """
    console = (console or Screen(stderr=True)) if distributed.is_process_zero() else Console(quiet=True)
    folder, command = Path(out), resume_command or f"bimedix train --resume --out {out}"
    with one_writer(folder, experiment, resume), signals.hint(f"resume with `{command}`" if resume else ""):
        return train_in(folder, experiment, resume, model, console, command, plan)


def train_in(
    folder: Path,
    experiment: Experiment,
    resume: bool,
    model: Mixtral | None,
    console: Console,
    command: str,
    plan: RoutingPlan | None,
) -> TrainResult:
    """`train` in a folder that this process has locked."""
    goodput = Goodput()
    warn_unchecked(check_tokenizer(experiment), console)
    rules = rules_of_run(experiment, plan)
    data_of(experiment)  # a wrong probe is an error before the model is read
    mesh = mesh_of(experiment)
    with host_memory() if mesh else contextlib.nullcontext():
        model = prepare_model(experiment, model, mesh)
        rows = open_rows(experiment, model.config.vocab_size)
        experiment = dataclasses.replace(experiment, steps=rows.steps)
        plan = plan_of_run(experiment, model, plan, folder if resume else None)
        covered = coverage(model).to_dict()
    model = model if mesh is None else place(model, mesh)
    with split_for_training(model) as (structure, params, frozen):
        check_router_rate(experiment, params)
        same = identity(frozen, rows.fingerprint, rows.steps, plan, rules)
        feed = Feed.of(experiment, rows, structure.layout)
        plans = StepPlans.of_run(plan, rules, model.config, rows, structure.layout)
        optimiser = make_optimiser(experiment.optimiser, rows.steps)
        fresh = partial(init_state, params, optimiser, structure.router_state(frozen))
        state = fresh()
        distributed.on_process_zero(lambda: begin(folder, experiment, plan))
        began = time.perf_counter()
        if resume:
            state = resume_state(folder, state, console)
        restore_seconds = time.perf_counter() - began
        if (done := int(state.step)) > 0:
            check_identity(folder, same)
        if done == rows.steps:
            console.print(f"all {rows.steps} steps are already done", highlight=False)
            last = next(reversed(read_metrics(folder)), {})
        else:
            step = make_train_step(structure, experiment, rows.steps, optimiser, len(rows.groups.pairs))
            observer = Observer.of_run(
                experiment, folder, model, structure, params, rows.groups, plans.free, goodput, console
            )
            with backends.use(**experiment.kernels.named()):
                compiled, cost = compile_step(step, state, frozen, feed, plans.of_step(done), console)
                cost |= {"restore_seconds": restore_seconds}
                distributed.on_process_zero(lambda: write_run(folder, covered, same, done, cost))
                print_start(experiment, rows, done, cost["kernels"], console)
                goodput.compiled(cost["compile_seconds"])
                with observer.reported(folder, console):
                    parts = (structure, state, fresh, frozen, plans, console, command, observer)
                    state, last = run_steps(experiment, folder, feed, compiled, *parts)
            report(plans.rules, console)
        update_params(model, {**state.params, **state.router})
    with signals.hint(f"resume with `{command}`"):
        skipped = count_skips(folder, console)
        return TrainResult(model, folder, save_trained(model, folder), rows.steps, last, skipped)


def save_trained(model: Mixtral, folder: Path) -> Path:
    """Writes the adapters, or the whole model if every parameter trained."""
    model.trained_over = None  # of adapters that were loaded; now they were trained over this base
    whole = gather_for_export(model)  # gathers the shards, so every process must call it
    trained = folder / ("model" if model.lora is None else "adapter")
    write = save if model.lora is None else save_adapter
    distributed.on_process_zero(lambda: write(whole, trained, overwrite=True))
    return trained


def warn_unchecked(folders: int, console: Console) -> None:
    """Warns that packed folders could not be checked against the model's tokenizer."""
    if folders:
        console.print(
            f"[bold yellow]{folders} packed folder{'s' if folders > 1 else ''} not compared[/] with the model's "
            "tokenizer, since the model or the folder names no tokenizer; make sure that they match",
            highlight=False,
        )


def compile_step(
    step: Any, state: TrainState, frozen: dict[str, Any], feed: Feed, plan: RoutingPlan | None, console: Console
) -> tuple[Step, dict[str, Any]]:
    """(the compiled step, its compile time, memory and kernel backends). Prints time and memory."""
    with console.status("compiling the training step"), backends.recording() as picked:
        began = time.perf_counter()
        options = None if feed.layout is None else COMPILER_OPTIONS.get(backends.platform())
        try:
            compiled = step.lower(state, frozen, feed.abstract(), plan).compile(compiler_options=options)
        except NotImplementedError as error:
            raise BimedixError(f"{error} Set this one of kernels.* to another backend, or to null.") from error
        seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    console.print(
        f"compiled in {duration(seconds)}; memory: {arguments / 2**30:.2f} GiB model and optimiser, "
        f"{temporaries / 2**30:.2f} GiB working space",
        highlight=False,
    )
    cost = {"compile_seconds": seconds, "argument_bytes": arguments, "temporary_bytes": temporaries}
    return compiled, {**cost, "kernels": picked.to_dict()}


def print_start(experiment: Experiment, rows: Rows, step: int, kernels: dict[str, list[str]], console: Console) -> None:
    size, length = experiment.batch.size, experiment.data.sequence_length
    console.print(
        f"{experiment.name}: {rows.steps} steps of {size} x {length} = {size * length:,} tokens"
        + (f", resuming after step {step}" if step else ""),
        highlight=False,
    )
    if experiment.remat == "experts" and "xla" in kernels.get("expert_mlp", ()):
        console.print(
            "[bold yellow]remat experts has no effect here[/]: on a CPU the experts are one operation, which is "
            "recomputed as with remat layer",
            highlight=False,
        )


def run_steps(
    experiment: Experiment,
    folder: Path,
    feed: Feed,
    step: Step,
    structure: Structure,
    state: TrainState,
    fresh: Callable[[], TrainState],
    frozen: dict[str, Any],
    plans: StepPlans,
    console: Console,
    command: str,
    observer: Observer,
) -> tuple[TrainState, dict[str, Any]]:
    """Runs the remaining steps. Returns the last state and the last line of metrics.

    After too many skipped steps in a row the run continues from its last checkpoint, or from a `fresh` state without
    one, with another order of the remaining batches.

    Raises:
      BimedixError: it may not go back again.
    """
    orders = read_orders(folder)
    logs = tuple(folder / name for name in (METRICS, SKIPPED, ORDERS))
    with StopRequest(console, command) as stop, Saver(folder / CHECKPOINTS, experiment.keep, before=logs) as saver:
        while True:
            rows = reordered(feed.rows, orders, experiment.seed)
            skips = Skips(
                experiment, folder, rows, int(state.step), len(orders), console, distributed.is_process_zero()
            )
            ordered = dataclasses.replace(feed, rows=rows), dataclasses.replace(plans, rows=rows)
            try:
                result = steps_in_order(
                    experiment, folder, step, structure, state, frozen, *ordered, skips, observer, stop, saver
                )
                observer.timed("save", partial(saver.finish, console))
                return result
            except Diverged as error:
                diverged = error.with_traceback(None)  # whose frames would keep the arrays of the state
            saver.wait()
            if len(orders) >= experiment.reorders:
                raise stopped(diverged, experiment, folder, newest_step(folder))
            state = resume_state(folder, fresh(), console)
            orders.append(int(state.step))
            distributed.on_process_zero(lambda: write_orders(folder, orders))
            console.print(
                f"[bold yellow]{diverged}[/] The run goes on from step {orders[-1]} with another order of the data",
                highlight=False,
            )


def steps_in_order(
    experiment: Experiment,
    folder: Path,
    step: Step,
    structure: Structure,
    state: TrainState,
    frozen: dict[str, Any],
    feed: Feed,
    plans: StepPlans,
    skips: Skips,
    observer: Observer,
    stop: StopRequest,
    saver: Saver,
) -> tuple[TrainState, dict[str, Any]]:
    """`run_steps` with one order of the data.

    While a step runs, the next batch is read and the line of the previous step is written. The next step donates the
    state. Before a checkpoint or a held-out measurement the loop therefore waits for the step and checks its loss.

    Raises:
      Diverged: too many steps in a row were skipped.
    """
    evaluate, logs, done = make_eval_step(structure), distributed.is_process_zero(), int(state.step)
    rows, probe = feed.rows, Probe.of_run(experiment, folder, structure, state, frozen, feed.rows.steps)
    read = partial(read_step, feed, plans, structure.vocab_size)
    with (
        MetricsLog(folder if logs else None) as log,
        Mirror(experiment if logs else None, folder, done) as mirror,
        TrainingProgress(stop.console, done, rows.steps) as progress,
        ReadAhead(read, done, rows.steps, observer.waited) as batches,
    ):
        lines = LateLines(skips, (log.write, mirror.write, progress.update, observer.alarms.update), observer)
        requested = distributed.any_process_later(lambda: stop.requested)
        while done < rows.steps:
            try:
                batch, plan = batches.next(lines.busy)
            except Exception:
                lines.settle()  # the previous step succeeded, so its line is written
                raise
            state, metrics = step(state, frozen, batch, plan)
            done += 1
            lines.add(done, observer.with_experts(done, metrics, state, frozen))
            saver.check()
            stopping, requested = requested(), distributed.any_process_later(lambda: stop.requested)
            evaluates = experiment.eval_every > 0 and done % experiment.eval_every == 0
            saves = stopping or done % experiment.checkpoint_every == 0 or done == rows.steps
            if not (evaluates or saves or probe.is_due(done)):
                continue
            measure = partial(measure_heldout, experiment, evaluate, state, frozen, feed, structure.vocab_size, plans)
            lines.settle(partial(observer.timed, "evaluation", measure) if evaluates else None)
            observer.timed("probe", partial(probe.record, state, done))
            if saves:
                stall = saver.save(done, state, position_of(experiment, rows, done))
                lines.timings["save_stall_seconds"] = observer.lost("save", stall)
            if stopping and done < rows.steps:
                saver.finish(stop.console)
                raise Interrupted(f"step {done} of {rows.steps} is saved; resume with `{stop.command}`")
            lines.restart_clock()
    return state, lines.last


def read_step(
    feed: Feed, plans: StepPlans, vocab_size: int, step: int
) -> tuple[dict[str, jax.Array], RoutingPlan | None]:
    """The batch of a step on the devices, and its routing plan."""
    return feed.to_devices(checked(feed.read(step), vocab_size, step)), plans.of_step(step)


def position_of(experiment: Experiment, rows: Rows, done: int) -> dict[str, Any]:
    """What a checkpoint records beside the state."""
    return {"data_position": done, "seed": experiment.seed, "data_fingerprint": rows.fingerprint}


def checked(batch: NumpyBatch, vocab_size: int, step: int) -> NumpyBatch:
    """The batch, if all token ids are in the vocabulary. JAX would clamp others and train on the wrong token.

    Raises:
      BimedixError: a token id is outside of the vocabulary.
    """
    wrong = outside(batch["tokens_BT"], vocab_size)
    if wrong is not None:
        raise BimedixError(
            f"The rows of step {step + 1} have token id {wrong}, but the vocabulary has {vocab_size} tokens; "
            "pack the data with this model's tokenizer."
        )
    return batch


def measure_heldout(
    experiment: Experiment,
    evaluate: Any,
    state: TrainState,
    frozen: dict[str, Any],
    feed: Feed,
    vocab_size: int,
    plans: StepPlans,
) -> dict[str, float]:
    """Held-out loss in nats per target. Raises BimedixError for a token id outside of the vocabulary."""
    nll, targets = 0.0, 0.0
    for rows in heldout_batches(experiment):
        batch, plan = pack.batch(rows), plans.of_rows(rows)
        require_ids(batch["tokens_BT"], vocab_size)
        nll_sum, count = evaluate(state.params, {**frozen, **state.router}, feed.whole_to_devices(batch), plan)
        nll, targets = nll + float(nll_sum), targets + float(count)
    return {"heldout_nll": nll / max(targets, 1.0), "heldout_targets": targets}
