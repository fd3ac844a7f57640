"""Attention equals NumPy loops and JAX's own gradient of the plain formula."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.attention import HeadMajor, api, attention, blocks, reference, write, xla
from bimedix_jax.kernels.attention.xla import visible

LENGTH = {"avx512": 150, "xla": 19, "triton": 37, "splash": 256}
WIDTH = {"avx512": 32, "xla": 8, "triton": 16, "splash": 128}
"""Tokens and width of heads that each backend takes; no block of `triton` divides its length."""


def draw(length: int, slots: int, heads: int, groups: int, width: int = 8) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(length)
    shapes = [(2, length, heads, width), (2, slots, groups, width), (2, slots, groups, width)]
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def segments(length: int) -> np.ndarray:
    """Two rows: padding on both sides of two documents; one document."""
    ids = np.ones((2, length), np.int32)
    ids[0, : length // 5] = 0
    ids[0, length // 2 :] = 2
    ids[0, -2:] = 0
    return ids


def plain(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, window: int | None) -> jax.Array:
    """The formula, for JAX to differentiate."""
    shared = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, shared, axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(visible(ids, ids, 0, 0, window)[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 1)])
@pytest.mark.parametrize("backend", ["xla", "triton", "splash"])
def test_equals_the_reference_forward_and_backward(backend: str, heads: int, groups: int, window: int | None) -> None:
    length = LENGTH[backend]
    q, k, v = draw(length, length, heads, groups, WIDTH[backend])
    ids = jnp.asarray(segments(length))

    @jax.jit
    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        out, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, ids, ids, window=window, backend=backend), q, k, v)
        return out, pullback(jnp.cos(out))

    out, gradients = ours(*map(jnp.asarray, (q, k, v)))
    assert np.allclose(out, reference.attention(q, k, v, segments(length), segments(length), 0, window), atol=2e-6)
    expected = jax.grad(lambda q, k, v: jnp.sum(jnp.sin(plain(q, k, v, ids, window))), (0, 1, 2))(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradients, expected)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("avx512", "bfloat16"), *itertools.product(["xla", "triton", "splash"], ["bfloat16", "float16"])],
)
def test_16_bits(backend: str, dtype: str) -> None:
    """Scores and sums are float32: the error is that of rounding operands, weights and the result."""
    length = LENGTH[backend]
    q, k, v = (jnp.asarray(x, dtype) for x in draw(length, length, 4, 2, WIDTH[backend]))
    ids = segments(length)
    got = attention(q, k, v, jnp.asarray(ids), jnp.asarray(ids), backend=backend)
    assert got.dtype == dtype
    exact = [np.asarray(x, np.float32) for x in (q, k, v)]
    expected = reference.attention(exact[0], exact[1], exact[2], ids, ids)
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, atol=1.6e-2)


@pytest.mark.parametrize("layout", [lambda x: x, HeadMajor.of])
@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_with_a_cache_offset(backend: str, layout: Any) -> None:
    width = WIDTH[backend]
    q, k, v = draw(2, 40, 4, 2, width)
    ids = segments(40)
    cached = (layout(jnp.asarray(x)) for x in (k, v))

    @jax.jit
    def ours(q: jax.Array, k: Any, v: Any, query_ids: jax.Array, key_ids: jax.Array, offset: jax.Array) -> jax.Array:
        return attention(q, k, v, query_ids, key_ids, offset=offset, backend=backend)

    got = ours(jnp.asarray(q), *cached, jnp.asarray(ids[:, 25:27]), jnp.asarray(ids), jnp.int32(25))
    assert np.allclose(got, reference.attention(q, k, v, ids[:, 25:27], ids, 25), atol=2e-6)


def test_the_kernel_for_gpus_takes_any_ids() -> None:
    """Ids that return, that fall, that are negative; one compiled program for all."""
    length, width = 40, 16
    q, k, v = draw(length, length, 2, 1, width)

    @jax.jit
    def ours(ids: jax.Array) -> jax.Array:
        return attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), ids, ids, window=11, backend="triton")

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.integers(-2, 2), min_size=2 * length, max_size=2 * length))
    def check(values: list[int]) -> None:
        ids = np.asarray(values, np.int32).reshape(2, length)
        assert np.allclose(ours(jnp.asarray(ids)), reference.attention(q, k, v, ids, ids, 0, 11), atol=2e-6)

    check()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_visible_key_is_in_a_visited_block(data: st.DataObject) -> None:
    rows, columns = data.draw(st.sampled_from([(2, 4), (4, 2), (4, 4)]))
    offset, window = data.draw(st.integers(0, 8)), data.draw(st.sampled_from([None, 1, 3, 5]))
    key_ids = np.asarray(data.draw(st.lists(st.integers(0, 3), min_size=16, max_size=16)), np.int32)[None]
    query_ids = key_ids[:, offset : offset + 8]
    queries, keys = jnp.asarray(query_ids), jnp.asarray(key_ids)
    seen = np.asarray(blocks.overlap(queries, keys, jnp.int32(offset), window, (rows, columns)))
    exact = np.asarray(visible(queries, keys, offset, 0, window))[0]
    in_blocks = exact.reshape(8 // rows, rows, 16 // columns, columns).any(axis=(1, 3))
    assert not (in_blocks & ~seen[0]).any()
    first, stop = (np.asarray(x)[0] for x in blocks.ranges(jnp.asarray(seen)))
    for i, row in enumerate(seen[0]):
        assert (row.nonzero()[0].size == 0) == (first[i] == stop[i])
        assert not row[: first[i]].any()
        assert not row[stop[i] :].any()


@pytest.mark.parametrize("window", [None, 200])
def test_a_segment_that_continues_another_one(window: int | None) -> None:
    """Forward and backward, over three chunks, and with a cache that begins earlier."""
    q, k, v = map(jnp.asarray, draw(600, 600, 2, 1))
    ids = segments(600)
    ids[0, 200:260], ids[1, 300:400], ids[1, 400:500] = 7, 8, 9
    ancestors = np.stack([np.where(ids >= 7, 1, ids), np.where(ids == 9, 8, ids)], axis=-1)
    host = [np.asarray(x) for x in (q, k, v)]
    expected = reference.attention(host[0], host[1], host[2], ids, ids, 0, window, ancestors)
    ids, ancestors = jnp.asarray(ids), jnp.asarray(ancestors)

    def formula(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        seen = visible(ids, ids, 0, 0, window, ancestors)
        scores = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 2, axis=2)) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), axis=-1)
        return jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, 2, axis=2))

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, ids, ids, window=window, ancestor_ids_BTA=ancestors)

    assert np.allclose(jax.jit(ours)(q, k, v), expected, atol=2e-6)
    got, exact = (
        jax.jit(jax.grad(lambda *qkv, f=f: jnp.sum(jnp.sin(f(*qkv))), (0, 1, 2)))(q, k, v) for f in (ours, formula)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, exact)
    last = attention(
        q[:, -40:], k, v, ids[:, -40:], ids, offset=jnp.int32(560), window=window, ancestor_ids_BTA=ancestors[:, -40:]
    )
    assert np.allclose(last, expected[:, -40:], atol=2e-6)


@pytest.mark.parametrize("backend", ["triton", "splash"])
def test_kernels_refuse_segments_that_continue_others(backend: str) -> None:
    q, k, v = map(jnp.asarray, draw(128, 128, 2, 1, 128))
    ids = jnp.ones((2, 128), jnp.int32)
    with pytest.raises(NotImplementedError, match="tree attention"):
        attention(q, k, v, ids, ids, ancestor_ids_BTA=ids[..., None], backend=backend)
    platform = {"triton": "gpu", "splash": "tpu"}[backend]
    with backends.use(platform), backends.recording() as choices:
        jax.eval_shape(lambda *x: attention(*x, ancestor_ids_BTA=x[3][..., None]), q, k, v, ids, ids)
    assert choices.to_dict()["attention"] == ["xla"]


def test_chunks_and_gradients() -> None:
    """Of the backend for CPUs: three chunks, the last one shorter."""
    q, k, v = map(jnp.asarray, draw(600, 600, 2, 1))
    ids = jnp.asarray(segments(600))
    got, expected = (
        jax.grad(lambda *qkv, f=f: jnp.sum(jnp.sin(f(*qkv, ids, 100))), (0, 1, 2))(q, k, v)
        for f in (lambda q, k, v, ids, window: attention(q, k, v, ids, ids, window=window), plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


@pytest.mark.parametrize(
    ("backend", "platform", "length", "width", "cached", "reason"),
    [
        ("triton", "tpu", 32, 16, False, "not for TPUs"),
        ("triton", "cpu", 32, 24, False, "heads of width 24"),
        ("splash", "gpu", 128, 128, False, "a kernel for TPUs"),
        ("splash", "cpu", 100, 128, False, "100 tokens and heads of width 128"),
        ("splash", "cpu", 128, 64, False, "heads of width 64"),
        ("splash", "cpu", 128, 128, True, "no key-value cache"),
        ("avx512", "cpu", 128, 64, False, "in bfloat16, not in float32"),
    ],
)
def test_refusals(backend: str, platform: str, length: int, width: int, cached: bool, reason: str) -> None:
    """A named backend says why; an automatic choice falls back."""
    q, k, v = map(jnp.asarray, draw(length, length, 2, 1, width))
    ids = jnp.ones((2, length), jnp.int32)
    offset = jnp.int32(0) if cached else None
    with backends.use(platform), pytest.raises(NotImplementedError, match=reason):
        attention(q, k, v, ids, ids, offset=offset, backend=backend)


@pytest.mark.parametrize(
    ("platform", "length", "expected"),
    [("cpu", 128, "xla"), ("gpu", 128, "triton"), ("gpu", 1, "xla"), ("tpu", 128, "splash")],
)
def test_the_backend_of_each_platform(platform: str, length: int, expected: str) -> None:
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    q, k, v = (jax.ShapeDtypeStruct((2, length, heads, 128), dtype) for heads in (4, 2, 2))
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32)
    with backends.use(platform), backends.recording() as choices:
        jax.eval_shape(lambda *x: attention(*x, offset=None), q, k, v, ids, ids)
    assert choices.to_dict()["attention"] == [expected]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 1)])
def test_both_cache_layouts_equal_the_reference(heads: int, groups: int, length: int, window: int | None) -> None:
    q, k, v = draw(length, 12, heads, groups)
    ids, start = segments(12), 5
    end = start + length
    expected = reference.attention(q, k, v, ids[:, start:end], ids, start, window)
    for layout in (lambda x: x, HeadMajor.of):

        @jax.jit
        def attend(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, offset: jax.Array, layout: Any = layout):
            new_k, new_v = (jax.lax.dynamic_slice_in_dim(x, offset, length, 1) for x in (k, v))
            before_k, before_v = (layout(x.at[:, start:end].set(7)) for x in (k, v))
            cached = write(before_k, new_k, offset), write(before_v, new_v, offset)
            return cached, attention(q, *cached, ids[:, start:end], ids, offset=offset, window=window)

        cached, found = attend(*map(jnp.asarray, (q, k, v, ids, np.int32(start))))
        for x, whole in zip(cached, (k, v), strict=True):
            assert x.shape == whole.shape
            np.testing.assert_array_equal(x.array() if isinstance(x, HeadMajor) else x, whole)
        assert np.allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("length", [1, 8])
def test_cache_layouts_agree_in_every_dtype(length: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit on scores, so that groups of heads run one after another."""
    monkeypatch.setattr(xla, "CPU_SCORES", 2 * length * 10)
    q, k, v = (jnp.asarray(x, dtype) for x in draw(length, 10, 4, 2))
    ids = jnp.asarray(segments(10))
    operands = (ids[:, 2 : 2 + length], ids)
    expected = attention(q, k, v, *operands, offset=jnp.int32(2))
    found = attention(q, HeadMajor.of(k), HeadMajor.of(v), *operands, offset=jnp.int32(2))
    assert found.dtype == expected.dtype == dtype
    np.testing.assert_array_equal(found, expected)
    assert HeadMajor.of(k).bits_BGSH.dtype == ("float32" if dtype == "float32" else "uint16")


