"""The loop as `lax.scan`: the reference, and the backend for GPUs and TPUs.

Packed weights that InPlace marks are constants of the loop, and a layer is a reference to them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bimedix_jax.kernels.layer_scan.layers import Body, is_in_place, refuse_unstacked, with_stacks, without_stacks

refusal = refuse_unstacked


def layer_scan(
    body: Body, constants: Any, x: jax.Array, layers: Any, memory: Any, depth: int
) -> tuple[jax.Array, Any, Any]:
    # packed weights are frozen; otherwise JAX would sum gradients of the scales of all layers in each layer
    layers = jax.tree.map(
        lambda leaf: lax.stop_gradient(leaf) if is_in_place(leaf) else leaf, layers, is_leaf=is_in_place
    )

    def step(x: jax.Array, given: tuple[jax.Array, Any, Any]) -> tuple[jax.Array, tuple[Any, Any]]:
        layer, own, slot = given
        x, out, slot = body(constants, x, with_stacks(layers, own, layer), slot)
        return x, (out, slot)

    given = (jnp.arange(depth, dtype=jnp.int32), without_stacks(layers), memory)
    x, (outs, memory) = lax.scan(step, x, given, length=depth)
    return x, outs, memory
