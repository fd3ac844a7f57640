"""Every TPU kernel compiles for v5e and v5p at the shapes of Mixtral-8x7B, by the compiler that libtpu brings."""

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


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("target", tpu.TARGETS)
def test_compiles_tight(target: str, name: str) -> None:
    case = cases()[name]
    compiled = tpu.compile_case(case, target)
    kernels = tpu.tpu_kernels(compiled)
    assert kernels[-1].name == {"weight": "grouped_gradient"}.get(case.part, f"grouped_{case.weight}")
    prepared = {("nf4", "forward"): ["decode_scales", "deinterleave"], ("nf4", "rows"): ["decode_scales"]}
    assert [kernel.name for kernel in kernels[:-1]] == prepared.get((case.weight, case.part), [])
    assert kernels[-1].vmem_bytes > 0
    assert all(0 <= kernel.vmem_bytes <= VMEM_LIMIT for kernel in kernels)
    assert 1 <= tpu.program_flops(compiled) / case.useful_flops <= 1.15
    assert not re.search(r"= \S+ (dot|convolution|gather)\(", compiled.as_text())  # XLA adds no product, no look-up


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", ["q nf4 forward", "w2 nf4 forward"])
def test_a_token_alone_compiles_too(name: str, rows: int) -> None:
    """As decoding has it."""
    compiled = tpu.compile_case(dataclasses.replace(cases()[name], rows=rows), tpu.TARGETS[0])
    assert tpu.tpu_kernels(compiled)[-1].name == "grouped_nf4"


def test_rows_for_the_script() -> None:
    *scales, product = tpu.measure("v5e", ["w2 nf4 rows"])
    assert [row["kernel"] for row in scales] == ["decode_scales"]
    assert (product["kernel"], product["tile"]) == ("grouped_nf4", (128, 1024, 4096))
    assert product["shapes"] == {"x": (8192, 14_336), "w": (8, 14_336, 4096)}
    assert product["flops_ratio"] == pytest.approx(71 / 64)


def test_a_moe_layer_multiplies_little_beyond_the_useful() -> None:
    """No product over all experts: that alone would make it 8 times the useful FLOPs."""
    assert 1 <= layer.measure("v5e")["flops_ratio"] <= 1.15


def test_flops_that_cannot_be_counted_are_an_error() -> None:
    placed = jax.sharding.SingleDeviceSharding(devices("v5e")[0])
    x = jax.ShapeDtypeStruct((128, 128), jnp.float32, sharding=placed)
    looped = jax.jit(lambda x: jax.lax.fori_loop(0, 5, lambda i, y: jnp.tanh(y @ x), x)).lower(x).compile()
    with pytest.raises(BimedixError, match="counted"):
        tpu.program_flops(looped)
