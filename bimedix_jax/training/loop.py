"""The training loop: everything around the compiled step."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from bimedix_jax import distributed
from bimedix_jax.adapters import add_lora, coverage
from bimedix_jax.checkpoint.load import read_model
from bimedix_jax.checkpoint.steps import save_step
from bimedix_jax.checkpoint.store import save, save_adapter
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment
from bimedix_jax.kernels import backends
from bimedix_jax.models.mixtral import Mixtral, init_random
from bimedix_jax.quantise import quantise_base
from bimedix_jax.sharding import BATCH_AXES, COMPILER_OPTIONS, host_memory, make_mesh, place, take_back
from bimedix_jax.training.feed import Feed
from bimedix_jax.training.metadata import check_identity, identity, write_run
from bimedix_jax.training.metrics import MetricsLog, read_metrics
from bimedix_jax.training.optimiser import make_optimiser
from bimedix_jax.training.pipeline import LateLines, ReadAhead
from bimedix_jax.training.progress import TrainingProgress, duration
from bimedix_jax.training.rows import NumpyBatch, Rows, check_tokenizer, heldout_batches, open_rows
from bimedix_jax.training.run_folder import CHECKPOINTS, begin, check_folder, resume_state
from bimedix_jax.training.state import Params, Structure, TrainState, init_state, put_back, take_apart
from bimedix_jax.training.step import make_eval_step, make_train_step
from bimedix_jax.training.stopping import Interrupted, StopRequest
from bimedix_jax.training.tracking import Mirror
from bimedix_jax.vocabulary import outside, require_ids

Step = Callable[[TrainState, dict[str, Any], dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


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
) -> TrainResult:
    """Runs an experiment into the folder `out` (its files: training/run_folder.py).

    Args:
      resume: continue from the newest valid checkpoint; the losses are to the bit those of a run that never stopped.
      model: the base in memory already, with or without adapters; None loads what the experiment names. Go on with
        the result's model: adapters may have been added to a copy that shares the base.
      console: for progress; stderr by default.
      resume_command: what to tell the user on an interruption; `bimedix train --resume --out OUT` by default.

    Raises:
      BimedixError: something asked for is impossible, or the loss stopped being a number; nothing is saved then.
      Interrupted: Ctrl-C or SIGTERM, after the step in progress was saved.
    """
    console = (console or Console(stderr=True)) if distributed.leader() else Console(quiet=True)
    folder = Path(out)
    distributed.by_leader(lambda: check_folder(folder, experiment, resume))
    say_unchecked(check_tokenizer(experiment), console)
    mesh = mesh_of(experiment)
    with host_memory() if mesh else contextlib.nullcontext():
        model = prepare_model(experiment, model, mesh)
        rows = open_rows(experiment, model.config.vocab_size)
        experiment = dataclasses.replace(experiment, steps=rows.steps)
        check_fit(experiment, model)
        covered = coverage(model).to_dict()
    model = model if mesh is None else place(model, mesh)
    structure, params, frozen = take_apart(model)
    check_router_rate(experiment, params)
    same = identity(frozen, rows.fingerprint, rows.steps)
    feed = Feed(rows, experiment.batch, experiment.data.sequence_length, structure.layout)
    optimiser = make_optimiser(experiment.optimiser, rows.steps)
    state = init_state(params, optimiser)
    distributed.by_leader(lambda: begin(folder, experiment))
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
            compiled, cost = compile_step(step, state, frozen, feed, console)
            distributed.by_leader(lambda: write_run(folder, covered, same, done, cost))
            say_start(experiment, rows, done, cost["kernels"], console)
            command = resume_command or f"bimedix train --resume --out {folder}"
            state, last = run_steps(experiment, folder, feed, compiled, structure, state, frozen, console, command)
    put_back(model, state.params)
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
    source = experiment.model
    if model is None and source.random is not None:
        dtype = source.dtype or ("bfloat16" if source.base == "nf4" else source.base)
        model = init_random(source.random, experiment.seed, dtype)
        model = quantise_base(model) if source.base == "nf4" else model
    elif model is None:
        if source.path is None:
            raise BimedixError("The experiment names no model; give model.path, a folder or a hub id.")
        model = read_model(source.path, source.base, None, mesh, source.dtype, source.revision)
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


def say_unchecked(folders: int, console: Console) -> None:
    """One line where rows may have been packed with another tokenizer than the model's."""
    if folders:
        console.print(
            f"[bold yellow]{folders} packed folder{'s' if folders > 1 else ''} not compared[/] with the model's "
            "tokenizer: one of the two names none; make sure that they belong together",
            highlight=False,
        )


