"""The training loop: everything around the compiled step."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from bimedix_jax import distributed
from bimedix_jax.adapters import add_lora, coverage
from bimedix_jax.checkpoint.load import read_base, with_router_of
from bimedix_jax.checkpoint.steps import save_step
from bimedix_jax.checkpoint.store import save, save_adapter
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment
from bimedix_jax.kernels import backends
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import RoutingPlan
from bimedix_jax.sharding import BATCH_AXES, COMPILER_OPTIONS, host_memory, make_mesh, place, take_back
from bimedix_jax.training.feed import Feed
from bimedix_jax.training.metadata import check_identity, identity, write_run
from bimedix_jax.training.metrics import MetricsLog, is_finite, plain, read_metrics
from bimedix_jax.training.optimiser import make_optimiser
from bimedix_jax.training.progress import TrainingProgress, duration
from bimedix_jax.training.rows import NumpyBatch, Rows, heldout_batches, open_rows
from bimedix_jax.training.run_folder import CHECKPOINTS, begin, check_folder, check_plan, resume_state
from bimedix_jax.training.state import Params, Structure, TrainState, init_state, put_back, take_apart
from bimedix_jax.training.step import make_eval_step, make_train_step
from bimedix_jax.training.stopping import Interrupted, StopRequest
from bimedix_jax.training.tracking import Mirror

Step = Callable[..., tuple[TrainState, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
      model: with the trained values. trained: folder of the adapters, or of the model where every parameter trained.
      metrics: the last step's line of metrics.jsonl.
    """

    model: Mixtral
    folder: Path
    trained: Path
    steps: int
    metrics: dict[str, Any]


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
    """Runs an experiment into the folder `out` (its files: training/run_folder.py).

    Args:
      resume: continue from the newest valid checkpoint; the losses are to the bit those of a run that never stopped.
      model: the base in memory already, with or without adapters; None loads what the experiment names. Go on with
        the result's model: adapters may have been added to a copy that shares the base.
      console: for progress; stderr by default.
      plan: what the routers are told to do in every step and in the held-out loss. Its B is 1 or the rows of a step,
        its T is 1 or the tokens of a row. The folder keeps it, and a resumed run must be given the same.
      resume_command: what to tell the user on an interruption; `bimedix train --resume --out OUT` by default.

    Raises:
      BimedixError: something asked for is impossible, or the loss stopped being a number; nothing is saved then.
      Interrupted: Ctrl-C or SIGTERM, after the step in progress was saved.
    """
    console = (console or Console(stderr=True)) if distributed.leader() else Console(quiet=True)
    folder = Path(out)
    distributed.by_leader(lambda: check_folder(folder, experiment, resume))
    mesh = mesh_of(experiment)
    with host_memory() if mesh else contextlib.nullcontext():
        model = prepare_model(experiment, model, mesh)
        rows = open_rows(experiment, model.config.vocab_size)
        experiment = dataclasses.replace(experiment, steps=rows.steps)
        check_fit(experiment, model)
        plan = checked_plan(experiment, model, plan, folder if resume else None)
        covered = coverage(model).to_dict()
    model = model if mesh is None else place(model, mesh)
    structure, params, frozen = take_apart(model)
    check_router_rate(experiment, params)
    same = identity(frozen, rows.fingerprint, rows.steps, plan)
    languages = bool(experiment.router.languages)
    feed = Feed(rows, experiment.batch, experiment.data.sequence_length, structure.layout, languages)
    optimiser = make_optimiser(experiment.optimiser, rows.steps)
    state = init_state(params, optimiser, structure.router_state(frozen))
    distributed.by_leader(lambda: begin(folder, experiment, plan))
    if resume:
        state = resume_state(folder, state, console)
    if int(state.step):
        check_identity(folder, same)
    if int(state.step) == rows.steps:
        console.print(f"all {rows.steps} steps are done already", highlight=False)
        last = read_metrics(folder)[-1]
    else:
        done, step = int(state.step), make_train_step(structure, experiment, rows.steps, optimiser)
        with backends.use(**experiment.kernels.named()):
            compiled, cost = compile_step(step, state, frozen, feed, plan, console)
            distributed.by_leader(lambda: write_run(folder, covered, same, done, cost))
            say_start(experiment, rows, done, cost["kernels"], console)
            command = resume_command or f"bimedix train --resume --out {folder}"
            state, last = run_steps(
                experiment, folder, feed, compiled, structure, state, frozen, plan, console, command
            )
    put_back(model, {**state.params, **state.router})
    return TrainResult(model, folder, save_trained(model, folder), rows.steps, last)


