"""The loop as `lax.scan`: the reference, and the backend for GPUs and TPUs.

Packed weights that InPlace marks are constants of the loop, and a layer is a reference to them. The memory is carried
and updated in place. As an input and an output of the loop it would be two arrays, and the TPU's compiler moved one of
them between HBM and VMEM in every layer.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bimedix_jax.kernels.layer_scan.layers import Body, is_in_place, refuse_unstacked, with_stacks, without_stacks
from bimedix_jax.kernels.stacks import index

refusal = refuse_unstacked


def layer_scan(
    body: Body, constants: Any, x: jax.Array, layers: Any, memory: Any, depth: int
) -> tuple[jax.Array, Any, Any]:
    # packed weights are frozen; otherwise JAX would sum gradients of the scales of all layers in each layer
    layers = jax.tree.map(
        lambda leaf: lax.stop_gradient(leaf) if is_in_place(leaf) else leaf, layers, is_leaf=is_in_place
    )

    def step(carry: tuple[jax.Array, Any], given: tuple[jax.Array, Any]) -> tuple[tuple[jax.Array, Any], Any]:
        (x, memory), (layer, own) = carry, given
        slot = jax.tree.map(lambda leaf: index(leaf, layer), memory)
        x, out, slot = body(constants, x, with_stacks(layers, own, layer), slot)
        memory = jax.tree.map(lambda leaf, new: lax.dynamic_update_index_in_dim(leaf, new, layer, 0), memory, slot)
        return (x, memory), out

    given = (jnp.arange(depth, dtype=jnp.int32), without_stacks(layers))
    (x, memory), outs = lax.scan(step, (x, memory), given, length=depth)
    return x, outs, memory
