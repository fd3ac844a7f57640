"""The packed tensor that every NF4 kernel reads."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bimedix_jax.kernels.pytree import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4Tensor:
    """A stack of independently quantised units, each stored exactly as bitsandbytes stores one tensor.

    A unit is flattened row-major and divided into blocks; two codes share a byte, the even element in the high nibble.
    Leading batch axes (layers, experts) are ordinary array axes of every leaf, so `lax.scan`, `vmap` and sharding work
    on them. `transposed` swaps the last two *logical* axes without copying: a weight stored as (out, in) is used as
    (in, out).

    Attributes:
      packed: uint8 [*batch, ceil(unit size / 2)].
      absmax: scale of each block: float32 [*batch, blocks], or uint8 codes of it under double quantisation.
      nested_absmax: float32 [*batch, ceil(blocks / 256)] under double quantisation, else None.
      nested_offset: float32 [*batch] under double quantisation: the mean of the scales, which is subtracted first.
      unit_shape: shape of one unit as stored.
      transposed: whether the logical shape swaps the last two axes of `unit_shape`.
      block_size: elements that share a scale.
      dtype: name of the dtype that was quantised, and that `dequantize` returns by default.
    """

    packed: Leaf
    absmax: Leaf
    nested_absmax: Leaf | None
    nested_offset: Leaf | None
    unit_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    transposed: bool = dataclasses.field(default=False, metadata={"static": True})
    block_size: int = dataclasses.field(default=64, metadata={"static": True})
    dtype: str = dataclasses.field(default="bfloat16", metadata={"static": True})

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.packed.shape[:-1])

    @property
    def shape(self) -> tuple[int, ...]:
        unit = self.unit_shape
        if self.transposed:
            unit = (*unit[:-2], unit[-1], unit[-2])
        return self.batch_shape + unit

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def block_axis(self) -> int:
        """The logical axis along which blocks run: -1, or -2 if transposed."""
        return -2 if self.transposed else -1

    @property
    def double_quantised(self) -> bool:
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves; 8 * nbytes / size is the storage in bits per weight."""
        return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    @property
    def mT(self) -> "NF4Tensor":
        """The same bytes, with the last two logical axes swapped."""
        if len(self.unit_shape) < 2:
            raise ValueError(
                f"mT needs units with at least two axes; the units of this NF4Tensor have shape {self.unit_shape}."
            )
        return dataclasses.replace(self, transposed=not self.transposed)

    def __getitem__(self, index: Any) -> "NF4Tensor":
        """Indexes batch axes only, because a part of a packed unit is not a unit."""
        depth = len(index) if isinstance(index, tuple) else 1
        if depth > len(self.batch_shape):
            raise IndexError(
                f"An NF4Tensor is indexed along its batch axes {self.batch_shape} only; got index {index}."
            )
        return jax.tree.map(lambda leaf: leaf[index], self)


def one_unit_stack(t: Any) -> Any:
    """An NF4Tensor or RowMajor with another last batch axis, of length 1."""
    return jax.tree.map(lambda leaf: jnp.expand_dims(leaf, len(t.batch_shape)), t)


def zero_cotangent(leaf: Leaf) -> jax.Array | np.ndarray:
    """The gradient of a frozen leaf: zeros, of dtype float0 for integers."""
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)