def mesh_of(experiment: Experiment) -> Mesh | None:
    """The devices that the experiment asks for.

    Raises:
      BimedixError: they are not these, or cannot divide the rows.
    """
    wanted = experiment.mesh
    if wanted is None:
        if distributed.several():
            raise BimedixError("Several processes need a mesh over their devices; give mesh.fsdp, for example.")
        return None
    mesh = make_mesh(wanted.data, wanted.fsdp, wanted.expert, wanted.tensor)
    parts = math.prod(mesh.shape[name] for name in BATCH_AXES)
    if experiment.batch.rows % parts:
        raise BimedixError(
            f"{experiment.batch.rows} rows of a micro-batch cannot be divided among the {parts} parts of this mesh; "
            f"make batch.rows a multiple of {parts}, or mesh.tensor larger."
        )
    return mesh


def save_trained(model: Mixtral, folder: Path) -> Path:
    """Writes what was trained: the adapters, or the model where every parameter was."""
    whole = take_back(model)  # by all processes, since each has a part
    trained = folder / ("model" if model.lora is None else "adapter")
    write = save if model.lora is None else save_adapter
    distributed.by_leader(lambda: write(whole, trained, overwrite=True))
    return trained


def prepare_model(experiment: Experiment, model: Mixtral | None, mesh: Mesh | None) -> Mixtral:
    """The base that the experiment names, or the given one, with the adapters that the experiment asks for.

    For a mesh: in host memory, with what this process's devices need.
    """
    if model is not None and model.placement is not None:
        raise BimedixError("The model lies on a mesh already; give train one that lies on one device.")
    if model is None:
        model = read_base(experiment, mesh)
    else:
        model = with_router_of(experiment, model, "the given model")
    wanted, found = experiment.lora, model.lora
    if found is None:
        return model if wanted is None else add_lora(model, wanted, experiment.seed)
    if (
        wanted is None
        or dataclasses.replace(wanted, targets=found.targets) != found
        or set(wanted.targets) != set(found.targets)
    ):
        raise BimedixError(f"The model carries adapters {found}, the experiment asks for {wanted}; make them agree.")
    return model


def check_fit(experiment: Experiment, model: Mixtral) -> None:
    if experiment.data.sequence_length > model.config.max_position_embeddings:
        raise BimedixError(
            f"Rows of {experiment.data.sequence_length} tokens exceed the model's "
            f"{model.config.max_position_embeddings} positions; pack the data with a smaller sequence length."
        )


def checked_plan(
    experiment: Experiment, model: Mixtral, plan: RoutingPlan | None, resumed: Path | None
) -> RoutingPlan | None:
    """The plan, None where it tells the routers nothing.

    Args:
      resumed: folder of the run that goes on, which must have the same plan.
    Raises:
      BimedixError: it does not fit the model or the rows, or is not the one that the run began with.
    """
    plan = None if plan is None or plan.is_free else plan
    if plan is not None:
        try:
            plan.check(model.config, experiment.batch.size, experiment.data.sequence_length)
        except ValueError as error:
            raise BimedixError(f"The plan does not fit this run: {error}") from error
        if experiment.eval_every and any(x.shape[1] > 1 for x in jax.tree.leaves(plan)):
            raise BimedixError("A plan for the rows of a step says nothing of held-out rows; set eval_every to 0.")
    if resumed is not None:
        check_plan(resumed, plan)
    return plan


def check_router_rate(experiment: Experiment, params: Params) -> None:
    if experiment.optimiser.router_learning_rate is not None and not any(".router." in name for name in params):
        raise BimedixError(
            "optimiser.router_learning_rate is set, but the routers are frozen; add router to lora.targets, set "
            "lora.train_router, or leave the rate out."
        )


def compile_step(
    step: Any, state: TrainState, frozen: dict[str, Any], feed: Feed, plan: RoutingPlan | None, console: Console
) -> tuple[Step, dict[str, Any]]:
    """The compiled step, and its time and memory, which are printed once, and the backends of its kernels."""
    with console.status("compiling the training step"), backends.recording() as picked:
        began = time.perf_counter()
        options = None if feed.layout is None else COMPILER_OPTIONS.get(backends.platform())
        compiled = step.lower(state, frozen, feed.abstract(), plan).compile(compiler_options=options)
        seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    held, extra = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    console.print(
        f"compiled in {duration(seconds)}; memory: {held / 2**30:.2f} GiB model and optimiser, "
        f"{extra / 2**30:.2f} GiB working space",
        highlight=False,
    )
    cost = {"compile_seconds": seconds, "argument_bytes": held, "temporary_bytes": extra}
    return compiled, {**cost, "kernels": picked.to_dict()}


