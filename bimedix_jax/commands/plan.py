"""`bimedix plan`: does a run fit a machine that is not here, what would it cost, how long would it take."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment, override, read
from bimedix_jax.models.config import ARCHITECTURES, MixtralConfig
from bimedix_jax.options import Assignment
from bimedix_jax.presets import PRESETS

DEFAULT = "bimedix-mixtral-8x7b"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compile the training step, the prefill and a decoding step of a run for devices that need not be here.

    What is compiled is what `bimedix train` and `bimedix chat` run, by the compiler that the devices would use; nothing
    is estimated but time. A step takes half a minute of a CPU for GPUs and two minutes for TPUs.
    """

    devices: str
    """Devices and their number: a100-80gb:8; also a100-40gb, h100-80gb, v5e and v5p."""
    experiment: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET|FILE")] = DEFAULT
    """Preset or experiment file, by default the paper's recipe."""
    model: str | None = None
    """Architecture by name, or a folder whose config.json has it; its weights are not read. By default that of the
    experiment's random model, if it has one, otherwise mixtral-8x7b."""
    set: tuple[Assignment, ...] = ()
    """Fields of the experiment by dotted name and JSON value, such as data.sequence_length=2048 batch.rows=16."""
    router: str | None = None
    """Router variant (topk, softmax_topk, sigmoid_bias) instead of the experiment's."""
    fit: bool = False
    """Where it does not fit, change the setting until it does, and say what was changed."""
    inference: bool = True
    """Plan the prefill and the decoding step as well."""
    prompt_tokens: int = 512
    """Tokens of the prompt that is prefilled."""
    prompts: int = 1
    """Prompts that are decoded side by side."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """The plan as a document."""
    from bimedix_jax.plan.devices import assumptions, target
    from bimedix_jax.plan.fit import fit
    from bimedix_jax.plan.page import show
    from bimedix_jax.plan.report import described, plan_inference, plan_training

    if config.prompt_tokens < 1 or config.prompts < 1:
        raise BimedixError("--prompt-tokens and --prompts are at least 1.")
    experiment, where = resolve(config), target(config.devices)
    architecture = architecture_of(config.model, experiment)
    progress = Console(stderr=True)
    changed: list[str] = []
    with progress.status(f"compiling the training step for {where.name}"):
        if config.fit:
            planned, changed = fit(architecture, experiment, where, lambda line: progress.print(line, highlight=False))
        else:
            planned = plan_training(architecture, experiment, where)
    document = {"model": config.model or experiment.name, **described(planned), "changed": changed}
    if config.inference:
        with progress.status(f"compiling prefill and decoding for {where.name}"):
            document |= plan_inference(architecture, planned.experiment, where, config.prompts, config.prompt_tokens)
    document |= {"assumptions": assumptions(where.device), "experiment": planned.experiment.to_dict()}
    show(document, console)
    return document


def resolve(config: Config) -> Experiment:
    """The experiment that the options describe.

    Raises:
      BimedixError: neither a preset nor a file, or a value that does not fit.
    """
    name = config.experiment
    if name in PRESETS:
        experiment = PRESETS[name]()
    elif Path(name).is_file():
        experiment = read(name)
    else:
        raise BimedixError(f"{name} is neither a preset ({', '.join(PRESETS)}) nor a file; correct it.")
    asked = {} if config.router is None else {"router.variant": config.router}
    return override(experiment, asked | dict(config.set))


def architecture_of(model: str | None, experiment: Experiment) -> MixtralConfig:
    """Sizes of a model by name or by the config.json of its folder; None: of the experiment's random model."""
    if model is None:
        return experiment.model.random or ARCHITECTURES["mixtral-8x7b"]
    if model in ARCHITECTURES:
        return ARCHITECTURES[model]
    if not Path(model).is_dir():
        raise BimedixError(f"{model} is neither an architecture ({', '.join(ARCHITECTURES)}) nor a folder; correct it.")
    from bimedix_jax.checkpoint.hf_config import read_config

    return read_config(Path(model))
