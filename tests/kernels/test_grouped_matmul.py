"""One suite for every backend of grouped_matmul: forward and gradients against NumPy loops."""

import functools
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.grouped_matmul import api, grouped_matmul, mosaic_tpu, reference, triton
from bimedix_jax.kernels.grouped_matmul.api import BACKENDS
from bimedix_jax.kernels.nf4 import NF4Tensor, dequantize, quantize
from bimedix_jax.kernels.nf4.api import layer_weights
from bimedix_jax.kernels.nf4.rows import RowMajor
from bimedix_jax.kernels.stacks import LayerOf

pack = jax.jit(quantize, static_argnames=("block_size", "double_quant", "batch_dims"))
unpack = jax.jit(dequantize, static_argnames="dtype")
"""As one program for each shape; eager, every operation is compiled."""

RELATIVE = {"float32": 2e-5, "bfloat16": 1.6e-2}
CASES = {  # rows, D, F, group sizes; those of one shape share a program
    "even": (64, 32, 48, [16, 16, 16, 16]),
    "one_takes_all": (64, 32, 48, [0, 64, 0, 0]),
    "no_row_owned": (64, 32, 48, [0, 0, 0, 0]),
    "empty_and_unassigned": (50, 33, 17, [10, 0, 25, 5]),
    "one_row": (1, 64, 64, [0, 0, 1, 0]),
    "one_expert": (23, 9, 31, [23]),
    "64_experts": (130, 16, 24, [i % 4 for i in range(64)]),
    "long_group": (1300, 8, 8, [1200, 3, 97]),
    "several_tiles": (70, 150, 300, [33, 0, 31]),
}

INTERPRETED = ("triton", "mosaic_tpu")
"""Pallas backends. A CPU interprets them, and compiles a second or two for each shape."""
REFUSED = {("triton", "blocks_straddle_rows"), ("mosaic_tpu", "blocks_straddle_rows")}
"""NF4 storage that a backend does not support."""


def close(got: jax.Array, expected: np.ndarray, dtype: str) -> None:
    limit = RELATIVE[dtype] * max(np.abs(expected).max(initial=0), 1e-3)
    assert np.abs(np.asarray(got, np.float32) - expected).max(initial=0) <= limit


