"""FLOPs and traffic of operations match their operands."""

import jax
import jax.numpy as jnp
import pytest

from bimedix_jax.bench.intensity import NF4, PHASES, D, F, works
from bimedix_jax.kernels.nf4 import quantize
from bimedix_jax.plan.codegen.cases import cases


def test_bytes_of_an_nf4_weight():
    t = jax.eval_shape(quantize, jax.ShapeDtypeStruct((F, D), jnp.bfloat16))
    assert pytest.approx(t.nbytes / t.size, rel=1e-5) == NF4


def test_flops_equal_those_of_the_compiled_cases():
    train = {work.operation: work.flops for work in works() if work.phase == PHASES[0].name}
    found = cases()
    products = sum(
        count * found[f"{name} nf4 {part}"].useful_flops
        for name, count in (("w1", 2), ("w2", 1))
        for part in ("forward", "rows")
    )
    assert train["experts, NF4 (grouped_matmul)"] == products
    attention = sum(2 * found[f"{name} nf4 {part}"].useful_flops for name in "qk" for part in ("forward", "rows"))
    assert train["q, k, v, o, NF4 (nf4_matmul)"] == attention


def test_training_is_compute_bound_and_decoding_memory_bound():
    intensities = {(work.operation, work.phase): work.intensity for work in works()}
    experts = [intensities["experts, NF4 (grouped_matmul)", phase.name] for phase in PHASES]
    assert experts == sorted(experts, reverse=True)
    assert experts[0] > 312e12 / 2.039e12 > experts[-1]
    work = works()[0]
    assert work.seconds(1.0, 1e30) == work.flops
    assert work.seconds(1e30, 1.0) == work.bytes
