"""Compares one training step on every mesh of eight devices with the same step on one device.

    python scripts/measure_invariance.py --json         # eight fake CPU devices, some minutes

For every factorisation of 8 over (data, fsdp, expert, tensor), in float32, it reports the differences of the loss, the
gradients, and the weights after one SGD step, relative to the largest entry of each, and the number of tokens that were
routed differently. Rows have packed documents and padding, and the load-balancing loss has the scope "global". Four of
the meshes run again with an NF4 base and two micro-batches, for each scope of that loss.
"""

import argparse
import itertools
import json
import math
import os
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from bimedix_jax.adapters import add_lora
from bimedix_jax.errors import run_script
from bimedix_jax.experiment import RouterTraining
from bimedix_jax.models.config import LoraConfig, MixtralConfig, RouterConfig
from bimedix_jax.models.init import init_random
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.quantise import quantise_base
from bimedix_jax.sharding.placement import place
from bimedix_jax.sharding.rules import AXES, make_mesh
from bimedix_jax.training.state import split_params
from bimedix_jax.training.step import make_gradient

RATE = 0.1
"""Learning rate of the SGD step."""
FULL = ((1, 8, 1, 1), (1, 2, 2, 2), (2, 1, 4, 1), (1, 1, 2, 4))
"""Meshes of the second part, with an NF4 base and two micro-batches."""


def make_model(packed: bool) -> Mixtral:
    """A model that every mesh can shard, with nonzero adapters."""
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=512,
        num_layers=2,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64 if packed else 8,  # a 4-bit o is sharded along its columns, in blocks of 64
        router=RouterConfig(num_experts=8, top_k=2),
        rope_theta=10_000.0,
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_embeddings=False,
        max_position_embeddings=64,
    )
    model = init_random(config, dtype="float32", std=0.1)
    model = add_lora(quantise_base(model) if packed else model, LoraConfig(rank=4, alpha=8.0))
    factors = list(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)))
    for number, (_, variable) in enumerate(factors):
        noise = jax.random.normal(jax.random.key(number), variable.get_value().shape)
        variable.set_value(variable.get_value() + 0.05 * noise)
    nnx.update(model, nnx.from_flat_state(factors))
    return model


def make_batch(parts: int) -> dict[str, np.ndarray]:
    """[A, 8, 16]: packed documents, padding on the right, and rows without any token."""
    random = np.random.default_rng(0)
    shape = (parts, 8, 16)
    segment_ids = np.ones(shape, np.int32)
    segment_ids[0, 1, 10:], segment_ids[-1, 3:5], segment_ids[0, 2, 7:] = 0, 0, 2
    tokens = random.integers(0, 64, shape, dtype=np.int32)
    return {
        "tokens_BT": tokens,
        "segment_ids_BT": segment_ids,
        "loss_mask_BT": (random.random(shape) < 0.6) & (segment_ids != 0),
    }


def outcome(model: Mixtral, batch: dict[str, np.ndarray], scope: Any) -> dict[str, Any]:
    """Loss, gradients, weights after one SGD step, and routing."""
    structure, params, frozen = split_params(model)
    router = RouterTraining(aux_loss_coef=0.1, aux_scope=scope, z_loss_coef=0.01)
    gradients, sums = jax.jit(make_gradient(structure, router, "layer"))(params, frozen, batch)
    stepped = {name: params[name] - RATE * gradients[name] for name in params}
    out = model(batch["tokens_BT"][0], batch["segment_ids_BT"][0])
    host = jax.tree.map(np.asarray, {"gradients": gradients, "weights": stepped, "loss": sums["loss"]})
    return {**host, "experts": np.asarray(out.routing.experts_LBTK), "logits": np.asarray(out.logits_BTV)}


def furthest(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Largest difference in any array, relative to the largest entry of that array."""
    return max(float(np.max(np.abs(ours[n] - theirs[n])) / np.max(np.abs(theirs[n]))) for n in theirs)


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    return {
        "loss_diff": float(abs(ours["loss"] - theirs["loss"]) / abs(theirs["loss"])),
        "grad_diff": furthest(ours["gradients"], theirs["gradients"]),
        "sgd_diff": furthest(ours["weights"], theirs["weights"]),
        "logit_diff": furthest({"": ours["logits"]}, {"": theirs["logits"]}),
        "routes_diff": int(np.sum(np.any(ours["experts"] != theirs["experts"], axis=-1))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.parse_args()
    every = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(sizes) == 8]
    cases = [(False, 1, "global", sizes) for sizes in every]
    cases += [(True, 2, scope, sizes) for scope in ("global", "micro_batch", "sequence") for sizes in FULL]
    rows, alone = [], {}
    for packed, parts, scope, sizes in tqdm(cases, desc="meshes"):
        model, batch = make_model(packed), make_batch(parts)
        if (packed, scope) not in alone:
            alone[packed, scope] = outcome(model, batch, scope)
        differences = compare(outcome(place(model, make_mesh(*sizes)), batch, scope), alone[packed, scope])
        base = "nf4" if packed else "float32"
        rows.append(
            {"mesh": dict(zip(AXES, sizes, strict=True)), "base": base, "accumulation": parts, "aux_scope": scope}
            | differences
        )
    worst = {name: max(row[name] for row in rows) for name in ("loss_diff", "grad_diff", "sgd_diff", "routes_diff")}
    print(json.dumps({"rows": rows, "worst": worst}, indent=2))


if __name__ == "__main__":
    run_script(main)
