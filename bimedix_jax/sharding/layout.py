"""The layout of a model on a mesh: PartitionSpecs of its parameters, gathers before their use, calls on each shard.

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
from bimedix_jax.kernels.nf4.units import split_units
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
    """Where one parameter lies: a PartitionSpec for each leaf, and how a device puts it together."""

    specs: tuple[P, ...]
    storage: shards.Storage | None

    @property
    def gathered(self) -> bool:
        return self.storage is not None


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the parameters of a model lie on a mesh; the `placement` of a placed model.

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
        """Mesh axes that divide `rows` rows: all of BATCH_AXES, or the first ones whose sizes do."""
        axes: tuple[str, ...] = ()
        for name in BATCH_AXES:
            if rows % math.prod(self.mesh.shape[axis] for axis in (*axes, name)):
                break
            axes = (*axes, name)
        return axes

    def split(self, batch_axes: tuple[str, ...] = BATCH_AXES) -> shards.Split:
        """What a shard lacks, for rows divided over these mesh axes."""
        axes = {BATCH: batch_axes, LENGTH: ("tensor",)}
        axes |= {name: (rule.split,) for name, rule in RULES.items() if rule.split is not None}
        present = {name: tuple(a for a in names if self.mesh.shape[a] > 1) for name, names in axes.items()}
        stored = tuple((path, place.storage) for path, place in self.places if place.storage is not None)
        return shards.Split(tuple((name, names) for name, names in present.items() if names), stored)

    def over_shards(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any, batch_axes: tuple[str, ...] = BATCH_AXES
    ) -> Callable[..., Any]:
        """`function` on every shard, where `models.shards` knows what it lacks."""

        def on_shard(*operands: Any) -> Any:
            with shards.split(self.split(batch_axes)):
                return function(*operands)

        return jax.shard_map(on_shard, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def forward(self, graph: Any, state: Any, call: Call) -> Output:
        """`Mixtral.forward` on every shard; rows that the mesh cannot divide are computed on several devices alike."""
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
        calls = dataclasses.replace(
            call, tokens_BT=rows, segment_ids_BT=rows, plan=plans, cache=cached, group_BT=groups
        )

        def function(values: dict[str, Any], call: Call) -> Output:
            variables = [(path, v.replace(values[name])) for name, (path, v) in zip(names, flat, strict=True)]
            out = nnx.merge(graph, nnx.from_flat_state(variables)).forward(call)
            return dataclasses.replace(out, sums=shards.sum_over(BATCH, out.sums))

        none: Any = None
        record = recorded(Routing(by_layer, by_layer, by_layer), call.record)
        sums = RouterSums(*[scalar] * len(dataclasses.fields(RouterSums))) if call.groups else None
        out = Output(rows, none, record, sums, cached)
        return self.over_shards(function, (self.specs(values), calls), out, batch_axes)(values, call)


def plan_specs(plan: RoutingPlan, batch_axes: tuple[str, ...], lead: tuple[None, ...] = ()) -> RoutingPlan:
    """PartitionSpecs of a plan, whose fields may have axes `lead` before L: rows are divided where each has its own."""
    row = 1 + len(lead)
    return jax.tree.map(lambda x: P(*lead, None, batch_axes if x.shape[row] > 1 else None), plan)


def place_dense(value: Any, axes: tuple[str | None, ...], mesh: Mesh) -> Place:
    spec, gathers = divide(tuple(value.shape), axes, mesh)
    return Place((spec,), shards.Storage((gathers,)) if gathers else None)


def place_nf4(t: NF4Tensor, units: bool, mesh: Mesh) -> Place:
    """A packed weight, cut into units already (`units`) where `tensor` divides it: fsdp divides the bytes of a unit."""
    lead: list[Any] = [None] * len(t.batch_shape)
    if len(lead) - units == 2 and mesh.shape["expert"] > 1:
        lead[1] = "expert"
    if units:
        lead[-1] = "tensor"
    parts = mesh.shape["fsdp"]
    specs, gathers = [], []
    for leaf in jax.tree.leaves(t):
        inside = leaf.ndim > len(lead)
        stored = inside and parts > 1 and leaf.shape[-1] % parts == 0
        specs.append(P(*lead, *(["fsdp" if stored else None] if inside else [])))
        gathers.append(((-1, ("fsdp",)),) if stored else ())
    return Place(tuple(specs), shards.Storage(tuple(gathers), units) if units or any(gathers) else None)


def prepared(model: Mixtral, mesh: Mesh) -> list[tuple[tuple, nnx.Variable, Any, bool]]:
    """(path, variable, value as devices hold it, whether it was cut into units) of every parameter."""
    found = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value, axes = variable.get_value(), variable.get_metadata("axes")
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
    """The layout of a model on a mesh; works on a model that has shapes only.

    Raises:
      BimedixError: the mesh cannot divide the model.
    """
    return layout_from(model, mesh, prepared(model, mesh))


def layout_from(model: Mixtral, mesh: Mesh, parameters: list[tuple[tuple, nnx.Variable, Any, bool]]) -> Layout:
    check_mesh(model.config, mesh)
    places = []
    for path, variable, value, units in parameters:
        if isinstance(value, NF4Tensor):
            place = place_nf4(value, units, mesh)
        else:
            place = place_dense(value, variable.get_metadata("axes"), mesh)
        places.append((".".join(map(str, path)), place))
    return Layout(mesh, tuple(places))


def host_memory() -> contextlib.AbstractContextManager[Any]:
    """Within, JAX makes arrays in host memory: where a model is made that one device may be too small for."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])
