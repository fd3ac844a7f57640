"""Packed matrices whose bytes and scales have an axis of rows, as the TPU kernels read them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from bimedix_jax.kernels.nf4.tables import NESTED_BLOCK_SIZE
from bimedix_jax.kernels.nf4.tensor import NF4Tensor
from bimedix_jax.kernels.pytree import Leaf

LANES = 128
PERIOD = 128
"""Rows after which the scales' groups of 256 begin at the start of a row again, or a multiple of that."""


def groups_of_a_row(scales: int) -> int:
    """The most groups of 256 scales that a row of this many scales touches."""
    starts = [row * scales % NESTED_BLOCK_SIZE for row in range(PERIOD)]
    return max((start + scales - 1) // NESTED_BLOCK_SIZE for start in starts) + 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowMajor:
    """The values of an NF4Tensor of matrices, whose bits it keeps.

    A TPU stores the last two axes of an array in tiles. In an NF4Tensor these are experts and bytes, and to split the
    bytes into rows is a copy. Here they are rows and bytes of a row.

    Attributes:
      packed: uint8 [*batch, rows, columns / 2].
      absmax: [*batch, rows, scales of a row], padded with zeros to whole lanes.
      nested_rows: float32 [*batch, groups, rows] under double quantisation, else None: the second-level scales of the
        groups of 256 scales that a row touches, in order.
      nested_offset, unit_shape, transposed, block_size, dtype: as in NF4Tensor.
    """

    packed: Leaf
    absmax: Leaf
    nested_rows: Leaf | None
    nested_offset: Leaf | None
    unit_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    transposed: bool = dataclasses.field(default=False, metadata={"static": True})
    block_size: int = dataclasses.field(default=64, metadata={"static": True})
    dtype: str = dataclasses.field(default="bfloat16", metadata={"static": True})

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.packed.shape[:-2])

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.unit_shape
        return (*self.batch_shape, *((columns, rows) if self.transposed else (rows, columns)))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def scales(self) -> int:
        """Scales of a row."""
        return self.unit_shape[1] // self.block_size

    @property
    def mT(self) -> "RowMajor":
        """The same bytes, with the last two logical axes swapped."""
        return dataclasses.replace(self, transposed=not self.transposed)

    @property
    def row_axes(self) -> "RowMajor":
        """Instead of each leaf its axis of rows, counted from the end, or 0 if it has none."""
        nested = None if self.nested_rows is None else -1
        offset = None if self.nested_offset is None else 0
        return dataclasses.replace(self, packed=-2, absmax=-2, nested_rows=nested, nested_offset=offset)

    @classmethod
    def of(cls, t: NF4Tensor) -> "RowMajor":
        """Raises ValueError for a tensor for which `has_rows` is false."""
        if not has_rows(t):
            raise ValueError(f"Units of shape {t.unit_shape} in blocks of {t.block_size} cannot be stored by rows.")
        (rows, columns), batch = t.unit_shape, t.batch_shape
        scales = columns // t.block_size
        absmax = t.absmax.reshape(*batch, rows, scales)
        absmax = jnp.pad(absmax, [(0, 0)] * (absmax.ndim - 1) + [(0, -scales % LANES)])
        nested_rows = None
        if t.nested_absmax is not None:
            nested_rows = jnp.take(t.nested_absmax, jnp.asarray(group_ids(rows, scales)), axis=-1)
        packed = t.packed.reshape(*batch, rows, columns // 2)
        return cls(packed, absmax, nested_rows, t.nested_offset, t.unit_shape, t.transposed, t.block_size, t.dtype)

    def tensor(self) -> NF4Tensor:
        """Inverse of `of`."""
        rows, batch, nested_absmax = self.unit_shape[0], self.batch_shape, None
        if self.nested_rows is not None:
            _, first = np.unique(group_ids(rows, self.scales), return_index=True)
            nested_absmax = jnp.take(self.nested_rows.reshape(*batch, -1), jnp.asarray(first), axis=-1)
        absmax = self.absmax[..., : self.scales].reshape(*batch, -1)
        leaves = self.packed.reshape(*batch, -1), absmax, nested_absmax, self.nested_offset
        return NF4Tensor(*leaves, self.unit_shape, self.transposed, self.block_size, self.dtype)


def group_ids(rows: int, scales: int) -> np.ndarray:
    """[groups of a row, rows]: which group of 256 scales each is; the last one where a row touches fewer."""
    first = np.arange(rows) * scales // NESTED_BLOCK_SIZE
    ids = first[None] + np.arange(groups_of_a_row(scales))[:, None]
    return np.minimum(ids, rows * scales // NESTED_BLOCK_SIZE - 1)


def has_rows(t: NF4Tensor) -> bool:
    """Whether RowMajor can store this tensor: matrices with whole tiles of rows, bytes and groups of scales."""
    if len(t.unit_shape) != 2:
        return False
    rows, columns = t.unit_shape
    whole = rows % PERIOD == 0 and columns % (2 * LANES) == 0 and columns % (2 * t.block_size) == 0
    return whole and len(t.batch_shape) > 0
