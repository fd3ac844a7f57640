"""Kernels inside shard_map compile for eight A100s and eight TPUs, with `check_vma` and without."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.grouped_matmul import grouped_matmul
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4_matmul import matmul
from bimedix_jax.plan.hardware import devices

KERNELS = {"gpu": ("grouped_matmul_", "nf4_matmul_", "weight_gradient_"), "tpu": ("grouped_nf4", "grouped_gradient")}
"""Parts of names in the compiled programs."""


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(("target", "platform"), [("a100-80gb", "gpu"), ("v5e", "tpu")])
def test_compiles_under_shard_map(target: str, platform: str, check_vma: bool) -> None:
    """Each of eight devices multiplies its rows by shared weights, 4-bit and dense; gradients are summed."""
    mesh = jax.make_mesh((8,), ("data",), devices=devices(target, 8), axis_types=(jax.sharding.AxisType.Auto,))

    def array(*shape: int, dtype: str, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def gradients(x: jax.Array, w: jax.Array, packed: jax.Array, absmax: jax.Array, groups: jax.Array) -> tuple:
        t = NF4Tensor(packed, absmax, None, None, unit_shape=(512, 256), transposed=True)

        def loss(x: jax.Array, w: jax.Array) -> jax.Array:
            y = grouped_matmul(x, t, groups[0]) + grouped_matmul(x, w, groups[0]) + matmul(x, t[0])
            return jnp.sum(y.astype(jnp.float32) ** 2)

        dx, dw = jax.grad(loss, argnums=(0, 1))(x, w)
        return dx, dw if check_vma else jax.lax.psum(dw, "data")

    rows = P("data")
    specs = (rows, P(), P(), P(), rows)
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=(rows, P()), check_vma=check_vma)
    operands = (
        array(8 * 256, 256, dtype="bfloat16", spec=rows),
        array(4, 256, 512, dtype="bfloat16", spec=P()),
        array(4, 256 * 256, dtype="uint8", spec=P()),
        array(4, 512 * 4, dtype="float32", spec=P()),
        array(8, 4, dtype="int32", spec=rows),
    )
    with backends.use(device=mesh.devices.flat[0]):
        text = jax.jit(sharded).lower(*operands).compile().as_text() or ""
    assert all(name in text for name in (*KERNELS[platform], "all-reduce"))
