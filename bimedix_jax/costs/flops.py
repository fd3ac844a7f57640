"""FLOPs of Mixtral's matrix products: the one count behind the planner, the benchmarks and the rooflines.

A multiply-add is two FLOPs. Norms, softmax, rotations and activation functions are not counted. A causal token sees
(T + 1) / 2 keys of a row of T on average. FLOPs are those of the mathematics: each token runs its top-k experts, a
frozen matrix has no gradient of its own, and nothing is computed twice. `plan/work.py` counts what a compiled program
executes; the difference of the two is the excess that `bimedix plan` reports.

The benchmarks deviate in three places, on purpose:
  - `bench/bounds.py` needs whole matrices to time: every expert gets the same whole number of rows, at least one, and
    causality halves the keys, T // 2. It leaves out the router, a float32 product of 0.02 % of the FLOPs. For very
    short inputs this count is the less exact one.
  - `bench/intensity.py` counts 7 products for attention in training, as a kernel that does not store the scores needs
    them. The planner counts 6, since the seventh recomputes the scores.
  - The prefill benchmark returns the logits of all positions, `inference_flops` counts those of the last one.
"""

import math
from collections.abc import Iterable

from bimedix_jax.adapters import linears
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.models.linear import TrainedParam
from bimedix_jax.models.mixtral import Mixtral

ATTENTION = ("q", "k", "v", "o")
EXPERTS = ("w1", "w2", "w3")
ROUTER, HEAD = "router", "lm_head"

FORWARD, FROZEN, TRAINED = 1, 2, 3
"""Products of a linear layer: forward; in training also the gradient to its input; also the gradient to its weight."""


def matmul_flops(m: int, k: int, n: int) -> int:
    """FLOPs of [M, K] times [K, N]."""
    return 2 * m * k * n


def low_rank_flops(rows: int, k: int, n: int, rank: int) -> int:
    """FLOPs of [rows, K] times [K, rank] times [rank, N]."""
    return matmul_flops(rows, k, rank) + matmul_flops(rows, rank, n)


def linear_shapes(config: MixtralConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of one matrix of each kind."""
    width, hidden = config.hidden_size, config.intermediate_size
    heads, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "q": (width, heads),
        "k": (width, keys),
        "v": (width, keys),
        "o": (heads, width),
        "w1": (width, hidden),
        "w2": (hidden, width),
        "w3": (width, hidden),
        ROUTER: (width, config.router.num_experts),
        HEAD: (width, config.vocab_size),
    }


def weights(config: MixtralConfig, names: Iterable[str]) -> int:
    """Weights in one matrix of each of these kinds together."""
    shapes = linear_shapes(config)
    return sum(math.prod(shapes[name]) for name in names)


def matrices_per_token(config: MixtralConfig) -> dict[str, int]:
    """How many matrices of each kind a token is multiplied with in a forward pass."""
    layers, top_k = config.num_layers, config.router.top_k
    return {
        name: 1 if name == HEAD else layers * top_k if name in EXPERTS else layers for name in linear_shapes(config)
    }


def linear_flops(config: MixtralConfig) -> dict[str, float]:
    """FLOPs of a token in one forward pass through the matrices of each kind."""
    used = matrices_per_token(config)
    return {name: float(matmul_flops(1, k, n) * used[name]) for name, (k, n) in linear_shapes(config).items()}


def adapter_flops(model: Mixtral) -> float:
    """FLOPs of a token in one forward pass through the adapters. A token uses top_k / num_experts of the experts'."""
    total, router = 0.0, model.config.router
    for path, layer in linears(model).items():
        if layer.lora is None:
            continue
        a, b = layer.lora.a.get_value().shape, layer.lora.b.get_value().shape
        used = math.prod(a[:-2]) * (router.top_k / router.num_experts if path[-1] in EXPERTS else 1)
        total += used * low_rank_flops(1, a[-2], b[-1], a[-1])
    return total


def attention_product_flops(config: MixtralConfig, pairs: float) -> float:
    """FLOPs of one of attention's products in one layer, over this many pairs of a query and a key.

    The forward pass has two of them: the scores, and the mean of the values.
    """
    return 2.0 * pairs * config.num_heads * config.head_dim


def attention_flops(config: MixtralConfig, keys: float) -> float:
    """FLOPs of attention in a forward pass of one token that sees this many keys on average."""
    seen = keys if config.sliding_window is None else min(keys, float(config.sliding_window))
    return 2 * attention_product_flops(config, seen) * config.num_layers


def training_flops(model: Mixtral, tokens: float, length: int, keys: float | None = None) -> dict[str, float]:
    """Useful FLOPs of an optimiser step over `tokens` tokens in rows of `length`.

    Frozen matrices have a forward product and a gradient to their input. Adapters, and all matrices of a model without
    adapters, also have a gradient to their weights. Attention has two products forward and four backward.

    Args:
      keys: keys that a token sees on average; None if each row is one document.
    """
    forward = linear_flops(model.config)
    in_full = [name for name, layer in ((path[-1], layer) for path, layer in linears(model).items())
               if model.lora is None or isinstance(layer.w, TrainedParam)]  # fmt: skip
    per_token = sum(flops * (TRAINED if name in in_full else FROZEN) for name, flops in forward.items())
    if model.lora is None and model.lm_head is None:
        per_token += forward[HEAD]
    seen = (length + 1) / 2 if keys is None else keys
    return {
        "matrices": tokens * per_token,
        "adapters": tokens * TRAINED * adapter_flops(model),
        "attention": tokens * 3 * attention_flops(model.config, seen),
    }


def inference_flops(model: Mixtral, rows: int, length: int, before: int = 0) -> dict[str, float]:
    """Useful FLOPs of `length` new tokens of each row, after `before` cached ones; logits of the last token only."""
    tokens, forward = rows * length, linear_flops(model.config)
    matrices = sum(flops for name, flops in forward.items() if name != HEAD)
    return {
        "matrices": tokens * matrices + rows * forward[HEAD],
        "adapters": tokens * adapter_flops(model),
        "attention": tokens * attention_flops(model.config, before + (length + 1) / 2),
    }
