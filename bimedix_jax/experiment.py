"""An experiment is one frozen value: what trains, on what, how. No JAX here: the command line reads these before it.

`Experiment` goes to JSON and back without loss; an unknown key, a missing one or a value of the wrong type is an error
that names it. A run folder keeps its resolved experiment as config.json, and a resumed run must present the same one.
"""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

from bimedix_jax.errors import BimedixError
from bimedix_jax.models.config import LoraConfig, MixtralConfig, Remat

Dtype = Literal["bfloat16", "float32"]


def require(condition: bool, message: str) -> None:
    if not condition:
        raise BimedixError(message)


def require_choices(value: Any) -> None:
    """Raises BimedixError for a field annotated as a Literal that holds something else (Python does not check)."""
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        for choice in (hints[field.name], *typing.get_args(hints[field.name])):
            options = typing.get_args(choice)
            held = getattr(value, field.name)
            if typing.get_origin(choice) is Literal and held is not None and held not in options:
                raise BimedixError(f"{field.name} is {held!r}; choose one of {', '.join(map(str, options))}.")


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where the base model comes from and how it is held."""

    path: str | None = None
    """Folder with a model, or a hub id (owner/name)."""
    revision: str | None = None
    """Revision of a hub id."""
    base: Literal["bfloat16", "float32", "nf4"] = "nf4"
    """Storage of the base weights; nf4 packs attention and experts to 4 bits with double quantisation."""
    dtype: Dtype | None = None
    """Compute dtype; None takes the base's own, bfloat16 for nf4."""
    random: MixtralConfig | None = None
    """Architecture to initialise at random instead of loading one: for smoke runs and timings."""

    def __post_init__(self) -> None:
        require_choices(self)
        require(self.path is None or self.random is None, "model.path and model.random exclude each other; keep one.")
        require(
            self.dtype is None or self.base in ("nf4", self.dtype),
            f"model.base {self.base} computes in {self.base}, not in {self.dtype}; leave model.dtype out.",
        )
        require(self.revision is None or self.path is not None, "model.revision belongs to a hub id; give model.path.")


@dataclasses.dataclass(frozen=True)
class DataSource:
    """Rows of tokens to learn from."""

    path: str | None = None
    """Packed folder, as `bimedix data pack` writes it."""
    heldout: str | None = None
    """Packed folder whose loss is measured every `eval_every` steps."""
    sequence_length: int = 2048
    """Tokens a row; the packed folder must have the same."""
    synthetic_rows: int = 0
    """Learn this many made-up rows instead of a folder: for smoke runs and timings."""

    def __post_init__(self) -> None:
        require(self.sequence_length >= 2, f"data.sequence_length must be at least 2, got {self.sequence_length}.")
        require(self.synthetic_rows >= 0, f"data.synthetic_rows cannot be negative, got {self.synthetic_rows}.")
        require(
            not (self.path and self.synthetic_rows), "data.path and data.synthetic_rows exclude each other; keep one."
        )


