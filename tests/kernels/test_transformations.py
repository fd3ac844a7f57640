"""JAX transformations do not change results: jit, vmap, scan, remat and shard_map, forward and gradients.

Every operation stands here as a function of rows [24, 32] to rows [24, 32], on each of its backends. A new backend is
in its operation's BACKENDS and thereby here.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.attention import attention
from bimedix_jax.kernels.expert_mlp import expert_mlp
from bimedix_jax.kernels.grouped_low_rank import api as grouped_low_rank
from bimedix_jax.kernels.grouped_matmul import api as grouped_matmul
from bimedix_jax.kernels.layer_scan import api as layer_scan
from bimedix_jax.kernels.nf4 import quantize
from bimedix_jax.kernels.nf4_matmul import api as nf4_matmul
from bimedix_jax.kernels.permute import combine, dispatch, sort_by_expert

ROWS, WIDTH, EXPERTS, RANK = 24, 32, 3, 4
GROUPS = ([4, 0, 20], [10, 9, 1])
"""Two sets of group sizes."""
INTERPRETED = ("triton", "mosaic_tpu")
"""JAX's interpreter of Pallas kernels does not support `check_vma`; the compilers do (test_codegen_*.py)."""

Operation = Callable[[jax.Array, Any, Any, jax.Array], jax.Array]
"""(x, trained weights, frozen weights, group sizes) -> y like x."""


def owners(groups_E: jax.Array) -> jax.Array:
    return jnp.repeat(jnp.arange(EXPERTS, dtype=jnp.int32), groups_E, total_repeat_length=ROWS)


def permuted(x: jax.Array, trained: Any, frozen: Any, groups_E: jax.Array) -> jax.Array:
    owners_M = owners(groups_E)
    permutation = sort_by_expert(jnp.stack([owners_M, (owners_M + 1) % EXPERTS], axis=1), EXPERTS)
    return combine(jnp.tanh(dispatch(x, permutation)), trained[0, :ROWS, :2], permutation)


def mixed(backend: str, x: jax.Array, trained: Any, frozen: Any, groups_E: jax.Array) -> jax.Array:
    ids = owners(groups_E)[None]
    k, v = ((x @ trained[i, :, :16]).reshape(1, ROWS, 1, 16) for i in range(2))
    return attention(x.reshape(1, ROWS, 2, 16), k, v, ids, ids, window=9, backend=backend).reshape(ROWS, WIDTH)


def rounded(x: jax.Array, trained: Any, frozen: Any, groups_E: jax.Array) -> jax.Array:
    """Attention in bfloat16, of operands that no transformation rounds differently."""
    ids = owners(groups_E)[None]
    q, k, v = ((x * trained[i, :1]).astype(jnp.bfloat16).reshape(1, ROWS, 1, WIDTH) for i in range(3))
    return attention(q, k, v, ids, ids, window=9, backend="avx512").reshape(ROWS, WIDTH).astype(jnp.float32)


def fed_forward(x: jax.Array, trained: Any, frozen: Any, groups_E: jax.Array) -> jax.Array:
    """Experts in bfloat16, whose factors are trained."""
    owners_M = owners(groups_E)
    permutation = sort_by_expert(jnp.stack([owners_M, (owners_M + 1) % EXPERTS], axis=1), EXPERTS)
    weights = (lax.stop_gradient(trained).astype(jnp.bfloat16),) * 3
    deltas = ((trained[:, :, :RANK], trained[:, :RANK]), None, (trained[:, :, -RANK:], trained[:, -RANK:]))
    pairs = trained[0, :ROWS, :2]
    y = expert_mlp(x.astype(jnp.bfloat16), pairs, permutation, weights, deltas, backend="avx512")
    return y.astype(jnp.float32)


def product_in_16_bits(x: jax.Array, trained: Any, frozen: Any, groups_E: jax.Array) -> jax.Array:
    return nf4_matmul.matmul(x.astype(jnp.bfloat16), frozen[1], backend="avx512").astype(jnp.float32)


def dense_product_in_16_bits(x: jax.Array, trained: Any, frozen: Any, groups_E: jax.Array) -> jax.Array:
    with backends.use(nf4_matmul="avx512"):
        return nf4_matmul.matmul(x.astype(jnp.bfloat16), lax.stop_gradient(trained[0]), jnp.float32)


def layered(backend: str, x: jax.Array, trained: Any, frozen: Any, groups_E: jax.Array) -> jax.Array:
    """One layer for each expert; all layers use the same groups."""

    def body(rows: jax.Array, x: jax.Array, layer: Any, slot: Any) -> tuple[jax.Array, None, Any]:
        return jnp.tanh(x @ layer + rows[:, None]), None, slot

    rows = owners(groups_E).astype(jnp.float32) / 8
    return layer_scan.layer_scan(body, rows, x, trained, backend=backend)[0]


