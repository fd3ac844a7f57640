"""Training all parameters equals transformers' Mixtral with torch's AdamW."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bimedix_jax.checkpoint.load import load
from bimedix_jax.experiment import OptimiserConfig, RouterTraining
from bimedix_jax.training.optimiser import make_optimiser, schedule
from bimedix_jax.training.rows import micro_batches
from bimedix_jax.training.state import init_state, split_params
from bimedix_jax.training.step import make_train_step

DEFAULT_KERNELS = True
STEPS = 5
CLIP = 0.5
OPTIMISER = OptimiserConfig(learning_rate=0.01, warmup_steps=2, weight_decay=0.1, clip_norm=CLIP)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    import torch
    import transformers

    torch.manual_seed(0)
    kernels: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    config = transformers.MixtralConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=None,
        **kernels,
    )
    model = transformers.MixtralForCausalLM(config)
    folder = tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(folder)
    return model, folder


def torch_losses(model, data):
    """The losses of all steps on one right-padded batch, with the load-balancing loss. Norms are not decayed."""
    import torch

    tokens = torch.tensor(data["tokens_BT"]).long()
    mask = torch.tensor(data["segment_ids_BT"] != 0).long()
    learned = torch.tensor(data["loss_mask_BT"])[:, 1:] & (mask[:, 1:] * mask[:, :-1]).bool()
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if "norm" not in name], "weight_decay": OPTIMISER.weight_decay},
        {"params": [p for name, p in named.items() if "norm" in name], "weight_decay": 0.0},
    ]
    adamw, losses = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8), []
    for step in range(STEPS):
        for group in adamw.param_groups:
            group["lr"] = np.asarray(schedule(OPTIMISER, STEPS)(step)).item()
        adamw.zero_grad()
        out = model(input_ids=tokens, attention_mask=mask, output_router_logits=True)
        logits = out.logits[:, :-1][learned]
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:][learned]) + 0.1 * out.aux_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adamw.step()
        losses.append(loss.item())
    return losses


def test_losses_of_five_steps(pretrained, experiment):
    theirs, folder = pretrained
    random = np.random.default_rng(0)
    segment_ids = np.ones((3, 12), np.int32)
    segment_ids[1, 8:] = 0
    data = {
        "tokens_BT": random.integers(0, 61, (3, 12), dtype=np.int32),
        "segment_ids_BT": segment_ids,
        "loss_mask_BT": (random.random((3, 12)) < 0.7) & (segment_ids != 0),
    }
    router = RouterTraining(aux_loss_coef=0.1, aux_scope="micro_batch")
    plan = dataclasses.replace(experiment(), lora=None, router=router, optimiser=OPTIMISER)
    structure, params, frozen = split_params(load(folder, base="float32"))
    optimiser = make_optimiser(OPTIMISER, STEPS)
    state, ours = init_state(params, optimiser), []
    step = make_train_step(structure, plan, STEPS, optimiser)
    for _ in range(STEPS):
        state, metrics = step(state, frozen, jax.tree.map(jnp.asarray, micro_batches(data, 1)))
        ours.append(float(metrics["loss"]))
    expected = torch_losses(theirs, data)
    assert expected[-1] < expected[0] - 0.1
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
