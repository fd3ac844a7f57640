"""The tiny models of the tests: `from tiny import TINY`, or `tiny(field=...)` where a test is about that field.

Tests that share a configuration also share compiled programs.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from bimedix_jax.models.config import MixtralConfig, RouterConfig

TINY = MixtralConfig(
    vocab_size=304,  # of data.tokenizer.byte_tokenizer
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    router=RouterConfig(num_experts=4, top_k=2),
    rope_theta=10_000.0,
    rms_norm_eps=1e-5,
    sliding_window=None,
    tie_embeddings=False,
    max_position_embeddings=512,
)
"""Four experts are enough to route, and tokens of byte_tokenizer fit."""

GROUPED = dataclasses.replace(TINY, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2)
"""With grouped queries, and widths that differ from each other."""


def tiny(base: MixtralConfig = TINY, **changes: Any) -> MixtralConfig:
    """`base` with other fields, and `experts` and `top_k` for its router."""
    router = {"num_experts": changes.pop("experts", 4), "top_k": changes.pop("top_k", 2)}
    return dataclasses.replace(base, router=RouterConfig(**router), **changes)


@contextlib.contextmanager
def quick_kernels() -> Iterator[None]:
    """Kernels that compile in half the time, where kernels are not the point. A context, or a decorator of a test."""
    from bimedix_jax.kernels import backends

    with backends.use(expert_mlp="composed", grouped_matmul="ragged_dot"):
        yield
