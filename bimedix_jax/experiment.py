"""An experiment is one frozen value: the model, the data and how it trains.

`Experiment` converts to JSON and back without loss. An unknown key, a missing one or a value of the wrong type is an
error that names it. A run folder stores its resolved experiment as config.json. This module does not import JAX.
"""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

from bimedix_jax import files
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.config import LoraConfig, MixtralConfig, Remat

Dtype = Literal["bfloat16", "float32"]


def require(condition: bool, message: str) -> None:
    if not condition:
        raise BimedixError(message)


def require_choices(value: Any) -> None:
    """Raises BimedixError if a field annotated as a Literal has another value, which Python does not check."""
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        for choice in (hints[field.name], *typing.get_args(hints[field.name])):
            options = typing.get_args(choice)
            actual = getattr(value, field.name)
            if typing.get_origin(choice) is Literal and actual is not None and actual not in options:
                raise BimedixError(f"{field.name} is {actual!r}; choose one of {', '.join(map(str, options))}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where the base model comes from and how its weights are stored."""

    path: str | None = None
    """Folder with a model, or a hub id (owner/name)."""
    revision: str | None = None
    """Revision of a hub id."""
    base: Literal["bfloat16", "float32", "nf4"] = "nf4"
    """Storage of the base weights; nf4 quantises attention and experts to 4 bits with double quantisation."""
    dtype: Dtype | None = None
    """Compute dtype; null uses that of the base, and bfloat16 for nf4."""
    random: MixtralConfig | None = None
    """Architecture to initialise at random instead of loading one: for smoke runs and timings."""

    def __post_init__(self) -> None:
        require_choices(self)
        require(self.path is None or self.random is None, "model.path and model.random exclude each other; set one.")
        require(
            self.dtype is None or self.base in ("nf4", self.dtype),
            f"model.base {self.base} computes in {self.base}, not in {self.dtype}; do not set model.dtype.",
        )
        require(self.revision is None or self.path is not None, "model.revision needs a hub id; set model.path.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSource:
    """The rows of tokens to train on."""

    path: str | None = None
    """Packed folder, as `bimedix data pack` writes it."""
    heldout: str | None = None
    """Packed folder of held-out rows, whose loss is measured every `eval_every` steps."""
    sequence_length: int = 2048
    """Tokens in a row; the packed folder must have the same."""
    synthetic_rows: int = 0
    """Train on this many synthetic rows instead of a folder: for smoke runs and timings."""

    def __post_init__(self) -> None:
        require(self.sequence_length >= 2, f"data.sequence_length must be at least 2, got {self.sequence_length}.")
        require(self.synthetic_rows >= 0, f"data.synthetic_rows cannot be negative, got {self.synthetic_rows}.")
        require(
            not (self.path and self.synthetic_rows), "data.path and data.synthetic_rows exclude each other; set one."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterTraining:
    """The routers: their losses, their variant and the languages of the metrics."""

    aux_loss_coef: float = 0.001
    """Weight of the load-balancing loss; with 0 it is only reported."""
    aux_scope: Literal["sequence", "micro_batch", "global"] = "micro_batch"
    """Tokens over which load is balanced. sequence: each row, averaged over rows. micro_batch: one micro-batch, as in
    Hugging Face, so accumulation changes it. global: the step, which with accumulation needs another forward pass."""
    z_loss_coef: float = 0.0
    """Weight of the router z-loss."""
    variant: str | None = None
    """Router by its name in models/routers.py (topk, softmax_topk, sigmoid_bias); null keeps the model's own."""
    scale: float | None = None
    """Factor on the weights of softmax_topk and sigmoid_bias; null keeps the model's own."""
    bias_rate: float | None = None
    """Change of sigmoid_bias's balancing bias in an optimiser step; null keeps the model's own."""
    languages: tuple[str, ...] = ()
    """Languages, such as en and ar, whose loss and load are logged separately; empty logs all of the packed data."""

    def __post_init__(self) -> None:
        require_choices(self)
        require(len(set(self.languages)) == len(self.languages), "router.languages names a language twice.")
        for name in ("aux_loss_coef", "z_loss_coef"):
            require(getattr(self, name) >= 0, f"router.{name} cannot be negative, got {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """AdamW (arXiv 1711.05101) with linear warm-up and cosine decay."""

    learning_rate: float = 2e-4
    """Peak learning rate, reached at the last warm-up step."""
    router_learning_rate: float | None = None
    """Peak learning rate of the routers, with the same schedule; null uses that of all other parameters."""
    warmup_steps: int = 10
    """Steps of linear warm-up; step s (from 1) uses s / warmup_steps of the peak, so the rate is never 0."""
    final_fraction: float = 0.0
    """Final share of the peak rate; 1 keeps the rate constant."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; norms are not decayed."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; null does not clip."""
    state_dtype: Dtype = "float32"
    """Storage of both moments; bfloat16 halves their memory, with stochastic rounding so that small changes add up."""

    def __post_init__(self) -> None:
        require_choices(self)
        require(self.learning_rate > 0, f"optimiser.learning_rate must be positive, got {self.learning_rate}.")
        require(
            self.router_learning_rate is None or self.router_learning_rate > 0,
            f"optimiser.router_learning_rate must be positive, got {self.router_learning_rate}; to freeze the routers "
            "leave them out of lora.targets.",
        )
        require(self.warmup_steps >= 0, f"optimiser.warmup_steps cannot be negative, got {self.warmup_steps}.")
        require(0 <= self.final_fraction <= 1, f"optimiser.final_fraction is {self.final_fraction}, not in [0, 1].")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimiser.{name} is {getattr(self, name)}, not in [0, 1).")
        require(self.epsilon > 0, f"optimiser.epsilon must be positive, got {self.epsilon}.")
        require(self.weight_decay >= 0, f"optimiser.weight_decay cannot be negative, got {self.weight_decay}.")
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optimiser.clip_norm must be positive or null, got {self.clip_norm}.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Rows of one optimiser step, on all devices together: rows * accumulation."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """Backends by operation; null chooses the platform's best one that supports the operands. A named backend never
    falls back: the run fails if it does not support the operands. run.json lists what ran."""

    layer_scan: Literal["scan", "bits", "unrolled"] | None = None
    """The loop over layers: lax.scan (scan), a scan over bits for CPUs (bits), or each layer compiled separately."""
    attention: Literal["avx512", "xla", "triton", "splash"] | None = None
    """Attention in C++ for CPUs (avx512), by XLA, by our kernel for GPUs (triton), or by JAX's for TPUs (splash)."""
    expert_mlp: Literal["avx512", "xla", "composed", "few_rows"] | None = None
    """The experts from dispatch to combine: fused for CPUs (avx512, xla), or composed of the operations below."""
    grouped_matmul: Literal["xla", "ragged_dot", "triton", "mosaic_tpu"] | None = None
    """Products of the experts; ragged_dot is JAX's, which off TPUs computes every expert for every row."""
    nf4_matmul: Literal["avx512", "xla", "triton", "mosaic_tpu"] | None = None
    """Products with one matrix: 4-bit projections; in bfloat16 avx512 takes dense ones too."""
    grouped_low_rank: Literal["masked", "grouped"] | None = None
    """The experts' adapters: one masked product over all experts, or two grouped products."""

    def __post_init__(self) -> None:
        require_choices(self)

    def named(self) -> dict[str, str]:
        """The named backends, as arguments of `kernels.backends.use`."""
        return {operation: name for operation, name in dataclasses.asdict(self).items() if name is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The axes of the device mesh. Their product is the number of devices. All but tensor shard the rows of a batch."""

    data: int = 1
    """Replicas of the model."""
    fsdp: int | None = None
    """Devices over which every matrix is sharded; null uses all devices that the other axes leave."""
    expert: int = 1
    """Devices over which the experts are sharded, with an exchange of tokens."""
    tensor: int = 1
    """Devices over which heads and feed-forward columns are sharded."""

    def __post_init__(self) -> None:
        for name in ("data", "fsdp", "expert", "tensor"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"mesh.{name} must be at least 1, got {value}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tracking:
    """The mirror of metrics.jsonl in Weights & Biases. It receives numbers and this configuration, but no text."""

    mode: Literal["disabled", "offline", "online"] = "offline"
    """offline writes to the run folder only; online also uploads, and fails at the start if it cannot."""
    project: str = "bimedix"
    """Project of the run in Weights & Biases."""

    def __post_init__(self) -> None:
        require_choices(self)
        require(bool(self.project), "tracking.project is empty; set it.")
        require(
            self.mode == "disabled" or (not set(self.project) & set("/\\#?%:") and len(self.project) <= 128),
            f"tracking.project is {self.project!r}, but a project of Weights & Biases has at most 128 characters and "
            "none of / \\ # ? % : (an owner is named by WANDB_ENTITY instead); give another name.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training run."""

    name: str
    """Name of the experiment in reports."""
    model: ModelSource = ModelSource()
    """The base model."""
    lora: LoraConfig | None = None
    """Adapters; null trains every parameter, which needs a float32 base."""
    data: DataSource = DataSource()
    """Training data."""
    router: RouterTraining = RouterTraining()
    """Router losses and variant."""
    intervene: str | None = None
    """JSON file of rules that tell the routers what to do with which tokens (docs/routing.md); null for none."""
    optimiser: OptimiserConfig = OptimiserConfig()
    """AdamW and its schedule."""
    batch: BatchConfig = BatchConfig()
    """Rows of a step."""
    mesh: MeshConfig | None = None
    """Mesh over the devices of all processes of the run; null uses one device."""
    steps: int | None = None
    """Optimiser steps; null derives them from `epochs`."""
    epochs: int | None = None
    """Passes over the data; the last batch is padded with empty rows. With null, the data repeat for `steps` steps."""
    remat: Remat = "layer"
    """What the backward pass recomputes. layer: each layer from its input. experts: the same except for the products of
    the experts, with a quarter less work and more memory. none: nothing."""
    seed: int = 0
    """Seed of the adapters' initial values and of the order of the rows."""
    eval_every: int = 0
    """Steps between measurements of the held-out loss; 0 turns them off."""
    probe: str | None = None
    """Folder of packed rows whose routes are recorded at steps 0, 1, 2, 4, ... and after the last; null for none."""
    log_experts_every: int = 0
    """Steps between logs of gradient norm and weight change by expert; the last step has them too. 0 for none."""
    checkpoint_every: int = 100
    """Steps between checkpoints. One is always written at the end and on Ctrl-C."""
    keep: int = 2
    """Number of checkpoints to keep, the newest ones."""
    skip_limit: int = 3
    """Steps in a row that may be skipped because loss or gradient is not finite; then the run goes back, or stops."""
    reorders: int = 1
    """How often the run goes back to its last checkpoint with another order of the data; afterwards it stops."""
    tracking: Tracking = Tracking()
    """Weights & Biases."""
    kernels: KernelChoice = KernelChoice()
    """Backend of each kernel."""

    def __post_init__(self) -> None:
        require_choices(self)
        require(bool(self.name), "name is empty; set it.")
        require(self.steps is not None or self.epochs is not None, "steps and epochs are both missing; set one.")
        for name in ("steps", "epochs", "checkpoint_every", "keep", "skip_limit"):
            require((value := getattr(self, name)) is None or value >= 1, f"{name} must be at least 1, got {value}.")
        for name in ("eval_every", "seed", "reorders", "log_experts_every"):
            require(getattr(self, name) >= 0, f"{name} cannot be negative, got {getattr(self, name)}.")
        require(
            self.eval_every == 0 or self.data.heldout is not None,
            "eval_every needs held-out rows; set data.heldout, or set eval_every to 0.",
        )
        require(
            self.lora is not None or self.model.base == "float32",
            "Without adapters every parameter trains, which needs model.base float32 (small updates vanish in "
            f"{self.model.base}); change the base or set lora.",
        )

    def to_dict(self) -> dict[str, Any]:
        """The experiment as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"


def from_dict(plain: dict[str, Any]) -> Experiment:
    """The inverse of `to_dict`. Fields with defaults may be missing.

    Raises:
      BimedixError: a key is unknown or missing, or a value has the wrong type or range; the message names it.
    """
    return parse(Experiment, plain, "")


def read(path: str | Path) -> Experiment:
    """Reads an experiment from a JSON file, such as the config.json of a run.

    Raises:
      BimedixError: the file does not exist, is not JSON, or is not an experiment.
    """
    plain = files.read_json(path, dict[str, Any], "correct it, or name a JSON file with an experiment")
    try:
        return from_dict(plain)
    except BimedixError as error:
        raise BimedixError(f"{path}: {error}") from error


def parse(kind: Any, value: Any, where: str) -> Any:
    """Converts a JSON value to the annotated type `kind`. `where` is the dotted name for messages."""
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
    """Converts a JSON object to a dataclass."""
    name = where or "the experiment"
    require(isinstance(value, dict), f"{name} is {value!r}; it must be an object.")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(fields))
    require(not unknown, f"{name} has the unknown key {', '.join(unknown)}; the known keys are {', '.join(fields)}.")
    absent = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [key for key, f in fields.items() if (f.default, f.default_factory) == absent and key not in value]
    require(not missing, f"{name} lacks {', '.join(missing)}; add it.")
    hints = typing.get_type_hints(kind)
    parsed = {key: parse(hints[key], item, f"{where}.{key}" if where else key) for key, item in value.items()}
    try:
        return kind(**parsed)
    except ValueError as error:  # models/config.py validates with ValueError
        raise BimedixError(f"{name}: {error}") from error


def differences(ours: Experiment, theirs: Experiment) -> list[str]:
    """The fields that differ, as 'batch.rows: 4 here, 2 there', in the order of the fields."""
    here, there = files.flatten(ours.to_dict()), files.flatten(theirs.to_dict())
    changed = [name for name in dict.fromkeys((*here, *there)) if here.get(name) != there.get(name)]
    return [f"{name}: {here.get(name)!r} here, {there.get(name)!r} there" for name in changed]


def override(experiment: Experiment, changes: dict[str, Any]) -> Experiment:
    """The experiment with fields changed by dotted name, as {'batch.rows': 2}. An object that is null is created.

    Raises:
      BimedixError: a name is unknown, or a value is invalid.
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
