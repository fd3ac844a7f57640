"""One model on many devices: a mesh, the table from logical axes to mesh axes, and what follows from it.

The mesh has four axes. `data`, `fsdp` and `expert` divide the rows of a batch; `fsdp` also divides what is stored of
every matrix, which is gathered again layer by layer (4-bit ones as packed bytes); `expert` also divides the experts,
whose shard takes the tokens of all others; `tensor` divides heads and feed-forward columns of one matrix product.

    RULES  ->  layout_of(model, mesh): what each device stores and lacks of each parameter
           ->  place(model, mesh): the same model there;  Layout.over_shards: a function of the model on every shard
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bimedix_jax import distributed
from bimedix_jax.adapters import add_lora
from bimedix_jax.errors import BimedixError
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.units import split_units
from bimedix_jax.models import shards
from bimedix_jax.models.attention import KVCache
from bimedix_jax.models.axes import BATCH, EMBED, EXPERTS, HEADS, KV_HEADS, LENGTH, MLP, VOCAB
from bimedix_jax.models.call import Call, Output, recorded
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.models.linear import TrainedParam
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.moe import RouterState
from bimedix_jax.models.router_sums import RouterSums
from bimedix_jax.models.routers import Routing, RoutingPlan

AXES = ("data", "fsdp", "expert", "tensor")
"""Axes of the mesh, the slowest network first."""
BATCH_AXES = ("data", "fsdp", "expert")
"""Axes that divide the rows of a batch."""


COMPILER_OPTIONS = {"gpu": {"xla_gpu_enable_latency_hiding_scheduler": True}}
"""By platform, for programs on several devices: gathers begin while the work before them still runs."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a logical axis of a parameter means on the mesh.

    Attributes:
      split: mesh axis that divides the computation: a device never sees more than its part.
      stored: mesh axes that divide storage further; gathered before use.
    """

    split: str | None = None
    stored: tuple[str, ...] = ()


RULES = {
    EXPERTS: Rule(split="expert"),
    HEADS: Rule(split="tensor", stored=("fsdp",)),
    KV_HEADS: Rule(split="tensor", stored=("fsdp",)),
    MLP: Rule(split="tensor", stored=("fsdp",)),
    VOCAB: Rule(stored=("tensor", "fsdp")),
    EMBED: Rule(stored=("fsdp",)),
}
"""Logical axes of parameters; those not named here are whole on every device. A mesh axis divides a parameter once: the
first axis of this table that the parameter has, and whose size it divides, takes it."""


def make_mesh(data: int = 1, fsdp: int | None = None, expert: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """A mesh of these sizes over `devices` (all by default); `fsdp` None takes what the others leave.

    Raises:
      BimedixError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp or 1, "expert": expert, "tensor": tensor}
    if min(sizes.values()) < 1:
        raise BimedixError(f"The axes of a mesh are at least 1, got {sizes}.")
    if fsdp is None:
        sizes["fsdp"] = max(1, len(devices) // math.prod(sizes.values()))
    if math.prod(sizes.values()) != len(devices):
        asked = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise BimedixError(
            f"A mesh of {asked} needs {math.prod(sizes.values())} devices, there are {len(devices)}; change mesh.data, "
            "mesh.fsdp, mesh.expert or mesh.tensor."
        )
    shape = tuple(sizes[name] for name in AXES)
    if devices[0].platform == "tpu" and len(devices) > 1:
        from jax.experimental import mesh_utils

        return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES)
    return Mesh(np.array(devices).reshape(shape), AXES)


def check_mesh(config: MixtralConfig, mesh: Mesh) -> None:
    """Raises BimedixError where heads, experts or columns of the model cannot be divided as the mesh wants."""
    size = {name: mesh.shape[name] for name in AXES}
    for what, number, axis in (
        ("experts", config.router.num_experts, "expert"),
        ("heads", config.num_heads, "tensor"),
        ("key heads", config.num_kv_heads, "tensor"),
        ("feed-forward columns", config.intermediate_size, "tensor"),
    ):
        if number % size[axis]:
            raise BimedixError(
                f"{number} {what} cannot be divided among {size[axis]} devices; choose a mesh.{axis} that divides "
                f"{number}."
            )


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

    def run(self, graph: Any, state: Any, call: Call) -> Output:
        """`Mixtral.run` on every shard; rows that the mesh cannot divide are computed on several devices alike."""
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
            out = nnx.merge(graph, nnx.from_flat_state(variables)).run(call)
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


