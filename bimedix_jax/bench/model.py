"""The model of the whole-model benchmarks, and this project's side of them: a training step, a prefill, a decoding
step."""

import dataclasses
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bimedix_jax.adapters import add_lora
from bimedix_jax.checkpoint.load import check_router_name
from bimedix_jax.experiment import DataSource, Experiment, ModelSource, OptimiserConfig, RouterTraining
from bimedix_jax.inference.generate import Sampling, decode
from bimedix_jax.models.config import LoraConfig, MixtralConfig, Remat, RouterConfig
from bimedix_jax.models.init import init_random
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.quantise import quantise_base
from bimedix_jax.sharding.by_rows import store_for_training
from bimedix_jax.training.optimiser import make_optimiser
from bimedix_jax.training.state import init_state, split_params
from bimedix_jax.training.step import make_train_step


def architecture(vocabulary: int, width: int, hidden: int, layers: int, head_dim: int) -> MixtralConfig:
    """A Mixtral with 8 experts, top-2 routing, and 4 query heads for each key head."""
    heads = width // head_dim
    return MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=max(1, heads // 4),
        head_dim=head_dim,
        router=RouterConfig(num_experts=8, top_k=2),
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_embeddings=False,
        max_position_embeddings=4096,
    )


MODEL = architecture(vocabulary=32_000, width=512, hidden=1792, layers=4, head_dim=64)
"""122 M parameters in Mixtral-8x7B's proportions: enough work for two cores, and done in minutes."""
FULL_WIDTH = architecture(vocabulary=32_000, width=4096, hidden=14_336, layers=2, head_dim=128)
"""Two of the 32 layers of Mixtral-8x7B: 3.1 G parameters, for accelerators."""
SMOKE = architecture(vocabulary=128, width=64, hidden=64, layers=2, head_dim=16)
"""Runs in seconds, compilation included."""
SIZES = {"small": MODEL, "full_width": FULL_WIDTH, "smoke": SMOKE}

RANK, ALPHA = 16, 32.0
TARGETS = ("q", "k", "v", "w1", "w2", "w3", "router")
"""Adapters of the training benchmark, the same on both sides."""
BASES = ("bfloat16", "float32", "nf4")
"""Storage of our weights. For prefill and decoding the fastest is chosen unless --base names one."""
AUX_COEF, LEARNING_RATE, CLIP_NORM = 0.02, 1e-4, 1.0
STEPS = 1000
"""Length of the learning-rate schedule; a benchmark runs its first steps."""


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
      run: does the work once, and returns when the results are ready.
      dtype: of base and arithmetic, as text; its first word is the base.
      implementation: which implementation runs, as text.
      compile_seconds: time of the first run less that of a warm one; 0 where nothing is compiled.
    """

    run: Callable[[], Any]
    dtype: str
    implementation: str
    compile_seconds: float = 0.0


def threads() -> int:
    """Cores that this process may use. XLA uses all of them, and so does the peer."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def with_variant(config: MixtralConfig, variant: str | None) -> MixtralConfig:
    """The architecture with this router.

    Raises:
      BimedixError: no router has this name.
    """
    check_router_name(variant)
    router = config.router if variant is None else dataclasses.replace(config.router, variant=variant)
    return dataclasses.replace(config, router=router)


def base_model(config: MixtralConfig, base: str) -> Mixtral:
    """A model with random weights. It computes in bfloat16 unless the base is float32."""
    model = init_random(config, dtype="float32" if base == "float32" else "bfloat16")
    return quantise_base(model) if base == "nf4" else model


def tokens(config: MixtralConfig, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, length), dtype=np.int32)


def compile_seconds(run: Callable[[], Any]) -> float:
    """Seconds that the first run takes longer than the second."""
    taken = []
    for _ in range(2):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return max(0.0, taken[0] - taken[1])


def training(config: MixtralConfig, base: str, remat: Remat, batch: int, length: int) -> Side:
    """Whole optimiser steps: forward and backward pass, load balancing, clipping, AdamW."""
    model = add_lora(base_model(config, base), LoraConfig(rank=RANK, alpha=ALPHA, targets=TARGETS))
    experiment = Experiment(
        name="bench",
        model=ModelSource(random=config),
        lora=model.lora,
        data=DataSource(sequence_length=length, synthetic_rows=batch),
        router=RouterTraining(aux_loss_coef=AUX_COEF, aux_scope="micro_batch"),
        optimiser=OptimiserConfig(learning_rate=LEARNING_RATE, clip_norm=CLIP_NORM),
        steps=STEPS,
        remat=remat,
    )
    store_for_training(model)
    structure, params, frozen = split_params(model)
    optimiser = make_optimiser(experiment.optimiser, STEPS)
    step = make_train_step(structure, experiment, STEPS, optimiser)
    state = init_state(params, optimiser, structure.router_state(frozen))
    tokens_ABT = jnp.asarray(tokens(config, batch, length))[None]
    data = {
        "tokens_BT": tokens_ABT,
        "segment_ids_BT": jnp.ones_like(tokens_ABT),
        "loss_mask_BT": jnp.ones(tokens_ABT.shape, bool),
    }

    def train_step() -> float:
        nonlocal state
        state, metrics = step(state, frozen, data)
        jax.block_until_ready(state.params)
        return float(metrics["loss"])

    implementation = f"adapters of rank {RANK}, remat {remat}"
    return Side(train_step, f"{base} base, {model.dtype} arithmetic", implementation, compile_seconds(train_step))


def fastest(make: Callable[[str], Side], base: str | None, runs: int = 7) -> Side:
    """Our side on this base. None tries all of BASES, as `peer.fastest` tries all implementations of the peer.

    They take turns, and the best time of each counts.
    """
    sides = {name: make(name) for name in (BASES if base is None else (base,))}
    if len(sides) == 1:
        return sides[base or BASES[0]]
    seconds = dict.fromkeys(sides, math.inf)
    for _ in range(runs):
        for name, side in sides.items():
            began = time.perf_counter()
            side.run()
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    return sides[min(seconds, key=seconds.__getitem__)]


def prefill(config: MixtralConfig, base: str, batch: int, length: int) -> Side:
    """A forward pass with the logits of all positions."""
    model = base_model(config, base)
    tokens_BT = jnp.asarray(tokens(model.config, batch, length))
    graph, weights = nnx.split(model)
    forward = jax.jit(lambda weights, tokens_BT: nnx.merge(graph, weights)(tokens_BT).logits_BTV)

    def all_logits() -> jax.Array:
        return jax.block_until_ready(forward(weights, tokens_BT))

    dtype = f"{base} base, {model.dtype} arithmetic"
    return Side(all_logits, dtype, "logits of all positions", compile_seconds(all_logits))


def decoding(config: MixtralConfig, base: str, batch: int, prompt: int, steps: int, runs: int) -> Side:
    """Decodes `steps` greedy tokens for each row, continuing where the last call ended.

    It can be called `runs` times, besides the two calls that are made here.
    """
    model = base_model(config, base)
    prompts = list(tokens(config, batch, prompt))
    decoded = (tokens for tokens, _ in decode(model, prompts, 1 + steps * (runs + 2), Sampling.of(), seed=0))
    next(decoded)  # the token of the prefill

    def decode_steps() -> list[list[int]]:
        return [next(decoded) for _ in range(steps)]

    dtype = f"{base} base, {model.dtype} arithmetic"
    return Side(decode_steps, dtype, "key-value cache, one step a token", compile_seconds(decode_steps))
