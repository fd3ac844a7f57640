"""Cutting the matrices of an NF4Tensor into smaller units, so that each device can hold and use its own."""

import dataclasses

import jax
import jax.numpy as jnp

from bimedix_jax.kernels.nf4.api import block_scales
from bimedix_jax.kernels.nf4.tables import NESTED_BLOCK_SIZE
from bimedix_jax.kernels.nf4.tensor import NF4Tensor


def split_units(t: NF4Tensor, axis: int, parts: int) -> NF4Tensor:
    """The same values with every [R, C] unit cut into `parts` along a logical axis (-1 or -2).

    The parts lie along a new last batch axis. Nibbles move, none changes. The scales stay in 8 bits where their groups
    of 256 blocks fall into one part each; otherwise they become float32, 4.5 instead of 4.127 bits a weight.

    Raises:
      ValueError: units that are no matrices, or a cut through a block of elements that share a scale.
    """
    if len(t.unit_shape) != 2:
        raise ValueError(f"Units of shape {t.unit_shape} are no matrices and cannot be cut along axis {axis}.")
    rows, columns = t.unit_shape
    by_rows = (axis == -1) == t.transposed
    size = rows if by_rows else columns
    part = (size // parts, columns) if by_rows else (rows, size // parts)
    run = part[0] * columns if by_rows else part[1]  # neighbours in storage that stay together
    if size % parts or run % t.block_size or run % 2 or columns % (2 if by_rows else t.block_size):
        raise ValueError(
            f"A stored matrix {t.unit_shape} cannot be cut into {parts} along its {'rows' if by_rows else 'columns'} "
            f"without cutting through blocks of {t.block_size}."
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
