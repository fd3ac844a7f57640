"""One token a row on a CPU: every layer and expert a separate array, so that nothing is moved before it is multiplied.

`Mixtral` runs its layers as one loop over stacked parameters. That compiles fast and suits many tokens, but XLA:CPU
copies what a loop slices, and for a single token copying a layer's experts costs many times the products with the two
that it uses. Here layers are written out and experts are branches, of which only the chosen ones run.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4_matmul import matmul
from bimedix_jax.kernels.products import dot, from_bits, to_bits
from bimedix_jax.kernels.pytree import Leaf
from bimedix_jax.models import shards
from bimedix_jax.models.attention import Attention, KVCache, rotate, rotations
from bimedix_jax.models.linear import Linear
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.moe import MoE
from bimedix_jax.models.routers import RoutingPlan, route

MAX_BRANCHES, MAX_ROWS = 64, 16
"""Layers times experts, each of which is compiled on its own; rows, all of which run through every chosen expert."""
FEW_ROWS = 8
"""Rows of a 16-bit product at least: XLA:CPU runs one row at 7 GB/s of weights and eight at 20."""
EXPERT_LAYERS = ("w1", "w2", "w3")
HIDDEN = -1e30
"""Score of a key that a query may not see."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Separate:
    """A model's parameters, layer by layer and expert by expert, sharing the memory of the stacked ones.

    Attributes:
      rest: state of everything outside of the layers.
      layers: state of each layer; its experts' weights are empty.
      experts: for each layer and expert, its weights by EXPERT_LAYERS.
    """

    rest: Any
    layers: tuple[Any, ...]
    experts: tuple[tuple[dict[str, Any], ...], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCaches:
    """`KVCache` layer by layer, keys and values as bits [B, G, S, H] so that XLA:CPU writes a token in place."""

    k: tuple[Leaf, ...]
    v: tuple[Leaf, ...]
    segment_ids_BS: Leaf
    length: Leaf


def suits(model: Mixtral, rows: int) -> bool:
    """Whether `step` is the way to decode this many rows of `model` here; a model with adapters keeps to the loop."""
    config = model.config
    few = config.num_layers * config.router.num_experts <= MAX_BRANCHES and rows <= MAX_ROWS and model.lora is None
    return few and backends.platform() == "cpu" and model.placement is None and not shards.active()


def separate(model: Mixtral) -> tuple[Any, Separate]:
    """(graphs of the rest and of one layer, for `step`; the parameters)."""
    model = nnx.merge(*nnx.split(model))
    layer_graph, state = nnx.split(model.layers)
    flat = [(tuple(map(str, path)), path, variable) for path, variable in nnx.to_flat_state(state)]
    layers, experts = [], []
    for index in range(model.config.num_layers):
        own, weights = [], [{} for _ in range(model.config.router.num_experts)]
        for names, path, variable in flat:
            value = variable.get_value()
            if names[-2] in EXPERT_LAYERS and names[-1] == "w":
                for expert, found in enumerate(weights):
                    found[names[-2]] = view(value, (index, expert))
                own.append((path, variable.replace(jnp.zeros((0,), jnp.bfloat16))))
            else:
                own.append((path, variable.replace(view(value, index))))
        layers.append(nnx.from_flat_state(own))
        experts.append(tuple(weights))
    model.layers = nnx.data(None)  # pyright: ignore[reportAttributeAccessIssue]
    rest_graph, rest = nnx.split(model)
    return (rest_graph, layer_graph), Separate(rest, tuple(layers), tuple(experts))


def view(value: Any, index: int | tuple[int, ...]) -> Any:
    """A part of an array (of each leaf) on a CPU, in the same memory where its alignment allows."""
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)[index], may_alias=True), value)


def separate_caches(cache: KVCache) -> LayerCaches:
    """The same cache, layer by layer."""
    k, v = (
        tuple(to_bits(x[layer].swapaxes(1, 2)) for layer in range(x.shape[0])) for x in (cache.k_LBSGH, cache.v_LBSGH)
    )
    return LayerCaches(k, v, cache.segment_ids_BS, cache.length)


