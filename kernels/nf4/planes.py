"""The two-plane view of packed weights that matmul kernels on XLA use.

On a CPU, interleaving low and high nibbles into one matrix costs several times the look-up. So kernels keep the even
and the odd columns of the stored matrix separate, and split or merge the (much smaller) activations instead.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt8

from bimedix_jax.kernels.nf4.api import as_recorded, nibble_values
from bimedix_jax.kernels.nf4.tensor import NF4Tensor


def is_planar(w: jax.Array | NF4Tensor) -> bool:
    """Whether the two-plane view exists: units are matrices, and no block crosses rows of the stored matrix."""
    return isinstance(w, NF4Tensor) and len(w.unit_shape) == 2 and w.unit_shape[1] % w.block_size == 0


def planes(
    packed: UInt8[Array, "bytes"], scales: Float[Array, "blocks"], t: NF4Tensor, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Even and odd columns, each [rows, columns / 2] in storage order, of the unit of `t` with these leaves."""
    rows, columns = t.unit_shape
    by_block = packed.reshape(-1, t.block_size // 2)

    def plane(codes: jax.Array) -> jax.Array:
        return as_recorded(nibble_values(codes) * scales[:, None], t, dtype).reshape(rows, columns // 2)

    return plane(by_block >> 4), plane(by_block & 15)


def split_columns(x: Shaped[Array, "*rows n"]) -> tuple[jax.Array, jax.Array]:
    """Even and odd columns of an activation, each [*rows, n / 2]."""
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    return pairs[..., 0], pairs[..., 1]


def merge_columns(even: Shaped[Array, "*rows half"], odd: Shaped[Array, "*rows half"]) -> jax.Array:
    """Inverse of split_columns."""
    return jnp.stack([even, odd], axis=-1).reshape(*even.shape[:-1], 2 * even.shape[-1])
