"""Attention's kernels compiled for absent GPUs and TPUs, at the shapes of Mixtral-8x7B."""

from collections.abc import Iterator
from typing import Any

from bimedix_jax.costs.flops import matmul_flops
from bimedix_jax.models.config import MIXTRAL_8X7B
from bimedix_jax.plan.attention import PRODUCTS, TRITON, is_attention

TOKENS = 4096
BACKENDS = {"gpu": "triton", "tpu": "splash"}


def gradients(backend: str, length: int, target: str, dtype: str = "bfloat16", width: int | None = None) -> tuple:
    """(function of q, k, v, segment ids and the result's cotangent; its abstract operands on a device of `target`)."""
    import jax
    import jax.numpy as jnp

    from bimedix_jax.kernels.attention import attention
    from bimedix_jax.plan.hardware import devices

    config = MIXTRAL_8X7B
    placed = jax.sharding.SingleDeviceSharding(devices(target)[0])

    def array(*shape: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, dout: jax.Array) -> tuple:
        out, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, ids, ids, backend=backend), q, k, v)
        return out, pullback(dout)

    q = array(1, length, config.num_heads, width or config.head_dim)
    kv = array(1, length, config.num_kv_heads, width or config.head_dim)
    return both, (q, kv, kv, array(1, length, dtype=jnp.int32), q)


def measure_gpu(target: str, dtype: str = "bfloat16", width: int | None = None) -> Iterator[dict[str, Any]]:
    """A row for each kernel of the forward and backward pass: figures of ptxas, and FLOPs over the useful ones."""
    from bimedix_jax.kernels import backends
    from bimedix_jax.plan.attention import blocks_visited
    from bimedix_jax.plan.codegen.gpu import gpu_kernels
    from bimedix_jax.plan.hardware import devices

    function, operands = gradients("triton", TOKENS, target, dtype, width)
    with backends.use(device=devices(target)[0]):
        kernels = gpu_kernels(function, *operands)
    for kernel in kernels:
        if (found := TRITON.fullmatch(kernel.name)) is None:
            continue
        rows, columns, head = (int(found[i]) for i in (2, 3, 4))
        visited = blocks_visited(TOKENS, TOKENS, rows, columns) * matmul_flops(rows, head, columns)
        yield {
            "target": target,
            "case": f"attention {found[1]}, {dtype}",
            "kernel": f"attention_{found[1]}",
            "shapes": {"q": operands[0].shape, "k": operands[1].shape},
            "dtype": dtype,
            "tile": (rows, columns, head),
            "registers": kernel.registers,
            "spill_bytes": kernel.spill_bytes,
            "shared_bytes": kernel.shared_bytes,
            "grid": kernel.grid,
            "threads": kernel.threads,
            "products": PRODUCTS[found[1]],
            "flops_ratio": visited / matmul_flops(TOKENS * (TOKENS + 1) // 2, head, 1),
        }


def measure_tpu(target: str) -> Iterator[dict[str, Any]]:
    """A row for each kernel of JAX's splash attention."""
    import jax

    from bimedix_jax.kernels import backends
    from bimedix_jax.plan.codegen.tpu import tpu_kernels
    from bimedix_jax.plan.hardware import devices

    function, operands = gradients("splash", TOKENS, target)
    with backends.use(device=devices(target)[0]):
        compiled = jax.jit(function).lower(*operands).compile()
    for kernel in tpu_kernels(compiled):
        if is_attention(kernel.name):
            shapes = {"q": operands[0].shape, "k": operands[1].shape}
            yield {
                "target": target,
                "case": f"attention {kernel.name.split('_')[2]}",
                "kernel": kernel.name,
                "shapes": shapes,
                "dtype": "bfloat16",
                "vmem_bytes": kernel.vmem_bytes,
            }
