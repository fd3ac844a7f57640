"""NF4 equals bitsandbytes and the NumPy reference bit for bit."""

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
from bimedix_jax.kernels.nf4.api import (
    all_finite,
    block_scales,
    flushed_blocks,
    layer_weights,
    mean_scale,
    quantize_scales,
    quantized_shapes,
)
from bimedix_jax.kernels.nf4.planes import is_planar, merge_columns, planes, split_columns
from bimedix_jax.kernels.nf4.tables import DYNAMIC_MAP, NF4_THRESHOLDS, NF4_VALUES

# bitsandbytes 0.50.2 dequantises wrongly on CPU where the last axis is a multiple of 16 but not of 64
SHAPES = [(96, 50), (7, 13), (64, 128), (3, 5, 7), (1, 1), (1000,)]
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def weights(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def unit_of(t: NF4Tensor) -> reference.PackedUnit:
    nested = (None if leaf is None else np.asarray(leaf) for leaf in (t.nested_absmax, t.nested_offset))
    return reference.PackedUnit(np.asarray(t.packed), np.asarray(t.absmax), *nested)


def test_code_books_equal_those_of_bitsandbytes() -> None:
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


@pytest.mark.parametrize("block_size", [32, 64, 512])
@pytest.mark.parametrize("dtype", TORCH)
def test_double_quantised_states_of_bitsandbytes_dequantise_bit_equal(dtype: str, block_size: int) -> None:
    """Eagerly, under jit (where XLA might fuse into an FMA), and with the casts of layers."""
    source = torch.tensor(weights((300, 50))).to(TORCH[dtype])
    packed, state = bnb.quantize_4bit(source, quant_type="nf4", blocksize=block_size, compress_statistics=True)
    assert state.state2 is not None
    assert state.offset is not None
    t = NF4Tensor(
        jnp.asarray(packed.numpy().reshape(-1)),
        jnp.asarray(state.absmax.numpy()),
        jnp.asarray(state.state2.absmax.numpy()),
        jnp.asarray(state.offset.numpy()),
        (300, 50),
        block_size=block_size,
        dtype=dtype,
    )
    expected = bnb.dequantize_4bit(packed, state)
    for values in (dequantize(t), jax.jit(dequantize)(t)):
        assert np.array_equal(values.astype(jnp.float32), expected.float().numpy())
    for compute in ("float32", "bfloat16"):
        used = jax.jit(layer_weights, static_argnums=1)(t, compute).astype(jnp.float32)
        assert np.array_equal(used, expected.to(TORCH[compute]).float().numpy()), compute
    if dtype != "float32":
        assert not np.array_equal(dequantize(t, "float32"), layer_weights(t, "float32")), "the test shows nothing"


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.sampled_from([(1,), (63,), (64,), (65,), (1000,), (20, 50), (3, 5, 7)]),  # few, because each is compiled
        elements=st.floats(-1, 1, width=32, allow_subnormal=False),
    ),
    st.integers(-116, 127),
    st.sampled_from(sorted(TORCH)),
)
def test_any_normal_weights_quantise_and_dequantise_as_in_bitsandbytes(w: np.ndarray, power: int, dtype: str) -> None:
    """The largest magnitude is 2**power, from the first effect of denormals to the largest numbers."""
    largest = np.abs(w).max()
    power = max(-14, min(15, power)) if dtype == "float16" else power
    w = np.ldexp(w / largest if largest > 0 else w, power).astype(np.float32)
    source = torch.tensor(w).to(TORCH[dtype])
    stored = jnp.asarray(source.float().numpy()).astype(dtype)
    assert flushed_blocks(stored) == 0 or largest < 1
    packed, state = bnb.quantize_4bit(source, quant_type="nf4", blocksize=64)
    t = quantize(stored, double_quant=False)
    if flushed_blocks(stored) == 0:
        assert np.array_equal(packed.numpy().reshape(-1), t.packed)
        assert np.array_equal(state.absmax.numpy(), t.absmax)
        values = bnb.dequantize_4bit(packed, state).float().numpy().reshape(w.shape)
        assert np.array_equal(values, dequantize(t).astype(jnp.float32))


@pytest.mark.parametrize("size", [64, 63, 127, 1], ids=["full", "unfinished", "both", "single"])
def test_weights_near_a_threshold_get_the_codes_of_bitsandbytes(size: int) -> None:
    """Within two units in the last place, for complete blocks (times a reciprocal) and incomplete ones (divided)."""
    draws = np.random.default_rng(0)
    w = draws.standard_normal((300, size)).astype(np.float32)
    w[:, 1:16] = (NF4_THRESHOLDS * np.abs(w[:, :1]) * (1 + draws.integers(-2, 3, (300, 15)) * 2.0**-24))[:, : size - 1]
    t = quantize(jnp.asarray(w), double_quant=False, batch_dims=1)
    for i, row in enumerate(w):
        packed, state = bnb.quantize_4bit(torch.tensor(row), quant_type="nf4", blocksize=64)
        assert np.array_equal(packed.numpy().reshape(-1), t.packed[i])
        assert np.array_equal(state.absmax.numpy(), t.absmax[i])
        assert np.array_equal(packed.numpy().reshape(-1), reference.quantize(row, double_quant=False).packed)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 129])
def test_zeros_have_the_scales_of_bitsandbytes(size: int) -> None:
    """0 in complete blocks, 1e-38 in an incomplete one."""
    packed, state = bnb.quantize_4bit(torch.zeros(size), quant_type="nf4", blocksize=64)
    for t in (quantize(jnp.zeros(size), double_quant=False), reference.quantize(np.zeros(size), double_quant=False)):
        assert np.array_equal(packed.numpy().reshape(-1), t.packed)
        assert np.asarray(t.absmax).tobytes() == state.absmax.numpy().tobytes()
    assert not dequantize(quantize(jnp.zeros(size))).any()