def test_cache_and_queries_of_different_dtypes() -> None:
    q, k, v = map(jnp.asarray, draw(2, 10, 4, 2))
    ids = jnp.asarray(segments(10))
    k16, v16 = (x.astype("bfloat16") for x in (k, v))
    expected = attention(q, k16.astype("float32"), v16.astype("float32"), ids[:, 5:7], ids, offset=jnp.int32(5))
    for layout in (lambda x: x, HeadMajor.of):
        found = attention(q, layout(k16), layout(v16), ids[:, 5:7], ids, offset=jnp.int32(5))
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, expected)
        written = write(layout(k16), k[:, :1], jnp.int32(3))
        assert written.dtype == "bfloat16"


def test_decoding_does_not_convert_the_cache_to_float32() -> None:
    """One token's attention reads the 16-bit cache as stored, and writes its slot in place."""
    q, k, v = (jnp.asarray(x, "bfloat16") for x in draw(1, 64, 4, 2))
    ids = jnp.ones((2, 64), jnp.int32)

    def step(k: HeadMajor, v: HeadMajor, q: jax.Array, new: jax.Array, offset: jax.Array) -> tuple:
        written = write(k, new, offset), write(v, new, offset)
        return written, attention(q, *written, ids[:, :1], ids, offset=offset)

    operands = (HeadMajor.of(k), HeadMajor.of(v), q, k[:, :1], jnp.int32(9))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*operands).compile()
    text, memory = compiled.as_text() or "", compiled.memory_analysis()
    assert "f32[2,2,64,8]" not in text
    assert "f32[4,64,8]" not in text
    assert memory is not None
    assert memory.alias_size_in_bytes == 2 * k.nbytes


