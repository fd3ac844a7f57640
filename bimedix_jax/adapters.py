"""Low-rank adapters on a Mixtral: adding them, counting them, and selecting the parameters that train."""

import dataclasses
import itertools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich import box

from bimedix_jax.errors import BimedixError
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.stacks import as_tensor
from bimedix_jax.models.config import LORA_TARGETS, LoraConfig
from bimedix_jax.models.linear import ExpertLinear, Linear, Lora, TrainedParam, lora_axes
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.process.terminal import FittedTable


def linears(model: Mixtral) -> dict[tuple[str, ...], Linear | ExpertLinear]:
    """Every linear layer by its path, in tree order."""
    found = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear | ExpertLinear):
            found[tuple(map(str, path))] = module
    return dict(sorted(found.items()))


def has_lora(model: Mixtral) -> bool:
    return any(layer.lora is not None for layer in linears(model).values())


def is_trainable(model: Mixtral) -> Any:
    """Filter for `nnx.split`: the trained parameters of a model with adapters, or every parameter of one without."""
    return nnx.filterlib.Any(nnx.LoRAParam, TrainedParam) if model.lora is not None else nnx.Param


def make_factor(name: str, shape: tuple[int, ...], axes: tuple, bound: float, seed: int | None) -> nnx.LoRAParam:
    """A factor drawn uniformly from [-bound, bound] with a key derived from its name; shape only without a seed."""
    if seed is None:
        return nnx.LoRAParam(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    value = bound * jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0) if bound else jnp.zeros(shape, jnp.float32)
    return nnx.LoRAParam(value, axes=axes)


def is_abstract(layer: Linear | ExpertLinear) -> bool:
    return isinstance(jax.tree.leaves(layer.w.get_value())[0], jax.ShapeDtypeStruct)


def matrix_names(path: tuple[str, ...], lead: tuple[int, ...]) -> list[str]:
    """Full names of a layer's matrices, row-major over its leading axes: layers.3.moe.experts.5.w1."""
    if not lead:
        return [".".join(path)]
    stack, *middle, kind = path
    names = []
    for index in itertools.product(*map(range, lead)):
        expert = ["experts", str(index[1])] if len(index) == 2 else []
        names.append(".".join([stack, str(index[0]), *middle, *expert, kind]))
    return names


def factor_indices(layer: Linear | ExpertLinear) -> dict[tuple[int, ...], tuple[int, ...]]:
    """For every adapted matrix: its index in the leading axes of the weight -> its index in those of a and b."""
    if layer.lora is None:
        return {}
    indices = list(itertools.product(*map(range, layer.w.get_value().shape[:-2])))
    if layer.lora.slots is None:
        return {index: index for index in indices}
    return {indices[slot]: (place,) for place, slot in enumerate(layer.lora.slots)}


def attach(
    layer: Linear | ExpertLinear, path: tuple[str, ...], slots: list[int], config: LoraConfig, seed: int | None
) -> None:
    """Adds factors for the matrices `slots` of a layer: a is drawn as in PEFT (Kaiming-uniform, 1/sqrt(in)), b is 0.

    Without a seed, or if the layer has shapes only, the factors have shapes only.
    """
    *lead, width_in, width_out = layer.w.get_value().shape
    rank, name, every = config.rank_of(path[-1]), ".".join(path), len(slots) == math.prod(lead)
    a_axes, b_axes = lora_axes(layer.w.get_metadata("axes"))
    if not every:
        lead, a_axes, b_axes = [len(slots)], (None, *a_axes[-2:]), (None, *b_axes[-2:])
    drawn = None if is_abstract(layer) else seed
    a = make_factor(f"{name}.lora.a", (*lead, width_in, rank), a_axes, width_in**-0.5, drawn)
    b = make_factor(f"{name}.lora.b", (*lead, rank, width_out), b_axes, 0.0, drawn)
    layer.lora = Lora(a, b, config.scale_of(path[-1]), None if every else tuple(slots), config.dropout)


def add_lora(model: Mixtral, config: LoraConfig, seed: int | None = 0) -> Mixtral:
    """The model with new adapters, which change nothing until they are trained. The base is shared, not copied.

    With the seed None, they have shapes only, for values that are read from a file.

    Raises:
      BimedixError: the model already has adapters, or a target or override matched no layer.
    """
    if has_lora(model):
        raise BimedixError("This model already has adapters; load the base without them, or merge them first.")
    adapted = nnx.merge(*nnx.split(model), copy=True)
    layers = linears(adapted)
    matched: set[str] = set()
    for path, layer in layers.items():
        names = matrix_names(path, layer.w.get_value().shape[:-2])
        chosen = {slot: targets for slot, name in enumerate(names) if (targets := config.selects(name))}
        matched.update(*chosen.values())
        if chosen:
            attach(layer, path, list(chosen), config, seed)
    missing = [target for target in config.targets if target not in matched]
    if missing:
        tied = " (tied embeddings have no lm_head of their own)" if model.lm_head is None else ""
        kinds = {path[-1] for path in layers}
        raise BimedixError(
            f"Target {', '.join(missing)} matched no layer of this model; it has "
            f"{', '.join(name for name in LORA_TARGETS if name in kinds)}{tied}; patterns are matched with names such "
            f"as layers.{model.config.num_layers - 1}.moe.experts.{model.config.router.num_experts - 1}.w2."
        )
    adapted_kinds = {path[-1] for path, layer in layers.items() if layer.lora is not None}
    idle = [override.target for override in config.overrides if override.target not in adapted_kinds]
    if idle:
        raise BimedixError(
            f"The override of {', '.join(idle)} changes no adapter; add the target or drop the override."
        )
    if config.train_router:
        train_in_full(adapted.layers.moe.router)
    adapted.lora = config
    return adapted