def operations() -> dict[str, Operation]:
    found: dict[str, Operation] = {"permute": permuted}
    for name in ("xla", "triton"):  # splash attention takes rows of 128 tokens or more: test_attention.py
        found[f"attention {name}"] = functools.partial(mixed, name)
    found |= {"attention avx512": rounded, "expert_mlp avx512": fed_forward}
    found["dense matmul"] = lambda x, trained, frozen, groups: nf4_matmul.matmul(x, trained[0])
    for name in grouped_matmul.BACKENDS:
        grouped = functools.partial(grouped_matmul.grouped_matmul, backend=name)
        found[f"grouped_matmul {name}"] = lambda x, trained, frozen, groups, f=grouped: f(x, trained, groups)
        found[f"grouped_matmul nf4 {name}"] = lambda x, trained, frozen, groups, f=grouped: f(x, frozen, groups)
    found["nf4_matmul avx512"] = product_in_16_bits
    found["dense matmul avx512"] = dense_product_in_16_bits
    for name in sorted(set(nf4_matmul.BACKENDS) - {"avx512"}):
        single = functools.partial(nf4_matmul.matmul, backend=name)
        found[f"nf4_matmul {name}"] = lambda x, trained, frozen, groups, f=single: f(x, frozen[1])
    for name in grouped_low_rank.BACKENDS:
        delta = functools.partial(grouped_low_rank.grouped_low_rank, backend=name)
        found[f"grouped_low_rank {name}"] = lambda x, trained, frozen, groups, f=delta: f(
            x, trained[:, :, :RANK], trained[:, :RANK], groups
        )
    for name in layer_scan.BACKENDS:
        found[f"layer_scan {name}"] = functools.partial(layered, name)
    return found


OPERATIONS = operations()


def draw(layers: int) -> tuple[jax.Array, jax.Array, Any, jax.Array]:
    """(x for each set of group sizes, trained and frozen weights of each layer, the group sizes)."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, ROWS, WIDTH)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((layers, EXPERTS, WIDTH, WIDTH)), jnp.float32) / 4
    return x, w, quantize(w, block_size=32, batch_dims=2), jnp.asarray(GROUPS, jnp.int32)


def gradients(operation: Operation, x: jax.Array, trained: Any, frozen: Any, groups: jax.Array) -> tuple:
    """(y, (dx, dtrained)) for a loss that is nonlinear in y."""
    y, pullback = jax.vjp(lambda x, trained: operation(x, trained, frozen, groups), x, trained)
    return y, pullback(jnp.cos(y))


def assert_equal(got: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(float(jnp.abs(b).max()), 1e-3), rtol=0)


@functools.cache
def one_by_one(name: str) -> list[tuple]:
    """`gradients` for each set of group sizes separately, compiled: the expected values of all tests."""
    x, trained, frozen, groups = draw(1)
    run = jax.jit(functools.partial(gradients, OPERATIONS[name]))
    return [run(x[i], trained[0], frozen[0], groups[i]) for i in range(2)]


# interpreted kernels are compiled with and without jit
@pytest.mark.parametrize("name", [name for name in OPERATIONS if not any(backend in name for backend in INTERPRETED)])
def test_jit(name: str) -> None:
    x, trained, frozen, groups = draw(1)
    assert_equal(OPERATIONS[name](x[0], trained[0], frozen[0], groups[0]), one_by_one(name)[0][0])


# JAX has no rule to batch the gradient of lax.ragged_dot
@pytest.mark.parametrize("name", [name for name in OPERATIONS if "ragged_dot" not in name])
def test_vmap_over_rows_and_groups(name: str) -> None:
    x, trained, frozen, groups = draw(1)
    run = jax.vmap(functools.partial(gradients, OPERATIONS[name]), in_axes=(0, None, None, 0))
    expected = jax.tree.map(lambda *parts: jnp.stack(parts), *one_by_one(name))
    assert_equal(jax.jit(run)(x, trained[0], frozen[0], groups), expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_scan_over_layers_with_remat(name: str) -> None:
    x, trained, frozen, groups = draw(2)
    operation = OPERATIONS[name]

    def scanned(x: jax.Array, trained: Any, frozen: Any, groups: jax.Array) -> jax.Array:
        body = jax.checkpoint(lambda x, layer: (operation(x, layer[0], layer[1], groups), None))
        return lax.scan(body, x, (trained, frozen))[0]

    def looped(x: jax.Array, trained: Any, frozen: Any, groups: jax.Array) -> jax.Array:
        for layer in range(2):
            x = operation(x, trained[layer], frozen[layer], groups)
        return x

    got, expected = (
        jax.jit(functools.partial(gradients, f))(x[0], trained, frozen, groups[0]) for f in (scanned, looped)
    )
    assert_equal(got, expected)


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_shard_map_with_shared_weights(name: str, check_vma: bool) -> None:
    """Two devices with their own rows and groups and the same weights, whose gradient is the sum of both devices'.

    JAX sums it where it checks what varies; otherwise the caller does.
    """
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    if check_vma and any(backend in name for backend in INTERPRETED) and backends.platform() == "cpu":
        pytest.skip("not interpreted with types of what varies")
    x, trained, frozen, groups = draw(1)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def shard(x: jax.Array, trained: Any, frozen: Any, groups: jax.Array) -> tuple:
        y, (dx, dtrained) = gradients(OPERATIONS[name], x[0], trained, frozen, groups[0])
        return y[None], (dx[None], dtrained if check_vma else lax.psum(dtrained, "data"))

    rows = P("data")
    sharded = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(rows, P(), P(), rows),
        out_specs=(rows, (rows, P())),
        check_vma=check_vma,
    )
    y, (dx, dtrained) = jax.jit(sharded)(x, trained[0], frozen[0], groups)
    each = one_by_one(name)
    for i in range(2):
        assert_equal((y[i], dx[i]), (each[i][0], each[i][1][0]))
    assert_equal(dtrained, each[0][1][1] + each[1][1][1])