def say_start(experiment: Experiment, rows: Rows, step: int, kernels: dict[str, list[str]], console: Console) -> None:
    size, length = experiment.batch.size, experiment.data.sequence_length
    console.print(
        f"{experiment.name}: {rows.steps} steps of {size} x {length} = {size * length:,} tokens"
        + (f", continuing after step {step}" if step else ""),
        highlight=False,
    )
    if experiment.remat == "experts" and "xla" in kernels.get("expert_mlp", ()):
        console.print(
            "[bold yellow]remat experts keeps nothing here[/]: the CPU's experts are one operation, whose products are "
            "computed again as under remat layer",
            highlight=False,
        )


def run_steps(
    experiment: Experiment,
    folder: Path,
    feed: Feed,
    step: Step,
    structure: Structure,
    state: TrainState,
    frozen: dict[str, Any],
    plan: RoutingPlan | None,
    console: Console,
    resume_command: str,
) -> tuple[TrainState, dict[str, Any]]:
    """All steps that are left; returns the last state and line of metrics."""
    evaluate, rows, speaks = make_eval_step(structure), feed.rows, distributed.leader()
    done, line = int(state.step), {}
    with (
        StopRequest(console) as stop,
        MetricsLog(folder if speaks else None) as log,
        Mirror(experiment if speaks else None, folder, done) as mirror,
        TrainingProgress(console, done, rows.steps) as progress,
    ):
        while done < rows.steps:
            began = time.perf_counter()
            batch = feed.put(checked(feed.read(done), structure.vocab_size, done))
            state, metrics = step(state, frozen, batch, plan)
            line = {"step": done + 1, **plain(metrics)}
            if not is_finite(line):
                raise BimedixError(diverged(line, experiment, done))
            done += 1
            seconds = time.perf_counter() - began
            line |= {"seconds": seconds, "tokens_per_second": line["tokens"] / seconds}
            if experiment.eval_every and done % experiment.eval_every == 0:
                line |= measure_heldout(experiment, evaluate, state, frozen, feed, plan)
            log.write(line)
            mirror.write(line)
            progress.update(line)
            stopping = distributed.agree(stop.asked)
            if stopping or done % experiment.checkpoint_every == 0 or done == rows.steps:
                position = {"data_position": done, "seed": experiment.seed, "data_fingerprint": rows.fingerprint}
                save_step(folder / CHECKPOINTS, done, state, position, experiment.keep)
            if stopping and done < rows.steps:
                raise Interrupted(f"step {done} of {rows.steps} is saved; continue with `{resume_command}`")
    return state, line


def checked(batch: NumpyBatch, vocab_size: int, step: int) -> NumpyBatch:
    """The batch, if its token ids are the model's: JAX would clamp one that is not, and train on another token."""
    highest = int(batch["tokens_BT"].max())
    if highest >= vocab_size or int(batch["tokens_BT"].min()) < 0:
        raise BimedixError(
            f"The rows of step {step + 1} hold token id {highest}, the model knows {vocab_size}; "
            "pack the data with this model's tokenizer."
        )
    return batch


def diverged(line: dict[str, Any], experiment: Experiment, done: int) -> str:
    kept = done // experiment.checkpoint_every * experiment.checkpoint_every
    since = f"the last checkpoint is that of step {kept}" if kept else "there is no checkpoint before it"
    return (
        f"Step {line['step']}: loss {line['loss']}, gradient norm {line['grad_norm']}. The run stops and saves nothing "
        f"of this step; {since}. Lower optimiser.learning_rate or clip_norm, or look at the rows of this step."
    )


def measure_heldout(
    experiment: Experiment,
    evaluate: Any,
    state: TrainState,
    frozen: dict[str, Any],
    feed: Feed,
    plan: RoutingPlan | None,
) -> dict[str, float]:
    """Held-out loss in nats per target."""
    nll, targets = 0.0, 0.0
    for batch in heldout_batches(experiment):
        nll_sum, count = evaluate(state.params, {**frozen, **state.router}, feed.put_whole(batch), plan)
        nll, targets = nll + float(nll_sum), targets + float(count)
    return {"heldout_nll": nll / max(targets, 1.0), "heldout_targets": targets}
