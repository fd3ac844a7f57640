"""`bimedix plan`: whether a run fits other devices, how much memory it needs and how long it takes."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment, override, read
from bimedix_jax.models.config import ARCHITECTURES, MixtralConfig
from bimedix_jax.options import Assignment, ChangesField, changed_fields
from bimedix_jax.presets import PRESETS

DEFAULT = "bimedix-mixtral-8x7b"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compile the training step, the prefill and a decoding step of a run for devices that you do not need to have.

    The steps of `bimedix train` and `bimedix chat` are compiled with the compiler of these devices. Memory, FLOPs and
    communication are read from the compiled programs; only the time is estimated. On a CPU, compiling a step takes half
    a minute for GPUs and two minutes for TPUs.
    """

    devices: str
    """Device and number of devices, such as a100-80gb:8. The devices are a100-40gb, a100-80gb, h100-80gb, v5e and
    v5p."""
    experiment: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET|FILE")] = DEFAULT
    """Preset or experiment file; the default is the paper's recipe."""
    model: str | None = None
    """Architecture by name, or a folder with its config.json; weights are not read. By default the architecture of the
    experiment's random model, or else mixtral-8x7b."""
    set: tuple[Assignment, ...] = ()
    """Fields of the experiment by dotted name and JSON value, such as data.sequence_length=2048 batch.rows=16."""
    router: Annotated[str | None, ChangesField("router.variant")] = None
    """Router variant (topk, softmax_topk, sigmoid_bias)."""
    fit: bool = False
    """If the run does not fit, change its settings until it does, and list the changes."""
    inference: bool = True
    """Compile the prefill and the decoding step too."""
    prompt_tokens: int | None = None
    """Tokens of a prompt in the prefill; by default 512, or what the model's context leaves room for."""
    batch: int = 1
    """Prompts in an inference batch."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Prints and returns memory, communication, work and time."""
    from bimedix_jax.costs.devices import assumptions, target
    from bimedix_jax.plan.fit import fit
    from bimedix_jax.plan.hardware import require_slice
    from bimedix_jax.plan.page import show
    from bimedix_jax.plan.report import estimate_inference, estimate_training, to_document
    from bimedix_jax.process.terminal import Screen

    if config.batch < 1:
        raise BimedixError("--batch is below 1; give at least 1")
    experiment, where = resolve(config), target(config.devices)
    require_slice(where.device.name, where.count)
    architecture = architecture_of(config.model, experiment)
    prompt = prompt_of(config.prompt_tokens, architecture.max_position_embeddings)
    progress = Screen(stderr=True)
    changed: list[str] = []
    with progress.status(f"compiling the training step for {where.name}"):
        if config.fit:
            planned, changed = fit(architecture, experiment, where, lambda line: progress.print(line, highlight=False))
        else:
            planned = estimate_training(architecture, experiment, where)
    document = {"model": config.model or experiment.name, **to_document(planned), "changed": changed}
    if config.inference:
        with progress.status(f"compiling prefill and decoding for {where.name}"):
            document |= estimate_inference(architecture, planned.experiment, where, config.batch, prompt)
    document |= {"assumptions": assumptions(where.device), "experiment": planned.experiment.to_dict()}
    show(document, console)
    if not document["fits"]:
        raise BimedixError(does_not_fit(where.name, config.fit), document=document)
    return document


def prompt_of(tokens: int | None, context: int) -> int:
    """The tokens of a prompt, after which the context has room for one more."""
    if tokens is not None and not 1 <= tokens < context:
        raise BimedixError(
            f"--prompt-tokens {tokens} does not fit this model's context of {context}; give 1 to {context - 1}"
        )
    return min(512, context - 1) if tokens is None else tokens


def does_not_fit(target: str, tried: bool) -> str:
    """What to do about a training step that does not fit; `tried` is whether --fit was given."""
    if tried:
        return f"no settings that --fit tries fit {target}; name more devices, or devices with more memory"
    return f"the training step does not fit {target}; pass --fit to change settings until it does, or name more devices"


def resolve(config: Config) -> Experiment:
    """The experiment that the options describe.

    Raises:
      BimedixError: the experiment is neither a preset nor a file, or a value does not fit.
    """
    name = config.experiment
    if name in PRESETS:
        experiment = PRESETS[name]()
    elif Path(name).is_file():
        experiment = read(name)
    else:
        raise BimedixError(f"{name} is neither a preset ({', '.join(PRESETS)}) nor a file; correct it.")
    return override(experiment, changed_fields(config) | dict(config.set))


def architecture_of(model: str | None, experiment: Experiment) -> MixtralConfig:
    """Sizes of a model, by name or from the config.json of its folder; None: those of the experiment."""
    if model is None:
        return experiment.model.random or ARCHITECTURES["mixtral-8x7b"]
    if model in ARCHITECTURES:
        return ARCHITECTURES[model]
    if not Path(model).is_dir():
        raise BimedixError(f"{model} is neither an architecture ({', '.join(ARCHITECTURES)}) nor a folder; correct it.")
    from bimedix_jax.checkpoint.hf_config import read_config

    return read_config(Path(model))