def extreme(dtype: str) -> np.ndarray:
    """Blocks of the largest and of small finite numbers, of zeros (also negative), and with a single nonzero number."""
    limit = float(torch.finfo(TORCH[dtype]).max)
    small = 6e-8 if dtype == "float16" else 1e-35
    rows = [np.full(64, value) for value in (limit, -limit, small, -small, 0.0, -0.0)]
    rows += [weights((64,), seed) * scale for seed, scale in enumerate((limit / 8, small * 8))]
    rows += [np.eye(64)[i] * limit * (-1) ** i for i in (0, 1, 62, 63)]
    return np.clip(np.stack(rows), -limit, limit).astype(np.float32)


@pytest.mark.parametrize("dtype", TORCH)
def test_extreme_blocks_equal_bitsandbytes(dtype: str) -> None:
    source = torch.tensor(extreme(dtype)).to(TORCH[dtype])
    stored = jnp.asarray(source.float().numpy()).astype(dtype)
    packed, state = bnb.quantize_4bit(source, quant_type="nf4", blocksize=64)
    t = quantize(stored, double_quant=False)
    assert np.isfinite(state.absmax.numpy()).all()
    assert flushed_blocks(stored) == 0
    assert np.array_equal(packed.numpy().reshape(-1), t.packed)
    assert np.array_equal(state.absmax.numpy(), t.absmax)
    values = bnb.dequantize_4bit(packed, state).float().numpy()
    assert np.array_equal(values, dequantize(t).astype(jnp.float32))
    assert np.array_equal(values, jax.jit(dequantize)(t).astype(jnp.float32))


def test_denormals_become_zeros_and_are_counted() -> None:
    w = np.zeros((6, 64), np.float32)
    w[1, 0] = 1e-45  # alone: lost
    w[2] = 1e-39
    w[3, :2] = 1.0, 1e-39  # next to 1.0, its 4-bit code is zero anyway
    w[4, :2] = 2e-38, -8e-39  # next to 2e-38, it is not
    w[5, 0] = 1.2e-38
    for dtype in ("float32", "bfloat16"):
        stored = jnp.asarray(w).astype(dtype)
        lost = np.asarray(dequantize(quantize(stored, double_quant=False)).astype(jnp.float32))
        assert flushed_blocks(stored) == (3 if dtype == "float32" else 2), "bfloat16 rounds 1e-45 to zero itself"
        assert not lost[:3].any()
        assert (lost[3, 1], lost[4, 1]) == (0, 0)
    assert flushed_blocks(jnp.asarray(w[1:5]).reshape(2, 128)[:, :65], batch_dims=1) == 2, "blocks end with units"
    assert flushed_blocks(jnp.full(64, 6e-8, jnp.float16)) == 0, "its denormals are normal float32 numbers"


@pytest.mark.parametrize("dtype", TORCH)
def test_nan_and_infinity_are_detected(dtype: str) -> None:
    w = jnp.asarray(weights((3, 70))).astype(dtype)
    assert all_finite(w)
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        assert not all_finite(w.at[1, 5].set(value))


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.sampled_from([(1,), (64,), (65,), (1000,), (7, 13), (20, 32), (3, 5, 7)]),  # few, because each is compiled
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


def test_batched_units_equal_separate_units() -> None:
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


@pytest.mark.parametrize("largest", [0.3, 1e-38, 2.5e-38, 1e20, 3e38])
@pytest.mark.parametrize("blocks", [1, 300, 5184])
def test_scales_on_the_host_have_the_bits_of_quantize(blocks: int, largest: float) -> None:
    absmax = (np.abs(weights((blocks,))) / 5 * np.float32(largest)).astype(np.float32)
    absmax[-1] = np.float32(1e-38)  # of an incomplete block of zeros
    found = reference.quantize_scales(absmax, lambda scales: np.asarray(mean_scale(scales)))
    for ours, expected in zip(found, quantize_scales(jnp.asarray(absmax)), strict=True):
        np.testing.assert_array_equal(ours, expected, strict=True)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 64, 64), (65,)])
def test_shapes_without_tracing_are_those_of_quantize(shape: tuple[int, ...], double_quant: bool) -> None:
    for batch_dims in range(len(shape)):
        w = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        traced = jax.eval_shape(lambda w, dims=batch_dims: quantize(w, 32, double_quant, dims), w)
        assert quantized_shapes(shape, "bfloat16", 32, double_quant, batch_dims) == traced


def test_storage_of_a_mixtral_layer_is_below_4_13_bits() -> None:
    w = jax.ShapeDtypeStruct((14336, 4096), jnp.bfloat16)
    t = jax.eval_shape(quantize, w)
    assert 8 * t.nbytes / t.size <= 4.13


def test_planes_are_even_and_odd_columns() -> None:
    t = quantize(jnp.asarray(weights((6, 128))))
    assert is_planar(t)
    assert not is_planar(quantize(jnp.asarray(weights((6, 96)))))
    even, odd = planes(t.packed, block_scales(t), t, jnp.dtype("float32"))
    assert np.array_equal(merge_columns(even, odd), dequantize(t))
    assert np.array_equal(merge_columns(*split_columns(dequantize(t))), dequantize(t))


def test_invalid_operands_raise() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        quantize(jnp.arange(4))
    with pytest.raises(ValueError, match="more than 1 axes"):
        quantize(jnp.ones(4), batch_dims=1)
