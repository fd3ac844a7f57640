"""Adapters against transformers + peft on a tiny Mixtral: logits in both directions, gradients, losses of 30 steps.

    python scripts/measure_peft_parity.py            # a table
    python scripts/measure_peft_parity.py --json     # max_logit_diff, max_grad_rel_diff, max_loss_rel_diff, ...

Everything is float32, and every B is random instead of zero, so that every factor has a gradient.

`max_logit_diff`, by layout and direction, is the largest absolute difference of any logit (`largest_logit` is their
size). Under transformers 5 peft saves the fused layout only; an adapter "from peft" in the per-expert layout is written
here with torch, name by name as transformers 4 + peft do, and read by both sides.

`max_grad_rel_diff` is the largest |ours - theirs| / |theirs| (Frobenius) of the gradient of any factor of any matrix
in the first step, `max_loss_rel_diff` that of any loss. Both sides train q, k, v, w1, w2, w3 and the router from the
same adapter on the same right-padded batches, with the load-balancing loss, AdamW, weight decay and clipping. peft
keeps w1 and w3 as one adapter of twice the rank. Its B is block-diagonal at the start, but peft would train the blocks
that are zero too: their gradients are masked there, so that both sides train the same function. Over an NF4 base the
torch side has our dequantised weights.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bimedix_jax import startup
from bimedix_jax.errors import run_script

MODEL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
RANK, ALPHA = 4, 8.0
AUX_COEF = 0.02
STEPS, BATCHES, ROWS, LENGTH = 30, 3, 6, 24
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 3e-3, 0.05, 1.0
BASES = ("dense", "nf4")
EXPERTS, FFN = MODEL["num_local_experts"], MODEL["intermediate_size"]


def write_base(folder: Path) -> Path:
    """A random float32 Mixtral, saved by transformers."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(**MODEL, pad_token_id=None)
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def torch_model(base: Path) -> Any:
    import transformers

    # torch's grouped_mm refuses odd widths
    eager: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return transformers.MixtralForCausalLM.from_pretrained(base, **eager).eval()


def with_peft(base: Path, adapter: Path, trainable: bool = False) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(torch_model(base), str(adapter), is_trainable=trainable).eval()


def with_adapters(model: Any) -> Any:
    """Our adapters: the paper's targets with a small rank and a random B."""
    import jax.numpy as jnp

    from bimedix_jax.adapters import add_lora, linears
    from bimedix_jax.models.config import LoraConfig

    adapted, random = add_lora(model, LoraConfig(rank=RANK, alpha=ALPHA)), np.random.default_rng(1)
    for layer in linears(adapted).values():
        if layer.lora is not None:
            shape = layer.lora.b.get_value().shape
            layer.lora.b.set_value(jnp.asarray(random.normal(0, 0.05, shape), jnp.float32))
    return adapted


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """The logits of one of our models, or of one of torch's."""
    import torch

    if isinstance(model, torch.nn.Module):
        with torch.no_grad():
            return model(torch.tensor(tokens)).logits.numpy()
    return np.asarray(model(tokens).logits_BTV)


def peft_fused(base: Path, folder: Path) -> Path:
    """An adapter that peft made and saved. All of B is random, so that w1 and w3 share their ranks."""
    import peft
    import torch

    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    config = peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=["q_proj", "k_proj"], target_parameters=parameters)
    model = peft.get_peft_model(torch_model(base), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    model.save_pretrained(str(folder))
    return folder


def peft_per_expert(folder: Path) -> Path:
    """An adapter in the layout of transformers 4 + peft, written with torch."""
    import peft
    import torch
    from safetensors.torch import save_file

    width, generator = MODEL["hidden_size"], torch.Generator().manual_seed(2)
    shapes = {"self_attn.q_proj": (width, width), "block_sparse_moe.gate": (width, EXPERTS)}
    for expert in range(EXPERTS):
        names = {"w1": (width, FFN), "w2": (FFN, width), "w3": (width, FFN)}
        shapes |= {f"block_sparse_moe.experts.{expert}.{name}": shape for name, shape in names.items()}
    tensors = {}
    for layer in range(MODEL["num_hidden_layers"]):
        for module, (width_in, width_out) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(RANK, width_in, generator=generator)
            tensors[f"{name}.lora_B.weight"] = 0.05 * torch.randn(width_out, RANK, generator=generator)
    config = peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=["q_proj", "gate", "w1", "w2", "w3"])
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def logit_differences(base: Path, scratch: Path) -> dict[str, Any]:
    """max_logit_diff by layout and direction, and the largest logit."""
    from bimedix_jax.checkpoint.load import load
    from bimedix_jax.checkpoint.peft_write import LAYOUTS, export_peft

    tokens = np.random.default_rng(0).integers(0, MODEL["vocab_size"], (2, LENGTH))
    plain = load(base, base="float32")
    ours = with_adapters(plain)
    expected, largest, found = logits(ours, tokens), 0.0, {}
    for layout in LAYOUTS:
        folder = export_peft(ours, scratch / f"ours-{layout}", layout)
        theirs = scratch / f"theirs-{layout}"
        theirs = peft_fused(base, theirs) if layout == "fused" else peft_per_expert(theirs)
        here, there = (logits(model, tokens) for model in (load(base, "float32", theirs), with_peft(base, theirs)))
        found[layout] = {
            "ours_to_peft": difference(logits(with_peft(base, folder), tokens), expected),
            "peft_to_ours": difference(here, there),
        }
        largest = max(largest, *(float(np.abs(x).max()) for x in (expected, there)))
        moved = min(difference(x, logits(plain, tokens)) for x in (expected, there))
        if moved < 0.05 * largest:
            raise RuntimeError(f"the adapters move the logits by {moved} only, which would hide an error")
    return {"max_logit_diff": found, "largest_logit": largest}


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max())


