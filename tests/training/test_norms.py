"""Norms of gradients by part and by expert, and the change of each expert, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bimedix_jax.adapters import add_lora
from bimedix_jax.models.config import LoraConfig
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.training.norms import gradient_norms, make_weight_change
from bimedix_jax.training.state import split_params

SOME = LoraConfig(rank=2, alpha=6.0, targets=("q", "layers.1.moe.experts.2.w2", "layers.0.moe.experts.3.w2"))
EVERY = LoraConfig(rank=2, alpha=6.0, targets=("q", "w1", "w2", "w3", "router"))


def drawn(shapes, seed):
    random = np.random.default_rng(seed)
    return {name: random.normal(size=x.shape).astype(np.float32) for name, x in sorted(shapes.items())}


def squares(x):
    return (np.asarray(x, np.float64) ** 2).sum((-2, -1))


@pytest.mark.parametrize("lora", [SOME, EVERY, None], ids=["some", "every", "full"])
def test_norms_of_parts_and_experts_add_up(config, lora):
    model = Mixtral(config, "float32") if lora is None else add_lora(Mixtral(config, "float32"), lora)
    structure, params, frozen = split_params(model)  # shapes only
    gradients, first = drawn(params, 0), drawn(params, 1)
    found = jax.jit(lambda x: gradient_norms(x, model, None))(gradients)
    np.testing.assert_allclose(found["grad_norm"], optax.tree.norm(gradients), rtol=1e-6)
    total = sum(float(norm) ** 2 for norm in found["grad_norms"].values())
    np.testing.assert_allclose(total, float(found["grad_norm"]) ** 2, rtol=1e-5)
    names = {"attention", "experts", *(["router"] if lora is not SOME else []), *(["other"] if lora is None else [])}
    assert set(found["grad_norms"]) == names

    own, change = np.zeros((2, 4)), np.zeros((2, 4))
    places = ([0, 1], [3, 2]) if lora is SOME else np.indices((2, 4)).reshape(2, -1)
    for kind in ("w1", "w2", "w3"):
        ours = {name.rpartition(".")[2]: name for name in gradients if f".{kind}." in name}
        for name in ours.values():
            own[tuple(places)] += squares(gradients[name]).reshape(-1)
        if "w" in ours:
            change[tuple(places)] += squares(gradients[ours["w"]] - first[ours["w"]]).reshape(-1)
        elif ours:
            now, then = (x[ours["a"]].astype(np.float64) @ x[ours["b"]] for x in (gradients, first))
            change[tuple(places)] += squares(3.0 * (now - then)).reshape(-1)  # alpha / rank
    np.testing.assert_allclose(found["expert_grad_norm"], np.sqrt(own), rtol=1e-5)
    moved = make_weight_change(structure)(jax.tree.map(jnp.asarray, gradients), first, shapeless(frozen))
    assert moved is not None
    np.testing.assert_allclose(moved, np.sqrt(change), rtol=1e-5)


def shapeless(frozen):
    """Small stand-ins for frozen weights that have a shape but no values; their values do not matter."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), frozen)


def test_small_changes_are_not_lost_to_rounding(config):
    """At the start b is 0; later it moves by a little, and a loaded adapter starts with large factors."""
    structure, params, frozen = split_params(add_lora(Mixtral(config, "float32"), EVERY))
    first = drawn(params, 1)
    step = {name: x + np.float32(1e-5) * (name.endswith("w2.lora.b")) for name, x in first.items()}
    found = make_weight_change(structure)(step, first, shapeless(frozen))
    assert found is not None
    a, b, b0 = (
        x.astype(np.float64)
        for x in (first["layers.moe.w2.lora.a"], *(y["layers.moe.w2.lora.b"] for y in (step, first)))
    )
    np.testing.assert_allclose(found, 3.0 * np.sqrt(squares(a @ (b - b0))), rtol=1e-4)


def test_runs_without_trained_experts_have_no_numbers_by_expert(config):
    lora = LoraConfig(rank=2, alpha=6.0, targets=("q",))
    structure, params, frozen = split_params(add_lora(Mixtral(config, "float32"), lora))
    gradients = drawn(params, 0)
    found = gradient_norms(gradients, structure.merge(params, frozen), None)
    assert set(found) == {"grad_norm", "grad_norms"}
    assert make_weight_change(structure)(gradients, gradients, shapeless(frozen)) is None
