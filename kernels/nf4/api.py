"""quantize and dequantize; both can be jitted on every platform."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from bimedix_jax.kernels.nf4.tables import (
    DYNAMIC_MAP,
    DYNAMIC_THRESHOLDS,
    EMPTY_TAIL,
    HUGE,
    NESTED_BLOCK_SIZE,
    NF4_THRESHOLDS,
    NF4_VALUES,
    SHRINK,
    SUM_HUGE,
    SUM_SHRINK,
)
from bimedix_jax.kernels.nf4.tensor import NF4Tensor

TINY = jnp.finfo(jnp.float32).tiny


def normalise(blocks: Float[Array, "*batch blocks n"]) -> tuple[Float[Array, "*batch blocks n"], jax.Array]:
    """(blocks times 1 / absmax, absmax [*batch, blocks]); denormals become zeros, because XLA flushes them."""
    blocks = jnp.where(jnp.abs(blocks) < TINY, 0.0, blocks)
    magnitudes = jnp.abs(blocks)
    while magnitudes.shape[-1] > 8 and magnitudes.shape[-1] % 2 == 0:  # XLA:CPU vectorises this, but not its reduction
        half = magnitudes.shape[-1] // 2
        magnitudes = jnp.maximum(magnitudes[..., :half], magnitudes[..., half:])
    absmax = jnp.max(magnitudes, axis=-1)
    # without this, the reciprocal of a value above 2**126 would be denormal
    shrink = jnp.where(absmax >= HUGE, SHRINK, 1.0)
    inverse = jnp.where(absmax > 0, 1.0 / jnp.maximum(absmax * shrink, TINY), 0.0)
    return (blocks * shrink[..., None]) * inverse[..., None], absmax


def unfused(product: jax.Array) -> jax.Array:
    """Prevents XLA from fusing this product and a later sum into one FMA, which would round once instead of twice."""
    return jnp.where(product == product, product, 0.0)


def pad_last(x: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % multiple)])


def code_of(x: jax.Array, thresholds: tuple[float, ...]) -> jax.Array:
    """uint8 number of thresholds strictly below x: a sum of comparisons, because a search does not vectorise."""
    return functools.reduce(jnp.add, [(x > t).astype(jnp.uint8) for t in thresholds])


def quantize_scales(absmax: Float[Array, "*batch blocks"]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scales in 8 bits: (uint8 codes [*batch, blocks], nested_absmax [*batch, ceil(blocks/256)], offset [*batch]).

    Three programs and not one, because a mean fused with the product before it differs in its last bit.
    """
    shrunk, shrink = shrink_scales(absmax)
    return code_scales(absmax, mean_scale(shrunk), shrink)


@jax.jit
def mean_scale(absmax: Float[Array, "*batch blocks"]) -> Float[Array, "*batch"]:
    return jnp.mean(absmax, axis=-1)


@jax.jit
def shrink_scales(absmax: Float[Array, "*batch blocks"]) -> tuple[jax.Array, jax.Array]:
    """(scales whose sum does not overflow, the factor that they were multiplied with [*batch])."""
    shrink = jnp.where(jnp.max(absmax, axis=-1) >= SUM_HUGE, SUM_SHRINK, jnp.float32(1))
    return absmax * shrink[..., None], shrink


