"""All layers unrolled in the compiled program, for decoding on a CPU.

Compile time grows with depth, but no layer is sliced from a stack: with Unstacked weights and memory, no weight is
copied and each layer's memory is updated in place.
"""

from typing import Any

import jax

from bimedix_jax.kernels.layer_scan.layers import Body, part
from bimedix_jax.kernels.unstacked import Unstacked, is_unstacked, stack_parts


def refusal(layers: Any, memory: Any) -> str | None:
    del layers, memory
    return None


def layer_scan(
    body: Body, constants: Any, x: jax.Array, layers: Any, memory: Any, depth: int
) -> tuple[jax.Array, Any, Any]:
    outs, slots = [], []
    for index in range(depth):
        x, out, slot = body(constants, x, part(layers, index), part(memory, index))
        outs.append(out)
        slots.append(slot)
    return x, stack_parts(outs), like(memory, slots)


def like(memory: Any, slots: list[Any]) -> Any:
    """The layers' memories in the form of `memory`, stacked or Unstacked."""
    return jax.tree.map(
        lambda whole, *parts: Unstacked(parts) if is_unstacked(whole) else stack_parts(parts),
        memory,
        *slots,
        is_leaf=is_unstacked,
    )