def batches() -> list[dict[str, np.ndarray]]:
    """Right-padded rows of one document each, a part of whose tokens are targets."""
    random = np.random.default_rng(3)
    made = []
    for _ in range(BATCHES):
        lengths = random.integers(LENGTH // 2, LENGTH + 1, ROWS)
        valid = np.arange(LENGTH) < lengths[:, None]
        made.append(
            {
                "tokens_BT": random.integers(0, MODEL["vocab_size"], (ROWS, LENGTH), dtype=np.int32),
                "segment_ids_BT": valid.astype(np.int32),
                "loss_mask_BT": (random.random((ROWS, LENGTH)) < 0.7) & valid,
            }
        )
    return made


def train_here(model: Any) -> tuple[dict[str, np.ndarray], list[float]]:
    """(gradients of the first step, losses) of the project's own training step."""
    import jax
    import jax.numpy as jnp

    from bimedix_jax.experiment import DataSource, Experiment, ModelSource, OptimiserConfig, RouterTraining
    from bimedix_jax.training.optimiser import make_optimiser
    from bimedix_jax.training.rows import micro_batches
    from bimedix_jax.training.state import init_state, split_params
    from bimedix_jax.training.step import make_gradient, make_train_step

    experiment = Experiment(
        name="parity",
        model=ModelSource(path="base"),
        lora=model.lora,
        data=DataSource(sequence_length=LENGTH, synthetic_rows=ROWS),
        router=RouterTraining(aux_loss_coef=AUX_COEF, aux_scope="micro_batch"),
        optimiser=OptimiserConfig(
            learning_rate=LEARNING_RATE, warmup_steps=2, weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM
        ),
        steps=STEPS,
        remat="none",
    )
    structure, params, frozen = split_params(model)
    optimiser = make_optimiser(experiment.optimiser, STEPS)
    state, losses = init_state(params, optimiser), []
    step = make_train_step(structure, experiment, STEPS, optimiser)
    data = [jax.tree.map(jnp.asarray, micro_batches(batch, 1)) for batch in batches()]
    gradient, _ = jax.jit(make_gradient(structure, experiment.router, "none"))(state.params, frozen, data[0])
    for number in range(STEPS):
        state, metrics = step(state, frozen, data[number % BATCHES])
        losses.append(float(metrics["loss"]))
    return {name: np.asarray(value) for name, value in gradient.items()}, losses


def train_there(model: Any) -> tuple[dict[str, np.ndarray], list[float]]:
    """(gradients of the first step, losses) of transformers + peft under torch's AdamW, in our names."""
    import torch

    from bimedix_jax.experiment import OptimiserConfig
    from bimedix_jax.training.optimiser import schedule

    mask_shared_ranks(model)
    model.base_model.model.router_aux_loss_coef = AUX_COEF
    rate = schedule(OptimiserConfig(learning_rate=LEARNING_RATE, warmup_steps=2), STEPS)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=WEIGHT_DECAY)
    gradient, losses, data = {}, [], batches()
    for number in range(STEPS):
        batch = data[number % BATCHES]
        tokens = torch.tensor(batch["tokens_BT"]).long()
        labels = torch.where(torch.tensor(batch["loss_mask_BT"]), tokens, -100)
        mask = torch.tensor(batch["segment_ids_BT"]).long()
        adamw.param_groups[0]["lr"] = np.asarray(rate(number)).item()
        adamw.zero_grad()
        out = model(input_ids=tokens, attention_mask=mask, labels=labels, output_router_logits=True)
        out.loss.backward()
        if number == 0:
            gradient = in_our_layout(model, lambda parameter: parameter.grad.numpy().copy())
        torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        adamw.step()
        losses.append(out.loss.item())
    return gradient, losses


def mask_shared_ranks(model: Any) -> None:
    """Keeps B of gate_up_proj block-diagonal: ranks of w1 for w1's outputs, of w3 for w3's."""
    import torch

    block = torch.zeros(2 * FFN, 2 * RANK, EXPERTS)
    block[:FFN, :RANK] = block[FFN:, RANK:] = 1
    block = block.reshape(2 * FFN, -1)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.experts.base_layer.lora_B.default.weight"):
            if (parameter * (1 - block)).any():
                raise RuntimeError(f"{name} is not block-diagonal")
            parameter.register_hook(lambda gradient: gradient * block)


