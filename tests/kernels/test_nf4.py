"""NF4 equals bitsandbytes bit for bit, and its own NumPy reference everywhere."""

import bitsandbytes.functional as bnb
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from bimedix_jax.kernels.nf4 import NF4Tensor, dequantize, quantize, reference
from bimedix_jax.kernels.nf4.planes import is_planar, merge_columns, planes, split_columns
from bimedix_jax.kernels.nf4.tables import DYNAMIC_MAP, NF4_VALUES

# bitsandbytes 0.50.2 dequantises wrongly on CPU where the last axis is a multiple of 16 but not of 64
SHAPES = [(96, 50), (7, 13), (64, 128), (3, 5, 7), (1, 1), (1000,)]
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def weights(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def unit_of(t: NF4Tensor) -> reference.PackedUnit:
    nested = (None if leaf is None else np.asarray(leaf) for leaf in (t.nested_absmax, t.nested_offset))
    return reference.PackedUnit(np.asarray(t.packed), np.asarray(t.absmax), *nested)


def test_code_books_are_those_of_bitsandbytes() -> None:
    assert np.array_equal(bnb.create_dynamic_map().numpy(), DYNAMIC_MAP)
    assert np.array_equal(bnb.get_4bit_type("nf4", device="cpu").numpy(), NF4_VALUES)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("shape", SHAPES)
def test_nibbles_scales_and_values_equal_bitsandbytes(shape: tuple[int, ...], dtype: str) -> None:
    source = torch.tensor(weights(shape)).to(TORCH[dtype])
    packed, state = bnb.quantize_4bit(source, quant_type="nf4", blocksize=64)
    w = source.float().numpy().astype(getattr(ml_dtypes, dtype, None) or dtype)
    t = quantize(jnp.asarray(w), double_quant=False)
    assert np.array_equal(packed.numpy().reshape(-1), t.packed)
    assert np.array_equal(state.absmax.numpy(), t.absmax)
    assert np.array_equal(
        bnb.dequantize_4bit(packed, state).float().numpy().reshape(shape), dequantize(t).astype(jnp.float32)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_double_quantisation_equals_the_reference_eager_and_jitted(shape: tuple[int, ...]) -> None:
    w = weights(shape)
    t, expected = quantize(jnp.asarray(w)), reference.quantize(w)
    assert np.array_equal(t.packed, expected.packed)
    assert t.nested_offset is not None
    assert expected.nested_offset is not None
    # the mean of the scales may differ in its last bit by the order of summation
    assert np.allclose(t.nested_offset, expected.nested_offset, rtol=1e-6, atol=0)
    values = reference.dequantize(unit_of(t), shape)
    assert np.array_equal(dequantize(t), values)
    assert np.array_equal(jax.jit(dequantize)(t), values)


def test_bitsandbytes_double_quantised_state_dequantises_bit_equal() -> None:
    source = torch.tensor(weights((96, 50)))
    packed, state = bnb.quantize_4bit(source, quant_type="nf4", blocksize=64, compress_statistics=True)
    assert state.state2 is not None
    assert state.offset is not None
    t = NF4Tensor(
        jnp.asarray(packed.numpy().reshape(-1)),
        jnp.asarray(state.absmax.numpy()),
        jnp.asarray(state.state2.absmax.numpy()),
        jnp.asarray(state.offset.numpy()),
        (96, 50),
        dtype="float32",
    )
    assert np.array_equal(bnb.dequantize_4bit(packed, state).numpy(), jax.jit(dequantize)(t))


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.sampled_from([(1,), (64,), (65,), (1000,), (7, 13), (20, 32), (3, 5, 7)]),  # few: each is a compilation
        elements=st.floats(-(2.0**127), 2.0**127, width=32),
    ),
    st.booleans(),
)
def test_any_finite_array_round_trips_within_half_a_step(w: np.ndarray, double_quant: bool) -> None:
    t = quantize(jnp.asarray(w), double_quant=double_quant)
    expected = reference.quantize(w, double_quant=double_quant)
    assert np.array_equal(t.packed, expected.packed)
    if not double_quant:
        # the widest gap between neighbours is 0.304 of the block's scale
        blocks = reference.pad_to(np.abs(w).reshape(-1), 64).reshape(-1, 64).max(axis=1)
        limit = 0.1525 * np.repeat(blocks, 64)[: w.size].reshape(w.shape) + 1.2e-38
        assert (np.abs(np.asarray(dequantize(t)) - w) <= limit).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 3e38, -3e38])
def test_constant_blocks_are_exact(value: float) -> None:
    w = jnp.full((4, 64), value)
    assert np.array_equal(dequantize(quantize(w, double_quant=False)), w)


def test_huge_scales_do_not_overflow_their_mean() -> None:
    w = np.full((4, 18 * 64), 2.0**127, np.float32)
    for t in (quantize(jnp.asarray(w)), reference.quantize(w)):
        assert t.nested_offset == 2.0**127
    assert np.array_equal(dequantize(quantize(jnp.asarray(w))), w)


def test_batched_units_equal_units_on_their_own() -> None:
    w = jnp.asarray(weights((2, 3, 5, 64)))
    t = quantize(w, batch_dims=2)
    assert t.shape == w.shape
    assert t.batch_shape == (2, 3)
    assert t.block_axis == -1
    for i in range(2):
        for j in range(3):
            alone = quantize(w[i, j])
            assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), t[i, j], alone))
    assert t.mT.shape == (2, 3, 64, 5)
    assert t.mT.block_axis == -2
    assert np.array_equal(dequantize(t.mT), dequantize(t).mT)
    with pytest.raises(IndexError, match="batch axes"):
        t[0, 0, 0]


def test_storage_of_a_mixtral_layer_is_below_4_13_bits() -> None:
    w = jax.ShapeDtypeStruct((14336, 4096), jnp.bfloat16)
    t = jax.eval_shape(quantize, w)
    assert 8 * t.nbytes / t.size <= 4.13


def test_planes_are_the_columns() -> None:
    t = quantize(jnp.asarray(weights((6, 128))))
    assert is_planar(t)
    assert not is_planar(quantize(jnp.asarray(weights((6, 96)))))
    from bimedix_jax.kernels.nf4.api import block_scales

    even, odd = planes(t.packed, block_scales(t), t, jnp.dtype("float32"))
    assert np.array_equal(merge_columns(even, odd), dequantize(t))
    assert np.array_equal(merge_columns(*split_columns(dequantize(t))), dequantize(t))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        quantize(jnp.arange(4))
    with pytest.raises(ValueError, match="more than 1 axes"):
        quantize(jnp.ones(4), batch_dims=1)
