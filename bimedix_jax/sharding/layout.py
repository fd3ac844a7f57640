"""The layout of a model on a mesh: PartitionSpecs of its parameters, how they are gathered, calls on each shard.

RULES  ->  layout_of(model, mesh)  ->  Layout.over_shards: a function of the model on every shard
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bimedix_jax.errors import BimedixError
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.rows import RowMajor
from bimedix_jax.kernels.nf4.units import split_units
from bimedix_jax.kernels.stacks import as_tensor
from bimedix_jax.models import shards
from bimedix_jax.models.attention import KVCache
from bimedix_jax.models.axes import BATCH, LENGTH
from bimedix_jax.models.call import Call, Output, recorded
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.router_sums import RouterSums
from bimedix_jax.models.routers import Routing, RoutingPlan
from bimedix_jax.sharding.rules import BATCH_AXES, RULES, check_mesh, divide, split_axis


@dataclasses.dataclass(frozen=True)
class Place:
    """How one parameter is sharded: a PartitionSpec for each leaf, and how devices gather it before use."""

    specs: tuple[P, ...]
    storage: shards.Storage | None

    @property
    def gathered(self) -> bool:
        return self.storage is not None


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the parameters of a model are sharded on a mesh; the `placement` of a sharded model.

    Attributes:
      places: by dotted path.
    """

    mesh: Mesh
    places: tuple[tuple[str, Place], ...]

    def spec(self, path: str, value: Any) -> Any:
        """PartitionSpecs of one parameter, in the structure of its value."""
        return jax.tree.unflatten(jax.tree.structure(value), dict(self.places)[path].specs)

    def specs(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """PartitionSpecs of parameters by dotted path."""
        return {path: self.spec(path, value) for path, value in values.items()}

    def shardings(self, specs: Any) -> Any:
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))

    def batch_axes(self, rows: int) -> tuple[str, ...]:
        """Mesh axes that divide `rows` rows: all of BATCH_AXES, or the first ones whose sizes divide `rows`."""
        axes: tuple[str, ...] = ()
        for name in BATCH_AXES:
            if rows % math.prod(self.mesh.shape[axis] for axis in (*axes, name)):
                break
            axes = (*axes, name)
        return axes

    def split(self, batch_axes: tuple[str, ...] = BATCH_AXES) -> shards.Split:
        """How the model is divided among shards, if rows are divided over these mesh axes."""
        axes = {BATCH: batch_axes, LENGTH: ("tensor",)}
        axes |= {name: (rule.split,) for name, rule in RULES.items() if rule.split is not None}
        present = {name: tuple(a for a in names if self.mesh.shape[a] > 1) for name, names in axes.items()}
        stored = tuple((path, place.storage) for path, place in self.places if place.storage is not None)
        return shards.Split(tuple((name, names) for name, names in present.items() if names), stored)

    def over_shards(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any, batch_axes: tuple[str, ...] = BATCH_AXES
    ) -> Callable[..., Any]:
        """`function` on every shard, where the collectives of `models.shards` are active."""

        def on_shard(*operands: Any) -> Any:
            with shards.split(self.split(batch_axes)):
                return function(*operands)

        return jax.shard_map(on_shard, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def forward(self, graph: Any, state: Any, call: Call) -> Output:
        """`Mixtral.forward` on every shard. Rows that the mesh cannot divide are computed redundantly."""
        if call.start is not None:
            raise ValueError("A sharded model runs all its layers; only a model on one device starts at a later one.")
        batch_axes = self.batch_axes(call.tokens_BT.shape[0])
        rows: Any = P(batch_axes)
        by_layer: Any = P(None, batch_axes)
        flat = nnx.to_flat_state(state)
        names = [".".join(map(str, path)) for path, _ in flat]
        values = dict(zip(names, [variable.get_value() for _, variable in flat], strict=True))
        scalar: Any = P()
        keys: Any = P(None, batch_axes, None, "tensor")
        cached = call.cache and KVCache(keys, keys, rows, scalar)
        plans = plan_specs(call.plan, batch_axes)
        groups = None if call.group_BT is None else rows
        shared = None if call.operands is None else scalar
        ancestors = None if call.ancestor_ids_BTA is None else rows
        ids = {"tokens_BT": rows, "segment_ids_BT": rows, "ancestor_ids_BTA": ancestors, "group_BT": groups}
        calls = dataclasses.replace(call, plan=plans, cache=cached, operands=shared, **ids)

        def function(values: dict[str, Any], call: Call) -> Output:
            variables = [(path, v.replace(values[name])) for name, (path, v) in zip(names, flat, strict=True)]
            out = nnx.merge(graph, nnx.from_flat_state(variables)).forward(call)
            return dataclasses.replace(out, sums=shards.sum_over(BATCH, out.sums))

        none: Any = None
        record = recorded(Routing(by_layer, by_layer, by_layer), call.record)
        sums = RouterSums(*[scalar] * len(dataclasses.fields(RouterSums))) if call.groups else None
        out = Output(rows, none, record, sums, cached, by_layer if call.observe else None)
        return self.over_shards(function, (self.specs(values), calls), out, batch_axes)(values, call)


def plan_specs(plan: RoutingPlan, batch_axes: tuple[str, ...], lead: tuple[None, ...] = ()) -> RoutingPlan:
    """PartitionSpecs of a plan whose fields have axes `lead` before L. Fields with a value for each row are divided."""
    row = 1 + len(lead)
    return jax.tree.map(lambda x: P(*lead, None, batch_axes if x.shape[row] > 1 else None), plan)


def place_dense(value: Any, axes: tuple[str | None, ...], mesh: Mesh) -> Place:
    spec, gathers = divide(tuple(value.shape), axes, mesh)
    return Place((spec,), shards.Storage((gathers,)) if gathers else None)


def place_packed(t: NF4Tensor | RowMajor, units: bool, mesh: Mesh) -> Place:
    """A packed weight; `units`: it has already been split for `tensor`.

    The axis `fsdp` divides the experts of a shard, if their number is a multiple of it. Otherwise it divides the rows
    of a unit, or its bytes if it is not stored by rows. Experts are gathered along the first axis of a layer; bytes are
    transposed after the gather.
    """
    lead: list[Any] = [None] * len(t.batch_shape)
    parts, by_expert = mesh.shape["fsdp"], False
    if len(lead) - units == 2:
        names = ["expert"] if mesh.shape["expert"] > 1 else []
        by_expert = parts > 1 and t.batch_shape[1] % (mesh.shape["expert"] * parts) == 0
        names += ["fsdp"] if by_expert else []
        lead[1] = tuple(names) if len(names) > 1 else (*names, None)[0]
    if units:
        lead[-1] = "tensor"
    specs, gathers = [], []
    leaves = jax.tree.leaves(t)
    rows = jax.tree.leaves(t.row_axes) if isinstance(t, RowMajor) else [len(lead) - leaf.ndim for leaf in leaves]
    for leaf, row in zip(leaves, rows, strict=True):
        axis = 1 - leaf.ndim if by_expert else row  # 0: the leaf has no rows
        stored = parts > 1 and axis < 0 and leaf.shape[axis] % parts == 0
        inside: list[Any] = [None] * (leaf.ndim - len(lead))
        if stored and not by_expert:
            inside[axis] = "fsdp"
        specs.append(P(*lead, *inside))
        gathers.append(((axis, ("fsdp",)),) if stored else ())
    return Place(tuple(specs), shards.Storage(tuple(gathers), units) if units or any(gathers) else None)


def prepared(model: Mixtral, mesh: Mesh) -> list[tuple[tuple, nnx.Variable, Any, bool]]:
    """(path, variable, value to be sharded, whether it was split into units) of every parameter."""
    found = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value, axes = as_tensor(variable.get_value()), variable.get_metadata("axes")
        axis = split_axis(axes, mesh) if isinstance(value, NF4Tensor) else None
        if axis is not None:
            cut = functools.partial(split_units, axis=axis, parts=mesh.shape["tensor"])
            abstract = isinstance(jax.tree.leaves(value)[0], jax.ShapeDtypeStruct)
            try:
                with contextlib.nullcontext() if isinstance(value.packed, jax.Array) else host_memory():
                    value = jax.eval_shape(cut, value) if abstract else jax.jit(cut)(value)
            except ValueError as error:
                raise BimedixError(f"{error} Choose a smaller mesh.tensor.") from error
        found.append((path, variable, value, axis is not None))
    return found


def layout_of(model: Mixtral, mesh: Mesh) -> Layout:
    """The layout of a model on a mesh; the model may have shapes only.

    Raises:
      BimedixError: the mesh cannot divide the model.
    """
    return layout_from(model, mesh, prepared(model, mesh))


def layout_from(model: Mixtral, mesh: Mesh, parameters: list[tuple[tuple, nnx.Variable, Any, bool]]) -> Layout:
    check_mesh(model.config, mesh)
    places = []
    for path, variable, value, units in parameters:
        if isinstance(value, NF4Tensor):
            place = place_packed(value, units, mesh)
        else:
            place = place_dense(value, variable.get_metadata("axes"), mesh)
        places.append((".".join(map(str, path)), place))
    return Layout(mesh, tuple(places))


def host_memory() -> contextlib.AbstractContextManager[Any]:
    """Inside, JAX creates arrays in host memory, for models that may be too large for one device."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])
