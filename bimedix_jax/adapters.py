"""Low-rank adapters on a Mixtral: attaching them, counting them, and telling what trains."""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich import box
from rich.table import Table

from bimedix_jax.errors import BimedixError
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.models.config import LORA_TARGETS, LoraConfig
from bimedix_jax.models.linear import ExpertLinear, Linear, Lora, lora_axes
from bimedix_jax.models.mixtral import Mixtral


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
    """Filter for `nnx.split`: the adapters if the model has any, else every parameter."""
    return nnx.LoRAParam if has_lora(model) else nnx.Param


def make_factor(
    name: str, shape: tuple[int, ...], axes: tuple, bound: float, seed: int, abstract: bool
) -> nnx.LoRAParam:
    """Uniform in [-bound, bound] from the factor's own name; shapes only for a model without storage."""
    if abstract:
        return nnx.LoRAParam(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    value = bound * jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0) if bound else jnp.zeros(shape, jnp.float32)
    return nnx.LoRAParam(value, axes=axes)


def attach(layer: Linear | ExpertLinear, name: str, config: LoraConfig, seed: int) -> None:
    """Gives one layer its factors: a as PEFT draws it (Kaiming-uniform, bound 1/sqrt(in)), b zero."""
    weight = layer.w.get_value()
    *leading, width_in, width_out = weight.shape
    a_axes, b_axes = lora_axes(layer.w.get_metadata("axes"))
    abstract = isinstance(jax.tree.leaves(weight)[0], jax.ShapeDtypeStruct)
    a_shape, b_shape = (*leading, width_in, config.rank), (*leading, config.rank, width_out)
    a = make_factor(f"{name}.lora.a", a_shape, a_axes, width_in**-0.5, seed, abstract)
    b = make_factor(f"{name}.lora.b", b_shape, b_axes, 0.0, seed, abstract)
    layer.lora = Lora(a, b, config.scale)


def add_lora(model: Mixtral, config: LoraConfig, seed: int = 0) -> Mixtral:
    """The model with fresh adapters, which change nothing until trained; its base is shared, not copied.

    Raises:
      BimedixError: the model has adapters already, or a target matched no layer.
    """
    if has_lora(model):
        raise BimedixError("This model carries adapters already; load the base without them, or merge them first.")
    adapted = nnx.merge(*nnx.split(model), copy=True)
    layers = linears(adapted)
    matched = {path[-1] for path in layers}
    missing = [target for target in config.targets if target not in matched]
    if missing:
        raise BimedixError(
            f"Target {', '.join(missing)} matched no layer of this model; it has "
            f"{', '.join(sorted(matched & set(LORA_TARGETS)))}."
        )
    for path, layer in layers.items():
        if path[-1] in config.targets:
            attach(layer, ".".join(path), config, seed)
    return adapted


@dataclasses.dataclass(frozen=True)
class CoverageRow:
    """One base tensor, stacked over layers (and experts).

    Attributes:
      bits: storage per weight in bits, scales included.
      rank: of its adapter; None without one.
      full_rank: whether the adapter's rank reaches the matrix's smaller side, so that it restricts nothing.
      trainable: trained parameters, of the adapter or of the tensor itself.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    bits: float
    bytes: int
    rank: int | None
    full_rank: bool
    trainable: int


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What is stored in how many bits, what has an adapter, what trains."""

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

    def table(self) -> Table:
        """For a terminal of 80 columns or more."""
        share = 100 * self.trainable_parameters / self.total_parameters
        table = Table(
            title="Coverage: every base tensor, its storage and its adapter",
            caption=f"{self.trainable_parameters:,} trainable of {self.total_parameters:,} ({share:.2f} %); "
            f"base {self.base_bytes / 2**30:.2f} GiB",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            padding=0,
        )
        table.add_column("tensor", no_wrap=True)
        for column in ("shape", "params (M)", "bits", "rank", "train (M)"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.rows:
            rank = "-" if row.rank is None else f"{row.rank}" + (" full" if row.full_rank else "")
            shape = "x".join(map(str, row.shape))
            trained = f"{row.trainable / 1e6:,.2f}" if row.trainable else "-"
            table.add_row(row.name, shape, f"{row.parameters / 1e6:,.2f}", f"{row.bits:.2f}", rank, trained)
        return table


def coverage(model: Mixtral) -> Coverage:
    """Counts every base tensor; works on a model that has shapes only.

    Raises:
      BimedixError: a linear layer's adapter does not belong to it (shapes differ).
    """
    adapted = {path: layer.lora for path, layer in linears(model).items()}
    train_base = not has_lora(model)
    rows = []
    for path, variable in sorted(
        nnx.to_flat_state(nnx.state(model, nnx.Param)), key=lambda item: tuple(map(str, item[0]))
    ):
        path = tuple(map(str, path))
        if isinstance(variable, nnx.LoRAParam):
            continue
        value = variable.get_value()
        packed = isinstance(value, NF4Tensor)
        size = math.prod(value.shape)
        nbytes = value.nbytes if packed else size * jnp.dtype(value.dtype).itemsize
        lora = adapted.get(path[:-1])
        rank = None if lora is None else lora.a.get_value().shape[-1]
        if lora is not None and (lora.a.get_value().shape[-2], lora.b.get_value().shape[-1]) != value.shape[-2:]:
            raise BimedixError(
                f"The adapter of {'.'.join(path[:-1])} does not fit its base {value.shape}; it is of another model."
            )
        factors = 0 if lora is None else math.prod(lora.a.get_value().shape) + math.prod(lora.b.get_value().shape)
        rows.append(
            CoverageRow(
                ".".join(path),
                tuple(value.shape),
                size,
                8 * nbytes / size,
                nbytes,
                rank,
                rank is not None and rank >= min(value.shape[-2:]),
                size if train_base and not packed else factors,
            )
        )
    return Coverage(tuple(rows))
