"""Scores equal those of whole logits, in any batch, under a plan, and with the record of what the routers did."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY

from bimedix_jax.errors import BimedixError
from bimedix_jax.inference.scoring import score
from bimedix_jax.models.init import init_random
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import RoutingPlan

ROWS = [[5, 17, 3, 60, 2, 9, 9], [9, 1], [44, 8, 8, 20]]


@pytest.fixture(scope="module")
def model() -> Mixtral:
    return init_random(TINY, seed=3, std=0.3)


def logprobs(model: Mixtral, ids: list[int], plan: RoutingPlan | None = None) -> np.ndarray:
    """log p of ids[1:] from the logits of one row, in float64."""
    logits_TV = np.asarray(model(np.array([ids]), plan=plan).logits_BTV[0], np.float64)
    logits_TV -= logits_TV.max(axis=1, keepdims=True)
    logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))
    return logp_TV[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_scores_equal_those_of_whole_logits(model, batch_tokens):
    found = {index: row for index, row, _ in score(model, ROWS, batch_tokens=batch_tokens)}
    assert sorted(found) == [0, 1, 2]
    for index, ids in enumerate(ROWS):
        assert found[index][0] == 0
        np.testing.assert_allclose(found[index][1:], logprobs(model, ids), rtol=1e-5)


def test_only_the_selected_tokens_are_scored(model):
    wanted = [[True, False, False, True, False, False, True], [False, False], [True] * 4]
    for index, row, _ in score(model, ROWS, wanted):
        expected = np.where(wanted[index][1:], logprobs(model, ROWS[index]), 0)
        np.testing.assert_allclose(row[1:], expected, rtol=1e-5)


def test_a_plan_and_a_record_follow_the_sequence_through_packing(model):
    bias = np.zeros((2, 3, 7, 4), np.float32)
    for row, expert in enumerate((1, 2, 3)):
        bias[:, row, :, expert] = -np.inf
    plan = RoutingPlan(bias_LBTE=jnp.asarray(bias))
    for index, row, routing in score(model, ROWS, plan=plan, record="full"):
        ids = ROWS[index]
        alone = RoutingPlan(bias_LBTE=jnp.asarray(bias[:, index : index + 1, : len(ids)]))
        np.testing.assert_allclose(row[1:], logprobs(model, ids, alone), rtol=1e-5)
        assert routing is not None
        assert routing.logits_LBTE is not None
        assert routing.experts_LBTK.shape == (2, 1, len(ids), 2)
        assert (routing.experts_LBTK != index + 1).all()
        expected = model(np.array([ids]), plan=alone).routing
        np.testing.assert_array_equal(routing.experts_LBTK, expected.experts_LBTK)
        np.testing.assert_allclose(routing.logits_LBTE, expected.logits_LBTE, rtol=1e-4, atol=1e-5)


def test_rows_of_the_plan_can_be_chosen(model):
    """As when some sequences of a data set are too long and left out."""
    plan = RoutingPlan.ban(TINY, 2)
    chosen = {i: row for i, row, _ in score(model, ROWS[1:], plan=plan, plan_rows=[1, 2])}
    every = {i: row for i, row, _ in score(model, ROWS, plan=plan)}
    for index in (0, 1):
        np.testing.assert_allclose(chosen[index], every[index + 1], rtol=1e-5)


def test_sequences_that_the_model_cannot_read_raise(model):
    with pytest.raises(BimedixError, match="has 513 tokens, more than this model's context of 512"):
        list(score(model, [[1] * 513]))
    with pytest.raises(BimedixError, match="token id 304 is outside"):
        list(score(model, [[304]]))
    with pytest.raises(ValueError, match="temperature_LBT has shape"):
        list(score(model, ROWS, plan=RoutingPlan(temperature_LBT=jnp.ones((2, 1, 3)))))
