"""One layer's cache of keys or values, in the two layouts that `attention` reads.

Loops over layers and accelerators use an array [B, S, G, H]. Decoding on a CPU uses `HeadMajor`. With the array,
XLA:CPU would transpose all cached heads for each token's product, and would convert the whole 16-bit cache to float32
to write one token.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from bimedix_jax.kernels.products import from_bits, to_bits
from bimedix_jax.kernels.pytree import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadMajor:
    """Keys or values with heads before slots, 16-bit floats as integers of their bits.

    Attributes:
      bits_BGSH: result of `to_bits`; there may be more leading axes.
      dtype: name of the floats' dtype.
    """

    bits_BGSH: Leaf
    dtype: str = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, x_BSGH: Float[Array, "*lead B S G H"]) -> "HeadMajor":
        return cls(to_bits(x_BSGH.swapaxes(-3, -2)), str(x_BSGH.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array: [..., B, S, G, H]."""
        *lead, groups, slots, width = self.bits_BGSH.shape
        return (*lead, slots, groups, width)

    @property
    def ndim(self) -> int:
        return self.bits_BGSH.ndim

    def values_BGSH(self) -> jax.Array:
        return from_bits(self.bits_BGSH, jnp.dtype(self.dtype))

    def array(self) -> jax.Array:
        """The floats [..., B, S, G, H]."""
        return self.values_BGSH().swapaxes(-3, -2)


Cached = jax.Array | HeadMajor
"""Keys or values, [B, S, G, H] in either layout."""


def write(cache: Cached, new_BTGH: Float[Array, "B T G H"], offset: Int[Array, ""] | int) -> Cached:
    """The cache with new keys or values, in its dtype, from slot `offset` on; the slots must exist."""
    if isinstance(cache, HeadMajor):
        bits = to_bits(new_BTGH.astype(cache.dtype).swapaxes(1, 2))
        return dataclasses.replace(cache, bits_BGSH=lax.dynamic_update_slice_in_dim(cache.bits_BGSH, bits, offset, 2))
    return lax.dynamic_update_slice_in_dim(cache, new_BTGH.astype(cache.dtype), offset, 1)


def heads_of(cached: Cached, dtype: jnp.dtype) -> jax.Array:
    """[B * G, S, H] in `dtype`."""
    x_BGSH = cached.values_BGSH() if isinstance(cached, HeadMajor) else cached.swapaxes(1, 2)
    return x_BGSH.astype(dtype).reshape(-1, *x_BGSH.shape[2:])
