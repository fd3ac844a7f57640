"""Tiny models with the byte tokenizer; the output of one is known exactly, since it is the same at every position."""

import dataclasses
import functools
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import TINY

from bimedix_jax.data.records import Record, conversation, multiple_choice_answer, multiple_choice_question
from bimedix_jax.data.tokenizer import byte_tokenizer
from bimedix_jax.models.init import init_random


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="session")
def model():
    return init_random(TINY, seed=3, std=0.3)


@pytest.fixture(scope="session")
def unigram():
    """Makes a model whose logits are `logits_V` at every position of every sequence."""

    def make(logits_V):
        model = init_random(dataclasses.replace(TINY, num_layers=1, hidden_size=8, intermediate_size=8), seed=0)
        for variable in (model.layers.attention.o.w, model.layers.moe.w2.w):
            variable.set_value(jnp.zeros_like(variable.get_value()))
        model.embed.table.set_value(jnp.ones_like(model.embed.table.get_value()))
        # the final hidden state is a vector of ones but for the norm's epsilon
        assert model.lm_head is not None
        model.lm_head.w.set_value(jnp.tile(jnp.asarray(logits_V, jnp.float32) / 8, (8, 1)))
        return model

    return make


def make_record(name, language, kind, question, answer, choices=None, index=None, **rest):
    return Record(
        id=name,
        language=language,
        kind=kind,
        source="test",
        licence="Apache-2.0",
        conversations=conversation(question, answer),
        choices=choices,
        answer=index,
        **rest,
    )


@pytest.fixture(scope="session")
def mcqa():
    """Questions of different lengths in both languages, with right answers C, A, B, A."""

    def record(name, language, question, choices, answer, subject):
        human = multiple_choice_question(question, choices)
        gpt = multiple_choice_answer(choices, answer, language)
        return make_record(name, language, "mcqa", human, gpt, choices, answer, specialty=subject)

    return [
        record("q1", "en", "Which vitamin prevents scurvy?", ("A", "B12", "vitamin C", "D"), 2, "nutrition"),
        record("q2", "en", "Which organ makes insulin " * 5 + "?", ("pancreas", "liver"), 0, "endocrinology"),
        record("q3", "ar", "ما العضو الذي يفرز الأنسولين؟", ("الكبد", "البنكرياس", "الطحال"), 1, "endocrinology"),
        record("q4", "ar", "أي الفيتامينات يقي من الكساح؟", ("د", "ج"), 0, "nutrition"),
    ]


@pytest.fixture(scope="session")
def mixed(mcqa):
    """Records of several kinds, one with two answers."""
    chat = make_record("c1", "en", "chat", "I cough.", "Since when?").model_copy(
        update={"conversations": conversation("I cough.", "Since when?", "Two days.", "Drink, and rest.")}
    )
    return [
        *mcqa,
        make_record("o1", "en", "qa", "What is asthma?", "A chronic disease of the airways."),
        make_record("o2", "ar", "qa", "ما الربو؟", "مرض مزمن في الشعب الهوائية."),
        chat,
    ]


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, weights, tokens_BT, ids_BT):
    return nnx.merge(graph, weights)(tokens_BT, ids_BT).logits_BTV


def full_logprobs(model, ids):
    """log p of ids[1:] from the logits of a row with only these tokens, in float64."""
    tokens_BT, ids_BT = np.zeros((1, 512), np.int32), np.zeros((1, 512), np.int32)
    tokens_BT[0, : len(ids)], ids_BT[0, : len(ids)] = ids, 1
    logits = np.asarray(forward(*nnx.split(model), tokens_BT, ids_BT)[0, : len(ids)], np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logp[np.arange(len(ids) - 1), ids[1:]]


NAMES = {"by_group": "GROUP", "sensitivity": "SET", "SET": "KIND", "sets": "SET", "questions": "ID"}
"""Key of a result -> what docs/formats.md calls the keys below it; below a set of `sensitivity` there are kinds."""


def keys_of(value, path=()):
    """The keys of a part of a result, with dots, as docs/formats.md names them."""
    if not isinstance(value, dict):
        return {".".join(path)}
    if set(value) == {"accuracy", "low", "high", "correct", "n"} or value == {"n": 0}:
        return {".".join((*path, "ACCURACY"))}
    named = NAMES.get(path[-1]) if path[0] == "sensitivity" or path[-1] != "SET" else None
    return {found for name, item in value.items() for found in keys_of(item, (*path, named or name))}


def listed_keys():
    """The keys in the table of results in docs/formats.md, with {a,b} written out."""
    text = (Path(__file__).parents[2] / "docs/formats.md").read_text("utf-8")
    text = text.split("\n## Results of an evaluation\n")[1].split("\n## ")[0]
    found = []
    for key in re.findall(r"^\| `(\S+)` \|", text, re.MULTILINE):
        parts = [part.split(",") for part in re.split(r"[{}]", key)]
        found += ["".join(words) for words in itertools.product(*parts)]
    assert len(found) == len(set(found))
    return set(found)


@pytest.fixture(scope="session")
def compared_with_the_page():
    """Takes a part of a result by name: (keys that docs/formats.md lacks, keys that it lists and the part lacks)."""

    def compare(name, part):
        own, listed = keys_of(part, (name,)), {key for key in listed_keys() if key.split(".")[0] == name}
        return own - listed, listed - own

    return compare


@pytest.fixture(scope="session", name="full_logprobs")
def full_logprobs_fixture():
    return full_logprobs


@pytest.fixture(scope="session", name="make_record")
def make_record_fixture():
    return make_record
