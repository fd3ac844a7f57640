"""`bimedix train`: run a preset or an experiment file, with fields changed on the command line, into a folder."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from bimedix_jax import startup
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment, override, read
from bimedix_jax.options import Assignment, ChangesField, changed_fields
from bimedix_jax.presets import PRESETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Fine-tune a model: adapters on a frozen base, or every parameter.

    Name a preset (bimedix-mixtral-8x7b, bimedix-mixtral-8x7b-instruct, quickstart, smoke) or a JSON file with an
    experiment, such as the config.json of an earlier run. Options change its fields; the others keep their values.
    """

    out: Path
    """Folder of the run: config.json, metrics.jsonl, checkpoints, and the adapter at the end."""
    preset: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET|FILE")] = None
    """Preset or experiment file; with --resume, by default the one of the run."""
    resume: bool = False
    """Resume the run in --out from its newest valid checkpoint."""
    data: Annotated[str | None, ChangesField("data.path")] = None
    """Packed folder of training data; `bimedix data pack` writes one."""
    heldout: Annotated[str | None, ChangesField("data.heldout")] = None
    """Packed folder to measure the held-out loss on."""
    model: Annotated[str | None, ChangesField("model.path")] = None
    """Folder or hub id of the base model."""
    revision: Annotated[str | None, ChangesField("model.revision")] = None
    """Revision of a hub id."""
    base: Annotated[Literal["bfloat16", "float32", "nf4"] | None, ChangesField("model.base")] = None
    """Storage of the base weights."""
    sequence_length: Annotated[int | None, ChangesField("data.sequence_length")] = None
    """Tokens a row."""
    rows: Annotated[int | None, ChangesField("batch.rows")] = None
    """Rows of a micro-batch."""
    accumulation: Annotated[int | None, ChangesField("batch.accumulation")] = None
    """Micro-batches of an optimiser step."""
    steps: Annotated[int | None, ChangesField("steps")] = None
    """Optimiser steps."""
    epochs: Annotated[int | None, ChangesField("epochs")] = None
    """Passes over the data."""
    learning_rate: Annotated[float | None, ChangesField("optimiser.learning_rate")] = None
    """Peak learning rate."""
    rank: Annotated[int | None, ChangesField("lora.rank")] = None
    """Rank of the adapters."""
    alpha: Annotated[float | None, ChangesField("lora.alpha")] = None
    """Alpha of the adapters; their scale is alpha / rank."""
    targets: Annotated[tuple[str, ...] | None, ChangesField("lora.targets")] = None
    """Linear layers to adapt: q k v o w1 w2 w3 router lm_head, or patterns such as layers\\.[0-3]\\..*\\.w2."""
    aux_loss_coef: Annotated[float | None, ChangesField("router.aux_loss_coef")] = None
    """Weight of the load-balancing loss."""
    aux_scope: Annotated[Literal["sequence", "micro_batch", "global"] | None, ChangesField("router.aux_scope")] = None
    """Tokens over which the expert load is balanced."""
    intervene: Annotated[str | None, ChangesField("intervene"), tyro.conf.arg(metavar="FILE")] = None
    """JSON file of rules that tell the routers what to do (docs/routing.md)."""
    remat: Annotated[Literal["none", "experts", "layer"] | None, ChangesField("remat")] = None
    """What the backward pass recomputes."""
    seed: Annotated[int | None, ChangesField("seed")] = None
    """Seed of the adapters' initial values and of the order of the rows."""
    eval_every: Annotated[int | None, ChangesField("eval_every")] = None
    """Steps between measurements of the held-out loss; 0 for none."""
    checkpoint_every: Annotated[int | None, ChangesField("checkpoint_every")] = None
    """Steps between checkpoints."""
    wandb: Annotated[Literal["disabled", "offline", "online"] | None, ChangesField("tracking.mode")] = None
    """Whether metrics are also logged to Weights & Biases."""
    set: tuple[Assignment, ...] = ()
    """Other fields to change, by dotted name and JSON value, such as optimiser.weight_decay=0.1 or lora=null."""
    distributed: bool = False
    """Run as one of several processes that were started with the same options; needs a mesh and a shared --out."""
    dry_run: bool = False
    """Print the resolved experiment and exit. The rules of --intervene are read and checked."""


def resolve(config: Config) -> Experiment:
    """The experiment that the options describe.

    Raises:
      BimedixError: the preset is missing or unknown, or an option does not fit.
    """
    name = config.preset
    if name is None and config.resume:
        name = str(config.out / "config.json")
    if name is None:
        raise BimedixError(f"name a preset ({', '.join(PRESETS)}) or an experiment file.")
    if name in PRESETS:
        experiment = PRESETS[name]()
    elif Path(name).is_file():
        experiment = read(name)
    else:
        raise BimedixError(f"{name} is neither a preset ({', '.join(PRESETS)}) nor a file; correct it.")
    return override(experiment, changed_fields(config) | dict(config.set))


def run(config: Config, console: Console) -> dict[str, Any]:
    """Trains. Returns the paths of the results and the metrics of the last step."""
    experiment = resolve(config)
    if config.dry_run:
        from bimedix_jax.training.dry_run import check_interventions

        check_interventions(experiment)
        console.print_json(experiment.to_json())
        return {"experiment": experiment.to_dict()}
    if not config.distributed:
        startup.keep_programs()
    from bimedix_jax import distributed
    from bimedix_jax.process.terminal import Screen
    from bimedix_jax.routing.plans import read_plan
    from bimedix_jax.training.loop import train

    progress = console if console.stderr else Screen(stderr=True)
    kept = config.out / "plan.safetensors"
    plan = read_plan(kept) if config.resume and kept.is_file() else None
    with distributed.joined(config.distributed):
        result = train(experiment, config.out, resume=config.resume, console=progress, plan=plan)
    console.print(f"trained {result.steps} steps; {result.trained.name} in {result.trained}", highlight=False)
    return {
        "folder": str(result.folder),
        "trained": str(result.trained),
        "steps": result.steps,
        "loss": result.metrics.get("loss"),
        "metrics": result.metrics,
        "skipped_steps": result.skipped,
    }
