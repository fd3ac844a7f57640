"""Useful FLOPs of Mixtral-8x7B against numbers derived from its sizes, and the same numbers in all counters."""

import dataclasses

import pytest

from bimedix_jax.adapters import add_lora
from bimedix_jax.bench import bounds, intensity, model
from bimedix_jax.costs import flops
from bimedix_jax.models.config import MIXTRAL_8X7B, LoraConfig
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.plan.codegen import cases, layer

ACTIVE = 12_748_587_008
"""Parameters of the matrices that a token uses: 32 x (attention 41,943,040 + router 32,768 + 2 experts of 176,160,768),
and the head, 131,072,000."""


def test_linear_layers_of_a_token():
    assert sum(flops.linear_flops(MIXTRAL_8X7B).values()) == 2 * ACTIVE


def test_a_training_step_of_the_recipe():
    adapted = add_lora(Mixtral(MIXTRAL_8X7B), LoraConfig(rank=128, alpha=64.0))
    parts = flops.training_flops(adapted, 1000, 4096)
    assert parts["matrices"] == 1000 * 4 * ACTIVE
    # q, k, v: 32 x 128 x (8,192 + 2 x 5,120); router 32 x 128 x 4,104; two experts 32 x 2 x 3 x 128 x 18,432
    used = 32 * 128 * (8192 + 2 * 5120 + 4104 + 2 * 3 * 18432)
    assert parts["adapters"] == 1000 * 3 * 2 * used
    assert parts["attention"] == 1000 * 3 * 4 * 2048.5 * 4096 * 32


def test_without_adapters_every_matrix_has_a_gradient():
    parts = flops.training_flops(Mixtral(MIXTRAL_8X7B), 1, 64)
    assert parts["matrices"] == 6 * ACTIVE
    assert parts["adapters"] == 0


def test_one_adapted_expert_of_eight_is_used_by_a_quarter_of_the_tokens():
    every = add_lora(Mixtral(MIXTRAL_8X7B), LoraConfig(rank=8, alpha=8.0, targets=("w1",)))
    one = add_lora(Mixtral(MIXTRAL_8X7B), LoraConfig(rank=8, alpha=8.0, targets=(r"layers\.\d+\.moe\.experts\.3\.w1",)))
    assert flops.adapter_flops(every) == pytest.approx(8 * flops.adapter_flops(one))


def test_inference_needs_logits_of_the_last_token_only():
    base, head = Mixtral(MIXTRAL_8X7B), 2 * 4096 * 32_000
    prefill, decode = flops.inference_flops(base, 2, 100), flops.inference_flops(base, 2, 1, before=100)
    assert prefill["matrices"] == 200 * (2 * ACTIVE - head) + 2 * head
    assert decode["matrices"] == 2 * 2 * ACTIVE
    assert decode["attention"] == 2 * 4 * 101 * 4096 * 32


def test_all_counters_give_the_same_flops_of_a_layer():
    """The planner, the compiled cases, the MoE layer, the roofline and the benchmark's bound, at 4,096 tokens."""
    tokens, one_layer = 4096, dataclasses.replace(MIXTRAL_8X7B, num_layers=1)
    planner, shapes = flops.linear_flops(one_layer), flops.linear_shapes(one_layer)
    experts = tokens * sum(planner[name] for name in flops.EXPERTS)
    attention = tokens * sum(planner[name] for name in flops.ATTENTION)
    roofline = {work.operation: work.flops for work in intensity.works() if work.phase == intensity.PHASES[0].name}
    assert roofline["experts, NF4 (grouped_matmul)"] == flops.FROZEN * experts == 5_772_436_045_824
    assert roofline["q, k, v, o, NF4 (nf4_matmul)"] == flops.FROZEN * attention == 687_194_767_360
    found = cases.cases()
    assert 3 * found["w1 nf4 forward"].useful_flops == experts
    assert 2 * (found["q nf4 forward"].useful_flops + found["k nf4 forward"].useful_flops) == attention
    adapters = sum(
        flops.low_rank_flops(count, *shapes[name], cases.RANK)
        for count, name in ((2 * tokens, "w1"), (2 * tokens, "w2"), (2 * tokens, "w3"), (tokens, "router"))
    )
    router = tokens * planner["router"]
    assert layer.useful_flops(tokens) == 2 * (experts + router) + 3 * adapters == 6_133_775_335_424
    bound = sum(flops.matmul_flops(*product) * n for _, product, n in bounds.linear_products(one_layer, tokens))
    assert bound == tokens * sum(planner.values()) - router


@pytest.mark.parametrize(
    ("batch", "length", "forward", "training"),
    [
        (1, 512, 1_757_715_365_888, 3_549_387_816_960),
        (2, 64, 437_549_793_280, 881_709_809_664),
        (1, 1, 11_872_043_008, 23_921_098_752),
        (3, 33, 329_857_892_352, 664_597_168_128),
    ],
)
def test_the_bounds_of_the_benchmarks(batch, length, forward, training):
    """Four layers of Mixtral-8x7B, rank 16: these numbers must not change between versions."""
    config = dataclasses.replace(model.FULL_WIDTH, num_layers=4)
    assert bounds.total_flops(bounds.forward_products(config, batch, length)) == forward
    products = bounds.training_products(config, batch, length, model.RANK, model.TARGETS)
    assert bounds.total_flops(products) == training


def test_flops_of_the_recipe():
    """65,536 tokens in rows of 4,096, and four prompts of 2,048: these numbers must not change between versions."""
    adapted = add_lora(Mixtral(MIXTRAL_8X7B), LoraConfig(rank=128, alpha=64.0))
    assert flops.training_flops(adapted, 65_536, 4096) == {
        "matrices": 3_341_965_592_625_152,
        "adapters": 214_417_652_318_208,
        "attention": 211_157_772_140_544,
    }
    assert flops.inference_flops(adapted, 4, 2048) == {
        "matrices": 206_726_414_467_072,
        "adapters": 8_934_068_846_592,
        "attention": 4_400_193_994_752,
    }
    assert flops.inference_flops(adapted, 4, 1, before=2048) == {
        "matrices": 101_988_696_064,
        "adapters": 4_362_338_304,
        "attention": 4_297_064_448,
    }
