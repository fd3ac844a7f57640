"""Grouped products against one dense product and `lax.ragged_dot`; the experts' feed-forward, fused and composed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bimedix_jax.bench.bounds import product
from bimedix_jax.bench.timing import medians
from bimedix_jax.costs.flops import matmul_flops
from bimedix_jax.kernels.expert_mlp import avx512, expert_mlp
from bimedix_jax.kernels.grouped_matmul import grouped_matmul
from bimedix_jax.kernels.grouped_matmul.xla import index
from bimedix_jax.kernels.nf4 import NF4Tensor, quantize
from bimedix_jax.kernels.nf4.api import block_scales
from bimedix_jax.kernels.nf4.planes import planes
from bimedix_jax.kernels.permute import sort_by_expert

FEED_FORWARD = ("avx512", "xla", "composed")
"""The backends that are compared: fused in C++, where the processor suits it, fused, and composed. The other one,
few_rows, is for decoding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of one layer: its tokens and their width, the experts and their hidden width."""

    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k

    @property
    def flops(self) -> int:
        """FLOPs of one product over the rows that experts own, without padding."""
        return matmul_flops(self.rows, self.width, self.hidden)


def balanced(size: Size) -> np.ndarray:
    """Rows of each expert under a uniform router."""
    return np.random.default_rng(0).multinomial(size.rows, np.full(size.experts, 1 / size.experts)).astype(np.int32)


def skewed(size: Size) -> np.ndarray:
    """One expert takes half of the rows, the others share the rest."""
    rest = (size.rows - size.rows // 2) // (size.experts - 1)
    sizes = np.full(size.experts, rest, np.int32)
    sizes[2 % size.experts] += size.rows - sizes.sum()
    return sizes


def dequantise_all(t: NF4Tensor) -> tuple[jax.Array, jax.Array]:
    """Dequantises every matrix of a stack into the two planes of the CPU kernel. Each overwrites the one before."""
    scales = block_scales(t)

    def one(e: jax.Array) -> tuple[jax.Array, jax.Array]:
        return planes(index(t.packed, e), index(scales, e), t, jnp.dtype("bfloat16"))

    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, jnp.zeros((), jnp.int32)))
    return jax.lax.fori_loop(0, t.shape[0], lambda e, _: one(e), start)


def contestants(size: Size) -> dict[str, Callable[[], Any]]:
    """The functions to time, by name. All operands are arguments of compiled functions, so that none is a constant."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (size.rows, size.width), jnp.bfloat16)
    stored = jax.random.normal(key, (size.experts, size.hidden, size.width), jnp.bfloat16)
    w = stored.swapaxes(1, 2) + jnp.zeros((), jnp.bfloat16)
    t = quantize(stored, batch_dims=1).mT  # stored (out, in), as in PyTorch and its checkpoints
    even, uneven = jnp.asarray(balanced(size)), jnp.asarray(skewed(size))
    first = jnp.copy(w[0])
    dense = jax.jit(lambda x, w: product(x, w).astype(jnp.bfloat16))
    ours = jax.jit(lambda x, w, sizes: grouped_matmul(x, w, sizes))
    nf4_gradient = jax.jit(lambda dy, t, sizes: jax.vjp(lambda x: grouped_matmul(x, t, sizes), x)[1](dy))
    dy = jax.random.normal(key, (size.rows, size.hidden), jnp.bfloat16)
    ragged = jax.jit(
        lambda x, w, sizes: jax.lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32).astype(jnp.bfloat16)
    )
    dequantise = jax.jit(dequantise_all)
    return {
        "dense": lambda: dense(x, first),
        "ours": lambda: ours(x, w, even),
        "ours_skewed": lambda: ours(x, w, uneven),
        "nf4": lambda: ours(x, t, even),
        "nf4_skewed": lambda: ours(x, t, uneven),
        "nf4_gradient": lambda: nf4_gradient(dy, t, even),
        "ragged_dot": lambda: ragged(x, w, even),
        "dequant": lambda: dequantise(t),
    }


