"""The distance between experts is exactly 0 for copies, includes adapters, and is reported before and after
training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny

from bimedix_jax.adapters import add_lora
from bimedix_jax.models.config import LoraConfig
from bimedix_jax.models.init import init_random
from bimedix_jax.quantise import quantise_base
from bimedix_jax.quickstart.report import accuracies, divergence, overlap
from bimedix_jax.routing.claims import Gate
from bimedix_jax.routing.divergence import expert_distance, verdict


def copies(noise: float = 0.0):
    """A random model whose experts are copies of the first one, plus noise in units of its standard deviation."""
    model = init_random(tiny(), seed=1, std=0.2)
    for number, name in enumerate(("w1", "w2", "w3")):
        linear = getattr(model.layers.moe, name)
        w = linear.w.get_value()
        first = jnp.broadcast_to(w[:, :1], w.shape)
        linear.w.set_value(first + noise * 0.2 * jax.random.normal(jax.random.key(number), w.shape, w.dtype))
    return model


@pytest.mark.parametrize("four_bits", [False, True])
def test_copies_have_distance_zero_until_an_adapter_moves_one(four_bits):
    model = quantise_base(copies()) if four_bits else copies()
    model = add_lora(model, LoraConfig(rank=4, alpha=8.0), 0)
    assert expert_distance(model) == 0
    lora = model.layers.moe.w1.lora
    assert lora is not None
    b = lora.b
    b.set_value(b.get_value().at[:, 0].set(0.1))
    assert expert_distance(model) > 0


def test_noise_gives_the_distance_of_independent_draws():
    """|Wi - Wj| / |W| = sqrt(2) noise / sqrt(1 + noise^2)."""
    assert expert_distance(copies(0.1)) == pytest.approx(np.sqrt(2) * 0.1 / np.sqrt(1.01), rel=0.05)


def test_before_and_after_have_separate_sentences():
    zero = {"delta_nll": 0.0, "low": 0.0, "high": 0.0, "floor": 1e-4, "diverged": False}
    after = {"delta_nll": 0.2, "low": 0.1, "high": 0.3, "floor": 1e-4, "diverged": True}
    sentences = divergence({"before": zero, "after": after}, {"before": 0.0, "after": 0.02})
    assert sentences["before"].startswith("Before training: divergence gate fails: experts are identical (distance 0)")
    assert "exactly 0 nats" in sentences["before"]
    assert sentences["after"].startswith("After training: divergence gate holds: experts are 0.02 apart")
    assert "0.2 nats per token [0.1, 0.3]" in sentences["after"]


@pytest.mark.parametrize(("low", "word"), [(5e-5, "fails"), (None, "not tested"), (2e-4, "holds")])
def test_the_gate_decides_what_is_said_of_the_load(low, word):
    """However far the experts are apart."""
    high, diverged = (None, None) if low is None else (0.3, low > 1e-4)
    sentence = verdict(Gate(delta_nll=0.1, low=low, high=high, floor=1e-4, diverged=diverged), 0.3)
    assert sentence.startswith(f"divergence gate {word}: experts are 0.3 apart")
    assert ("says nothing about what experts do" in sentence) == (word != "holds")
    assert "speciali" not in sentence


def test_accuracies_have_number_and_interval():
    before = {"accuracy": 0.25, "low": 0.1, "high": 0.5, "n": 16}
    after = {"accuracy": 0.3125, "low": 0.14, "high": 0.56, "n": 16}
    scores = {"before": {"en": before}, "after": {"en": after}}
    assert accuracies(scores, {"en": 0.25}) == [("en", "25.0 [10.0, 50.0]", "31.2 [14.0, 56.0]", "16", "25.0")]
    assert overlap(scores)
    assert not overlap({"before": {"en": before}, "after": {"en": {**after, "low": 0.6, "high": 0.9}}})
