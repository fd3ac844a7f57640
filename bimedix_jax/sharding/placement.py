"""Sharding a model over the devices of a mesh, and gathering what an export of its adapters needs."""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from bimedix_jax import distributed
from bimedix_jax.adapters import add_lora
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.linear import TrainedParam
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.moe import RouterState
from bimedix_jax.sharding.layout import layout_from, prepared


def place(model: Mixtral, mesh: Mesh) -> Mixtral:
    """The model with its parameters sharded over `mesh`. A model of shapes only gets shapes with shardings.

    Raises:
      BimedixError: the mesh cannot divide the model, or the model is already sharded.
    """
    if model.placement is not None:
        raise BimedixError("The model is already sharded; load it again to shard it over another mesh.")
    parameters = prepared(model, mesh)
    layout = layout_from(model, mesh, parameters)
    placed = nnx.merge(*nnx.split(model), copy=True)
    placed.placement = layout
    flat = []
    for path, variable, value, _ in parameters:
        shardings = layout.shardings(layout.spec(".".join(map(str, path)), value))
        flat.append((path, variable.replace(jax.tree.map(shard, value, shardings))))
    nnx.update(placed, nnx.from_flat_state(flat))
    return placed


def shard(leaf: Any, sharding: NamedSharding) -> Any:
    """An array on its devices. Each process supplies the parts of its devices."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def gather_for_export(model: Mixtral) -> Mixtral:
    """The parameters of a sharded model that an export of its adapters needs, in host memory on every process.

    These are the trained ones and those that identify the base (norms, embeddings, routers); without adapters, all. The
    frozen matrices have shapes only. A model that is not sharded is returned unchanged.
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
