"""The experts' feed-forward as one operation: every backend against NumPy loops, forward and gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bimedix_jax.kernels import backends, native
from bimedix_jax.kernels.expert_mlp import LayerOf, expert_mlp, out_of_stacks, reference
from bimedix_jax.kernels.expert_mlp.api import AVX512_SHARE, BACKENDS, FUSED_SHARE, pick_backend
from bimedix_jax.kernels.expert_mlp.few_rows import MAX_EXPERTS, MAX_ROWS
from bimedix_jax.kernels.expert_mlp.layout import evens_first, interleaved
from bimedix_jax.kernels.nf4 import dequantize, quantize
from bimedix_jax.kernels.nf4.rows import RowMajor
from bimedix_jax.kernels.permute import sort_by_expert
from bimedix_jax.kernels.unstacked import unstack

pack = jax.jit(quantize, static_argnames=("block_size", "double_quant", "batch_dims"))
unpack = jax.jit(dequantize, static_argnames="dtype")
"""As one program for each shape; eager, every operation is compiled."""

RELATIVE = {"float32": 3e-5, "bfloat16": 2.5e-2}
TOKENS, WIDTH, HIDDEN, EXPERTS, RANK = 37, 64, 128, 5, 3
DTYPES = {backend: ("bfloat16",) if backend == "avx512" else tuple(RELATIVE) for backend in BACKENDS}
CASES = [(backend, dtype) for backend in BACKENDS for dtype in DTYPES[backend]]
RANKS = {"no deltas": (0, 0, 0), "all deltas": (RANK, RANK, RANK), "down alone": (0, 0, RANK), "gate alone": (2, 0, 0)}


def owners(kind: str) -> np.ndarray:
    """[N, 2] experts of each token; EXPERTS means no expert."""
    found = np.argsort(-np.random.default_rng(3).standard_normal((TOKENS, EXPERTS)), axis=1)[:, :2]
    if kind == "some unassigned":
        found[3, 1], found[7], found[found == 1] = EXPERTS, EXPERTS, 2  # and an expert without rows
    if kind == "one takes all":
        found[:] = [4, EXPERTS]
    if kind == "none owned":
        found[:] = EXPERTS
    return found.astype(np.int32)


def draw(dtype: str, packed: bool, ranks: tuple[int, ...]) -> tuple[jax.Array, jax.Array, tuple, tuple]:
    """(x, pairs' weights, (w1, w3, w2), deltas)."""
    rng = np.random.default_rng(0)

    def matrices(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(max(shape[-2], 1)), jnp.float32)

    x = jnp.asarray(rng.standard_normal((TOKENS, WIDTH)), dtype)
    pairs = jnp.asarray(rng.standard_normal((TOKENS, 2)), jnp.float32)
    shapes = [(WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    weights: tuple[Any, ...] = tuple(matrices(EXPERTS, *shape).astype(dtype) for shape in shapes)
    if packed:
        weights = tuple(pack(jnp.copy(w.mT), batch_dims=1).mT for w in weights)
    deltas = tuple(
        (matrices(EXPERTS, d, rank), matrices(EXPERTS, rank, f)) if rank else None
        for rank, (d, f) in zip(ranks, shapes, strict=True)
    )
    return x, pairs, weights, deltas


def unstacked(factors: Any) -> Any:
    """Weights or deltas with Unstacked experts."""
    if factors is None:
        return None
    return tuple(unstacked(part) for part in factors) if isinstance(factors, tuple) else unstack(factors, 1)


def operands_for(backend: str, dtype: str, packed: bool, ranks: tuple[int, ...], kind: str) -> tuple:
    """(x, pairs, owners, weights, deltas) in a form and size that the backend takes."""
    x, pairs, weights, deltas = draw(dtype, packed, ranks)
    if backend != "few_rows":
        return x, pairs, jnp.asarray(owners(kind)), weights, deltas
    return x[:MAX_ROWS], pairs[:MAX_ROWS], jnp.asarray(owners(kind)[:MAX_ROWS]), unstacked(weights), deltas


def values(weights: tuple, deltas: tuple) -> tuple[list[np.ndarray], list]:
    dense = [np.asarray(w if isinstance(w, jax.Array) else unpack(w), np.float32) for w in weights]
    none = [(np.zeros((*w.shape[:2], 1)), np.zeros((w.shape[0], 1, w.shape[2]))) for w in dense]
    pairs = [zero if pair is None else tuple(map(np.asarray, pair)) for pair, zero in zip(deltas, none, strict=True)]
    return dense, pairs


@functools.cache
def compiled(backend: str):
    def compute(x, pairs, experts_NK, weights, deltas, dout):
        permutation = sort_by_expert(experts_NK, EXPERTS)
        y, pullback = jax.vjp(
            lambda x, pairs, deltas: expert_mlp(x, pairs, permutation, weights, deltas, backend=backend),
            x,
            pairs,
            deltas,
        )
        return y, pullback(dout)

    return jax.jit(compute)


def close(got: Any, expected: Any, dtype: str) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= RELATIVE[dtype] * max(np.abs(b).max(), 1e-3)


@pytest.mark.parametrize("kind", ["some unassigned", "one takes all", "none owned"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_forward_against_loops(backend: str, packed: bool, dtype: str, kind: str) -> None:
    x, pairs, experts_NK, weights, deltas = operands_for(backend, dtype, packed, RANKS["all deltas"], kind)
    y, _ = compiled(backend)(x, pairs, experts_NK, weights, deltas, x)
    dense, factors = values(draw(dtype, packed, RANKS["all deltas"])[2], deltas)
    w1, w3, w2 = dense
    rows, owned = np.asarray(x, np.float32), np.asarray(experts_NK)
    expected = reference.expert_mlp(rows, np.asarray(pairs), owned, w1, w3, w2, factors)
    close(y, jnp.asarray(expected, dtype), dtype)


@pytest.mark.parametrize(
    ("packed", "ranks"),
    [(False, "all deltas"), (False, "gate alone"), (True, "no deltas"), (True, "all deltas"), (True, "down alone")],
)
@pytest.mark.parametrize("backend", ["xla", "few_rows"])
def test_gradients_equal_those_of_composed(backend: str, packed: bool, ranks: str) -> None:
    """`composed` is differentiated by its operations, whose gradients have separate tests."""
    for kind in ("some unassigned", "one takes all"):
        operands = operands_for(backend, "float32", packed, RANKS[ranks], kind)
        dout = jnp.cos(operands[0])
        close(compiled(backend)(*operands, dout), compiled("composed")(*operands, dout), "float32")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("backend", "ranks"), [("xla", "all deltas"), *(("avx512", ranks) for ranks in RANKS)])
def test_gradients_in_bfloat16(backend: str, packed: bool, ranks: str) -> None:
    """Of weights in bfloat16, against the same weights and rows in float32."""
    x, pairs, weights, deltas = draw("bfloat16", packed, RANKS[ranks])
    exact = tuple(w if packed else w.astype(jnp.float32) for w in weights)
    for kind in ("some unassigned", "one takes all", "none owned"):
        experts_NK, wide = jnp.asarray(owners(kind)), x.astype(jnp.float32)
        expected = compiled("composed")(wide, pairs, experts_NK, exact, deltas, jnp.cos(wide))
        got = compiled(backend)(x, pairs, experts_NK, weights, deltas, jnp.cos(wide).astype(x.dtype))
        close(jax.tree.map(lambda a, b: a.astype(b.dtype), got, expected), expected, "bfloat16")


def test_dense_weights_train() -> None:
    """In scanned and recomputed layers; some of the weights are trained, others are not."""
    x, pairs, weights, deltas = draw("float32", False, RANKS["gate alone"])
    permutation = sort_by_expert(jnp.asarray(owners("some unassigned")), EXPERTS)
    trained = jnp.stack([weights[0], 2 * weights[0]])

    def loss(trained: jax.Array, x: jax.Array, backend: str) -> jax.Array:
        @jax.checkpoint
        def layer(x: jax.Array, w1: jax.Array) -> tuple[jax.Array, None]:
            return x + expert_mlp(x, pairs, permutation, (w1, *weights[1:]), deltas, backend=backend), None

        return jnp.sum(jnp.sin(jax.lax.scan(layer, x, trained)[0]))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnames="backend")
    got, expected = (gradients(trained, x, backend=backend) for backend in ("xla", "composed"))
    assert float(jnp.abs(expected[0]).max()) > 0
    close(got, expected, "float32")


def test_cpus_fuse_many_rows_for_each_expert() -> None:
    weights = draw("float32", False, RANKS["no deltas"])[2]
    least = int(FUSED_SHARE * weights[0].shape[1]) * EXPERTS
    assert pick_backend(None, least, least, weights) == "xla"
    assert pick_backend(None, least, least - 1, weights) == "composed"


@pytest.mark.parametrize("matrix_units", [False, True])
def test_cpus_use_avx512_unless_they_have_matrix_units(
    matrix_units: bool, monkeypatch: pytest.MonkeyPatch, avx512_machine: None
) -> None:
    flags = native.AVX512_NEEDS | ({"amx_bf16"} if matrix_units else set())
    monkeypatch.setattr(native, "cpu_flags", lambda: flags)
    dense, packed = (draw("bfloat16", packed, RANKS["no deltas"])[2] for packed in (False, True))
    least = int(AVX512_SHARE * WIDTH) * EXPERTS
    best = "composed" if matrix_units else "avx512"
    assert pick_backend(None, 1, 2, packed, jnp.bfloat16) == best
    assert pick_backend(None, least, least, dense, jnp.bfloat16) == best
    assert pick_backend(None, least, least - 1, dense, jnp.bfloat16) == "composed"
    assert pick_backend(None, 1, 2, packed, jnp.float32) == "composed"
    with backends.use("gpu"):
        assert pick_backend(None, 1, 2, packed, jnp.bfloat16) == "composed"


def test_cpus_use_few_rows_for_unstacked_experts() -> None:
    weights = unstacked(draw("float32", True, RANKS["no deltas"])[2])
    assert pick_backend(None, MAX_ROWS, 2 * MAX_ROWS, weights) == "few_rows"
    assert pick_backend(None, MAX_ROWS + 1, 2 * MAX_ROWS, weights) == "composed"
    assert pick_backend(None, 1000, 2000, weights) == "xla"
    with backends.use("gpu"):
        assert pick_backend(None, 1, 2, weights) == "composed"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_unstacked_experts(backend: str, packed: bool) -> None:
    """Other backends stack them. Gradients of dense weights and of factors have the same form."""
    dtype = DTYPES[backend][0]
    operands = operands_for("few_rows", dtype, packed, RANKS["all deltas"], "some unassigned")
    x, pairs, experts_NK, weights, deltas = operands

    def compute(x: jax.Array, weights: Any, deltas: Any) -> jax.Array:
        return expert_mlp(x, pairs, sort_by_expert(experts_NK, EXPERTS), weights, deltas, backend=backend)

    stacked = draw(dtype, packed, RANKS["all deltas"])[2]
    permutation = sort_by_expert(experts_NK, EXPERTS)
    expected = expert_mlp(x, pairs, permutation, stacked, deltas, backend="composed")
    close(jax.jit(compute)(x, weights, unstacked(deltas)), expected, dtype)
    if packed:
        return
    trained = (weights, unstacked(deltas))
    got = jax.jit(jax.grad(lambda trained: jnp.sum(jnp.sin(compute(x, *trained)))))(trained)
    assert jax.tree.structure(got) == jax.tree.structure(trained)
    plain = jax.grad(lambda trained: jnp.sum(jnp.sin(expert_mlp(x, pairs, permutation, *trained, backend="composed"))))(
        (stacked, deltas)
    )
    close(got, tuple(map(unstacked, plain)), dtype)


def test_overflow_in_other_experts_does_not_affect_a_row() -> None:
    x, pairs, _, weights, deltas = operands_for("few_rows", "float32", False, RANKS["no deltas"], "one takes all")
    huge = tuple(unstack(w.at[1].multiply(1e30), 1) for w in draw("float32", False, RANKS["no deltas"])[2])
    experts_NK = jnp.zeros((MAX_ROWS, 2), jnp.int32).at[:, 1].set(2).at[5].set(1)
    permutation = sort_by_expert(experts_NK, EXPERTS)
    y, expected = (expert_mlp(x, pairs, permutation, w, deltas, backend="few_rows") for w in (huge, weights))
    assert not jnp.all(jnp.isfinite(y[5]))
    np.testing.assert_array_equal(jnp.delete(y, 5, axis=0), jnp.delete(expected, 5, axis=0))


@pytest.mark.parametrize(("backend", "dtype"), [case for case in CASES if case[0] != "few_rows"])
def test_weights_in_the_stack_of_all_layers(backend: str, dtype: str) -> None:
    x, pairs, weights, deltas = draw(dtype, False, RANKS["all deltas"])
    permutation = sort_by_expert(jnp.asarray(owners("some unassigned")), EXPERTS)
    for kept in (deltas, (None, None, None)):
        expected = expert_mlp(x, pairs, permutation, weights, kept, backend=backend)
        lying = tuple(LayerOf(jnp.stack([jnp.zeros_like(w), w]), jnp.int32(1)) for w in weights)
        got = jax.jit(expert_mlp, static_argnames="backend")(x, pairs, permutation, lying, kept, backend=backend)
        close(got, expected, dtype)


@pytest.mark.parametrize("packed", [True, False])
def test_a_layer_out_of_range_is_that_of_a_slice(packed: bool, avx512_machine: None) -> None:
    x, pairs, weights, _ = draw("bfloat16", False, RANKS["no deltas"])
    permutation = sort_by_expert(jnp.asarray(owners("some unassigned")), EXPERTS)
    stacks = [jnp.stack([w, -w, 2 * w]) for w in weights]
    stacks = [quantize(jnp.copy(w.mT), batch_dims=2).mT for w in stacks] if packed else stacks
    for layer in (3, 100_000, -1, -100_000):
        given = tuple(LayerOf(w, jnp.int32(layer)) for w in stacks)
        expected = expert_mlp(x, pairs, permutation, tuple(w.value() for w in given), backend="avx512")
        np.testing.assert_array_equal(expert_mlp(x, pairs, permutation, given, backend="avx512"), expected)


@pytest.mark.parametrize("backend", ["avx512", "xla"])
def test_some_weights_in_the_stack_and_others_in_another_dtype(backend: str) -> None:
    """Of three layers, the last one; what has to be converted is sliced first."""
    x, pairs, weights, deltas = draw("bfloat16", False, RANKS["all deltas"])
    permutation = sort_by_expert(jnp.asarray(owners("some unassigned")), EXPERTS)
    expected = expert_mlp(x, pairs, permutation, weights, deltas, backend=backend)
    w1, w3, w2 = (LayerOf(jnp.stack([jnp.zeros_like(w)] * 2 + [w]), jnp.int32(2)) for w in weights)
    wide = LayerOf(w3.stack.astype(jnp.float32), w3.layer)
    for given in ((w1, weights[1], w2), (w1, wide, w2), (weights[0], wide, w2)):
        np.testing.assert_array_equal(expert_mlp(x, pairs, permutation, given, deltas, backend=backend), expected)


def test_packed_weights_in_every_form_in_avx512(avx512_machine: None) -> None:
    """In the stack of all layers and stored by rows, forward and backward: bit for bit those of the layer alone."""
    rng = np.random.default_rng(0)
    stacks = [jnp.asarray(rng.standard_normal((3, EXPERTS, 256, 256)) / 16, jnp.bfloat16) for _ in range(3)]
    packed = [quantize(w, batch_dims=2).mT for w in stacks]
    x = jnp.asarray(rng.standard_normal((20, 256)), jnp.bfloat16)
    permutation = sort_by_expert(jnp.asarray(rng.integers(0, EXPERTS, (20, 2)), jnp.int32), EXPERTS)
    pairs = jnp.ones((20, 2), jnp.float32)

    def both(weights: Any) -> tuple[jax.Array, jax.Array]:
        y, pull = jax.vjp(lambda x: expert_mlp(x, pairs, permutation, weights, backend="avx512"), x)
        return y, pull(jnp.cos(y))[0]

    expected = both(tuple(t[2] for t in packed))
    assert all(jnp.abs(value).max() > 0 for value in expected)
    by_rows = [RowMajor.of(t) for t in packed]
    layer = jnp.int32(2)
    for forms in (
        tuple(LayerOf(t, layer) for t in packed),
        tuple(LayerOf(t, layer) for t in by_rows),
        tuple(jax.tree.map(lambda leaf: leaf[2], t) for t in by_rows),
        (LayerOf(packed[0], layer), packed[1][2], LayerOf(by_rows[2], layer)),
    ):
        for found, value in zip(both(forms), expected, strict=True):
            np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(value, np.float32))


def test_every_form_of_weights_becomes_one_array() -> None:
    w = draw("float32", False, RANKS["no deltas"])[2][0]
    forms = (w, unstack(w, 1), LayerOf(jnp.stack([-w, w]), jnp.int32(1)))
    assert all(isinstance(found, jax.Array) and jnp.array_equal(found, w) for found in out_of_stacks(forms))


def test_groups_with_too_many_rows_are_an_error(avx512_machine: None) -> None:
    x, pairs, weights, _ = draw("bfloat16", True, RANKS["no deltas"])
    permutation = sort_by_expert(jnp.asarray(owners("some unassigned")), EXPERTS)
    for sizes in (permutation.group_sizes_E * 50, permutation.group_sizes_E - 50):
        wrong = permutation._replace(group_sizes_E=sizes)
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="expert_mlp: "):
            jax.block_until_ready(expert_mlp(x, pairs, wrong, weights, backend="avx512"))


def test_sorted_rows_that_belong_to_no_pair_are_an_error(avx512_machine: None) -> None:
    """They would be read beyond the array."""
    x, pairs, weights, _ = draw("bfloat16", True, RANKS["no deltas"])
    permutation = sort_by_expert(jnp.asarray(owners("some unassigned")), EXPERTS)
    for order in (permutation.order_M + 10**7, -1 - permutation.order_M):
        with pytest.raises(
            (jax.errors.JaxRuntimeError, ValueError), match="expert_mlp: a sorted row belongs to no pair"
        ):
            jax.block_until_ready(expert_mlp(x, pairs, permutation._replace(order_M=order), weights, backend="avx512"))


@pytest.mark.parametrize("backend", ["avx512", "xla", "composed"])
def test_permutations_of_other_integers(backend: str) -> None:
    x, pairs, weights, _ = draw("bfloat16", True, RANKS["no deltas"])
    permutation = sort_by_expert(jnp.asarray(owners("some unassigned")), EXPERTS)
    expected = expert_mlp(x, pairs, permutation, weights, backend=backend)
    with jax.enable_x64(True):
        for dtype in ("int64", "uint8"):
            other = type(permutation)(*(part.astype(dtype) for part in permutation))
            np.testing.assert_array_equal(expert_mlp(x, pairs, other, weights, backend=backend), expected)
    wrong = permutation._replace(group_sizes_E=permutation.group_sizes_E.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"a permutation of integers, .*; got int32, int32, float32"):
        expert_mlp(x, pairs, wrong, weights, backend=backend)


@pytest.mark.parametrize("backend", ["avx512", "xla", "composed", None])
@pytest.mark.parametrize("empty", ["tokens", "top_k", "ranks"])
def test_nothing_to_compute(backend: str | None, empty: str) -> None:
    x, pairs, weights, deltas = draw("bfloat16", True, RANKS["all deltas"])
    chosen = jnp.asarray(owners("some unassigned"))
    if empty == "tokens":
        x, pairs, chosen = x[:0], pairs[:0], chosen[:0]
    elif empty == "top_k":
        pairs, chosen = pairs[:, :0], chosen[:, :0]
    else:
        deltas = tuple((a[:, :, :0], b[:, :0]) for a, b in deltas)
    permutation = sort_by_expert(chosen, EXPERTS)

    def run(x: jax.Array, pairs: jax.Array, deltas: tuple) -> jax.Array:
        return expert_mlp(x, pairs, permutation, weights, deltas, backend=backend)

    y, pullback = jax.vjp(run, x, pairs, deltas)
    gradients = pullback(y)
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, (x, pairs, deltas))
    if empty == "ranks":
        np.testing.assert_array_equal(y, expert_mlp(x, pairs, permutation, weights, backend=backend))
    else:
        assert y.shape == x.shape
        assert not y.any()


