"""Batch size, packing, order and sharding change log-likelihoods in float32 by rounding only: at most 1e-5."""

import numpy as np
import pytest

from bimedix_jax.evals.accuracy import TIE, ties
from bimedix_jax.evals.heldout import heldout_loss
from bimedix_jax.evals.multiple_choice import multiple_choice
from bimedix_jax.kernels import backends
from bimedix_jax.sharding.placement import place
from bimedix_jax.sharding.rules import make_mesh


@pytest.fixture(scope="module", autouse=True)
def quick_kernels():
    with backends.use(expert_mlp="composed", grouped_matmul="ragged_dot"):
        yield


def logprobs(model, tokenizer, records, batch_tokens=4096):
    """The log-likelihoods of all options, by question, and the choices."""
    found = multiple_choice(model, tokenizer, records, batch_tokens=batch_tokens).predictions
    assert not any(ties((one.groups, one.letters or one.texts) for one in found).values())
    return {one.id: np.array([*(one.letters or ()), *one.texts]) for one in found}, {
        one.id: one.chosen for one in found
    }


def check(found, expected):
    for name, values in expected[0].items():
        np.testing.assert_allclose(found[0][name], values, rtol=0, atol=TIE)
    assert found[1] == expected[1]


@pytest.fixture(scope="module")
def expected(model, tokenizer, mcqa):
    return logprobs(model, tokenizer, mcqa)


def test_batch_size_and_order(model, tokenizer, mcqa, expected):
    check(logprobs(model, tokenizer, mcqa, batch_tokens=1), expected)
    check(logprobs(model, tokenizer, mcqa[::-1]), expected)
    check(logprobs(model, tokenizer, mcqa[1:2]), ({"q2": expected[0]["q2"]}, {"q2": expected[1]["q2"]}))


def test_sharding(model, tokenizer, mcqa, expected):
    check(logprobs(place(model, make_mesh(data=4, fsdp=1, expert=2)), tokenizer, mcqa), expected)


def test_packing(model, tokenizer, mixed):
    """Of the loss: the sum over a record, in rows with others and alone."""
    packed = heldout_loss(model, tokenizer, mixed)
    alone = heldout_loss(model, tokenizer, mixed, batch_tokens=1)
    for group, loss in packed.nats_per_token.items():
        assert loss * packed.tokens[group] == pytest.approx(alone.nats_per_token[group] * alone.tokens[group], abs=TIE)


def test_ties_are_questions_that_rounding_decides():
    scored = [(("en", "en/a"), [-1.0, -1.0 - TIE / 2, -3.0]), (("en",), [-1.0, -1.1]), (("ar",), [-2.0, -5.0, -2.0])]
    assert ties(scored) == {"ar": 1, "en": 1, "en/a": 1}
    assert ties([(("en",), [-1.0])]) == {"en": 0}, "one option"


def test_ties_are_counted(unigram, tokenizer, mcqa):
    """All letters are equally likely."""
    assert multiple_choice(unigram(np.zeros(304)), tokenizer, mcqa).to_dict()["ties"]["en"] == 2