def check_fit(experiment: Experiment, model: Mixtral) -> None:
    if experiment.data.sequence_length > model.config.max_position_embeddings:
        raise BimedixError(
            f"Rows of {experiment.data.sequence_length} tokens exceed the model's "
            f"{model.config.max_position_embeddings} positions; pack the data with a smaller sequence length."
        )


def check_router_rate(experiment: Experiment, params: Params) -> None:
    if experiment.optimiser.router_learning_rate is not None and not any(".router." in name for name in params):
        raise BimedixError(
            "optimiser.router_learning_rate is set, but the routers are frozen; add router to lora.targets, set "
            "lora.train_router, or leave the rate out."
        )


def compile_step(
    step: Any, state: TrainState, frozen: dict[str, Any], feed: Feed, console: Console
) -> tuple[Step, dict[str, Any]]:
    """The compiled step, and its time and memory, which are printed once, and the backends of its kernels."""
    with console.status("compiling the training step"), backends.recording() as picked:
        began = time.perf_counter()
        options = None if feed.layout is None else COMPILER_OPTIONS.get(backends.platform())
        compiled = step.lower(state, frozen, feed.abstract()).compile(compiler_options=options)
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
    console: Console,
    resume_command: str,
) -> tuple[TrainState, dict[str, Any]]:
    """All steps that are left; returns the last state and line of metrics.

    While a step runs, the next batch is read and the line of the step before is written. The state is donated to the
    next step, so before a checkpoint or a measurement of its own a step is waited for, and its loss looked at.
    """
    evaluate, rows, speaks = make_eval_step(structure), feed.rows, distributed.leader()
    done = int(state.step)

    def read(step: int) -> dict[str, jax.Array]:
        return feed.put(checked(feed.read(step), structure.vocab_size, step))

    with (
        StopRequest(console) as stop,
        MetricsLog(folder if speaks else None) as log,
        Mirror(experiment if speaks else None, folder, done) as mirror,
        TrainingProgress(console, done, rows.steps) as progress,
        ReadAhead(read, done, rows.steps) as batches,
    ):
        lines = LateLines(experiment, (log.write, mirror.write, progress.update))
        asked = distributed.agree_later(lambda: stop.asked)
        while done < rows.steps:
            try:
                batch = batches.next()
            except Exception:
                lines.settle()  # the step before is not to blame
                raise
            state, metrics = step(state, frozen, batch)
            done += 1
            lines.add(done, metrics)
            stopping, asked = asked(), distributed.agree_later(lambda: stop.asked)
            evaluates = experiment.eval_every > 0 and done % experiment.eval_every == 0
            saves = stopping or done % experiment.checkpoint_every == 0 or done == rows.steps
            if not (evaluates or saves):
                continue
            measure = partial(measure_heldout, experiment, evaluate, state, frozen, feed, structure.vocab_size)
            lines.settle(measure if evaluates else None)
            if saves:
                position = {"data_position": done, "seed": experiment.seed, "data_fingerprint": rows.fingerprint}
                save_step(folder / CHECKPOINTS, done, state, position, experiment.keep)
            if stopping and done < rows.steps:
                raise Interrupted(f"step {done} of {rows.steps} is saved; continue with `{resume_command}`")
            lines.restart_clock()
    return state, lines.last


def checked(batch: NumpyBatch, vocab_size: int, step: int) -> NumpyBatch:
    """The batch, if its token ids are the model's: JAX would clamp one that is not, and train on another token."""
    wrong = outside(batch["tokens_BT"], vocab_size)
    if wrong is not None:
        raise BimedixError(
            f"The rows of step {step + 1} hold token id {wrong}, the model knows {vocab_size}; "
            "pack the data with this model's tokenizer."
        )
    return batch


def measure_heldout(
    experiment: Experiment, evaluate: Any, state: TrainState, frozen: dict[str, Any], feed: Feed, vocab_size: int
) -> dict[str, float]:
    """Held-out loss in nats per target; raises BimedixError for a token id that the model lacks."""
    nll, targets = 0.0, 0.0
    for batch in heldout_batches(experiment):
        require_ids(batch["tokens_BT"], vocab_size)
        nll_sum, count = evaluate(state.params, frozen, feed.put_whole(batch))
        nll, targets = nll + float(nll_sum), targets + float(count)
    return {"heldout_nll": nll / max(targets, 1.0), "heldout_targets": targets}