def test_a_second_derivative_names_the_backend_that_has_it(avx512_machine: None) -> None:
    x, pairs, weights, deltas = draw("bfloat16", True, RANKS["all deltas"])
    permutation = sort_by_expert(jnp.asarray(owners("some unassigned")), EXPERTS)

    def steepness(x: jax.Array) -> jax.Array:
        gradient = jax.grad(lambda x: jnp.sum(expert_mlp(x, pairs, permutation, weights, deltas)))(x)
        return jnp.sum(gradient.astype(jnp.float32) ** 2)

    message = r"differentiated once, .* by backends.use\(expert_mlp="
    with backends.use(expert_mlp="avx512"), pytest.raises(NotImplementedError, match=message):
        jax.grad(steepness)(x)
    with backends.use(expert_mlp="xla"):
        assert jax.grad(steepness)(x).shape == x.shape


def test_orders_are_inverse() -> None:
    x = jnp.arange(24).reshape(2, 6, 2)
    np.testing.assert_array_equal(evens_first(x, 1)[0, :, 0], [0, 4, 8, 2, 6, 10])
    np.testing.assert_array_equal(interleaved(evens_first(x, 1), 1), x)


def test_invalid_operands_raise() -> None:
    x, pairs, weights, deltas = draw("float32", True, RANKS["no deltas"])
    permutation = sort_by_expert(jnp.asarray(owners("some unassigned")), EXPERTS)
    mixed = (unpack(weights[0], "float32"), *weights[1:])
    with pytest.raises(NotImplementedError, match="it takes all weights dense, or all in NF4"):
        expert_mlp(x, pairs, permutation, mixed, deltas, backend="xla")
    assert expert_mlp(x, pairs, permutation, mixed, deltas).shape == x.shape
    with pytest.raises(NotImplementedError, match="Unstacked, and some of these are stacked"):
        expert_mlp(x[:1], pairs[:1], sort_by_expert(jnp.zeros((1, 2), jnp.int32), EXPERTS), weights, backend="few_rows")
    with pytest.raises(NotImplementedError, match=f"{MAX_ROWS} rows or fewer, not {TOKENS}"):
        expert_mlp(x, pairs, permutation, unstacked(weights), backend="few_rows")
    many = tuple(unstack(jnp.zeros((MAX_EXPERTS + 1, 2, 2)), 1) for _ in range(3))
    with pytest.raises(NotImplementedError, match=f"{MAX_EXPERTS} experts or fewer, not {MAX_EXPERTS + 1}"):
        pick_backend("few_rows", 1, 2, many)
    narrow = ((jnp.zeros((EXPERTS, WIDTH, 4)), jnp.zeros((EXPERTS, 4, WIDTH))), None, None)
    with pytest.raises(
        ValueError, match=r"needs factors .* of weights \(5, 64, 128\); got \(5, 64, 4\) and \(5, 4, 64\)"
    ):
        expert_mlp(x, pairs, permutation, weights, narrow)
    with pytest.raises(ValueError, match="needs w1 and w3"):
        expert_mlp(x, pairs, permutation, weights[::-1], deltas)
    with pytest.raises(ValueError, match="a permutation of N K pairs"):
        expert_mlp(x, pairs[:, :1], permutation, weights, deltas)
    with pytest.raises(ValueError, match="Unknown expert_mlp backend 'fastest'"):
        expert_mlp(x, pairs, permutation, weights, deltas, backend="fastest")
