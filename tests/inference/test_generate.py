"""Decoding: the cache, the padding, the batch and the stream change nothing; the filters keep what they say."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GROUPED, tiny

from bimedix_jax.errors import BimedixError
from bimedix_jax.inference.generate import Sampling, _prefill, _step, generate, keep_likely, sample, stream
from bimedix_jax.models.init import init_random

DEFAULT_KERNELS = True
CONFIG = tiny(GROUPED, max_position_embeddings=96)
PROMPTS = [[5, 17, 3], [40], list(range(20, 41)), [9, 9, 1, 80, 33, 2, 7]]


@pytest.fixture(scope="module")
def model():
    return init_random(CONFIG, seed=1, std=0.3)


def without_cache(model, prompt, count):
    """Greedy decoding that runs the whole sequence again for each token."""
    forward = jax.jit(lambda tokens, ids: model(tokens, ids).logits_BTV)
    tokens = list(prompt)
    for _ in range(count):
        row = np.zeros((1, 64), np.int32)
        row[0, : len(tokens)] = tokens
        ids = (np.arange(64) < len(tokens)).astype(np.int32)[None]
        tokens.append(int(jnp.argmax(forward(row, ids)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_greedy_decoding_is_the_same_with_and_without_a_cache(model):
    for prompt in PROMPTS[1:3]:
        assert generate(model, prompt, 20) == without_cache(model, prompt, 20)


def test_a_sliding_window_is_the_same_with_a_cache():
    model = init_random(dataclasses.replace(CONFIG, sliding_window=4), seed=2, std=0.3)
    assert generate(model, PROMPTS[2], 20) == without_cache(model, PROMPTS[2], 20)


def test_a_batch_of_different_lengths_equals_one_by_one(model):
    together = generate(model, PROMPTS, 12)
    assert together == [generate(model, prompt, 12) for prompt in PROMPTS]


def test_a_padded_array_with_segment_ids_equals_lists(model):
    tokens, ids = np.full((2, 9), 50, np.int64), np.zeros((2, 9), np.int64)
    tokens[0, :3], ids[0, :3] = PROMPTS[0], 1
    tokens[1, -1:], ids[1, -1:] = PROMPTS[1], 1
    assert generate(model, tokens, 8, segment_ids=ids) == generate(model, PROMPTS[:2], 8)


def test_stream_yields_the_tokens_of_generate(model):
    for options in ({}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 5}):
        whole = generate(model, PROMPTS[0], 16, **options)
        assert list(stream(model, PROMPTS[0], 16, **options)) == whole


def test_a_stop_token_ends_only_its_row_and_is_not_returned(model):
    free = generate(model, PROMPTS[:2], 12)
    stop = free[0][5]
    ended = [row[: row.index(stop)] if stop in row else row for row in free]
    assert generate(model, PROMPTS[:2], 12, stop_tokens=[stop]) == ended
    assert list(stream(model, PROMPTS[0], 12, stop_tokens=np.array([stop]))) == ended[0]


def test_the_same_seed_repeats_and_another_differs(model):
    first = generate(model, PROMPTS[0], 16, temperature=1.0, seed=1)
    assert first == generate(model, PROMPTS[0], 16, temperature=1.0, seed=1)
    assert first != generate(model, PROMPTS[0], 16, temperature=1.0, seed=2)


def test_rows_of_the_same_prompt_draw_differently(model):
    rows = generate(model, [PROMPTS[0]] * 2, 16, temperature=1.0)
    assert rows[0] != rows[1]


def test_top_k_of_one_and_tiny_top_p_are_greedy(model):
    greedy = generate(model, PROMPTS[3], 10)
    assert generate(model, PROMPTS[3], 10, temperature=1.5, top_k=1) == greedy
    assert generate(model, PROMPTS[3], 10, temperature=1.5, top_p=1e-6) == greedy


def test_a_huge_repetition_penalty_never_repeats(model):
    tokens = generate(model, PROMPTS[3], 30, repetition_penalty=1e6)
    assert len(set(tokens) | set(PROMPTS[3])) == 30 + len(set(PROMPTS[3]))


def kept(logits, **options):
    return np.isfinite(keep_likely(jnp.asarray(logits)[None], Sampling.of(temperature=1.0, **options))[0]).tolist()


def test_filters_keep_the_tokens_of_their_definitions():
    logits = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32))
    assert kept(logits, top_k=2) == [False, True, False, True, False]
    assert kept(logits, top_k=99) == [True] * 5
    assert kept(logits, top_p=0.39) == [False, True, False, False, False]
    assert kept(logits, top_p=0.8) == [False, True, False, True, True]
    assert kept(logits, min_p=0.45) == [False, True, False, True, True]
    # top-p is of what top-k left: 0.4 / 0.65 = 0.62 does not reach 0.63 alone
    assert kept(logits, top_k=2, top_p=0.63) == [False, True, False, True, False]
    assert kept(logits, top_k=2, top_p=0.61) == [False, True, False, False, False]


def test_sampling_frequencies_follow_the_temperature():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    draws = sample(jnp.tile(logits, (20_000, 1)), None, Sampling.of(temperature=0.5), jax.random.key(0))
    expected = np.array([0.25, 0.09, 0.04]) / 0.38
    np.testing.assert_allclose(np.bincount(draws, minlength=3) / 20_000, expected, atol=0.015)


def test_other_values_and_similar_lengths_do_not_recompile(model):
    generate(model, PROMPTS[0], 5, temperature=0.5, top_k=4)
    compiled: list[Any] = [_step, _prefill]
    before = [function._cache_size() for function in compiled]
    generate(model, PROMPTS[3], 6, temperature=0.9, top_k=7, seed=3)
    assert [function._cache_size() for function in compiled] == before


def test_the_whole_context_can_be_used(model):
    assert len(generate(model, list(range(80)), 16)) == 16


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "empty"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([1.5], {}, "integers"),
        ([304], {}, "token id 304 is outside"),
        ([-1], {}, "token id -1 is outside"),
        ([1] * 90, {}, "context of 96"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"top_k": 0}, "top_k"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens"),
        ([1], {"segment_ids": [1, 1]}, "segment_ids"),
        ([1], {"segment_ids": [0]}, "empty"),
    ],
)
def test_invalid_arguments_raise(model, prompt, options, message):
    with pytest.raises(BimedixError, match=message):
        generate(model, prompt, **({"max_new_tokens": 10} | options))
