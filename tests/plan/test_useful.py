"""Useful FLOPs of Mixtral-8x7B, against numbers from the paper's parameters."""

import pytest

from bimedix_jax.adapters import add_lora
from bimedix_jax.models.config import MIXTRAL_8X7B, LoraConfig
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.plan import useful

ACTIVE = 12_748_587_008
"""Parameters of matrices that a token passes: 32 x (attention 41,943,040 + router 32,768 + 2 experts of 176,160,768),
and the head 131,072,000."""


def test_matrices_of_a_token():
    assert sum(useful.product_flops(MIXTRAL_8X7B).values()) == 2 * ACTIVE


def test_a_step_of_the_recipe():
    model = add_lora(Mixtral(MIXTRAL_8X7B), LoraConfig(rank=128, alpha=64.0))
    parts = useful.training_flops(model, 1000, 4096)
    assert parts["matrices"] == 1000 * 4 * ACTIVE
    # q, k, v: 32 x 128 x (8,192 + 2 x 5,120); router 32 x 128 x 4,104; two experts 32 x 2 x 3 x 128 x 18,432
    used = 32 * 128 * (8192 + 2 * 5120 + 4104 + 2 * 3 * 18432)
    assert parts["adapters"] == 1000 * 3 * 2 * used
    assert parts["attention"] == 1000 * 3 * 4 * 2048.5 * 4096 * 32


def test_without_adapters_every_matrix_has_a_gradient():
    parts = useful.training_flops(Mixtral(MIXTRAL_8X7B), 1, 64)
    assert parts["matrices"] == 6 * ACTIVE
    assert parts["adapters"] == 0


def test_one_adapted_expert_of_eight_is_used_by_a_quarter_of_tokens():
    every = add_lora(Mixtral(MIXTRAL_8X7B), LoraConfig(rank=8, alpha=8.0, targets=("w1",)))
    one = add_lora(Mixtral(MIXTRAL_8X7B), LoraConfig(rank=8, alpha=8.0, targets=(r"layers\.\d+\.moe\.experts\.3\.w1",)))
    assert useful.adapter_flops(every) == pytest.approx(8 * useful.adapter_flops(one))


def test_inference_needs_logits_of_the_last_token_only():
    model, head = Mixtral(MIXTRAL_8X7B), 2 * 4096 * 32_000
    prefill, decode = useful.inference_flops(model, 2, 100), useful.inference_flops(model, 2, 1, before=100)
    assert prefill["matrices"] == 200 * (2 * ACTIVE - head) + 2 * head
    assert decode["matrices"] == 2 * 2 * ACTIVE
    assert decode["attention"] == 2 * 4 * 101 * 4096 * 32
