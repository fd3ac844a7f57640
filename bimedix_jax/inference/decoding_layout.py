"""Layers and experts as separate arrays, for decoding few rows on a CPU; they share the memory of the stacked ones.

A loop over stacked layers compiles fast and suits many tokens. But XLA:CPU copies each slice that a loop takes, and for
a single token the copies take many times as long as the matrix products. Only the layout changes here. The forward pass
is the model's own: its operations also take `Unstacked` arrays (kernels/layer_scan, kernels/expert_mlp,
kernels/attention).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.attention import HeadMajor
from bimedix_jax.kernels.by_output import ByOutput
from bimedix_jax.kernels.expert_mlp import few_rows
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.products import transposed
from bimedix_jax.kernels.unstacked import Unstacked, unstack
from bimedix_jax.models import shards
from bimedix_jax.models.attention import KVCache
from bimedix_jax.models.axes import EXPERTS, LAYERS
from bimedix_jax.models.linear import ExpertLinear, Linear, Lora, fill_slots
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.sharding.by_rows import store_by_rows

MAX_BRANCHES = 64
"""Maximum of layers times experts, since each pair of a layer and an expert is compiled separately."""
STEPS_BY_OUTPUT, MOST_BY_OUTPUT = 64, 2 << 30
"""Steps that save more time than the copies of matrices by output take; and the bytes of all copies."""


def is_faster(model: Mixtral, rows: int) -> bool:
    """Whether decoding this many rows of `model` on this machine is faster with unstacked layers and experts."""
    config = model.config
    few = config.num_layers * config.router.num_experts <= MAX_BRANCHES and rows <= few_rows.MAX_ROWS
    return few and backends.platform() == "cpu" and model.placement is None and not shards.active()


def for_steps(model: Mixtral, cache: KVCache | None, rows: int, steps: int) -> tuple[Mixtral, KVCache | None]:
    """The model and its cache as steps of `rows` rows read them fastest: themselves, or copies that share memory.

    For many steps of few rows, bfloat16 matrices are copied in another form (`store_by_output`).
    """
    if cache is not None and is_faster(model, rows):
        unstacked = unstack_model(model)
        router = model.config.router
        if steps >= STEPS_BY_OUTPUT and few_rows.takes_pairs(rows, router.top_k, router.num_experts):
            store_by_output(unstacked)
        return unstacked, unstack_cache(cache)
    return (with_stored_factors(model) if casts_factors(model) else model), cache


def unstack_model(model: Mixtral) -> Mixtral:
    """A copy of the model with unstacked layers and experts, which share its memory where alignment allows."""
    model = nnx.merge(*nnx.split(model), copy=True)
    fill_slots(model.layers, "layers")
    for path, variable in nnx.to_flat_state(nnx.state(model.layers)):
        axes = variable.get_metadata("axes")
        owner = functools.reduce(getattr, map(str, path[:-1]), model.layers)
        part = getattr(owner, str(path[-1]))
        part.set_value(unstack(part.get_value(), 2 if axes[:2] == (LAYERS, EXPERTS) else 1))
    return model


def store_by_output(model: Mixtral) -> None:
    """Stores the large bfloat16 matrices of an unstacked model by output, in place. These are copies.

    Not if they take more than MOST_BY_OUTPUT bytes together.
    """
    linear = [layer for _, layer in nnx.iter_modules(model) if isinstance(layer, Linear | ExpertLinear)]
    values = [layer.w.get_value() for layer in linear]
    leaves = [leaf for leaf in jax.tree.leaves(values, is_leaf=is_packed) if suits(leaf)]
    if sum(leaf.nbytes for leaf in leaves) > MOST_BY_OUTPUT:
        return
    for layer, value in zip(linear, values, strict=True):
        layer.w.set_value(jax.tree.map(lambda w: by_output(w) if suits(w) else w, value, is_leaf=is_packed))


def is_packed(w: Any) -> bool:
    return isinstance(w, NF4Tensor)


def suits(w: Any) -> bool:
    """Whether this is a matrix that one row reads faster by output."""
    return isinstance(w, jax.Array) and w.ndim == 2 and w.dtype == jnp.bfloat16 and min(w.shape) >= 64


@jax.jit
def by_output(w_DF: jax.Array) -> ByOutput:
    return ByOutput(transposed(w_DF))


@jax.jit
def unstack_cache(cache: KVCache) -> KVCache:
    """The cache with one array per layer, in which the slots of a head are contiguous."""

    def layers(x: Any) -> Any:
        return Unstacked(tuple(HeadMajor.of(x[layer]) for layer in range(x.shape[0])))

    return KVCache(layers(cache.k_LBSGH), layers(cache.v_LBSGH), cache.segment_ids_BS, cache.length)


def store_for_decoding(model: Mixtral) -> None:
    """Stores a model, in place, as this platform decodes it fastest. It must then only generate text.

    For a model that nobody else uses, as in `bimedix chat`. `generate` does not change its model, and stores factors in
    a copy.
    """
    if backends.platform() == "tpu":
        store_by_rows(model)
    if backends.platform() != "cpu":
        store_factors(model)


def store_factors(model: Mixtral) -> None:
    """Stores the factors of adapters in the dtype of the computation, in place, with the scale multiplied into B.

    A GPU or TPU then reads the factors of the experts that a token uses from their stacks. Otherwise it casts those of
    all experts for each token. The model computes the same. Exports take the factors as they were: it is for a model
    that only generates text.
    """
    for lora in adapters_of(model):
        for factor, scale in ((lora.a, 1.0), (lora.b, lora.scale)):
            factor.set_value(cast(factor.get_value(), scale, model.dtype))
        lora.scale = 1.0


def casts_factors(model: Mixtral) -> bool:
    """Whether this platform would cast the factors of adapters for each token, unless `store_factors` did it."""
    stored = all(lora.scale == 1 and lora.a.get_value().dtype == model.dtype for lora in adapters_of(model))
    return backends.platform() != "cpu" and not stored


def with_stored_factors(model: Mixtral) -> Mixtral:
    """A copy of the model after `store_factors`, which shares all other memory."""
    model = nnx.merge(*nnx.split(model), copy=True)
    store_factors(model)
    return model


def adapters_of(model: Mixtral) -> list[Lora]:
    """The adapters of all layers."""
    layers = [layer for _, layer in nnx.iter_modules(model.layers) if isinstance(layer, Linear | ExpertLinear)]
    return [layer.lora for layer in layers if layer.lora is not None]


def cast(x: Any, scale: float, dtype: str) -> Any:
    """scale * x, both in `dtype`; a shape with sharding gives one."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
    return x.astype(dtype) * jnp.asarray(scale, dtype)
