"""Every TPU kernel compiles for v5e and v5p at the shapes of Mixtral-8x7B, by the compiler that libtpu brings."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bimedix_jax import codegen_tpu
from bimedix_jax.codegen import cases
from bimedix_jax.hardware import devices
from bimedix_jax.kernels import backends
from bimedix_jax.kernels.grouped_matmul import grouped_matmul
from bimedix_jax.kernels.grouped_matmul.mosaic_plan import VMEM_LIMIT
from bimedix_jax.kernels.nf4 import NF4Tensor


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("target", codegen_tpu.TARGETS)
def test_compiles_tight(target: str, name: str) -> None:
    case = cases()[name]
    compiled = codegen_tpu.compile_case(case, target)
    kernels = codegen_tpu.tpu_kernels(compiled)
    assert kernels[-1].name == {"weight": "grouped_gradient"}.get(case.part, f"grouped_{case.weight}")
    prepared = {("nf4", "forward"): ["decode_scales", "deinterleave"], ("nf4", "rows"): ["decode_scales"]}
    assert [kernel.name for kernel in kernels[:-1]] == prepared.get((case.weight, case.part), [])
    for kernel in kernels:
        assert 0 < kernel.vmem_bytes <= VMEM_LIMIT
    assert 1 <= compiled.cost_analysis()["flops"] / case.useful_flops <= 1.15
    assert not re.search(r"= \S+ (dot|convolution|gather)\(", compiled.as_text())  # XLA adds no product, no look-up


def test_rows_for_the_script() -> None:
    *scales, product = codegen_tpu.measure("v5e", ["w2 nf4 rows"])
    assert [row["kernel"] for row in scales] == ["decode_scales"]
    assert (product["kernel"], product["tile"]) == ("grouped_nf4", (128, 1024, 4096))
    assert product["shapes"] == {"x": (8192, 14_336), "w": (8, 14_336, 4096)}
    assert product["flops_ratio"] == pytest.approx(71 / 64)


@pytest.mark.parametrize("check_vma", [True, False])
def test_compiles_under_shard_map(check_vma: bool) -> None:
    """Each of eight chips multiplies its own rows by shared NF4 and by its own dense weights, forward and backward."""
    mesh = jax.make_mesh((8,), ("data",), devices=devices("v5e", 8), axis_types=(jax.sharding.AxisType.Auto,))

    def array(*shape: int, dtype: str, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def gradients(x: jax.Array, a: jax.Array, packed: jax.Array, absmax: jax.Array, groups: jax.Array) -> tuple:
        t = NF4Tensor(packed, absmax, None, None, unit_shape=(512, 256), transposed=True)
        return jax.grad(
            lambda x, a: jnp.sum(
                (grouped_matmul(x, t, groups[0]) + grouped_matmul(x, a, groups[0])).astype(jnp.float32) ** 2
            ),
            argnums=(0, 1),
        )(x, a)

    rows = P("data")
    specs = (rows, rows, P(), P(), rows)
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=(rows, rows), check_vma=check_vma)
    operands = (
        array(8 * 256, 256, dtype="bfloat16", spec=rows),
        array(8 * 4, 256, 512, dtype="bfloat16", spec=rows),
        array(4, 256 * 256, dtype="uint8", spec=P()),
        array(4, 512 * 4, dtype="float32", spec=P()),
        array(8, 4, dtype="int32", spec=rows),
    )
    with backends.use(platform="tpu"):
        compiled = jax.jit(sharded).lower(*operands).compile()
    names = " ".join(kernel.name for kernel in codegen_tpu.tpu_kernels(compiled))
    assert all(name in names for name in ("deinterleave", "grouped_dense", "grouped_gradient", "grouped_nf4"))
