"""Upper bounds of speed on this machine: the time of the matrix products alone, and of reading the weights once.

The products are dense bfloat16 with float32 accumulation, timed with nothing around them. All experts get the same
number of rows, nothing is recomputed, and causality halves attention's keys. `costs/flops.py` has the shapes, and where
this count differs from the planner's.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bimedix_jax.costs.flops import EXPERTS, HEAD, ROUTER, linear_shapes, matmul_flops
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.products import dot
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.models.mixtral import Mixtral

Product = tuple[int, int, int]
"""(M, K, N) of [M, K] times [K, N]."""

COPIES_FLOPS, MAX_COPIES = 2e9, 16
"""A small product is timed in copies, in one program of about this many FLOPs, so that launching it does not count."""


def linear_products(config: MixtralConfig, rows: int) -> list[tuple[str, Product, int]]:
    """(name, product, number of such products) of the linear layers in one forward pass, without the router."""
    layers, experts = config.num_layers, config.router.num_experts
    share = max(1, rows * config.router.top_k // experts)
    found = []
    for name, (k, n) in linear_shapes(config).items():
        if name in EXPERTS:
            found.append((name, (share, k, n), layers * experts))
        elif name != ROUTER:
            found.append((name, (rows, k, n), 1 if name == HEAD else layers))
    return found


def attention_products(config: MixtralConfig, batch: int, length: int) -> Counter[Product]:
    """The products of attention in one forward pass, with half of the keys.

    All query heads that share a key head are rows of one product.
    """
    rows = config.num_heads // config.num_kv_heads * length
    count, seen = config.num_layers * batch * config.num_kv_heads, max(1, length // 2)
    return Counter({(rows, config.head_dim, seen): count}) + Counter({(rows, seen, config.head_dim): count})


def forward_products(config: MixtralConfig, batch: int, length: int) -> Counter[Product]:
    found = attention_products(config, batch, length)
    for _, product, count in linear_products(config, batch * length):
        found[product] += count
    return found


def training_products(
    config: MixtralConfig, batch: int, length: int, rank: int, targets: tuple[str, ...]
) -> Counter[Product]:
    """Products of a training step: forward, gradients to all inputs, and adapters with their gradients.

    Frozen weights have no gradient.
    """
    found = forward_products(config, batch, length)
    for (m, k, n), count in attention_products(config, batch, length).items():
        found[m, n, k] += count  # gradients of both operands
        found[k, m, n] += count
    for name, (m, k, n), count in linear_products(config, batch * length):
        found[m, n, k] += count
        if name in targets:
            for product in ((m, k, rank), (m, rank, n), (m, n, rank), (m, rank, k), (k, m, rank), (rank, m, n)):
                found[product] += count
    return found


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w in bfloat16 with float32 accumulation. The result is float32, on a GPU bfloat16.

    cuBLAS rounds the result while writing it, and loses a third of its speed when it must write float32.
    """
    if jax.default_backend() == "gpu":
        return jnp.matmul(x, w, preferred_element_type=jnp.bfloat16)
    return dot(x, w)


def contestants(products: Counter[Product]) -> dict[Product, tuple[Callable[[], Any], int]]:
    """For each shape, a function that multiplies several pairs of random matrices, and the number of pairs."""
    key, found = jax.random.key(0), {}

    @jax.jit
    def multiply(pairs: list[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
        return [product(x, w) for x, w in pairs]

    for m, k, n in products:
        copies = int(min(MAX_COPIES, products[m, k, n], max(1, COPIES_FLOPS // matmul_flops(m, k, n))))
        left, right = jax.random.split(key)
        xs, ws = (
            jax.random.normal(left, (copies, m, k), jnp.bfloat16),
            jax.random.normal(right, (copies, k, n), jnp.bfloat16),
        )
        pairs = list(zip(xs, ws, strict=True))
        found[m, k, n] = (lambda pairs=pairs: multiply(pairs)), copies
    return found


def total_flops(products: Counter[Product]) -> int:
    return sum(matmul_flops(*product) * count for product, count in products.items())


PASSES = 8
"""How often memory is read in one timing. A single pass takes milliseconds, much of it for waking the threads."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """The least that one decoding step must read.

    Attributes:
      bytes: size in storage of the weights that its tokens use.
      run: reads this many bytes PASSES times, on all cores.
    """

    bytes: int
    run: Callable[[], Any]


def bytes_of_step(model: Mixtral, batch: int) -> int:
    """Bytes of the weights that a decoding step of `batch` tokens uses.

    These are the tokens' rows of the embedding, all weights outside of the experts, and as many experts as `batch`
    tokens choose on average under a uniform router.
    """
    experts, top_k = model.config.router.num_experts, model.config.router.top_k
    share = 1 - (1 - top_k / experts) ** batch
    total = 0.0
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = variable.get_value()
        size = value.nbytes if isinstance(value, NF4Tensor | jax.Array) else 0
        if path[0] == "embed" and model.lm_head is not None:
            size *= batch / model.config.vocab_size
        elif path[-2] in EXPERTS:
            size *= share
        total += size
    return round(total)


def reading(size: int) -> Reading:
    """Reads `size` bytes as a float32 matrix times a vector, the fastest of nine ways to read in XLA:CPU.

    It reached 46 to 56 GB/s on two cores of an AMD EPYC; searching the largest element 29 to 41 GB/s, row sums 33 GB/s.
    """
    rows = 64
    data = jnp.ones((rows, max(1, size // 4 // rows)), jnp.float32)
    vector = jnp.ones(data.shape[1], jnp.float32)
    multiply = jax.jit(dot)
    return Reading(data.nbytes, lambda: [multiply(data, vector) for _ in range(PASSES)])
