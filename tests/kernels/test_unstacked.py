"""Arrays as tuples of their parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bimedix_jax.kernels.nf4 import NF4Tensor, dequantize, quantize
from bimedix_jax.kernels.unstacked import Unstacked, stack, unstack


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_parts_equal_the_array(dtype: str) -> None:
    array = jnp.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).astype(dtype)
    found = unstack(array, 2)
    assert (found.shape, found.ndim, found.dtype, len(found)) == (array.shape, 4, array.dtype, 2)
    assert isinstance(found[1], Unstacked)
    np.testing.assert_array_equal(found[1][2], array[1, 2])
    np.testing.assert_array_equal(stack(found), array)
    assert unstack(array, 0) is array


def test_packed_parts() -> None:
    packed = quantize(jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 64, 32)), jnp.bfloat16), batch_dims=2)
    found = unstack(packed.mT, 2)
    assert (found.shape, found.dtype) == (packed.mT.shape, packed.dtype)
    assert isinstance(found[1][2], NF4Tensor)
    np.testing.assert_array_equal(dequantize(found[1][2]), dequantize(packed.mT)[1, 2])
    assert jax.tree.structure(stack(found)) == jax.tree.structure(packed.mT)
    jax.tree.map(np.testing.assert_array_equal, stack(found), packed.mT)


def test_parts_share_the_memory_of_the_array() -> None:
    array = jnp.ones((2, 3, 16, 16))
    first, part = array.unsafe_buffer_pointer(), unstack(array, 2)[1][2]
    assert part.unsafe_buffer_pointer() == first + 5 * 16 * 16 * 4


def test_traced_arrays_and_keys_are_indexed() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    assert jnp.all(unstack(keys, 1)[2] == keys[2])
    assert jnp.all(stack(unstack(keys, 1)) == keys)
    np.testing.assert_array_equal(jax.jit(lambda x: unstack(x, 1)[1])(jnp.arange(6).reshape(2, 3)), [3, 4, 5])


def test_more_levels_than_axes_raise() -> None:
    with pytest.raises(ValueError, match="between 0 and the 2 axes of the array; got 3"):
        unstack(jnp.ones((2, 3)), 3)