@dataclasses.dataclass(frozen=True)
class RouterTraining:
    """What is asked of the routers besides a low language-model loss."""

    aux_loss_coef: float = 0.001
    """Weight of the load-balancing loss; 0 turns it off, and it is reported all the same."""
    aux_scope: Literal["sequence", "micro_batch", "global"] = "micro_batch"
    """Tokens over which load is balanced: sequence averages over rows; micro_batch pools one micro-batch as Hugging
    Face does, so accumulation changes it; global pools the step, for one more forward pass under accumulation."""
    z_loss_coef: float = 0.0
    """Weight of the router z-loss."""
    variant: str | None = None
    """Router by its name in models/routers.py (topk, softmax_topk, sigmoid_bias); null keeps the model's own."""
    scale: float | None = None
    """What multiplies the weights of softmax_topk and sigmoid_bias; null keeps the model's own."""
    bias_rate: float | None = None
    """Change of sigmoid_bias's balancing bias after an optimiser step; null keeps the model's own."""
    languages: tuple[str, ...] = ()
    """Languages, such as en and ar, whose load, entropy, margin and z are reported apart; needs a packed folder."""

    def __post_init__(self) -> None:
        require_choices(self)
        require(len(set(self.languages)) == len(self.languages), "router.languages names a language twice.")
        for name in ("aux_loss_coef", "z_loss_coef"):
            require(getattr(self, name) >= 0, f"router.{name} cannot be negative, got {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True)
class OptimiserConfig:
    """AdamW (arXiv 1711.05101) with linear warm-up and a cosine."""

    learning_rate: float = 2e-4
    """Peak rate, reached at the last warm-up step."""
    router_learning_rate: float | None = None
    """Peak rate of what trains in the routers, under the same schedule; None is that of the rest."""
    warmup_steps: int = 10
    """Steps of linear warm-up; step s (from 1) uses s / warmup_steps of the peak, so the first step already learns."""
    final_fraction: float = 0.0
    """Share of the peak that the cosine ends on; 1 keeps the rate constant."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices; norms are not decayed."""
    clip_norm: float | None = 1.0
    """Largest norm of the whole gradient; None does not clip."""
    state_dtype: Dtype = "float32"
    """Storage of both moments; bfloat16 halves their memory and rounds them stochastically, so that small changes
    accumulate instead of vanishing."""

    def __post_init__(self) -> None:
        require_choices(self)
        require(self.learning_rate > 0, f"optimiser.learning_rate must be positive, got {self.learning_rate}.")
        require(
            self.router_learning_rate is None or self.router_learning_rate > 0,
            f"optimiser.router_learning_rate must be positive, got {self.router_learning_rate}; to freeze the routers "
            "leave them out of lora.targets.",
        )
        require(self.warmup_steps >= 0, f"optimiser.warmup_steps cannot be negative, got {self.warmup_steps}.")
        require(0 <= self.final_fraction <= 1, f"optimiser.final_fraction lies in [0, 1], got {self.final_fraction}.")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimiser.{name} lies in [0, 1), got {getattr(self, name)}.")
        require(self.epsilon > 0, f"optimiser.epsilon must be positive, got {self.epsilon}.")
        require(self.weight_decay >= 0, f"optimiser.weight_decay cannot be negative, got {self.weight_decay}.")
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optimiser.clip_norm must be positive or null, got {self.clip_norm}.",
        )


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Rows of one optimiser step: rows * accumulation, on all devices together."""

    rows: int = 1
    """Rows of a micro-batch."""
    accumulation: int = 1
    """Micro-batches whose gradients one optimiser step sums."""

    def __post_init__(self) -> None:
        for name in ("rows", "accumulation"):
            require(getattr(self, name) >= 1, f"batch.{name} must be at least 1, got {getattr(self, name)}.")

    @property
    def size(self) -> int:
        return self.rows * self.accumulation


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """Backends of the kernels by operation; null is the platform's best that takes the operands.

    A named one never falls back: the run ends where it cannot take them. run.json says which ones ran."""

    layer_scan: Literal["scan", "bits", "unrolled"] | None = None
    """The loop over layers: lax.scan, the same over bits for CPUs, or no loop, which compiles every layer by itself."""
    expert_mlp: Literal["xla", "composed", "few_rows"] | None = None
    """The experts from dispatch to combine: in one piece for CPUs, or composed of the operations below."""
    grouped_matmul: Literal["xla", "ragged_dot", "triton", "mosaic_tpu"] | None = None
    """Products of the experts; ragged_dot is JAX's own, which computes every expert for every row except on TPUs."""
    nf4_matmul: Literal["xla", "triton", "mosaic_tpu"] | None = None
    """Products of the attention's 4-bit projections."""
    grouped_low_rank: Literal["masked", "grouped"] | None = None
    """The experts' adapters: all experts at once and masked, or two grouped products."""

    def __post_init__(self) -> None:
        require_choices(self)

    def named(self) -> dict[str, str]:
        """The choices, as `kernels.backends.use` takes them."""
        return {operation: name for operation, name in dataclasses.asdict(self).items() if name is not None}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; the sizes multiply to their number. All but tensor divide the rows of a batch."""

    data: int = 1
    """Copies of the model."""
    fsdp: int | None = None
    """Devices that share the storage of every matrix; null: all that the other axes leave."""
    expert: int = 1
    """Devices that share the experts and exchange tokens."""
    tensor: int = 1
    """Devices that share heads and feed-forward columns."""

    def __post_init__(self) -> None:
        for name in ("data", "fsdp", "expert", "tensor"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"mesh.{name} must be at least 1, got {value}.")


@dataclasses.dataclass(frozen=True)
class Tracking:
    """The mirror of metrics.jsonl in Weights & Biases. It receives numbers and this configuration, never text."""

    mode: Literal["disabled", "offline", "online"] = "offline"
    """offline writes into the run folder only; online also uploads, and fails at the start where it cannot."""
    project: str = "bimedix"
    """Project that the run appears in."""

    def __post_init__(self) -> None:
        require_choices(self)
        require(bool(self.project), "tracking.project is empty; name one.")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One training run."""

    name: str
    """What reports call it."""
    model: ModelSource = ModelSource()
    """The base model."""
    lora: LoraConfig | None = None
    """Adapters; None trains every parameter, which needs a float32 base."""
    data: DataSource = DataSource()
    """What it learns from."""
    router: RouterTraining = RouterTraining()
    """Router losses."""
    optimiser: OptimiserConfig = OptimiserConfig()
    """AdamW and its schedule."""
    batch: BatchConfig = BatchConfig()
    """Rows of a step."""
    mesh: MeshConfig | None = None
    """Devices of the run, of all its processes together; null: one device."""
    steps: int | None = None
    """Optimiser steps; None follows from `epochs`."""
    epochs: int | None = None
    """Passes over the data; the last batch is filled up with empty rows. None: `steps` decides and the data repeat."""
    remat: Remat = "layer"
    """What the backward pass recomputes: each layer from its input (layer), the same without the products of its
    experts (experts: a quarter less work, more memory), or nothing (none)."""
    seed: int = 0
    """Of the adapters' initial values and of the order of the rows."""
    eval_every: int = 0
    """Steps between measurements of the held-out loss; 0 for none."""
    checkpoint_every: int = 100
    """Steps between checkpoints; one is always written at the end and on Ctrl-C."""
    keep: int = 2
    """Checkpoints kept, the newest ones."""
    tracking: Tracking = Tracking()
    """Weights & Biases."""
    kernels: KernelChoice = KernelChoice()
    """Which backend of each kernel runs."""

    def __post_init__(self) -> None:
        require_choices(self)
        require(bool(self.name), "name is empty; give the experiment one.")
        require(self.steps is not None or self.epochs is not None, "steps and epochs are both missing; give one.")
        for name in ("steps", "epochs", "checkpoint_every", "keep"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, got {value}.")
        require(self.eval_every >= 0, f"eval_every cannot be negative, got {self.eval_every}.")
        require(self.seed >= 0, f"seed cannot be negative, got {self.seed}.")
        require(
            self.eval_every == 0 or self.data.heldout is not None,
            "eval_every needs rows to measure on; give data.heldout or set eval_every to 0.",
        )
        require(
            self.lora is not None or self.model.base == "float32",
            "Without adapters every parameter trains, which needs model.base float32 (small updates vanish in "
            f"{self.model.base}); change the base or give lora.",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as JSON holds them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"


def from_dict(plain: dict[str, Any]) -> Experiment:
    """The experiment that `to_dict` wrote; fields may be left out where they have defaults.

    Raises:
      BimedixError: an unknown key, a missing one, a value of the wrong type or out of range; the message names it.
    """
    return parse(Experiment, plain, "")


def read(path: str | Path) -> Experiment:
    """The experiment of a JSON file, such as a run's config.json.

    Raises:
      BimedixError: no such file, not JSON, or not an experiment.
    """
    try:
        plain = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise BimedixError(f"cannot read {path} ({error.strerror}); name a JSON file with an experiment.") from error
    except ValueError as error:
        raise BimedixError(f"{path} is not JSON ({error}); correct it.") from error
    try:
        return from_dict(plain)
    except BimedixError as error:
        raise BimedixError(f"{path}: {error}") from error


def parse(kind: Any, value: Any, where: str) -> Any:
    """`value`, as JSON gives it, as the annotated type `kind`; `where` is the dotted name for messages."""
    name = where or "the experiment"
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if value is None and type(None) in typing.get_args(kind):
            return None
        (kind,) = (option for option in typing.get_args(kind) if option is not type(None))
    if dataclasses.is_dataclass(kind):
        return parse_fields(kind, value, where)
    if typing.get_origin(kind) is Literal:
        options = typing.get_args(kind)
        require(value in options, f"{name} is {value!r}; choose one of {', '.join(map(str, options))}.")
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise BimedixError(f"{name} is {value!r}; it must be a list.")
        return tuple(parse(typing.get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if kind is float and type(value) is int:
        value = float(value)
    require(type(value) is kind, f"{name} is {value!r}; it must be of type {kind.__name__}.")
    return value


def parse_fields(kind: Any, value: Any, where: str) -> Any:
    """A dataclass from its JSON object."""
    name = where or "the experiment"
    require(isinstance(value, dict), f"{name} is {value!r}; it must be an object.")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(fields))
    require(not unknown, f"{name} has the unknown key {', '.join(unknown)}; it knows {', '.join(fields)}.")
    absent = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [key for key, f in fields.items() if (f.default, f.default_factory) == absent and key not in value]
    require(not missing, f"{name} lacks {', '.join(missing)}; add it.")
    hints = typing.get_type_hints(kind)
    parsed = {key: parse(hints[key], item, f"{where}.{key}" if where else key) for key, item in value.items()}
    try:
        return kind(**parsed)
    except ValueError as error:  # models/config.py validates with ValueError
        raise BimedixError(f"{name}: {error}") from error


def flatten(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} as {'a.b': 1}."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(ours: Experiment, theirs: Experiment) -> list[str]:
    """What differs, as 'batch.rows: 4 here, 2 there', in the order of the fields."""
    here, there = flatten(ours.to_dict()), flatten(theirs.to_dict())
    changed = [name for name in dict.fromkeys((*here, *there)) if here.get(name) != there.get(name)]
    return [f"{name}: {here.get(name)!r} here, {there.get(name)!r} there" for name in changed]


def override(experiment: Experiment, changes: dict[str, Any]) -> Experiment:
    """The experiment with fields changed by dotted name, {'batch.rows': 2}; an object that is null there is begun.

    Raises:
      BimedixError: an unknown name, or a value that does not fit.
    """
    plain = experiment.to_dict()
    for name, value in changes.items():
        *parents, last = name.split(".")
        place = plain
        for parent in parents:
            require(parent in place and isinstance(place[parent], dict | None), f"the experiment has no field {name}.")
            if place[parent] is None:
                place[parent] = {}
            place = place[parent]
        place[last] = value
    return from_dict(plain)