def divide(
    shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh, whole: tuple[str, ...] = ()
) -> tuple[P, tuple[tuple[int, tuple[str, ...]], ...]]:
    """(PartitionSpec of an array with these logical axes, gathers that put a device's part together).

    Args:
      whole: mesh axes that are not to divide it.
    """
    names: list[list[str]] = [[] for _ in shape]
    gathers = []
    matrix = sum(axis is not None and axis in RULES for axis in axes) and len(shape) - (axes[0] == "layers") >= 2
    free = {name for name in AXES if mesh.shape[name] > 1 and name not in whole}
    for logical, rule in RULES.items():
        for dimension in [d for d, axis in enumerate(axes) if axis == logical]:
            if rule.split in free:
                names[dimension].append(rule.split)
                free.discard(rule.split)
            held = math.prod(mesh.shape[name] for name in names[dimension])
            taken = []
            for name in rule.stored if matrix else ():
                if name in free and shape[dimension] % (held * mesh.shape[name]) == 0:
                    taken.append(name)
                    free.discard(name)
                    held *= mesh.shape[name]
            names[dimension] += taken
            if taken:
                gathers.append((dimension - len(shape), tuple(taken)))
    return P(*(tuple(part) if part else None for part in names)), tuple(gathers)


def own_experts(mesh: Mesh, experts: int) -> set[int]:
    """Experts that this process's devices hold a part of."""
    parts = NamedSharding(mesh, P("expert")).addressable_devices_indices_map((experts,)).values()
    return {number for part in parts if part for number in range(*part[0].indices(experts))}


def place_dense(value: Any, axes: tuple[str | None, ...], mesh: Mesh) -> Place:
    spec, gathers = divide(tuple(value.shape), axes, mesh)
    return Place((spec,), shards.Storage((gathers,)) if gathers else None)


def split_axis(axes: tuple[str | None, ...], mesh: Mesh) -> int | None:
    """Axis, -1 or -2, along which `tensor` divides the computation with a matrix of these logical axes."""
    if mesh.shape["tensor"] == 1:
        return None
    return next((axis for axis in (-1, -2) if RULES.get(axes[axis] or "", Rule()).split == "tensor"), None)


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


def place(model: Mixtral, mesh: Mesh) -> Mixtral:
    """The model with its parameters on the devices of `mesh`; a model that has shapes only gets shapes with shardings.

    Raises:
      BimedixError: the mesh cannot divide the model, or it is placed already.
    """
    if model.placement is not None:
        raise BimedixError("The model lies on a mesh already; load it again to put it on another one.")
    parameters = prepared(model, mesh)
    layout = layout_from(model, mesh, parameters)
    placed = nnx.merge(*nnx.split(model), copy=True)
    placed.placement = layout
    flat = []
    for path, variable, value, _ in parameters:
        shardings = layout.shardings(layout.spec(".".join(map(str, path)), value))
        flat.append((path, variable.replace(jax.tree.map(put, value, shardings))))
    nnx.update(placed, nnx.from_flat_state(flat))
    return placed


def put(leaf: Any, sharding: NamedSharding) -> Any:
    """An array on its devices; every process brings the parts of its own devices."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def host_memory() -> contextlib.AbstractContextManager[Any]:
    """Within, JAX makes arrays in host memory: where a model is made that one device may be too small for."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def take_back(model: Mixtral) -> Mixtral:
    """What exports of adapters need of a placed model, in host memory on every process.

    That is what was trained and what tells a base from others (norms, embeddings, routers), or everything where no
    adapters are; the frozen matrices have shapes only. A model that is not placed is returned as it is.
    """
    if model.placement is None:
        return model
    whole = Mixtral(model.config, model.dtype)
    whole = whole if model.lora is None else add_lora(whole, model.lora)
    whole.origin = model.origin
    wanted = {path for path, variable in nnx.to_flat_state(nnx.state(whole)) if is_identifying(path, variable, model)}
    host = jax.local_devices(backend="cpu")[0]
    flat = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path in wanted:
            flat.append((path, variable.replace(jax.device_put(distributed.on_host(variable.get_value()), host))))
    nnx.update(whole, nnx.from_flat_state(flat))
    return whole


def is_identifying(path: tuple, variable: nnx.Variable, model: Mixtral) -> bool:
    name = ".".join(map(str, path))
    trained = model.lora is None or isinstance(variable, nnx.LoRAParam | TrainedParam | RouterState)
    return trained or name in ("embed.table", "layers.moe.router.w") or name.endswith(".scale")
