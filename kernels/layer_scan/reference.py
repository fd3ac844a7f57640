"""The loop as `lax.scan`: the reference, and the backend for GPUs and TPUs."""

from typing import Any

import jax
from jax import lax

from bimedix_jax.kernels.layer_scan.layers import Body, refuse_unstacked

refusal = refuse_unstacked


def layer_scan(
    body: Body, constants: Any, x: jax.Array, layers: Any, memory: Any, depth: int
) -> tuple[jax.Array, Any, Any]:
    def step(x: jax.Array, given: tuple[Any, Any]) -> tuple[jax.Array, tuple[Any, Any]]:
        x, out, slot = body(constants, x, *given)
        return x, (out, slot)

    x, (outs, memory) = lax.scan(step, x, (layers, memory), length=depth)
    return x, outs, memory
