"""Multiple choice: likelihoods against whole logits, answers of a model with known output, any batch size."""

import dataclasses

import numpy as np
import pytest

from bimedix_jax.data.encoding import encode_chat
from bimedix_jax.data.records import Turn
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.multiple_choice import Accuracy, begin_answer, multiple_choice, question_of
from bimedix_jax.models.init import init_random


def expected(model, tokenizer, record, words, full_logprobs):
    """log p of `words` after the opening of the answer, from whole logits."""
    opening = {"en": "Answer:", "ar": "الإجابة:"}[record.language]
    prompt = begin_answer(tokenizer, record.conversations[:-1], opening)
    ids = begin_answer(tokenizer, record.conversations[:-1], f"{opening} {words}")
    assert ids[: len(prompt)] == prompt
    return full_logprobs(model, ids)[len(prompt) - 1 :].sum()


def test_likelihoods_equal_those_of_whole_logits(model, tokenizer, mcqa, full_logprobs):
    found = multiple_choice(model, tokenizer, mcqa)
    for record, prediction in zip(mcqa, found.predictions, strict=True):
        options = "ABCD"[: len(record.choices)]
        letters = [expected(model, tokenizer, record, letter, full_logprobs) for letter in options]
        texts = [expected(model, tokenizer, record, text, full_logprobs) for text in record.choices]
        assert prediction.letters == pytest.approx(letters, rel=1e-5)
        np.testing.assert_allclose(prediction.texts, texts, rtol=1e-5)
        assert prediction.chosen == np.argmax(letters)
        sizes = [len(choice.encode()) for choice in record.choices]
        assert prediction.chosen_by_text == np.argmax(np.array(texts) / sizes)


def test_batches_change_nothing(model, tokenizer, mcqa):
    alone = multiple_choice(model, tokenizer, mcqa, batch_tokens=1).predictions
    together = multiple_choice(model, tokenizer, mcqa, batch_tokens=700).predictions
    for one, other in zip(alone, together, strict=True):
        assert (one.id, one.chosen) == (other.id, other.chosen)
        assert one.letters == pytest.approx(other.letters, rel=1e-5)
        assert one.texts == pytest.approx(other.texts, rel=1e-5)


def test_a_model_that_always_prefers_one_letter(unigram, tokenizer, mcqa):
    logits = np.zeros(304)
    logits[tokenizer.encode("A")] = 5.0
    found = multiple_choice(unigram(logits), tokenizer, mcqa)
    assert [prediction.chosen for prediction in found.predictions] == [0, 0, 0, 0]
    assert found.accuracy["en"] == 0.5
    assert found.accuracy["ar"] == 0.5
    assert found.accuracy["en/nutrition"] == 0.0
    assert found.accuracy["ar/nutrition"] == 1.0
    assert found.chance["en"] == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert found.scores["en"].total == 2


def test_length_does_not_count_against_an_option_scored_per_byte(unigram, tokenizer, make_record):
    """All bytes are equally likely: the sum favours the short option, the mean per byte the long one."""
    record = make_record("y", "en", "qa", "Is it?", "Answer: no", ("no", "certainly"), 0)
    (prediction,) = multiple_choice(unigram(np.zeros(304)), tokenizer, [record]).predictions
    assert prediction.letters is None
    assert prediction.chosen == 0
    assert prediction.chosen_by_text == 1
    assert prediction.texts == pytest.approx([-3 * np.log(304), -10 * np.log(304)], rel=1e-5)


def test_options_without_letters_are_scored_by_their_text(unigram, tokenizer, make_record):
    logits = np.zeros(304)
    logits[tokenizer.encode("maybe")] = 9.0
    record = make_record("p", "en", "qa", "Abstract: ...\nQuestion: ...?", "Answer: maybe", ("yes", "no", "maybe"), 2)
    assert multiple_choice(unigram(logits), tokenizer, [record]).accuracy == {"en": 1.0}


def test_a_question_that_fills_the_context_to_the_last_token(model, tokenizer, mcqa, full_logprobs):
    length = question_of(mcqa[1], tokenizer).length
    tight = dataclasses.replace(model.config, max_position_embeddings=length)
    small = init_random(tight, seed=3, std=0.3)
    found = multiple_choice(small, tokenizer, [mcqa[1], mcqa[0]])
    assert found.too_long == {}
    for record, prediction in zip((mcqa[1], mcqa[0]), found.predictions, strict=True):
        texts = [expected(model, tokenizer, record, text, full_logprobs) for text in record.choices]
        np.testing.assert_allclose(prediction.texts, texts, rtol=1e-5)
    shorter = multiple_choice(small, tokenizer, mcqa[:2], max_length=length - 1)
    assert shorter.too_long == {"en": 1, "en/endocrinology": 1}
    assert shorter.scores["en"].total == 1


def test_the_prompt_is_a_prefix_of_the_training_text(tokenizer, mcqa):
    for record in mcqa:
        question = question_of(record, tokenizer)
        trained, _ = encode_chat(tokenizer, record.conversations)
        right = [*question.prompt, *question.candidates[record.answer]]
        assert trained[: len(right)] == right


def test_the_assistant_turn_is_left_open(tokenizer):
    turns = (Turn(speaker="human", value="Why?"),)
    assert tokenizer.decode(begin_answer(tokenizer, turns, "Answer:")).endswith("assistant\nAnswer:")


def test_records_without_choices_raise(model, tokenizer, make_record):
    with pytest.raises(BimedixError, match="no choices"):
        multiple_choice(model, tokenizer, [make_record("x", "en", "qa", "Why?", "So.")])


@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (3, 7), (50, 100), (500, 1273), (4183, 4183)])
def test_the_interval_is_wilsons(correct, total):
    """Against the formula of Wilson 1927."""
    z, share = 1.959964, correct / total
    centre = share + z * z / (2 * total)
    spread = z * np.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    low, high = max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0)
    assert Accuracy(correct, total).interval == pytest.approx((low, high), abs=1e-8)


def test_published_wilson_intervals():
    assert Accuracy(8, 10).interval == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Accuracy(0, 10).interval == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert Accuracy(10, 10).interval == pytest.approx((0.7225, 1.0), abs=1e-4)
