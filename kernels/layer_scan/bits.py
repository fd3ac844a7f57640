"""The loop in the form that XLA:CPU runs fast: 16-bit floats are stacked as integers of their bits.

XLA:CPU converts 16-bit floats to float32. In a loop, every dynamic slice of a stack of bfloat16 weights converts the
whole stack first, and every update of a stack of bfloat16 residuals rewrites all of it. Integers of 16 bits are copied
unchanged. `lax.scan` would stack residuals as floats, so this module defines the gradient: one loop forward, one
backward.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.layer_scan.layers import (
    Body,
    InPlace,
    is_in_place,
    refuse_unstacked,
    unmarked,
    with_stacks,
    without_stacks,
)
from bimedix_jax.kernels.nf4.tensor import NF4Tensor
from bimedix_jax.kernels.products import from_bits, to_bits
from bimedix_jax.kernels.stacks import LayerOf


def refusal(layers: Any, memory: Any) -> str | None:
    if backends.platform() != "cpu":
        return "it runs on CPUs only."
    return refuse_unstacked(layers, memory)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bits:
    """A pytree whose 16-bit floats are stored as integers; PRNG keys and all other arrays are unchanged."""

    leaves: list[Any]
    dtypes: tuple[Any, ...] = dataclasses.field(metadata={"static": True})
    tree: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, value: Any) -> "Bits":
        leaves, tree = jax.tree.flatten(value)
        return cls([to_bits(leaf) for leaf in leaves], tuple(leaf.dtype for leaf in leaves), tree)

    def value(self) -> Any:
        floats = {jnp.dtype("bfloat16"), jnp.dtype("float16")}
        return self.tree.unflatten(
            from_bits(leaf, dtype) if dtype in floats else leaf
            for leaf, dtype in zip(self.leaves, self.dtypes, strict=True)
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Fixed:
    """A residual that is a constant of the program, equal for all layers: part of the structure, not stacked."""

    value: Any


jax.tree_util.register_static(Fixed)


def layer_scan(
    body: Body, constants: Any, x: jax.Array, layers: Any, memory: Any, depth: int
) -> tuple[jax.Array, Any, Any]:
    if memory is not None:  # without the custom gradient: JAX differentiates the loop
        return without_gradient(body, constants, x, layers, memory, depth)
    found: tuple[jax.Array, Any] = differentiable(body, depth, constants, x, layers)
    return *found, None


def without_gradient(
    body: Body, constants: Any, x: jax.Array, layers: Any, memory: Any, depth: int
) -> tuple[jax.Array, Any, Any]:
    """The loop when nothing is differentiated. Arrays that InPlace marks are not sliced from their stacks."""

    def step(x: jax.Array, given: tuple[jax.Array, Bits, Bits]) -> tuple[jax.Array, tuple[Bits, Bits]]:
        index, own, slot = given
        x, out, slot = body(constants, x, with_stacks(layers, own.value(), index), slot.value())
        return x, (Bits.of(out), Bits.of(slot))

    given = (jnp.arange(depth, dtype=jnp.int32), Bits.of(without_stacks(layers)), Bits.of(memory))
    x, (outs, memory) = lax.scan(step, x, given)
    return x, outs.value(), memory.value()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def differentiable(body: Body, depth: int, constants: Any, x: jax.Array, layers: Any) -> tuple[jax.Array, Any]:
    x, outs, _ = without_gradient(body, constants, x, layers, None, depth)
    return x, outs


def forward(body: Body, depth: int, constants: Any, x: jax.Array, marked: Any) -> tuple[tuple[jax.Array, Any], Any]:
    """(outputs, residuals). The residuals of a layer that are stacked are x and computed values only.

    jax.vjp separates arguments from computed values (https://docs.jax.dev/en/latest/301/vjp-objects.html). Constants
    and weights are already arguments of this function, so they are not stacked again.
    """
    layers = unmarked(marked, (NF4Tensor,))

    def call(constants: Any, x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        x, out, _ = body(constants, x, layer, None)
        return x, out

    def step(x: jax.Array, given: tuple[jax.Array, Bits]) -> tuple[jax.Array, tuple[Bits, Bits]]:
        pull: Any
        index, own = given
        (x, out), pull = jax.vjp(call, constants, x, with_stacks(layers, own.value(), index))
        pull.args_res = [None, pull.args_res[1], None]  # not stacked: `backward` has them as arguments
        pull.opaque_residuals = [r if isinstance(r, Tracer) else Fixed(r) for r in pull.opaque_residuals]
        return x, (Bits.of(out), Bits.of(pull))

    given = (jnp.arange(depth, dtype=jnp.int32), Bits.of(without_stacks(layers)))
    x, (outs, pulls) = lax.scan(step, x, given)
    return (x, outs.value()), (pulls, constants, marked)


def backward(body: Body, depth: int, residuals: Any, cotangents: tuple[jax.Array, Any]) -> tuple[Any, jax.Array, Any]:
    """Gradients of x and of the floating-point arrays of `layers`; XLA removes those that are not used."""
    del body
    pulls, constants, marked = residuals
    layers, (dx, douts) = unmarked(marked, (NF4Tensor,)), cotangents

    def step(dx: jax.Array, given: tuple[jax.Array, Bits, Bits, Bits]) -> tuple[jax.Array, Bits]:
        index, *parts = given
        pull, own, dout = (bits.value() for bits in parts)
        layer = with_stacks(layers, own, index)
        dout = jax.tree.map(lambda whole, own: no_cotangent(whole.shape[1:]) if own is None else own, douts, dout)
        pull.args_res = [constants, pull.args_res[1], layer]
        pull.opaque_residuals = [r.value if isinstance(r, Fixed) else r for r in pull.opaque_residuals]
        _, dx, dlayer = pull((dx, dout))
        gradients = jax.tree.map(lambda leaf, g: g if is_float(leaf) else None, own, not_in_place(dlayer))
        return dx, Bits.of(gradients)

    existing = jax.tree.map(lambda leaf: None if leaf.dtype == jax.dtypes.float0 else leaf, douts)
    given = (jnp.arange(depth, dtype=jnp.int32), pulls, Bits.of(without_stacks(layers)), Bits.of(existing))
    dx, dlayers = lax.scan(step, dx, given, reverse=True)

    # the gradient of packed weights in place is None, which JAX takes as zeros
    dlayers = jax.tree.map(
        lambda leaf, g: InPlace(g) if is_in_place(leaf) else g, marked, dlayers.value(), is_leaf=is_in_place
    )
    return None, dx, dlayers


def not_in_place(gradients: Any) -> Any:
    """None for each LayerOf, as in `without_stacks`."""
    return jax.tree.map(
        lambda g: None if isinstance(g, LayerOf) else g, gradients, is_leaf=lambda g: isinstance(g, LayerOf)
    )


def no_cotangent(shape: tuple[int, ...]) -> np.ndarray:
    """The cotangent that JAX expects for integers and keys."""
    return np.zeros(shape, jax.dtypes.float0)


def is_float(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


differentiable.defvjp(forward, backward)
