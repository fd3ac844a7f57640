"""Splitting the matrices of an NF4Tensor into smaller units, one for each device."""

import dataclasses

import jax
import jax.numpy as jnp

from bimedix_jax.kernels.nf4.api import block_scales
from bimedix_jax.kernels.nf4.tables import NESTED_BLOCK_SIZE
from bimedix_jax.kernels.nf4.tensor import NF4Tensor


def split_units(t: NF4Tensor, axis: int, parts: int) -> NF4Tensor:
    """The same values with every [R, C] unit split into `parts` along a logical axis (-1 or -2).

    The parts are a new last batch axis. Nibbles are reordered, not changed. If no group of 256 scales is split, scales
    stay in 8 bits. Otherwise they become float32: 4.5 instead of 4.127 bits a weight.

    Raises:
      ValueError: units that are not matrices, or a split of a block of elements that share a scale.
    """
    if len(t.unit_shape) != 2:
        raise ValueError(f"Units of shape {t.unit_shape} are not matrices and cannot be split along axis {axis}.")
    rows, columns = t.unit_shape
    by_rows = (axis == -1) == t.transposed
    size = rows if by_rows else columns
    part = (size // parts, columns) if by_rows else (rows, size // parts)
    run = part[0] * columns if by_rows else part[1]  # contiguous elements that stay together
    if size % parts or run % t.block_size or run % 2 or columns % (2 if by_rows else t.block_size):
        raise ValueError(
            f"A stored matrix {t.unit_shape} cannot be split into {parts} along its {'rows' if by_rows else 'columns'} "
            f"without splitting blocks of {t.block_size}."
        )

    def cut(leaf: jax.Array) -> jax.Array:
        """[*batch, n] of elements, or blocks of them, in row-major order -> [*batch, parts, n / parts]."""
        batch = leaf.shape[:-1]
        if by_rows:
            return leaf.reshape(*batch, parts, -1)
        return jnp.moveaxis(leaf.reshape(*batch, rows, parts, -1), -2, -3).reshape(*batch, parts, -1)

    blocks = rows * columns // t.block_size
    aligned = by_rows and blocks % (parts * NESTED_BLOCK_SIZE) == 0
    absmax, nested_absmax, nested_offset = block_scales(t), None, None
    if aligned and t.nested_absmax is not None and t.nested_offset is not None:
        absmax, nested_absmax = t.absmax, cut(t.nested_absmax)
        nested_offset = jnp.broadcast_to(t.nested_offset[..., None], (*t.batch_shape, parts))
    return dataclasses.replace(
        t,
        packed=cut(t.packed),
        absmax=cut(absmax),
        nested_absmax=nested_absmax,
        nested_offset=nested_offset,
        unit_shape=part,
    )
