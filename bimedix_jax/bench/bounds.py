"""What the machine allows: the time of a model's own matrix products alone, and of reading its weights once.

Products are dense and bfloat16 with float32 accumulation, as fast as XLA runs them on this machine with nothing around
them; experts have equal shares of the rows, nothing is recomputed, and of attention's products only the causal half
counts.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.products import dot
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.models.mixtral import Mixtral

Product = tuple[int, int, int]
"""(M, K, N) of [M, K] times [K, N]."""

EXPERT_LAYERS = ("w1", "w2", "w3")

COPIES_FLOPS, MAX_COPIES = 2e9, 16
"""A shape is timed on several products at once, so that starting a program does not count; this much work or so."""


def linear_shapes(config: MixtralConfig, rows: int) -> list[tuple[str, Product, int]]:
    """(name, product, how many of it) of every linear layer in one forward pass."""
    layers, width, ffn = config.num_layers, config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    experts = config.router.num_experts
    share = max(1, rows * config.router.top_k // experts)
    return [
        ("q", (rows, width, q), layers),
        ("k", (rows, width, kv), layers),
        ("v", (rows, width, kv), layers),
        ("o", (rows, q, width), layers),
        ("w1", (share, width, ffn), layers * experts),
        ("w3", (share, width, ffn), layers * experts),
        ("w2", (share, ffn, width), layers * experts),
        ("lm_head", (rows, width, config.vocab_size), 1),
    ]


def attention_shapes(config: MixtralConfig, batch: int, length: int) -> Counter[Product]:
    """Scores and mixing of one forward pass. The query heads of a key head are rows of one product; keys are halved."""
    rows = config.num_heads // config.num_kv_heads * length
    count, seen = config.num_layers * batch * config.num_kv_heads, max(1, length // 2)
    return Counter({(rows, config.head_dim, seen): count}) + Counter({(rows, seen, config.head_dim): count})


def forward_products(config: MixtralConfig, batch: int, length: int) -> Counter[Product]:
    found = attention_shapes(config, batch, length)
    for _, product, count in linear_shapes(config, batch * length):
        found[product] += count
    return found


def training_products(
    config: MixtralConfig, batch: int, length: int, rank: int, targets: tuple[str, ...]
) -> Counter[Product]:
    """Forward, gradient to every layer's input, and adapters both ways; no gradient of a frozen weight."""
    found = forward_products(config, batch, length)
    for (m, k, n), count in attention_shapes(config, batch, length).items():
        found[m, n, k] += count  # gradients of both operands
        found[k, m, n] += count
    for name, (m, k, n), count in linear_shapes(config, batch * length):
        found[m, n, k] += count
        if name in targets:
            for product in ((m, k, rank), (m, rank, n), (m, n, rank), (m, rank, k), (k, m, rank), (rank, m, n)):
                found[product] += count
    return found


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w in bfloat16, accumulated in float32: float32, on a GPU bfloat16, whose library rounds as it writes and
    loses a third of its speed where it has to write float32."""
    if jax.default_backend() == "gpu":
        return jnp.matmul(x, w, preferred_element_type=jnp.bfloat16)
    return dot(x, w)


def contestants(products: Counter[Product]) -> dict[Product, tuple[Callable[[], Any], int]]:
    """For each shape a function that multiplies several pairs of random matrices, and how many they are."""
    key, found = jax.random.key(0), {}

    @jax.jit
    def multiply(pairs: list[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
        return [product(x, w) for x, w in pairs]

    for m, k, n in products:
        copies = int(min(MAX_COPIES, products[m, k, n], max(1, COPIES_FLOPS // (2 * m * k * n))))
        left, right = jax.random.split(key)
        xs, ws = (
            jax.random.normal(left, (copies, m, k), jnp.bfloat16),
            jax.random.normal(right, (copies, k, n), jnp.bfloat16),
        )
        pairs = list(zip(xs, ws, strict=True))
        found[m, k, n] = (lambda pairs=pairs: multiply(pairs)), copies
    return found


def flops(products: Counter[Product]) -> int:
    return sum(2 * m * k * n * count for (m, k, n), count in products.items())


PASSES = 8
"""Times that memory is read in a row: a single pass takes milliseconds, of which waking the threads is a large part."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one decoding step must read at least.

    Attributes:
      bytes: of the weights that its tokens use, as they are stored.
      run: reads as many bytes PASSES times, on all cores.
    """

    bytes: int
    run: Callable[[], Any]


def bytes_of_step(model: Mixtral, batch: int) -> int:
    """Bytes of the weights that a step of `batch` tokens uses: its rows of the embedding, every other layer whole, and
    of the experts as many as `batch` tokens choose on average when they choose uniformly."""
    experts, top_k = model.config.router.num_experts, model.config.router.top_k
    share = 1 - (1 - top_k / experts) ** batch
    total = 0.0
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = variable.get_value()
        size = value.nbytes if isinstance(value, NF4Tensor | jax.Array) else 0
        if path[0] == "embed" and model.lm_head is not None:
            size *= batch / model.config.vocab_size
        elif path[-2] in EXPERT_LAYERS:
            size *= share
        total += size
    return round(total)


def reading(size: int) -> Reading:
    """A float32 matrix of `size` bytes times a vector: of nine ways to read in XLA:CPU the fastest (46 to 56 GB/s on
    two cores of an AMD EPYC; the largest element 29 to 41, row sums 33)."""
    rows = 64
    data = jnp.ones((rows, max(1, size // 4 // rows)), jnp.float32)
    vector = jnp.ones(data.shape[1], jnp.float32)
    multiply = jax.jit(dot)
    return Reading(data.nbytes, lambda: [multiply(data, vector) for _ in range(PASSES)])