@jax.jit
def code_scales(
    absmax: Float[Array, "*batch blocks"], mean: Float[Array, "*batch"], shrink: Float[Array, "*batch"]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`quantize_scales`, from the mean of the scales after `shrink_scales`."""
    blocks, offset = absmax.shape[-1], mean / shrink
    groups = pad_last(absmax - offset[..., None], NESTED_BLOCK_SIZE)
    groups = groups.reshape(*absmax.shape[:-1], -1, NESTED_BLOCK_SIZE)
    scaled, nested_absmax = normalise(groups)
    codes = jnp.searchsorted(jnp.asarray(DYNAMIC_THRESHOLDS), scaled).astype(jnp.uint8)
    return codes.reshape(*absmax.shape[:-1], -1)[..., :blocks], nested_absmax, offset


@functools.partial(jax.jit, static_argnames="block_size")
def quantize_blocks(w: Float[Array, "*batch n"], block_size: int) -> tuple[UInt8[Array, "*batch b"], jax.Array]:
    """Nibbles and float32 scales of flattened units: packed [*batch, ceil(n/2)], absmax [*batch, ceil(n/block)].

    An incomplete last block is divided by its scale, the others are multiplied by the reciprocal, as in bitsandbytes on
    CPU (backends/default/ops.py, 0.50.2). The two can differ in the last bit.
    """
    size = w.shape[-1]
    # with an odd block size, one more block may be needed for an even length; it is cut off below
    blocks = pad_last(w.astype(jnp.float32), math.lcm(block_size, 2)).reshape(*w.shape[:-1], -1, block_size)
    normalised, absmax = normalise(blocks)
    thresholds = tuple(NF4_THRESHOLDS.tolist())
    codes = code_of(normalised, thresholds)
    if size % block_size:
        last = size // block_size
        tail, scale = blocks[..., last, :], absmax[..., last, None]
        # XLA would replace the division by a broadcast scalar with a product with its reciprocal; `where` prevents that
        divisor = jnp.where((tail == tail) & (scale > 0), scale, 1.0)
        codes = codes.at[..., last, :].set(code_of(tail / divisor, thresholds))
        # select bits, since XLA may flush a denormal number
        bits = jnp.where(scale > 0, lax.bitcast_convert_type(scale, jnp.uint32), EMPTY_TAIL.view(np.uint32))
        absmax = absmax.at[..., last].set(lax.bitcast_convert_type(bits, jnp.float32)[..., 0])
    # both codes of a byte as one integer, because XLA:CPU does not vectorise slices with a stride: 5 times as fast
    pairs = lax.bitcast_convert_type(codes.reshape(*w.shape[:-1], -1, 2), jnp.uint16)
    packed = ((pairs << 4) | (pairs >> 8)).astype(jnp.uint8)
    return packed[..., : (size + 1) // 2], absmax[..., : -(-size // block_size)]


def quantize(
    w: Shaped[Array, "..."], block_size: int = 64, double_quant: bool = True, batch_dims: int = 0
) -> NF4Tensor:
    """Quantises `w` to 4 bits; nibbles and scales are those of bitsandbytes.

    Args:
      w: array of any shape; each of its `w.shape[:batch_dims]` sub-arrays is quantised separately.
      block_size: elements of the row-major flattening of a unit that share a scale.
      double_quant: store the scales in 8 bits too: 4.127 instead of 4.5 bits a weight at block size 64.

    Raises:
      ValueError: `w` is not floating point, is empty, or batch_dims leaves no axis.
    """
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"quantize needs a floating-point array, got {w.dtype}; cast it first.")
    if not 0 <= batch_dims < max(w.ndim, 1) or w.size == 0:
        raise ValueError(f"quantize needs a non-empty array with more than {batch_dims} axes, got shape {w.shape}.")
    batch, unit_shape = w.shape[:batch_dims], w.shape[batch_dims:]
    packed, absmax = quantize_blocks(w.reshape(*batch, -1), block_size)
    nested_absmax = nested_offset = None
    if double_quant:
        absmax, nested_absmax, nested_offset = quantize_scales(absmax)
    return NF4Tensor(packed, absmax, nested_absmax, nested_offset, unit_shape, False, block_size, str(w.dtype))


def quantized_shapes(
    shape: tuple[int, ...], dtype: str, block_size: int = 64, double_quant: bool = True, batch_dims: int = 0
) -> NF4Tensor:
    """What `quantize` returns for an array of this shape and dtype, as jax.ShapeDtypeStructs; nothing is traced."""
    batch, unit_shape = shape[:batch_dims], shape[batch_dims:]
    size = math.prod(unit_shape)
    blocks = -(-size // block_size)

    def leaf(width: tuple[int, ...], kind: type) -> Any:
        return jax.ShapeDtypeStruct((*batch, *width), kind)

    return NF4Tensor(
        leaf(((size + 1) // 2,), jnp.uint8),
        leaf((blocks,), jnp.uint8 if double_quant else jnp.float32),
        leaf((-(-blocks // NESTED_BLOCK_SIZE),), jnp.float32) if double_quant else None,
        leaf((), jnp.float32) if double_quant else None,
        unit_shape,
        False,
        block_size,
        dtype,
    )


@jax.jit
def all_finite(w: Float[Array, "..."]) -> Bool[Array, ""]:
    """Whether all values are finite. `quantize` does not check: XLA:CPU's maximum ignores NaN."""
    return jnp.all(jnp.isfinite(w))


@functools.partial(jax.jit, static_argnames=("block_size", "batch_dims"))
def flushed_blocks(w: Float[Array, "..."], block_size: int = 64, batch_dims: int = 0) -> Int[Array, ""]:
    """Blocks of `w`, cut as `quantize` cuts it, that lose values because denormals are quantised as zeros.

    bitsandbytes quantises denormals like other numbers. The results differ only in blocks whose largest magnitude is
    close to the smallest normal float32. In other blocks, denormals are quantised as zero by both (scaled values below
    0.0398 are zero).
    """
    if w.dtype == jnp.float16:  # its denormals are normal float32 numbers
        return jnp.zeros((), jnp.int32)
    # compare bits, because comparisons flush denormals too; magnitudes have the same order as these integers
    bits = lax.bitcast_convert_type(w.astype(jnp.float32), jnp.uint32) & 0x7FFFFFFF
    blocks = pad_last(bits.reshape(*w.shape[:batch_dims], -1), block_size).reshape(-1, block_size)
    denormal = jnp.any((blocks > 0) & (blocks < 1 << 23), axis=-1)
    return jnp.sum(denormal & (jnp.max(blocks, axis=-1) < 6 << 23), dtype=jnp.int32)  # 2**5 times the smallest normal


def block_scales(t: NF4Tensor) -> Float[Array, "*batch blocks"]:
    """float32 scale of every block; scales under double quantisation are decoded."""
    if t.nested_absmax is None or t.nested_offset is None:
        return t.absmax
    blocks = t.absmax.shape[-1]
    coded = jnp.asarray(DYNAMIC_MAP).at[t.absmax.astype(jnp.int32)].get(mode="promise_in_bounds")
    groups = jnp.repeat(t.nested_absmax, NESTED_BLOCK_SIZE, axis=-1)[..., :blocks]
    return unfused(coded * groups) + t.nested_offset[..., None]


def nibble_values(codes: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
    """Table look-up without bounds checks; codes must be below 16."""
    return jnp.asarray(NF4_VALUES).at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


def dequantize(t: NF4Tensor, dtype: jnp.dtype | type | str | None = None) -> Float[Array, "..."]:
    """Array of `t.shape` in `dtype` (the recorded dtype if None); value times scale in float32, then one cast."""
    unit_size = math.prod(t.unit_shape)
    codes = jnp.stack([t.packed >> 4, t.packed & 15], axis=-1).reshape(*t.batch_shape, -1)[..., :unit_size]
    scales = jnp.repeat(block_scales(t), t.block_size, axis=-1)[..., :unit_size]
    w = (nibble_values(codes) * scales).astype(dtype or t.dtype).reshape(*t.batch_shape, *t.unit_shape)
    return jnp.swapaxes(w, -1, -2) if t.transposed else w


def as_recorded(values: Float[Array, "*n"], t: NF4Tensor, dtype: jnp.dtype | str) -> Float[Array, "*n"]:
    """float32 `values` of `t`, rounded to the dtype that `t` records and then to `dtype`.

    bitsandbytes' layers round twice in the same way: a tensor quantised from bfloat16 has bfloat16 values in a float32
    model too. XLA may skip a cast to bfloat16 and back (xla_allow_excess_precision), but not `reduce_precision`.
    """
    if t.dtype == "bfloat16" and jnp.dtype(dtype) != jnp.bfloat16:
        values = lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
    return values.astype(t.dtype).astype(dtype)


def layer_weights(t: NF4Tensor, dtype: jnp.dtype | str) -> Float[Array, "..."]:
    """`dequantize` to the values that a layer uses when it computes in `dtype`; see `as_recorded`."""
    return as_recorded(dequantize(t, "float32"), t, dtype)
