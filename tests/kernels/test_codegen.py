"""Kernels compile for an absent A100: without spills, within its shared memory, with little padding.

Some of the cases of `scripts/measure_kernel_codegen.py`, at the shapes of Mixtral-8x7B.
"""

import pytest

from bimedix_jax.plan.codegen import gpu, layer

SHARED_BYTES = 163 * 1024
"""Shared memory of one block on an A100 (CUDA C++ Programming Guide, compute capability 8.0)."""


@pytest.mark.parametrize(
    "name",
    [
        "w1 nf4 forward",
        "w1 nf4 rows",
        "w2 nf4 forward",
        "w2 nf4 rows",
        "w1 dense forward",
        "w1 lora_a forward",
        "w1 lora_b rows",
        "w1 lora_b weight",
        "w1 nf4 forward, 256 tokens",
        "w1 nf4 forward, 1024 tokens",
        "w1 nf4 rows, 1024 tokens",
        "w2 nf4 forward, 1 token",
        "q nf4 forward",
        "k nf4 rows",
        "k nf4 forward, 1 token",
        "w2 nf4 rows, of 32 layers",
        "w1 nf4 forward, 1 token, of 32 layers",
        "w1 nf4 rows, 256 tokens, of 32 layers",
        "w1 nf4 forward, float32",
        "w1 lora_a weight, float32",
    ],
)
def test_nothing_spills_on_an_a100(name: str) -> None:
    rows = list(gpu.measure("a100-80gb", [name]))
    for row in rows:
        assert row["spill_bytes"] == 0
        assert 0 < row["registers"] <= 255
        assert 0 < row["shared_bytes"] <= SHARED_BYTES
    if "token" not in name:
        assert 1 <= sum(row["flops_ratio"] for row in rows) <= 1.15
    assert [row["kernel"] for row in rows].count("unpack") == (
        "nf4" in name and "token" not in name and "float32" not in name
    )


def test_a_moe_layer_does_few_extra_flops() -> None:
    """There is no product over all experts, which would multiply the useful FLOPs by 8."""
    assert 1 <= layer.measure("a100-80gb")["flops_ratio"] <= 1.15
