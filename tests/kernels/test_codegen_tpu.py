"""Every TPU kernel compiles for v5e and v5p at the shapes of Mixtral-8x7B, with the compiler of libtpu."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from bimedix_jax.errors import BimedixError
from bimedix_jax.kernels.grouped_matmul.mosaic_tiling import VMEM_LIMIT
from bimedix_jax.plan.codegen import layer, tpu
from bimedix_jax.plan.codegen.cases import cases
from bimedix_jax.plan.hardware import devices

LARGEST = ["w1 nf4 rows", "w2 nf4 forward", "w2 lora_a rows", "w1 dense weight", "q nf4 forward"]
"""One case of each kernel and part: scripts/measure_kernel_codegen.py compiles all cases for v5p too."""


@pytest.mark.parametrize(("target", "name"), [("v5e", name) for name in cases()] + [("v5p", name) for name in LARGEST])
def test_compiles_within_limits(target: str, name: str) -> None:
    case = cases()[name]
    compiled = tpu.compile_case(case, target)
    kernels = tpu.tpu_kernels(compiled)
    assert kernels[-1].name == {"weight": "grouped_gradient"}.get(case.part, f"grouped_{case.weight}")
    prepared = {("nf4", "forward"): ["decode_scales", "deinterleave"], ("nf4", "rows"): ["decode_scales"]}
    assert [kernel.name for kernel in kernels[:-1]] == prepared.get((case.weight, case.part), [])
    assert kernels[-1].vmem_bytes > 0
    assert all(0 <= kernel.vmem_bytes <= VMEM_LIMIT for kernel in kernels)
    assert 1 <= tpu.program_flops(compiled) / case.useful_flops <= 1.15
    assert not re.search(r"= \S+ (dot|convolution|gather)\(", compiled.as_text())  # outside of kernels


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", ["q nf4 forward", "w2 nf4 forward"])
def test_a_single_token_compiles(name: str, rows: int) -> None:
    """As in decoding."""
    compiled = tpu.compile_case(dataclasses.replace(cases()[name], rows=rows), tpu.TARGETS[0])
    assert tpu.tpu_kernels(compiled)[-1].name == "grouped_nf4"


def test_rows_for_the_script() -> None:
    *scales, product = tpu.measure("v5e", ["w2 nf4 rows"])
    assert [row["kernel"] for row in scales] == ["decode_scales"]
    assert (product["kernel"], product["tile"]) == ("grouped_nf4", (128, 1024, 4096))
    assert product["shapes"] == {"x": (8192, 14_336), "w": (8, 14_336, 4096)}
    assert product["flops_ratio"] == pytest.approx(71 / 64)


@pytest.mark.usefixtures("least_effort")
def test_a_moe_layer_does_few_extra_flops() -> None:
    """There is no product over all experts, which would multiply the useful FLOPs by 8."""
    assert 1 <= layer.measure("v5e")["flops_ratio"] <= 1.15


def test_uncountable_flops_raise() -> None:
    placed = jax.sharding.SingleDeviceSharding(devices("v5e")[0])
    x = jax.ShapeDtypeStruct((128, 128), jnp.float32, sharding=placed)
    looped = jax.jit(lambda x: jax.lax.fori_loop(0, 5, lambda i, y: jnp.tanh(y @ x), x)).lower(x).compile()
    with pytest.raises(BimedixError, match="counted"):
        tpu.program_flops(looped)
