"""NF4 in TPU kernels gives the bits of `nf4.api`; tiles fit into VMEM."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from bimedix_jax.kernels.grouped_matmul import mosaic_tiling, mosaic_tpu
from bimedix_jax.kernels.nf4 import NF4Tensor, quantize
from bimedix_jax.kernels.nf4.api import block_scales, layer_weights
from bimedix_jax.kernels.nf4.mosaic_tile import as_recorded, dequantise_tile, merge_pairs, split_pairs, value_table
from bimedix_jax.kernels.nf4.planes import split_columns


def weights(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), dtype)


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(np.uint16 if x.dtype.itemsize == 2 else np.uint32)


def test_pairs_split_and_merge() -> None:
    x = weights(5, 256)
    split = jax.jit(split_pairs)(x)
    assert (split == jnp.concatenate(split_columns(x), axis=1)).all()
    assert (jax.jit(merge_pairs)(split) == x).all()


@pytest.mark.parametrize("recorded", ["bfloat16", "float16", "float32"])
def test_rounding_equals_a_cast(recorded: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(20_000) * 10.0 ** rng.uniform(-9, 5, 20_000)
    edges = [0, 65504, 65519.9, 65520, -65520, 2**-14, 2**-25, 3 * 2**-25, 1 + 2**-9, 1 + 3 * 2**-9]  # ties, limits
    values = np.concatenate([values, edges]).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = values.astype(jnp.dtype(recorded)).astype(np.float32)
    assert (np.asarray(jax.jit(as_recorded, static_argnums=1)(values, recorded)) == expected).all()


@pytest.mark.parametrize("shape", [(3, 70, 192), (1, 1, 64), (2, 520, 1024)])
def test_decoded_scales_are_bit_equal(shape: tuple[int, ...]) -> None:
    t = quantize(weights(*shape) * 1e-2, block_size=16, batch_dims=1)  # the last: 33,280 blocks, two steps of the grid
    assert (bits(jax.jit(mosaic_tpu.float32_scales)(t)) == bits(jax.jit(block_scales)(t))).all()


@pytest.mark.parametrize("block_size", mosaic_tiling.BLOCK_SIZES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tiles_have_the_bits_of_layer_weights(dtype: str, block_size: int) -> None:
    rows, columns = 70, 512
    t = quantize(weights(1, rows, columns, dtype="bfloat16"), block_size=block_size, double_quant=False, batch_dims=1)

    @jax.jit
    def dequantise(t: NF4Tensor) -> jax.Array:
        packed, scales = mosaic_tpu.stored_matrices(t)
        kernel = functools.partial(dequantise_tile, block_size=block_size, recorded=t.dtype)
        shape = jax.ShapeDtypeStruct((rows, columns), dtype)
        return pl.pallas_call(kernel, shape, interpret=True)(packed[0], scales[0], value_table())

    expected = jax.jit(layer_weights, static_argnums=1)(t, dtype)[0]
    chunks = [jnp.concatenate(split_columns(chunk), axis=1) for chunk in jnp.split(expected, columns // 256, axis=1)]
    assert (bits(dequantise(t)) == bits(jnp.concatenate(chunks, axis=1))).all()


def test_float32_scales_are_unchanged() -> None:
    t = quantize(weights(2, 8, 64), double_quant=False, batch_dims=1)
    assert (mosaic_tpu.float32_scales(t) == t.absmax).all()


def test_tiles_are_as_wide_as_memory_allows() -> None:
    bfloat16, float32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
    assert mosaic_tiling.dense_columns(4096, 14_336, bfloat16) == 1024
    assert mosaic_tiling.dense_columns(14_336, 4096, bfloat16) == 512
    assert mosaic_tiling.dense_columns(4096, 14_336, float32) == 512
    assert mosaic_tiling.dense_columns(4096, 128 + 64, bfloat16) == 192  # all columns at once
    assert mosaic_tiling.dense_columns(64, 1024 + 128, bfloat16) == 128  # 1,024 would compute 896 columns of padding
    assert mosaic_tiling.packed_columns(14_336, 4096, bfloat16, False, 64) == 512
    assert mosaic_tiling.packed_columns(2**18, 4096, bfloat16, True, 64) is None
    assert mosaic_tiling.gradient_tile(4096, 14_336) == (1024, 1024)
    assert mosaic_tiling.gradient_tile(14_336, 128) == (7168, 128)


def test_invalid_operands_raise() -> None:
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((4, 2**18), (2, 2**18, 2**18)))
    with pytest.raises(NotImplementedError, match=r"'mosaic_tpu': tiles .* do not fit into VMEM"):
        jax.eval_shape(mosaic_tpu.grouped_matmul, x, w, jax.ShapeDtypeStruct((2,), jnp.int32))
    with pytest.raises(NotImplementedError, match="TPUs multiply bfloat16 and float32, not float16"):
        mosaic_tpu.grouped_matmul(jnp.ones((4, 8), jnp.float16), jnp.ones((1, 8, 8)), jnp.asarray([4]))
    assert mosaic_tpu.grouped_matmul(jnp.ones((0, 8)), jnp.ones((2, 8, 3)), jnp.asarray([0, 0])).shape == (0, 3)
    assert mosaic_tpu.weight_gradient(jnp.ones((0, 8)), jnp.ones((0, 3)), jnp.asarray([0, 0])).shape == (2, 8, 3)
