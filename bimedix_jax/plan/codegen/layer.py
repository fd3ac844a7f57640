"""One MoE layer of Mixtral-8x7B, forward and backward pass, compiled for accelerators that this machine need not
have."""

import time
from dataclasses import replace
from typing import Any

from bimedix_jax.costs import devices, flops
from bimedix_jax.models.config import MIXTRAL_8X7B
from bimedix_jax.plan import hlo, roofline
from bimedix_jax.plan.codegen import gpu, tpu
from bimedix_jax.plan.codegen.cases import RANK


def compile_layer(target: str, tokens: int) -> Any:
    """The compiled program, with NF4 experts and adapters of rank RANK on experts and router.

    Raises:
      BimedixError: the extra `aot` is not installed.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from bimedix_jax.adapters import add_lora
    from bimedix_jax.kernels import backends
    from bimedix_jax.models.config import LoraConfig
    from bimedix_jax.models.mixtral import Mixtral
    from bimedix_jax.models.routers import RoutingPlan
    from bimedix_jax.plan import hardware
    from bimedix_jax.quantise import quantise_base

    config = replace(MIXTRAL_8X7B, num_layers=1)
    lora = LoraConfig(rank=RANK, alpha=1.0, targets=("w1", "w2", "w3", "router"))
    graph, trained, frozen = nnx.split(add_lora(quantise_base(Mixtral(config)), lora).layers.moe, nnx.LoRAParam, ...)

    def output(x_BTD: jax.Array, trained: Any, frozen: Any) -> jax.Array:
        moe = nnx.merge(graph, *(jax.tree.map(lambda leaf: leaf[0], state) for state in (trained, frozen)))
        return moe(x_BTD, jnp.ones(x_BTD.shape[:2], bool), RoutingPlan())[0]

    def gradients(x_BTD: jax.Array, dy_BTD: jax.Array, trained: Any, frozen: Any) -> Any:
        y_BTD, pullback = jax.vjp(lambda x, trained: output(x, trained, frozen), x_BTD, trained)
        return y_BTD, pullback(dy_BTD)

    x_BTD = jax.ShapeDtypeStruct((1, tokens, config.hidden_size), jnp.bfloat16)
    [device] = hardware.devices(target)
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (x_BTD, x_BTD, trained, frozen)
    )
    with backends.use(device=device):
        return jax.jit(gradients).lower(*arguments).compile()


def useful_flops(tokens: int) -> int:
    """FLOPs that the layer cannot avoid, for experts and router: base products, adapters, and their gradients."""
    shapes = flops.linear_shapes(MIXTRAL_8X7B)
    rows = dict.fromkeys(flops.EXPERTS, MIXTRAL_8X7B.router.top_k * tokens) | {flops.ROUTER: tokens}
    base = sum(flops.matmul_flops(count, *shapes[name]) for name, count in rows.items())
    adapters = sum(flops.low_rank_flops(count, *shapes[name], RANK) for name, count in rows.items())
    return flops.FROZEN * base + flops.TRAINED * adapters


def measure(target: str, tokens: int = 4096) -> dict[str, Any]:
    """`flops_ratio`: FLOPs of the compiled program over the useful ones.

    On a GPU these are the FLOPs of matrix products. On a TPU they are all FLOPs that the compiler counts.

    Raises:
      BimedixError: the extra `aot` is not installed, or the program contains what cannot be counted.
    """
    began = time.perf_counter()
    compiled = compile_layer(target, tokens)
    seconds = time.perf_counter() - began
    if target in gpu.TARGETS:
        counted = roofline.costs_of(hlo.parse(compiled.as_text()), devices.DEVICES[target]).total_flops
    else:
        counted = tpu.program_flops(compiled)
    return {
        "target": target,
        "case": "MoE layer, forward and backward",
        "flops_ratio": counted / useful_flops(tokens),
        "compile_seconds": seconds,
    }
