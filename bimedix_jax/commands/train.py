"""`bimedix train`: a preset or an experiment file, with fields changed on the command line, run into a folder."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment, override, read
from bimedix_jax.presets import PRESETS


@dataclasses.dataclass(frozen=True)
class Config:
    """Fine-tune a model: adapters on a frozen base, or every parameter.

    Name a preset (bimedix-mixtral-8x7b, bimedix-mixtral-8x7b-instruct, quickstart, smoke) or a JSON file with an
    experiment, such as the config.json of an earlier run. A field that is not given keeps the value it has there.
    """

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the run: config.json, metrics.jsonl, checkpoints, and the adapter at the end."""
    preset: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET|FILE")] = None
    """Preset or experiment file; may be left out with --resume."""
    resume: bool = False
    """Continue the run in --out from its newest valid checkpoint."""
    data: str | None = None
    """Packed folder to learn from (`bimedix data pack` writes one)."""
    heldout: str | None = None
    """Packed folder to measure the held-out loss on."""
    model: str | None = None
    """Folder or hub id of the base model."""
    revision: str | None = None
    """Revision of a hub id."""
    base: Literal["bfloat16", "float32", "nf4"] | None = None
    """Storage of the base weights."""
    sequence_length: int | None = None
    """Tokens a row."""
    rows: int | None = None
    """Rows of a micro-batch."""
    accumulation: int | None = None
    """Micro-batches of an optimiser step."""
    steps: int | None = None
    """Optimiser steps."""
    epochs: int | None = None
    """Passes over the data."""
    learning_rate: float | None = None
    """Peak learning rate."""
    rank: int | None = None
    """Rank of the adapters."""
    alpha: float | None = None
    """The adapters' alpha; their scale is alpha / rank."""
    targets: tuple[str, ...] | None = None
    """Linear layers to adapt: q k v o w1 w2 w3 router lm_head, or patterns such as layers\\.[0-3]\\..*\\.w2."""
    aux_loss_coef: float | None = None
    """Weight of the load-balancing loss."""
    aux_scope: Literal["sequence", "micro_batch", "global"] | None = None
    """Tokens over which load is balanced."""
    remat: Literal["none", "experts", "layer"] | None = None
    """What the backward pass recomputes."""
    seed: int | None = None
    """Of the adapters' initial values and of the order of the rows."""
    eval_every: int | None = None
    """Steps between measurements of the held-out loss."""
    checkpoint_every: int | None = None
    """Steps between checkpoints."""
    wandb: Literal["disabled", "offline", "online"] | None = None
    """Mode of the mirror in Weights & Biases."""
    set: tuple[str, ...] = ()
    """Any other field by its dotted name and a JSON value, such as optimiser.weight_decay=0.1 or lora=null."""
    distributed: bool = False
    """Join the other processes of this run, each started with the same options; needs a mesh and a shared --out."""
    dry_run: bool = False
    """Print the resolved experiment and leave."""


FIELDS = {
    "data": "data.path",
    "heldout": "data.heldout",
    "model": "model.path",
    "revision": "model.revision",
    "base": "model.base",
    "sequence_length": "data.sequence_length",
    "rows": "batch.rows",
    "accumulation": "batch.accumulation",
    "steps": "steps",
    "epochs": "epochs",
    "learning_rate": "optimiser.learning_rate",
    "rank": "lora.rank",
    "alpha": "lora.alpha",
    "targets": "lora.targets",
    "aux_loss_coef": "router.aux_loss_coef",
    "aux_scope": "router.aux_scope",
    "remat": "remat",
    "seed": "seed",
    "eval_every": "eval_every",
    "checkpoint_every": "checkpoint_every",
    "wandb": "tracking.mode",
}
"""Options and the fields that they change."""


def resolve(config: Config) -> Experiment:
    """The experiment that the options describe.

    Raises:
      BimedixError: no preset, an unknown one, or an option that does not fit.
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
    changes: dict[str, Any] = {field: getattr(config, option) for option, field in FIELDS.items()}
    changes = {field: value for field, value in changes.items() if value is not None}
    return override(experiment, changes | dict(map(parse_assignment, config.set)))


def parse_assignment(text: str) -> tuple[str, Any]:
    """'a.b=1' as ('a.b', 1); a value that is not JSON is taken as text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise BimedixError(f"--set {text} is not FIELD=VALUE; write --set optimiser.weight_decay=0.1, for example.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def run(config: Config, console: Console) -> dict[str, Any]:
    """Trains; returns where the result lies and the last step's metrics."""
    experiment = resolve(config)
    if config.dry_run:
        console.print_json(experiment.to_json())
        return {"experiment": experiment.to_dict()}
    from bimedix_jax import distributed
    from bimedix_jax.routing.plans import read_plan
    from bimedix_jax.training.loop import train

    progress = console if console.stderr else Console(stderr=True)
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
    }