def draw(rows: int, d: int, f: int, experts: int, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(rows + d)
    shapes = [(rows, d), (experts, d, f), (rows, f)]
    x, w, dy = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    return x, w, dy


@functools.cache
def compiled(backend: str) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple]:
    """(x, w, dy, group sizes) -> (y, (dx, dw)); compiled once for each shape, because sizes are data."""

    def compute(x: jax.Array, w: jax.Array, dy: jax.Array, groups: jax.Array) -> tuple:
        y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, groups, backend=backend), x, w)
        return y, pullback(dy)

    return jax.jit(compute)


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_forward_and_gradients(backend: str, case: str, dtype: str) -> None:
    rows, d, f, sizes = CASES[case]
    x, w, dy = draw(rows, d, f, len(sizes), dtype)
    y, (dx, dw) = compiled(backend)(x, w, dy, jnp.asarray(sizes, jnp.int32))
    assert y.dtype == x.dtype
    assert dx.dtype == x.dtype
    assert dw.dtype == w.dtype
    x32, w32, dy32 = (np.asarray(a, np.float32) for a in (x, w, dy))
    close(y, reference.grouped_matmul(x32, w32, np.array(sizes)), dtype)
    close(dx, reference.grouped_matmul(dy32, w32.swapaxes(1, 2), np.array(sizes)), dtype)
    close(dw, reference.weight_gradient(x32, dy32, np.array(sizes)), dtype)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("storage", ["EDF", "EFD", "EFD_transposed", "whole", "blocks_straddle_rows"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nf4_forward_and_gradient(backend: str, storage: str, double_quant: bool) -> None:
    rows, d, f, sizes = 50, 64, 128, [10, 0, 25, 5]
    if storage == "blocks_straddle_rows":
        d, f = 33, 17
    x, w, dy = draw(rows, d, f, len(sizes), "float32")
    transposed = storage in ("EFD", "EFD_transposed")
    batch_dims = 0 if storage in ("whole", "blocks_straddle_rows") else 1
    t = pack(w.mT if transposed else w, double_quant=double_quant, batch_dims=batch_dims)
    values = np.asarray(unpack(t.mT if transposed else t))
    t = t.mT if storage == "EFD_transposed" else t
    groups = jnp.asarray(sizes, jnp.int32)
    if (backend, storage) in REFUSED:
        with pytest.raises(NotImplementedError, match=f"grouped_matmul backend '{backend}': NF4 weights stored as"):
            grouped_matmul(x, t, groups, backend=backend)
        return

    @jax.jit
    def compute(x: jax.Array, t: NF4Tensor):
        y, pullback = jax.vjp(lambda x: grouped_matmul(x, t, groups, backend=backend), x)
        return y, pullback(dy)[0]

    y, dx = compute(x, t)
    close(y, reference.grouped_matmul(np.asarray(x), values, np.array(sizes)), "float32")
    close(dx, reference.grouped_matmul(np.asarray(dy), values.swapaxes(1, 2), np.array(sizes)), "float32")


@pytest.mark.parametrize(
    ("dtype", "recorded"),
    [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float16")],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nf4_rounds_like_layer_weights(backend: str, dtype: str, recorded: str) -> None:
    """The product with a unit vector is a row of the weights, bit for bit as `layer_weights`, over several tiles."""
    d, f, block = 192, 320, 32
    w = jnp.asarray(np.random.default_rng(1).standard_normal((2, f, d)), recorded)
    t = pack(w, block_size=block, batch_dims=1).mT
    expected = np.asarray(layer_weights(t, dtype), np.float32)
    rows = np.array([0, 63, 64, 191, 5, 130])
    x, sizes = jax.nn.one_hot(rows, d, dtype=dtype), jnp.asarray([4, 2])
    got = jax.jit(lambda x, t: grouped_matmul(x, t, sizes, backend=backend))(x, t)
    np.testing.assert_array_equal(np.asarray(got, np.float32), expected[[0, 0, 0, 0, 1, 1], rows])
    columns = np.array([0, 319, 31, 32, 64, 255])
    dy = jax.nn.one_hot(columns, f, dtype=dtype)
    got = jax.jit(lambda dy, t: grouped_matmul(dy, t, sizes, backend=backend))(dy, t.mT)
    np.testing.assert_array_equal(np.asarray(got, np.float32), expected[[0, 0, 0, 0, 1, 1], :, columns])


@pytest.mark.parametrize("recorded", ["bfloat16", "float32", "float16"])
def test_weights_that_triton_dequantises_first_round_the_same(monkeypatch: pytest.MonkeyPatch, recorded: str) -> None:
    from bimedix_jax.kernels.grouped_matmul import triton

    monkeypatch.setattr(triton, "UNPACKED_ROWS", 1)
    test_nf4_rounds_like_layer_weights("triton", "bfloat16", recorded)


@pytest.mark.parametrize("storage", ["EDF", "EFD_transposed", "whole"])
@pytest.mark.parametrize("backend", INTERPRETED)
def test_nf4_with_many_rows(backend: str, storage: str) -> None:
    """As many rows as in training, for which a backend may use another algorithm; some rows have no group."""
    d, f, sizes = 64, 128, [0, 700, 900]
    x, w, dy = draw(1700, d, f, len(sizes), "bfloat16")
    transposed = storage == "EFD_transposed"
    t = pack(w.mT if transposed else w, batch_dims=0 if storage == "whole" else 1)
    t = t.mT if transposed else t
    values, groups = np.asarray(unpack(t), np.float32), jnp.asarray(sizes, jnp.int32)

    @jax.jit
    def compute(x: jax.Array, t: NF4Tensor):
        y, pullback = jax.vjp(lambda x: grouped_matmul(x, t, groups, backend=backend), x)
        return y, pullback(dy)[0]

    y, dx = compute(x, t)
    close(y, reference.grouped_matmul(np.asarray(x, np.float32), values, np.array(sizes)), "bfloat16")
    wanted = reference.grouped_matmul(np.asarray(dy, np.float32), values.swapaxes(1, 2), np.array(sizes))
    close(dx, wanted, "bfloat16")


@pytest.mark.parametrize(
    ("backend", "rows", "double_quant"),
    [*((name, 20, double_quant) for name in BACKENDS for double_quant in (True, False)), ("triton", 1700, True)],
)
def test_a_layer_of_a_stack_is_bit_equal_to_its_slice(backend: str, rows: int, double_quant: bool) -> None:
    """Forward and gradient. The first layer of the stack holds other values; some rows have no group."""
    d, f, sizes = 96, 128, jnp.asarray([rows // 4, 0, rows // 2], jnp.int32)
    x, w, dy = draw(rows, f, d, 2 * 3, "bfloat16")  # stored as (out, in)
    t = pack(w.reshape(2, 3, f, d), block_size=32, double_quant=double_quant, batch_dims=2).mT

    @jax.jit
    def compute(x: jax.Array, dy: jax.Array, w: NF4Tensor | LayerOf):
        y, pullback = jax.vjp(lambda x: grouped_matmul(x, w, sizes, backend=backend), x)
        return y, pullback(dy)[0]

    got, expected = compute(dy, x, LayerOf(t, jnp.int32(1))), compute(dy, x, t[1])
    for one, other in zip(got, expected, strict=True):
        assert jnp.abs(other).max() > 0
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize(("transposed", "double_quant"), [(True, True), (False, True), (True, False)])
def test_a_layer_stored_by_rows_is_bit_equal_to_its_slice(transposed: bool, double_quant: bool) -> None:
    """Rows of 12 scales touch one or two groups of 256. No bit of the tensor is lost. Also without a stack, as after a
    gather over devices."""
    rows, columns, sizes = 256, 768, jnp.asarray([3, 0, 6], jnp.int32)
    x, w, dy = draw(10, rows, columns, 2 * 3, "bfloat16")
    t = pack(w.reshape(2, 3, rows, columns), double_quant=double_quant, batch_dims=2)
    t, x, dy = (t.mT, dy, x) if transposed else (t, x, dy)
    by_rows = jax.jit(RowMajor.of)(t)
    for one, other in zip(jax.tree.leaves(jax.jit(RowMajor.tensor)(by_rows)), jax.tree.leaves(t), strict=True):
        np.testing.assert_array_equal(one, other)

    @jax.jit
    def compute(x: jax.Array, dy: jax.Array, w: NF4Tensor | LayerOf):
        y, pullback = jax.vjp(lambda x: grouped_matmul(x, w, sizes, backend="mosaic_tpu"), x)
        return y, pullback(dy)[0]

    expected, forms = compute(x, dy, t[1]), [LayerOf(by_rows, jnp.int32(1))]
    forms += [jax.tree.map(lambda leaf: leaf[1], by_rows)] if transposed and double_quant else []
    for form in forms:
        for one, other in zip(compute(x, dy, form), expected, strict=True):
            assert jnp.abs(other).max() > 0
            np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_of_a_dense_stack_equals_its_slice(backend: str) -> None:
    """In float32 with rows in bfloat16, as adapters that are trained; a backend may cast in its kernel. That for TPUs
    slices such a layer, and reads one in bfloat16 in place."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (24, 32)).astype("bfloat16")
    stack = jax.random.normal(keys[1], (3, 4, 32, 16)).astype("bfloat16" if backend == "mosaic_tpu" else "float32")
    sizes = jnp.array([5, 0, 12, 4], jnp.int32)
    dy = jnp.cos(jnp.arange(24 * 16.0)).reshape(24, 16).astype("bfloat16")

    def compute(x: jax.Array, w: jax.Array | LayerOf) -> tuple[jax.Array, Any]:
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, backend=backend), x, w)
        return y, pull(dy)

    y, (dx, dlayer) = jax.jit(compute)(x, LayerOf(stack, jnp.int32(2)))
    expected, (dx_expected, dw) = jax.jit(compute)(x, stack[2])
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(dx, dx_expected)
    np.testing.assert_allclose(dlayer.stack[2], dw, rtol=2**-7, atol=1e-6)
    assert not np.asarray(dlayer.stack[:2]).any()
    assert triton.takes_stack(stack)
    assert mosaic_tpu.takes_stack(stack)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_sizes_and_skew(backend: str) -> None:
    # rows, experts, D, F; few shapes, because each is compiled, but any group sizes
    shapes = [(1, 1, 1, 1), (23, 5, 9, 7), (40, 6, 12, 3), (150, 2, 4, 11)]

    @settings(max_examples=40 if backend in INTERPRETED else 150, deadline=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        rows, experts, d, f = data.draw(st.sampled_from(shapes))
        stops = sorted(data.draw(st.lists(st.integers(0, rows), min_size=experts, max_size=experts)))
        sizes = np.diff([0, *stops])
        x, w, dy = draw(rows, d, f, experts, "float32")
        x_np, w_np, dy_np = (np.asarray(a) for a in (x, w, dy))
        y, (dx, dw) = compiled(backend)(x, w, dy, jnp.asarray(sizes, jnp.int32))
        close(y, reference.grouped_matmul(x_np, w_np, sizes), "float32")
        close(dx, reference.grouped_matmul(dy_np, w_np.swapaxes(1, 2), sizes), "float32")
        close(dw, reference.weight_gradient(x_np, dy_np, sizes), "float32")

    check()


def test_invalid_operands_raise() -> None:
    x, w, _ = draw(8, 4, 6, 2, "float32")
    groups = jnp.asarray([4, 4], jnp.int32)
    with pytest.raises(ValueError, match="Unknown grouped_matmul backend 'fastest'"):
        grouped_matmul(x, w, groups, backend="fastest")
    with pytest.raises(ValueError, match="needs x"):
        grouped_matmul(x, jnp.ones((2, 5, 6)), groups)


def test_the_named_backend_runs() -> None:
    """The caller's choice, else that of `use`, else the platform's; each has a separate entry in JAX's caches."""
    x, w, _ = draw(8, 4, 6, 2, "float32")
    groups = jnp.asarray([4, 4], jnp.int32)
    product = jax.jit(lambda x, w: grouped_matmul(x, w, groups))

    def runs_ragged_dot() -> bool:
        return "ragged_dot" in product.lower(x, w).as_text() or "ragged" in str(jax.make_jaxpr(product)(x, w))

    assert not runs_ragged_dot()
    with backends.use(grouped_matmul="ragged_dot"):
        assert runs_ragged_dot()
        with backends.use(grouped_matmul="xla"):
            assert not runs_ragged_dot()
        assert runs_ragged_dot()
    with (
        pytest.raises(ValueError, match="No operation 'grouped_matmull' has backends"),
        backends.use(grouped_matmull="xla"),
    ):
        pass


def test_falling_back_is_announced_once(caplog: pytest.LogCaptureFixture) -> None:
    x, w, _ = draw(8, 4, 6, 2, "float32")
    groups = jnp.asarray([4, 4], jnp.int32)
    t = pack(w, batch_dims=1)  # blocks of 64 in rows of 6
    backends.announced.clear()
    with caplog.at_level("INFO"), backends.use(platform="gpu"):
        for _ in range(2):
            jax.eval_shape(lambda x: grouped_matmul(x, t, groups), x)
        jax.eval_shape(lambda x: grouped_matmul(x, w, groups), x)
    fell_back, ragged, best = (record.getMessage() for record in caplog.records)
    assert "triton cannot be used, falling back: NF4 weights stored as (2, 4, 6) in blocks of 64" in fell_back
    assert (ragged, best) == ("grouped_matmul: backend ragged_dot on gpu", "grouped_matmul: backend triton on gpu")


def test_a_kernel_that_is_interpreted_says_so(caplog: pytest.LogCaptureFixture) -> None:
    x, w, _ = draw(8, 4, 6, 2, "float32")
    groups = jnp.asarray([4, 4], jnp.int32)
    backends.announced.clear()
    for name in ("xla", "triton", "triton"):
        jax.eval_shape(lambda x, name=name: grouped_matmul(x, w, groups, backend=name), x)
    with backends.use(platform="gpu"):
        jax.eval_shape(lambda x: grouped_matmul(x, w, groups, backend="triton"), x)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == ["grouped_matmul: backend triton is interpreted on a CPU: correct, but very slow"]


def test_triton_programs_write_only_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs run in any order on a GPU. Interpreted in reverse order, a write to a neighbouring tile would show."""
    from bimedix_jax.kernels.grouped_matmul import triton

    def backwards(program: jax.Array, tiles: int, columns: int) -> tuple[jax.Array, jax.Array]:
        return tiles - 1 - lax.div(program, columns), lax.rem(program, columns)

    monkeypatch.setattr(triton, "swizzled", backwards)
    sizes = [10, 0, 25, 5]
    x, w, _ = draw(50, 32, 48, len(sizes), "float32")
    y = jax.jit(lambda x, w, groups: grouped_matmul(x, w, groups, backend="triton"))(x, w, jnp.asarray(sizes))
    close(y, reference.grouped_matmul(np.asarray(x), np.asarray(w), np.array(sizes)), "float32")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 32, 64), (4, 0, 64), (4, 32, 0)])
def test_nothing_to_compute(shape: tuple[int, int, int], backend: str) -> None:
    rows, inputs, outputs = shape
    x, w, sizes = jnp.ones((rows, inputs)), jnp.ones((2, inputs, outputs)), jnp.asarray([rows, 0], jnp.int32)
    y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, backend=backend), x, w)
    np.testing.assert_array_equal(y, np.zeros((rows, outputs)))
    assert [found.shape for found in pullback(y)] == [x.shape, w.shape]


def test_group_sizes_are_integers_of_any_kind() -> None:
    x, w, _ = draw(4, 32, 48, 2, "float32")
    expected = grouped_matmul(x, w, jnp.asarray([1, 3], jnp.int32))
    np.testing.assert_array_equal(grouped_matmul(x, w, jnp.asarray([1, 3], jnp.int8)), expected)
    with pytest.raises(ValueError, match=r"needs .* E integers as group sizes; got .* float32 \(2,\)"):
        api.check(x, w, jnp.ones(2))
