"""The product with one matrix against NumPy, dense and 4-bit on every backend: forward and gradients."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from bimedix_jax.kernels import backends, native
from bimedix_jax.kernels.by_output import ByOutput
from bimedix_jax.kernels.nf4 import NF4Tensor, dequantize, quantize
from bimedix_jax.kernels.nf4.api import layer_weights
from bimedix_jax.kernels.nf4.rows import RowMajor
from bimedix_jax.kernels.nf4_matmul import matmul, reference
from bimedix_jax.kernels.nf4_matmul.api import BACKENDS, FEW_ROWS, dense_dot
from bimedix_jax.kernels.stacks import LayerOf

pack = jax.jit(quantize, static_argnames=("block_size", "double_quant", "batch_dims"))
unpack = jax.jit(dequantize, static_argnames="dtype")
"""As one program for each shape; eager, every operation is compiled."""

RELATIVE = {"float32": 2e-5, "bfloat16": 1.6e-2}
DTYPES = {backend: ("bfloat16",) if backend == "avx512" else tuple(RELATIVE) for backend in BACKENDS}
IN_EACH_DTYPE = [(backend, dtype) for backend in BACKENDS for dtype in DTYPES[backend]]
CASES = {  # leading axes of x, D, F, block, double quantisation, whether stored [F, D]
    "one_row": ((1,), 64, 128, 64, True, True),
    "no_row": ((0,), 64, 64, 64, True, True),
    "as_checkpoints_are": ((2, 9), 128, 192, 64, True, True),
    "as_quantised": ((2, 9), 128, 192, 64, True, False),
    "several_tiles": ((150,), 192, 320, 32, False, True),
    "no_tile_divides": ((3, 1, 7), 96, 160, 32, False, False),
}


def close(got: jax.Array, expected: np.ndarray, dtype: str) -> None:
    limit = RELATIVE[dtype] * np.abs(expected).max(initial=0)
    assert np.abs(np.asarray(got, np.float32) - expected).max(initial=0) <= limit


def draw(*shapes: tuple[int, ...], dtype: str = "float32") -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@functools.cache
def compiled(backend: str):
    """(y, dx) of x, 4-bit weights and dy."""

    def compute(x: jax.Array, t: NF4Tensor, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pullback = jax.vjp(lambda x: matmul(x, t, backend=backend), x)
        return y, pullback(dy)[0]

    return jax.jit(compute)


@pytest.mark.parametrize("dtype", RELATIVE)
def test_dense_product_and_gradients(dtype: str) -> None:
    x, w, dy = draw((2, 3, 16), (16, 24), (2, 3, 24), dtype=dtype)
    y, pullback = jax.vjp(matmul, x, w)
    dx, dw = pullback(dy)
    x32, w32, dy32 = (np.asarray(value, np.float32) for value in (x, w, dy))
    close(y, reference.matmul(x32, w32), dtype)
    close(dx, dy32 @ w32.T, dtype)
    close(dw, x32.reshape(-1, 16).T @ dy32.reshape(-1, 24), dtype)
    assert y.dtype == dx.dtype == x.dtype
    assert dw.dtype == w.dtype
    assert matmul(x, w, "float32").dtype == jnp.float32


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (FEW_ROWS,), (0,)])
@pytest.mark.parametrize("dtype", [*RELATIVE, "float16"])
def test_few_dense_rows(dtype: str, lead: tuple[int, ...]) -> None:
    """A CPU pads them in bfloat16, which must not change result or gradients."""
    x, w, dy = draw((*lead, 16), (16, 24), (*lead, 24), dtype=dtype)
    y, pullback = jax.vjp(lambda x, w: matmul(x, w, "float32"), x, w)
    x32, w32, dy32 = (np.asarray(value, np.float32) for value in (x, w, dy))
    assert (y.shape, y.dtype) == (dy.shape, jnp.float32)
    close(y, x32 @ w32, "float32")
    dx, dw = pullback(dy.astype("float32"))
    close(dx, dy32 @ w32.T, "bfloat16")
    close(dw, x32.reshape(-1, 16).T @ dy32.reshape(-1, 24), "bfloat16")


def test_only_a_cpu_pads_few_rows_and_only_in_bfloat16() -> None:
    def padded(dtype: str, rows: int) -> bool:
        x, w = draw((rows, 16), (16, 24), dtype=dtype)
        return f"[{FEW_ROWS},24]" in str(jax.make_jaxpr(matmul)(x, w))

    assert padded("bfloat16", 1)
    assert padded("bfloat16", FEW_ROWS - 1)
    assert not padded("float16", 1)
    assert not padded("float32", 1)
    assert not padded("bfloat16", FEW_ROWS + 1)
    with backends.use("gpu"):
        assert not padded("bfloat16", 1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("backend", "dtype"), IN_EACH_DTYPE)
def test_forward_and_gradient(backend: str, case: str, dtype: str) -> None:
    lead, d, f, block, double_quant, transposed = CASES[case]
    x, w, dy = draw((*lead, d), (f, d) if transposed else (d, f), (*lead, f), dtype=dtype)
    t = pack(w, block_size=block, double_quant=double_quant)
    t = t.mT if transposed else t
    values = np.asarray(unpack(t), np.float32)
    y, dx = compiled(backend)(x, t, dy)
    assert (y.dtype, dx.dtype) == (x.dtype, x.dtype)
    assert (y.shape, dx.shape) == (dy.shape, x.shape)
    close(y, reference.matmul(np.asarray(x), values), dtype)
    close(dx, np.asarray(dy, np.float32) @ values.T, dtype)


@pytest.mark.parametrize(("source", "double_quant"), [("bfloat16", True), ("bfloat16", False), ("float32", True)])
@pytest.mark.parametrize(("backend", "dtype"), IN_EACH_DTYPE)
def test_values_are_bit_equal_to_layer_weights(backend: str, dtype: str, source: str, double_quant: bool) -> None:
    """The product with a unit vector is a row of the weights."""
    d, f = 192, 320
    t = pack(draw((f, d), dtype=source)[0], block_size=32, double_quant=double_quant).mT
    expected = np.asarray(layer_weights(t, dtype), np.float32)
    rows, columns = np.array([0, 63, 64, 191, 5]), np.array([0, 319, 31, 32, 255])
    x, dy = jax.nn.one_hot(rows, d, dtype=dtype), jax.nn.one_hot(columns, f, dtype=dtype)
    y, dx = compiled(backend)(x, t, dy)
    np.testing.assert_array_equal(np.asarray(y, np.float32), expected[rows])
    np.testing.assert_array_equal(np.asarray(dx, np.float32), expected.T[columns])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_of_a_stack_is_bit_equal_to_its_slice(backend: str) -> None:
    """The other layers hold other values."""
    w, x, dy = draw((3, 128, 192), (2, 1, 192), (2, 1, 128), dtype="bfloat16")
    t = pack(w, batch_dims=1).mT
    got, expected = compiled(backend)(x, LayerOf(t, jnp.int32(2)), dy), compiled(backend)(x, t[2], dy)
    for one, other in zip(got, expected, strict=True):
        assert jnp.abs(other).max() > 0
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize("layer", [3, 100_000, -1, -100_000])
@pytest.mark.parametrize("packed", [True, False])
def test_a_layer_out_of_range_is_that_of_a_slice(packed: bool, layer: int, avx512_machine: None) -> None:
    x, w = draw((40, 64), (3, 64, 64), dtype="bfloat16")
    stack = quantize(w, batch_dims=1) if packed else w
    got, expected = (matmul(x, LayerOf(stack, jnp.int32(layer)), backend=name) for name in ("avx512", "xla"))
    assert np.abs(np.asarray(got - expected, np.float32)).max() <= 0.02 * np.abs(np.asarray(expected, np.float32)).max()


def test_a_layer_stored_by_rows_is_bit_equal_to_its_slice() -> None:
    """In a stack, and alone as after a gather over devices. The rows are as many as in training."""
    w, x, dy = draw((3, 128, 256), (2, 100, 256), (2, 100, 128), dtype="bfloat16")
    t = pack(w, batch_dims=1).mT
    by_rows, expected = jax.jit(RowMajor.of)(t), compiled("mosaic_tpu")(x, t[2], dy)
    for form in (LayerOf(by_rows, jnp.int32(2)), jax.tree.map(lambda leaf: leaf[2], by_rows)):
        for one, other in zip(compiled("mosaic_tpu")(x, form, dy), expected, strict=True):
            assert jnp.abs(other).max() > 0
            np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_values(backend: str) -> None:
    shapes = [(1, 32, 96), (33, 64, 32)]  # few, because each is compiled

    @settings(max_examples=15, deadline=None)
    @given(st.sampled_from(shapes), st.integers(0, 2**31), st.floats(-12, 12))
    def check(shape: tuple[int, int, int], seed: int, magnitude: float) -> None:
        rows, d, f = shape
        rng = np.random.default_rng(seed)
        x, w, dy = (rng.standard_normal(size).astype(np.float32) for size in ((rows, d), (f, d), (rows, f)))
        dtype = DTYPES[backend][0]
        x, dy = jnp.asarray(x, dtype), jnp.asarray(dy, dtype)
        t = pack(jnp.asarray(w * 10.0**magnitude, dtype), block_size=32).mT
        values = np.asarray(unpack(t), np.float32)
        y, dx = compiled(backend)(x, t, dy)
        close(y, reference.matmul(np.asarray(x, np.float32), values), dtype)
        close(dx, np.asarray(dy, np.float32) @ values.T, dtype)

    check()


@pytest.mark.parametrize("width", [128, 50])
@pytest.mark.parametrize("transposed", [True, False])
def test_blocks_that_cross_rows(transposed: bool, width: int) -> None:
    """Only XLA supports them. The default backend falls back to it, a named one does not."""
    x, w, dy = draw((5, 96), (width, 96) if transposed else (96, width), (5, width))
    t = pack(w).mT if transposed else pack(w)
    values = np.asarray(unpack(t))
    y, dx = compiled("xla")(x, t, dy)
    close(y, reference.matmul(np.asarray(x), values), "float32")
    close(dx, np.asarray(dy) @ values.T, "float32")
    if transposed or width == 50:
        with pytest.raises(NotImplementedError, match="nf4_matmul backend 'triton': NF4 weights stored as"):
            matmul(x, t, backend="triton")
        for platform in ("gpu", "tpu"):
            with backends.use(platform=platform), backends.recording() as picked:
                jax.eval_shape(lambda x: matmul(x, t), x)
            assert picked.to_dict() == {"nf4_matmul": ["xla"]}


def test_invalid_operands_raise() -> None:
    x, w = draw((5, 8), (9, 4))
    with pytest.raises((ValueError, TypeError)):
        matmul(x, w)
    for contract_w, wrong in ((0, 32), (1, 64)):  # also where nothing checked the operands before
        rows, matrix = draw((5, wrong), (64, 32), dtype="bfloat16")
        with pytest.raises(ValueError, match=r"of \(64, 32\) needs rows of that length; got \(5, "):
            dense_dot(rows, matrix, contract_w)
    with pytest.raises(
        ValueError, match="Unknown nf4_matmul backend 'fastest'; choose one of avx512, mosaic_tpu, triton, xla"
    ):
        matmul(x, pack(jnp.ones((8, 64))), backend="fastest")


@pytest.mark.parametrize("rows", [(1,), (1, 1), (3,), (2, 9)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_matrix_stored_by_output(rows, dtype):
    """Product and gradients are those of the same matrix stored by input."""
    x, w_DF, dy = draw((*rows, 64), (64, 96), (*rows, 96), dtype=dtype)

    def product(w: jax.Array | ByOutput, x: jax.Array) -> jax.Array:
        return matmul(x, w, "float32")

    expected, back = jax.vjp(product, w_DF, x)
    found, back_too = jax.vjp(product, ByOutput(w_DF.T), x)
    close(found, np.asarray(expected, np.float32), dtype)
    (dw, dx), (dw_too, dx_too) = back(dy.astype(jnp.float32)), back_too(dy.astype(jnp.float32))
    close(dx_too, np.asarray(dx, np.float32), dtype)
    close(dw_too.array.T, np.asarray(dw, np.float32), dtype)


def runs_in_avx512(x: jax.Array, w: jax.Array | ByOutput) -> bool:
    return "bimedix_linear" in str(jax.make_jaxpr(matmul)(x, w))


@pytest.mark.parametrize("outputs", [32, 64, 96, 160, 13_376])
@pytest.mark.parametrize("rows", [(2,), (3,), (8,), (2, 9), (601,), (0,)])
@pytest.mark.usefixtures("avx512_machine")
def test_dense_matrices_in_avx512(rows: tuple[int, ...], outputs: int) -> None:
    """Stored by input and by output, and gradients: several chunks of rows, wide tasks, and a result of over 16 MiB."""
    x, w, dy = draw((*rows, 96), (96, outputs), (*rows, outputs), dtype="bfloat16")
    x32, w32, dy32 = (np.asarray(value, np.float32) for value in (x, w, dy))
    by_output = ByOutput(jnp.asarray(np.ascontiguousarray(np.asarray(w).T)))

    def product(x: jax.Array, w: jax.Array | ByOutput, dtype: str) -> jax.Array:
        return matmul(x, w, dtype)

    with backends.use(nf4_matmul="avx512"):
        for form in (w, by_output):
            assert runs_in_avx512(x, form) == (x.size > 0)
            for dtype in ("float32", "bfloat16", "float16"):
                y, pullback = jax.vjp(functools.partial(product, dtype=dtype), x, form)
                assert y.dtype == dtype
                close(y, x32 @ w32, "float32" if dtype == "float32" else "bfloat16")
                dx, dw = pullback(dy.astype(dtype))
                close(dx, dy32 @ w32.T, "bfloat16")
                dw = dw.array.T if isinstance(dw, ByOutput) else dw
                close(dw, x32.reshape(-1, 96).T @ dy32.reshape(-1, outputs), "bfloat16")


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("inputs", [32, 512, 2016])
@pytest.mark.parametrize("form", ["nf4", "by output"])
@pytest.mark.usefixtures("avx512_machine")
def test_few_rows_in_avx512(form: str, inputs: int, rows: int) -> None:
    """Rows within and beyond the first-level cache; contractions that are no multiple of what one step takes."""
    x, stored = draw((rows, inputs), (96, inputs), dtype="bfloat16")
    packed = pack(stored, block_size=32)
    w = ByOutput(stored) if form == "by output" else packed.mT
    values = np.asarray(stored if form == "by output" else unpack(packed), np.float32)
    with backends.use(nf4_matmul="avx512"):
        assert runs_in_avx512(x, w)
        y = matmul(x, w, "float32")
    close(y, np.asarray(x, np.float32) @ values.T, "float32" if form == "by output" else "bfloat16")


@pytest.mark.parametrize("shape", [(4, 0, 32), (4, 32, 0), (0, 0, 0), (0, 32, 64)])
def test_empty_matrices(shape: tuple[int, int, int]) -> None:
    rows, inputs, outputs = shape
    y = matmul(jnp.ones((rows, inputs), jnp.bfloat16), jnp.ones((inputs, outputs), jnp.bfloat16))
    np.testing.assert_array_equal(y, np.zeros((rows, outputs)))


def test_when_dense_matrices_take_avx512(avx512_machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default where the processor has no matrix units; not in other dtypes or widths."""
    x, w = draw((4, 64), (64, 96), dtype="bfloat16")
    monkeypatch.setattr(native, "cpu_flags", lambda: native.AVX512_NEEDS)
    assert runs_in_avx512(x, w)
    assert runs_in_avx512(x[:1], w)
    assert runs_in_avx512(x[:1], ByOutput(w.T))
    assert not runs_in_avx512(x.astype(jnp.float32), w.astype(jnp.float32))
    assert not runs_in_avx512(x, w[:, :80])
    for name in ("xla", "triton"):
        with backends.use(nf4_matmul=name):
            assert not runs_in_avx512(x, w)
    with backends.use("gpu"):
        assert not runs_in_avx512(x, w)
    monkeypatch.setattr(native, "cpu_flags", lambda: native.AVX512_NEEDS | {"amx_bf16"})
    assert not runs_in_avx512(x[:3], w)  # another shape, since JAX remembers the choice for the first one
    with backends.use(nf4_matmul="avx512"):
        assert runs_in_avx512(x[:3], w)


