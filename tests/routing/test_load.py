"""Expert load against the model's record, in any batch size, and its plot."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny

from bimedix_jax.data.encoding import encode_chat
from bimedix_jax.data.records import Record, conversation
from bimedix_jax.data.tokenizer import byte_tokenizer
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.init import init_random
from bimedix_jax.routing.load import expert_load
from bimedix_jax.routing.load_and_gate import load_and_gate
from bimedix_jax.routing.picture import draw

CONFIG = tiny(num_layers=3)
TEXTS = [
    ("en", "qa", "What is asthma?", "A chronic disease."),
    ("en", "chat", "I cough.", "Since when?"),
    ("ar", "qa", "ما الربو؟", "مرض مزمن."),
    ("en", "qa", "Why?", "Nobody knows."),
]


@pytest.fixture(scope="module")
def model():
    return init_random(CONFIG, seed=4, std=0.3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def records():
    return [
        Record.model_validate(
            {"id": str(i), "language": language, "kind": kind, "source": "test", "licence": "Apache-2.0"}
            | {"conversations": conversation(*turns)}
        )
        for i, (language, kind, *turns) in enumerate(TEXTS)
    ]


def test_counts_equal_those_of_the_models_record(model, tokenizer, records):
    found = expert_load(model, tokenizer, records)
    assert sorted(found.counts) == ["ar", "ar/qa", "en", "en/chat", "en/qa"]
    ids, _ = encode_chat(tokenizer, records[2].conversations)
    routing = model.hidden(np.array([ids]), record="full").routing
    experts = np.asarray(routing.experts_LBTK).reshape(3, -1)
    np.testing.assert_array_equal(found.counts["ar"], [np.bincount(row, minlength=4) for row in experts])
    np.testing.assert_allclose(found.top_weight["ar"], np.asarray(routing.weights_LBTK).max(-1).mean((1, 2)), rtol=1e-5)
    assert found.tokens["ar"] == len(ids)


def test_the_load_with_the_gate_is_the_same(model, tokenizer, records):
    """The gate's cost is that of the recorder; identical experts need no run."""
    expected = expert_load(model, tokenizer, records)
    found, gate = load_and_gate(model, tokenizer, records)
    for group, counts in expected.counts.items():
        np.testing.assert_array_equal(found.counts[group], counts)
        np.testing.assert_allclose(found.entropy[group], expected.entropy[group], rtol=1e-4)
        np.testing.assert_allclose(found.top_weight[group], expected.top_weight[group], rtol=1e-4)
    assert (found.tokens, found.too_long) == (expected.tokens, 0)
    assert gate.delta_nll != 0
    assert gate.floor < 1e-3
    assert (gate.low, gate.diverged) == (None, None)  # four records
    found, gate = load_and_gate(model, tokenizer, records, identical=True)
    assert (gate.delta_nll, gate.low, gate.high, gate.diverged) == (0, 0, 0, False)
    np.testing.assert_array_equal(found.counts["en"], expected.counts["en"])


def test_groups_add_up(model, tokenizer, records):
    found = expert_load(model, tokenizer, records)
    np.testing.assert_array_equal(found.counts["en"], found.counts["en/qa"] + found.counts["en/chat"])
    assert found.tokens["en"] == found.tokens["en/qa"] + found.tokens["en/chat"]
    for group, counts in found.counts.items():
        np.testing.assert_array_equal(counts.sum(axis=1), 2 * found.tokens[group])
        np.testing.assert_allclose(found.share(group).sum(axis=1), 1.0)
    weights = np.array([found.tokens["en/qa"], found.tokens["en/chat"]]) / found.tokens["en"]
    mixed = weights[0] * found.entropy["en/qa"] + weights[1] * found.entropy["en/chat"]
    np.testing.assert_allclose(found.entropy["en"], mixed, rtol=1e-6)


def test_batches_change_nothing(model, tokenizer, records):
    one, other = expert_load(model, tokenizer, records, batch_tokens=1), expert_load(model, tokenizer, records[::-1])
    for group in one.counts:
        np.testing.assert_array_equal(one.counts[group], other.counts[group])
        np.testing.assert_allclose(one.entropy[group], other.entropy[group], rtol=1e-5)


def test_a_uniform_router_has_the_largest_entropy(tokenizer, records):
    model = init_random(CONFIG, seed=4)
    router = model.layers.moe.router.w
    router.set_value(jnp.zeros_like(router.get_value()))
    found = expert_load(model, tokenizer, records)
    np.testing.assert_allclose(found.entropy["en"], math.log(4), rtol=1e-6)
    np.testing.assert_allclose(found.top_weight["en"], 0.5, rtol=1e-6)


def test_long_records_are_counted(model, tokenizer, records):
    assert expert_load(model, tokenizer, records, max_length=50).too_long == 2
    with pytest.raises(BimedixError, match="at most 3 tokens"):
        expert_load(model, tokenizer, records, max_length=3)


def test_the_plot_is_a_png_with_every_panel(model, tokenizer, records, tmp_path):
    found = expert_load(model, tokenizer, records)
    path = draw({"before": found, "after": found}, tmp_path / "new" / "load.png", notes={"before": "identical"})
    assert path.read_bytes().startswith(b"\x89PNG")
    english = expert_load(model, tokenizer, records[:2])
    draw({"now": english}, tmp_path / "one.png")
    with pytest.raises(BimedixError, match="different languages"):
        draw({"before": found, "after": english}, tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()