def train_in_full(layer: Linear) -> None:
    """Makes a layer's weight trainable in float32, because small updates vanish in bfloat16."""
    weight, axes = layer.w.get_value(), layer.w.get_metadata("axes")
    if isinstance(weight, jax.ShapeDtypeStruct):
        layer.w = TrainedParam(jax.ShapeDtypeStruct(weight.shape, jnp.float32), axes=axes)
    else:
        layer.w = TrainedParam(weight.astype(jnp.float32), axes=axes)


@dataclasses.dataclass(frozen=True)
class CoverageRow:
    """One base tensor, stacked over layers (and experts).

    Attributes:
      bits: storage per weight in bits, scales included.
      matrices, adapted: how many matrices are stacked in it, and how many of them have an adapter.
      rank: of its adapters; None without any.
      full_rank: whether the adapter's rank is at least the matrix's smaller side, so that any update can be learned.
      trainable: how many parameters train: those of the adapters, or those of the tensor itself.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    bits: float
    bytes: int
    matrices: int
    adapted: int
    rank: int | None
    full_rank: bool
    trainable: int


@dataclasses.dataclass(frozen=True)
class Coverage:
    """The storage, adapters and trained parameters of every base tensor."""

    rows: tuple[CoverageRow, ...]

    @property
    def total_parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def trainable_parameters(self) -> int:
        return sum(row.trainable for row in self.rows)

    @property
    def base_bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {
            "trainable_parameters": self.trainable_parameters,
            "total_parameters": self.total_parameters,
            "trainable_percent": 100 * self.trainable_parameters / self.total_parameters,
            "base_bytes": self.base_bytes,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def table(self) -> FittedTable:
        """For a terminal of 80 columns or more."""
        share = 100 * self.trainable_parameters / self.total_parameters
        partly = [row for row in self.rows if 0 < row.adapted < row.matrices]
        full = any(row.full_rank for row in self.rows)
        table = FittedTable(
            title="Coverage: every base tensor, its storage and its adapter",
            caption="\n".join(
                [
                    f"{self.trainable_parameters:,} trainable of {self.total_parameters:,} ({share:.2f} %); "
                    f"base {self.base_bytes / 2**30:.2f} GiB",
                    *(["full rank: such a row's adapter can represent every change of its matrices"] if full else []),
                    *(f"part: {row.name} has {row.adapted} of {row.matrices} matrices adapted" for row in partly),
                ]
            ),
            box=box.SIMPLE_HEAD,
            show_edge=False,
            padding=0,
        )
        table.add_column("tensor")
        for column in ("shape", "params (M)", "bits"):
            table.add_column(column, justify="right")
        table.add_prose_column("rank", justify="right")
        table.add_column("train (M)", justify="right")
        for row in self.rows:
            rank = "-" if row.rank is None else f"rank {row.rank} (full rank)" if row.full_rank else f"{row.rank}"
            rank += " part" if 0 < row.adapted < row.matrices else ""
            shape = "x".join(map(str, row.shape))
            trained = f"{row.trainable / 1e6:,.2f}" if row.trainable else "-"
            table.add_row(row.name, shape, f"{row.parameters / 1e6:,.2f}", f"{row.bits:.2f}", rank, trained)
        return table


def coverage(model: Mixtral) -> Coverage:
    """A row for every base tensor; also works for a model that has shapes only.

    Raises:
      BimedixError: the shapes of an adapter do not fit its linear layer.
    """
    adapted = {path: layer.lora for path, layer in linears(model).items()}
    rows = []
    for path, variable in sorted(
        nnx.to_flat_state(nnx.state(model, nnx.Param)), key=lambda item: tuple(map(str, item[0]))
    ):
        path = tuple(map(str, path))
        if isinstance(variable, nnx.LoRAParam):
            continue
        value, lora = jax.eval_shape(as_tensor, variable.get_value()), adapted.get(path[:-1])
        packed = isinstance(value, NF4Tensor)
        size = math.prod(value.shape)
        nbytes = value.nbytes if packed else size * jnp.dtype(value.dtype).itemsize
        matrices = math.prod(value.shape[:-2])
        in_full = isinstance(variable, TrainedParam) or (model.lora is None and not packed)
        row = CoverageRow(
            ".".join(path),
            tuple(value.shape),
            size,
            8 * nbytes / size,
            nbytes,
            matrices,
            0,
            None,
            False,
            size if in_full else 0,
        )
        rows.append(row if lora is None else with_adapter(row, lora))
    return Coverage(tuple(rows))


def with_adapter(row: CoverageRow, lora: Lora) -> CoverageRow:
    """The row with its adapters counted."""
    a, b = lora.a.get_value().shape, lora.b.get_value().shape
    adapted = row.matrices if lora.slots is None else len(lora.slots)
    fits = (math.prod(a[:-2]), a[-2], b[-1]) == (adapted, *row.shape[-2:]) and (*b[:-2], b[-2]) == (*a[:-2], a[-1])
    if not fits:
        raise BimedixError(
            f"The adapter of {row.name} does not fit its base {row.shape}; load the model that it was trained on."
        )
    return dataclasses.replace(
        row,
        adapted=adapted,
        rank=a[-1],
        full_rank=a[-1] >= min(row.shape[-2:]),
        trainable=math.prod(a) + math.prod(b),
    )
