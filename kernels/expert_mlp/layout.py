"""One expert's matrices as the fused loop reads them: gate and up joined, with the adapters' factors appended.

x w1 + (x a1) b1 is one product: [x, x a1] times [w1; b1]. And h [w2, a2] is one product that gives both h w2 and the
input h a2 of the second factor. So a delta needs no separate pass over rows of the hidden width.

NF4 matrices are stored as (out, in), with two neighbouring inputs in a byte. Interleaving them is slow, so the inputs
are reordered instead: even ones first, then odd ones. This is the order of x, a1 and a3, and of the outputs of w1 and
w3, which are the inputs of w2.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.api import block_scales
from bimedix_jax.kernels.nf4.planes import is_planar, planes
from bimedix_jax.kernels.nf4.rows import RowMajor
from bimedix_jax.kernels.products import from_bits, to_bits
from bimedix_jax.kernels.stacks import LayerOf, as_tensor, index
from bimedix_jax.kernels.unstacked import Unstacked, stack

Weights = tuple[jax.Array | NF4Tensor | RowMajor | LayerOf, ...]
"""(w1 [E, D, F], w3 [E, D, F], w2 [E, F, D])."""
Deltas = tuple[tuple[jax.Array, jax.Array] | None, ...]
"""Factors (a [E, in, R], b [E, R, out]) of the delta of each, or None."""
GivenWeights = tuple[jax.Array | NF4Tensor | RowMajor | LayerOf | Unstacked, ...]
GivenDeltas = tuple[tuple[jax.Array | Unstacked | LayerOf, jax.Array | Unstacked | LayerOf] | None, ...]
"""The forms that callers may pass: experts may also be Unstacked, and factors layers of stacks."""


class Expert(NamedTuple):
    """One expert, or all of them on a leading axis. S = R1 + R3. In NF4, `up` and `down` are [out, in] (`inward` is 1).

    Attributes:
      up: [w1 w3; b1 0; 0 b3], [D + S, 2 F]; or (w1, w3).
      down: [w2 a2], [F, D + R].
      a: [a1 a3], [D, S].
      b: b2, [R, D].
    """

    up: Any
    down: Any
    a: Any
    b: Any


def packed(weights: tuple[Any, ...]) -> tuple[NF4Tensor, ...]:
    """The weights that are in NF4."""
    return tuple(w for w in weights if isinstance(w, NF4Tensor))


def refusal(weights: tuple[Any, ...]) -> str | None:
    """The reason why the fused loop cannot take weights of these shapes, or None."""
    if not (tensors := packed(weights)):
        return None
    planar = [t for t in tensors if is_planar(t) and t.transposed and len(t.batch_shape) == 1]
    if len(planar) < len(weights):
        return "it takes all weights dense, or all in NF4 and stored as (out, in), in rows of whole blocks."
    w1, w3, _ = planar
    if (w1.block_size, w1.dtype) != (w3.block_size, w3.dtype):
        return "gate and up differ in block size or dtype."
    return None


def is_packed(weights: Weights) -> bool:
    return isinstance(weights[0], NF4Tensor)


def evens_first(x: Shaped[Array, "*n"], axis: int = -1) -> Shaped[Array, "*n"]:
    axis %= x.ndim
    pairs = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    return pairs.swapaxes(axis, axis + 1).reshape(x.shape)


def interleaved(x: Shaped[Array, "*n"], axis: int = -1) -> Shaped[Array, "*n"]:
    """Inverse of evens_first."""
    axis %= x.ndim
    halves = x.reshape(*x.shape[:axis], 2, x.shape[axis] // 2, *x.shape[axis + 1 :])
    return halves.swapaxes(axis, axis + 1).reshape(x.shape)


def join(parts: list[jax.Array], axis: int) -> jax.Array:
    """Concatenation as bits: XLA:CPU would concatenate 16-bit floats in float32, slower than dequantising them."""
    return from_bits(jnp.concatenate([to_bits(part) for part in parts], axis=axis), parts[0].dtype)


def factors(weights: Weights, deltas: Deltas, dtype: jnp.dtype) -> Expert:
    """The adapters' factors of every expert; those without an adapter have rank 0."""
    shapes = [w.shape for w in weights]
    empty = [(jnp.zeros((*s[:2], 0), dtype), jnp.zeros((s[0], 0, s[2]), dtype)) for s in shapes]
    pairs = [none if pair is None else pair for pair, none in zip(deltas, empty, strict=True)]
    (a1, b1), (a3, b3), (a2, b2) = [(a.astype(dtype), b.astype(dtype)) for a, b in pairs]
    up = jnp.concatenate(
        [jnp.pad(b1, ((0, 0), (0, 0), (0, b3.shape[2]))), jnp.pad(b3, ((0, 0), (0, 0), (b1.shape[2], 0)))], axis=1
    )
    a = jnp.concatenate([a1, a3], axis=2)
    if not is_packed(weights):
        return Expert(up, a2, a, b2)
    hidden = b1.shape[2]
    sides_bits = to_bits(up).reshape(*up.shape[:2], 2, hidden // 2, 2)
    up = from_bits(sides_bits.transpose(0, 2, 4, 3, 1).reshape(up.shape[0], 2 * hidden, -1), dtype)
    return Expert(up, evens_first(a2, -2).mT, evens_first(a, -2), b2)


def sources(weights: Weights, deltas: Deltas, dtype: jnp.dtype) -> tuple[Any, Expert]:
    """The arrays from which `load` slices an expert."""
    if tensors := packed(weights):
        return tuple((t.packed, block_scales(t)) for t in tensors), factors(weights, deltas, dtype)
    return tuple(as_dtype(w, dtype) for w in weights), factors(weights, deltas, dtype)


def as_dtype(w: Any, dtype: jnp.dtype) -> Any:
    """Dense weights in the rows' dtype. A LayerOf that has to be converted is sliced from its stack."""
    if isinstance(w, LayerOf):
        return w if w.stack.dtype == dtype else w.value().astype(dtype)
    return w.astype(dtype)


def out_of_stacks(weights: GivenWeights, in_place: bool = False) -> tuple[Any, ...]:
    """Each as one array or NF4Tensor [E, in, out]: a LayerOf is sliced, Unstacked experts are stacked.

    With `in_place`, a LayerOf or RowMajor is returned unchanged, for operations that take it.
    """

    def whole(w: Any) -> Any:
        if in_place and isinstance(w, LayerOf | RowMajor):
            return w
        return w.value() if isinstance(w, LayerOf) else as_tensor(stack(w))

    return tuple(map(whole, weights))


def without_layers(deltas: GivenDeltas) -> tuple[Any, ...]:
    """`deltas` with each LayerOf sliced from its stack."""

    def sliced(pair: Any) -> Any:
        return None if pair is None else tuple(w.value() if isinstance(w, LayerOf) else w for w in pair)

    return tuple(map(sliced, deltas))


def load(weights: Weights, dtype: jnp.dtype, separate: bool, pinned: tuple[Any, Expert], e: jax.Array) -> Expert:
    """One expert. With `separate`, dense w1 and w3 without adapters are not joined; `up` is then the pair of them."""
    base, adapters = pinned
    up, down, a, b = (index(part, e) for part in adapters)
    if not is_packed(weights):
        w1, w3, w2 = (w.expert(e) if isinstance(w, LayerOf) else index(w, e) for w in base)
        if separate and not (up.shape[0] or down.shape[1]):
            return Expert((w1, w3), w2, a, b)
        return Expert(join([join([w1, w3], 1), up], 0), join([w2, down], 1), a, b)
    w1, _, w2 = packed(weights)
    hidden, width = w1.unit_shape
    codes, scales = (
        jnp.concatenate([evens_first(index(w[leaf], e).reshape(hidden, -1), 0) for w in base[:2]]) for leaf in (0, 1)
    )
    both = dataclasses.replace(w1, unit_shape=(2 * hidden, width))
    up = join([*planes(codes.reshape(-1), scales.reshape(-1), both, dtype), up], 1)
    out = join(list(planes(index(base[2][0], e), index(base[2][1], e), w2, dtype)), 1)
    return Expert(up, join([out, down], 0), a, b)