@pytest.mark.parametrize(("matrix_units", "best"), [(False, "avx512"), (True, "xla")])
def test_cpus_use_avx512_unless_they_have_matrix_units(
    matrix_units: bool, best: str, monkeypatch: pytest.MonkeyPatch, avx512_machine: None
) -> None:
    flags = native.AVX512_NEEDS | ({"amx_bf16"} if matrix_units else set())
    monkeypatch.setattr(native, "cpu_flags", lambda: flags)
    x, w = draw((4, 64), (96, 64), dtype="bfloat16")
    for dtype, expected in (("bfloat16", best), ("float32", "xla")):
        with backends.recording() as picked:
            jax.eval_shape(lambda x, t: matmul(x, t.mT), x.astype(dtype), pack(w))
        assert picked.to_dict() == {"nf4_matmul": [expected]}


@pytest.mark.parametrize(
    ("width", "block", "source", "reason"),
    [
        (64, 64, "float16", "packed weights must come from bfloat16 or float32, in blocks of a multiple of 32"),
        (48, 48, "bfloat16", r"widths must be positive multiples of 32, not \(48, 96\)"),
        (64, 16, "bfloat16", "in blocks of a multiple of 32"),
    ],
)
def test_what_avx512_refuses(width: int, block: int, source: str, reason: str, avx512_machine: None) -> None:
    x, w = draw((4, width), (96, width), dtype=source)
    x = x.astype(jnp.bfloat16)
    t = pack(w, block_size=block).mT
    with pytest.raises(NotImplementedError, match=f"nf4_matmul backend 'avx512': {reason}" if block > 16 else reason):
        matmul(x, t, backend="avx512")
    with pytest.raises(NotImplementedError, match="it computes in bfloat16, not in float32"):
        matmul(x.astype(jnp.float32), t, backend="avx512")
    assert matmul(x, t).shape == (4, 96)