def in_our_layout(model: Any, of: Callable[[Any], np.ndarray]) -> dict[str, np.ndarray]:
    """`of(parameter)` of every factor, under our names and stacked as ours are."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def factors(module: str) -> tuple[np.ndarray, np.ndarray]:
        """A [L, r, in] and B [L, out, r] of a module over layers."""
        layers = range(MODEL["num_hidden_layers"])
        name = "base_model.model.model.layers.{}.{}.lora_{}.default.weight"
        a, b = (np.stack([of(named.pop(name.format(layer, module, f))) for layer in layers]) for f in "AB")
        return a, b

    found = {}
    for path, module in {
        "attention.q": "self_attn.q_proj",
        "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj",
        "moe.router": "mlp.gate",
    }.items():
        a, b = factors(module)
        found[path] = a.swapaxes(1, 2), b.swapaxes(1, 2)
    for kinds, module in ((("w1", "w3"), "mlp.experts.base_layer"), (("w2",), "mlp.experts")):
        a, b = factors(module)
        layers, rank = a.shape[0], len(kinds) * RANK
        a_LEDR = a.reshape(layers, EXPERTS, rank, -1).swapaxes(2, 3)
        b_LERF = b.reshape(layers, -1, rank, EXPERTS).transpose(0, 3, 2, 1)
        width = b_LERF.shape[3] // len(kinds)
        for place, kind in enumerate(kinds):
            ranks, outputs = slice(place * RANK, (place + 1) * RANK), slice(place * width, (place + 1) * width)
            found[f"moe.{kind}"] = a_LEDR[..., ranks], b_LERF[:, :, ranks, outputs]
    if named:
        raise RuntimeError(f"not compared: {sorted(named)}")
    return {f"layers.{path}.lora.{factor}": pair[i] for path, pair in found.items() for i, factor in enumerate("ab")}


def gradient_differences(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """By factor, the largest relative difference of any of its matrices."""
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"the sides train different things: {sorted(ours.keys() ^ theirs.keys())}")
    found = {}
    for name, expected in theirs.items():
        apart = np.linalg.norm(ours[name] - expected, axis=(-2, -1)) / np.linalg.norm(expected, axis=(-2, -1))
        found[name] = float(apart.max())
    return found


def training_differences(base: Path, scratch: Path, kind: str) -> dict[str, Any]:
    """Gradients and losses on a dense or 4-bit base."""
    from bimedix_jax.checkpoint.hf import export_hf
    from bimedix_jax.checkpoint.load import load
    from bimedix_jax.checkpoint.peft_write import export_peft

    model = load(base, base="float32" if kind == "dense" else "nf4", dtype="float32")
    reference = base if kind == "dense" else export_hf(model, scratch / "dequantised")
    adapted = with_adapters(model)
    theirs = with_peft(reference, export_peft(adapted, scratch / f"start-{kind}", "fused"), trainable=True)
    here, our_losses = train_here(adapted)
    there, their_losses = train_there(theirs)
    gradients = gradient_differences(here, there)
    losses = np.abs(np.array(our_losses) / np.array(their_losses) - 1)
    return {
        "max_grad_rel_diff": max(gradients.values()),
        "max_loss_rel_diff": float(losses.max()),
        "grad_rel_diff": gradients,
        "first_loss": our_losses[0],
        "last_loss": our_losses[-1],
    }


def measure() -> dict[str, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(prefix="measure-peft-parity-") as folder:
        scratch = Path(folder)
        base = write_base(scratch / "base")
        print("comparing logits", file=sys.stderr)
        result = logit_differences(base, scratch)
        by_base = {}
        for kind in BASES:
            print(f"training on a base that is {kind}", file=sys.stderr)
            by_base[kind] = training_differences(base, scratch, kind)
    for key in ("max_grad_rel_diff", "max_loss_rel_diff"):
        result[key] = max(by_base[kind][key] for kind in BASES)
    training = {"steps": STEPS, "batches": BATCHES, "rows": ROWS, "length": LENGTH, "aux_loss_coef": AUX_COEF}
    return {
        **result,
        "by_base": by_base,
        "model": MODEL,
        "adapters": {"rank": RANK, "alpha": ALPHA},
        "training": training,
        "versions": {name: version(name) for name in ("jax", "torch", "transformers", "peft")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    startup.prepare()
    result = measure()
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for layout, directions in result["max_logit_diff"].items():
        for direction, value in directions.items():
            print(f"logits, {layout}, {direction}: {value:.1e} of {result['largest_logit']:.1f}")
    for kind, found in result["by_base"].items():
        gradients, losses = found["max_grad_rel_diff"], found["max_loss_rel_diff"]
        print(f"{kind} base: gradients within {gradients:.1e}, losses of {STEPS} steps within {losses:.1e}")


if __name__ == "__main__":
    run_script(main)