def step(
    graphs: Any, parameters: Separate, token_B: Int[Array, "B"], caches: LayerCaches
) -> tuple[Float[Array, "B V"], LayerCaches]:
    """(float32 logits, the caches with these tokens in them) of one more token in each row."""
    rest_graph, layer_graph = graphs
    model = nnx.merge(rest_graph, parameters.rest)
    config, slot = model.config, caches.length
    ids_BS = lax.dynamic_update_slice_in_dim(caches.segment_ids_BS, jnp.ones_like(token_B)[:, None], slot, 1)
    # padding stands on the left only, so that a token's place is the number of tokens before it
    positions_B1 = jnp.sum(caches.segment_ids_BS == 1, axis=1, dtype=jnp.int32)[:, None]
    rotations_B1H = rotations(positions_B1, config.head_dim, config.rope_theta)
    key_S = jnp.arange(ids_BS.shape[1])
    near_S = (
        key_S <= slot if config.sliding_window is None else (key_S <= slot) & (key_S > slot - config.sliding_window)
    )
    visible_BS = (ids_BS == 1) & near_S[None]
    x_BD = model.embed.table[...][token_B].astype(model.dtype)
    keys, values = [], []
    for layer, experts, k, v in zip(parameters.layers, parameters.experts, caches.k, caches.v, strict=True):
        block = nnx.merge(layer_graph, layer)
        mixed_BD, k, v = attend(block.attention, block.attention_norm(x_BD), rotations_B1H, visible_BS, k, v, slot)
        x_BD = x_BD + mixed_BD
        x_BD = x_BD + mixture(block.moe, block.moe_norm(x_BD), experts)
        keys.append(k)
        values.append(v)
    weight_DV = model.head.weight_DV
    assert weight_DV is not None  # only a head with an adapter has none
    return product(model.norm(x_BD), weight_DV, jnp.float32), LayerCaches(tuple(keys), tuple(values), ids_BS, slot + 1)


def product(x_ND: jax.Array, w_DF: jax.Array | NF4Tensor, out_dtype: Any = None) -> jax.Array:
    """x w in `out_dtype`, that of x if None, for few rows."""
    out_dtype = out_dtype or x_ND.dtype
    if isinstance(w_DF, NF4Tensor):
        return matmul(x_ND, w_DF, out_dtype)
    rows, w_DF = x_ND.shape[0], w_DF.astype(x_ND.dtype)
    if x_ND.dtype == jnp.bfloat16 and rows < FEW_ROWS:
        x_ND = jnp.pad(x_ND, ((0, FEW_ROWS - rows), (0, 0)))
    return dot(x_ND, w_DF)[:rows].astype(out_dtype)


def attend(
    attention: Attention,
    x_BD: jax.Array,
    rotations_B1H: jax.Array,
    visible_BS: jax.Array,
    k_BGSH: jax.Array,
    v_BGSH: jax.Array,
    slot: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(mixed values, keys, values) of one token a row; keys and values as bits, this token's written in."""
    config, batch = attention.config, x_BD.shape[0]
    groups, width = config.num_kv_heads, config.head_dim

    def heads(layer: Linear) -> jax.Array:
        return product(x_BD, layer.w.get_value()).reshape(batch, 1, -1, width)

    q, k = rotate(heads(attention.q), rotations_B1H), rotate(heads(attention.k), rotations_B1H)
    k_BGSH = lax.dynamic_update_slice_in_dim(k_BGSH, to_bits(k.swapaxes(1, 2)), slot, 2)
    v_BGSH = lax.dynamic_update_slice_in_dim(v_BGSH, to_bits(heads(attention.v).swapaxes(1, 2)), slot, 2)
    k, v = (from_bits(x, x_BD.dtype).reshape(batch * groups, -1, width) for x in (k_BGSH, v_BGSH))
    q = (q * jnp.asarray(width**-0.5, q.dtype)).reshape(batch * groups, -1, width)
    scores = jax.vmap(lambda q, k: dot(q, k, 1))(q, k).reshape(batch, config.num_heads, -1)
    weights = jax.nn.softmax(jnp.where(visible_BS[:, None], scores, HIDDEN), axis=-1).astype(v.dtype)
    mixed = jax.vmap(dot)(weights.reshape(*q.shape[:2], -1), v).astype(x_BD.dtype)
    return product(mixed.reshape(batch, -1), attention.o.w.get_value()), k_BGSH, v_BGSH


def mixture(moe: MoE, x_BD: jax.Array, experts: tuple[dict[str, Any], ...]) -> jax.Array:
    """What `moe` returns. Every row runs through every expert that any row chose, weighted 0 where it did not."""
    routing = route(moe.router(x_BD[:, None].astype(jnp.float32)), moe.config, RoutingPlan())
    chosen_BKE = jax.nn.one_hot(routing.experts_LBTK[:, 0], moe.config.num_experts, dtype=jnp.float32)
    weights_BE = jnp.sum(chosen_BKE * routing.weights_LBTK[:, 0, :, None], axis=1)
    used_E = jnp.any(chosen_BKE > 0, axis=(0, 1))

    def branch(expert: int, w: dict[str, Any]) -> Callable[[jax.Array], jax.Array]:
        def run(x_BD: jax.Array) -> jax.Array:
            hidden_BF = jax.nn.silu(product(x_BD, w["w1"])) * product(x_BD, w["w3"])
            return product(hidden_BF, w["w2"], jnp.float32) * weights_BE[:, expert, None]

        return run

    total_BD = jnp.zeros(x_BD.shape, jnp.float32)
    for expert, w in enumerate(experts):
        zero = jnp.zeros_like(total_BD)
        total_BD = total_BD + lax.cond(used_E[expert], branch(expert, w), lambda _, zero=zero: zero, x_BD)
    return total_BD.astype(x_BD.dtype)
