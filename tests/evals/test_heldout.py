"""Held-out loss: against whole logits, against a model with known output, and with any batch size."""

import math

import numpy as np
import pytest

from bimedix_jax.data.encoding import encode_chat
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.heldout import heldout_loss


def test_loss_equals_that_of_whole_logits_one_record_at_a_time(model, tokenizer, mixed, full_logprobs):
    found = heldout_loss(model, tokenizer, mixed)
    nats, tokens = {}, {}
    for record in mixed:
        ids, learned = encode_chat(tokenizer, record.conversations)
        logp = full_logprobs(model, ids)[np.array(learned[1:])]
        for group in (record.language, f"{record.language}/{record.kind}"):
            nats[group] = nats.get(group, 0) - logp.sum()
            tokens[group] = tokens.get(group, 0) + logp.size
    assert found.tokens == dict(sorted(tokens.items()))
    assert set(found.nats_per_token) == {"ar", "ar/mcqa", "ar/qa", "en", "en/chat", "en/mcqa", "en/qa"}
    for group, value in found.nats_per_token.items():
        assert value == pytest.approx(nats[group] / tokens[group], rel=1e-5)


def test_bits_per_byte_of_a_uniform_model(unigram, tokenizer, mixed):
    found = heldout_loss(unigram(np.zeros(304)), tokenizer, mixed)
    for group, bits in found.bits_per_byte.items():
        assert found.nats_per_token[group] == pytest.approx(math.log(304), rel=1e-6)
        assert bits == pytest.approx(found.tokens[group] * math.log2(304) / found.text_bytes[group], rel=1e-6)
    # one token a byte, and the end of each of the two answers
    assert found.text_bytes["en/chat"] == len("Since when?Drink, and rest.")
    assert found.tokens["en/chat"] == found.text_bytes["en/chat"] + 2
    # Arabic letters are two bytes: the text of 26 characters has more bytes than characters
    assert found.text_bytes["ar/qa"] == len("مرض مزمن في الشعب الهوائية.".encode()) > len("مرض مزمن في الشعب الهوائية.")


def test_batches_change_nothing(model, tokenizer, mixed):
    one_by_one = heldout_loss(model, tokenizer, mixed, batch_tokens=1)
    together = heldout_loss(model, tokenizer, mixed[::-1], batch_tokens=10_000)
    assert one_by_one.tokens == together.tokens
    for group, value in one_by_one.nats_per_token.items():
        assert together.nats_per_token[group] == pytest.approx(value, rel=1e-5)


def test_long_records_are_counted_and_not_scored(model, tokenizer, mixed):
    whole = heldout_loss(model, tokenizer, mixed)
    short = heldout_loss(model, tokenizer, mixed, max_length=120)
    assert short.too_long
    for group, records in whole.records.items():
        assert short.records.get(group, 0) + short.too_long.get(group, 0) == records
    with pytest.raises(BimedixError, match="at most 5 tokens"):
        heldout_loss(model, tokenizer, mixed, max_length=5)