def measure(size: Size, repetitions: int) -> dict[str, Any]:
    """One row: useful GFLOP/s of each contestant, ratios to the dense product, G elements/s of dequantisation."""
    seconds = medians(contestants(size), repetitions)
    row: dict[str, Any] = {"tokens": size.tokens, "rows": size.rows, "width": size.width, "hidden": size.hidden}
    row |= {"experts": size.experts, "top_k": size.top_k, "dtype": "bfloat16", "repetitions": repetitions}
    for name, taken in seconds.items():
        if name != "dequant":
            row[f"{name}_gflops"] = size.flops / taken / 1e9
    row["dequant_gelems"] = size.experts * size.width * size.hidden / seconds["dequant"] / 1e9
    for name in ("ours", "ours_skewed", "nf4", "nf4_skewed", "nf4_gradient"):
        row[f"{name}_over_dense"] = seconds["dense"] / seconds[name]
    row["ours_over_ragged_dot"] = seconds["ragged_dot"] / seconds["ours"]
    return row


def feed_forwards(size: Size, rank: int) -> dict[str, Callable[[], Any]]:
    """The feed-forward on NF4 weights: forward, forward with adapters, and with the gradients of a training step."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[-2]), jnp.float32)

    x = jnp.asarray(rng.standard_normal((size.tokens, size.width)), jnp.bfloat16)
    pairs = jnp.full((size.tokens, size.top_k), 1 / size.top_k, jnp.float32)
    owners = jnp.asarray(np.argsort(rng.random((size.tokens, size.experts)))[:, : size.top_k], jnp.int32)
    shapes = [(size.width, size.hidden)] * 2 + [(size.hidden, size.width)]
    weights = tuple(quantize(draw(size.experts, f, d).astype(jnp.bfloat16), batch_dims=1).mT for d, f in shapes)
    deltas = tuple((draw(size.experts, d, rank), draw(size.experts, rank, f)) for d, f in shapes)

    def forward_pass(backend: str, x: jax.Array, weights: Any, deltas: Any) -> jax.Array:
        return expert_mlp(x, pairs, sort_by_expert(owners, size.experts), weights, deltas, backend=backend)

    def forward_and_gradients(backend: str, x: jax.Array, weights: Any, deltas: Any) -> Any:
        y, pullback = jax.vjp(lambda x, deltas: forward_pass(backend, x, weights, deltas), x, deltas)
        return y, pullback(y)

    found: dict[str, Callable[[], Any]] = {}
    for backend in FEED_FORWARD:
        if backend == "avx512" and avx512.refusal(x.dtype, weights) is not None:
            continue
        forward, both = (jax.jit(function, static_argnums=0) for function in (forward_pass, forward_and_gradients))
        found[f"forward_{backend}"] = lambda f=forward, b=backend: f(b, x, weights, (None,) * 3)
        found[f"forward_adapters_{backend}"] = lambda f=forward, b=backend: f(b, x, weights, deltas)
        found[f"training_{backend}"] = lambda f=both, b=backend: f(b, x, weights, deltas)
    return found


def measure_feed_forward(size: Size, rank: int, repetitions: int) -> dict[str, Any]:
    """One row: milliseconds of each backend and pass, and the speed-up of the fastest fused one; None where one cannot
    run."""
    seconds = medians(feed_forwards(size, rank), repetitions)
    row: dict[str, Any] = dataclasses.asdict(size) | {"rank": rank, "base": "nf4", "repetitions": repetitions}
    for name in ("forward", "forward_adapters", "training"):
        taken = {backend: seconds.get(f"{name}_{backend}") for backend in FEED_FORWARD}
        row |= {f"{name}_{backend}_ms": None if s is None else 1000 * s for backend, s in taken.items()}
        fused = min(s for backend, s in taken.items() if s is not None and backend != "composed")
        row[f"{name}_ratio"] = seconds[f"{name}_composed"] / fused
    return row