def test_layers_of_a_cache_are_its_parts() -> None:
    k = jnp.asarray(draw(1, 10, 4, 2)[1], "bfloat16")
    stacked = HeadMajor.of(jnp.stack([k, 2 * k]))
    assert (stacked.shape, stacked.ndim) == ((2, *k.shape), 5)
    one = jax.tree.map(lambda leaf: leaf[1], stacked)
    np.testing.assert_array_equal(one.array(), 2 * k)


@pytest.mark.parametrize("backend", ["avx512", "xla", None])
@pytest.mark.parametrize("shape", [(0, 20), (2, 0)])
def test_no_query(shape: tuple[int, int], backend: str | None) -> None:
    q = jnp.zeros((*shape, 4, 32), jnp.bfloat16)
    k, ids = q[:, :, :2], jnp.ones(shape, jnp.int32)
    y, pullback = jax.vjp(lambda q, k, v: api.attention(q, k, v, ids, ids, backend=backend), q, k, k)
    assert y.shape == q.shape
    assert [x.shape for x in pullback(y)] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize(
    "wrong", ["heads", "slots", "width", "batch", "ids", "ancestors", "window", "axes", "no heads", "kind"]
)
def test_invalid_operands_raise(wrong: str) -> None:
    q, k, v = map(jnp.asarray, draw(20, 20, 4, 2, 32))
    ids, ancestors, window = jnp.ones((2, 20), jnp.int32), None, None
    if wrong == "heads":
        q = q[:, :, :3]
    if wrong == "slots":
        v = v[:, :5]
    if wrong == "width":
        k, v = k[..., :16], v[..., :16]
    if wrong == "batch":
        k, v = k[:1], v[:1]
    if wrong == "ids":
        ids = ids[:1]
    if wrong == "ancestors":
        ancestors = jnp.ones((2, 3, 1), jnp.int32)
    if wrong == "window":
        window = 0
    if wrong == "axes":
        q = q[0]
    if wrong == "no heads":
        k = v = k[:, :, :0]
    if wrong == "kind":
        ids = ids.astype(jnp.float32)
    message = {"window": "a window of attention", "kind": "integers as ids; got float32, float32"}
    with pytest.raises(ValueError, match=message.get(wrong, "attention needs q")):
        api.check(q, k, v, ids, ids, ancestors, window)


def test_queries_among_more_keys_need_an_offset() -> None:
    q, k, v = map(jnp.asarray, draw(8, 20, 4, 2, 32))
    with pytest.raises(ValueError, match="attention of 8 queries to 20 keys needs the offset of the first query"):
        api.attention(q, k, v, jnp.ones((2, 8), jnp.int32), jnp.ones((2, 20), jnp.int32))
