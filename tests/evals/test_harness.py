"""Our model in lm-evaluation-harness: the same requests give what the harness's Hugging Face back end gives."""

import dataclasses
import math
import types
from typing import Any

import jax
import numpy as np
import pytest
from tiny import TINY

from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.data.tokenizer import byte_tokenizer
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.harness import HarnessModel
from bimedix_jax.evals.request_store import RequestStore
from bimedix_jax.inference.continuations import Continuations, Group
from bimedix_jax.kernels import backends
from bimedix_jax.models.init import init_random
from bimedix_jax.models.routers import RoutingPlan
from bimedix_jax.routing.interventions import Interventions
from bimedix_jax.routing.rules import parse_rules
from bimedix_jax.sharding.placement import place
from bimedix_jax.sharding.rules import make_mesh

PAIRS = [
    ("Question: Which vitamin prevents scurvy?\nAnswer:", " A"),
    ("Question: Which vitamin prevents scurvy?\nAnswer:", " B"),
    ("Question: Which vitamin prevents scurvy?\nAnswer:", " vitamin C, which fruit contains"),
    ("سؤال: أي الفيتامينات يقي من الكساح؟\nالإجابة:", " أ"),
    ("سؤال: أي الفيتامينات يقي من الكساح؟\nالإجابة:", " فيتامين د"),
    ("سؤال: أي الفيتامينات يقي من الكساح؟\nالإجابة:", " أ"),
    ("", "unconditional"),
    ("Trailing space ", "x"),
    ("long " * 140, "truncated on the left"),
]
"""The last context has more tokens than TINY's context of 512."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("hf") / "model"
    export_hf(init_random(TINY, seed=3, std=0.3), place)
    byte_tokenizer(place)
    return place


@pytest.fixture(scope="module")
def ours(model, tokenizer):
    return HarnessModel(model, tokenizer, batch_tokens=512)


@pytest.fixture(scope="module")
def theirs(folder):
    from lm_eval.models import huggingface

    peer: Any = huggingface.HFLM  # decorators hide its arguments
    return peer(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4, max_length=512)


@pytest.fixture(autouse=True)
def simple_backends():
    with backends.use(expert_mlp="composed", grouped_matmul="ragged_dot"):
        yield


def requests(*arguments) -> Any:
    return [types.SimpleNamespace(args=one) for one in arguments]


def test_loglikelihoods_equal_those_of_the_hugging_face_back_end(ours, theirs):
    mine = ours.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    other = theirs.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    np.testing.assert_allclose([one[0] for one in mine], [one[0] for one in other], atol=1e-3)
    assert [one[1] for one in mine] == [one[1] for one in other]
    assert ours.truncated == 1


def test_rolling_loglikelihoods_equal_those_of_the_hugging_face_back_end(ours, theirs):
    texts = [("short",), ("a text that is longer than the context " * 20,)]
    mine = ours.loglikelihood_rolling(requests(*texts), disable_tqdm=True)
    np.testing.assert_allclose(mine, theirs.loglikelihood_rolling(requests(*texts), disable_tqdm=True), rtol=1e-5)


def test_generated_answers_equal_those_of_the_hugging_face_back_end(ours, theirs):
    how = {"until": ["\n\n", "a"], "max_gen_toks": 6, "do_sample": False}
    asked = [("Question: 1 + 1?\nAnswer:", how), ("سؤال", how), ("Why", {"until": [], "max_gen_toks": 4})]
    mine = ours.generate_until(requests(*asked), disable_tqdm=True)
    assert mine == theirs.generate_until(requests(*asked), disable_tqdm=True)


def test_prompts_of_chats_equal_those_of_the_hugging_face_back_end(ours, theirs):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ما هو السكري؟"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    begun = [*chat, {"role": "assistant", "content": "Answer:"}]
    assert ours.apply_chat_template(begun, False) == theirs.apply_chat_template(begun, False)
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours.eot_token_id == theirs.eot_token_id


def test_a_killed_evaluation_runs_only_the_batches_that_are_missing(model, tokenizer, tmp_path, ours):
    wanted = ours.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    path = tmp_path / "requests.jsonl"
    first = HarnessModel(model, tokenizer, batch_tokens=512, store=RequestStore(path, {"model": "m"}))
    assert first.loglikelihood(requests(*PAIRS), disable_tqdm=True) == wanted
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:30])
    again = HarnessModel(model, tokenizer, batch_tokens=512, store=RequestStore(path, {"model": "m"}))
    assert again.loglikelihood(requests(*PAIRS), disable_tqdm=True) == wanted
    assert again.store.reused > 0
    assert path.read_text() == "".join(lines)
    with pytest.raises(BimedixError, match="an evaluation with other values of: model; repeat its command"):
        RequestStore(path, {"model": "other"})


@pytest.mark.parametrize("line", ["garbage", "3", "\xff", '{"a": [NaN, true]}', '{"a": [-Infinity, true]}', '{"a": 1}'])
def test_a_line_that_is_not_ours_is_refused_by_its_number(tmp_path, line):
    path = tmp_path / "requests.jsonl"
    store = RequestStore(path, {"model": "m"})
    assert not path.exists(), "a run that fails before its first answer leaves nothing"
    store.add({"a": [-1.5, True]})
    store.add({"b": "text\u2028of two lines"})
    assert RequestStore(path, {"model": "m"}).known == store.known
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[1], line.encode("latin-1") + b"\n", *lines[2:]]))
    with pytest.raises(BimedixError, match=r"requests.jsonl:3 does not have the answers.*remove this line"):
        RequestStore(path, {"model": "m"})
    path.write_bytes(line.encode("latin-1") + b"\n")
    with pytest.raises(BimedixError, match=r"does not have answers to requests; name another folder"):
        RequestStore(path, {"model": "m"})


def test_counts_of_rules_are_restored(tmp_path):
    path, counters = tmp_path / "requests.jsonl", np.zeros(2, np.int64)
    store = RequestStore(path, {}, counters)
    for number in range(3):
        counters += [1, 10]
        store.add({f"{number}": [-1.0, False]})
    path.write_bytes(path.read_bytes()[:-5])
    restored = np.zeros(2, np.int64)
    assert set(RequestStore(path, {}, restored).known) == {"0", "1"}
    assert restored.tolist() == [2, 20]
    with pytest.raises(BimedixError, match=r"requests.jsonl:2 does not have"):
        RequestStore(path, {})


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_model_that_computes_nan_is_refused(value):
    with pytest.raises(BimedixError, match="NaN or infinity; check its weights"):
        RequestStore().add({"a": [value, False]})


@pytest.mark.parametrize(("columns", "window"), [(64, None), (256, None), (64, 100), (64, 50)])
def test_lines_and_branches_do_not_change_scores(model, columns, window):
    """The oracle runs each continuation alone. A window that is shorter than a row makes its context run again for
    some continuations, and so does a long continuation."""
    rng = np.random.default_rng(0)

    def tokens(most):
        return tuple(rng.integers(0, 300, rng.integers(1, most)).tolist())

    groups = [Group(tokens(40), tuple({tokens(9) for _ in range(4)})) for _ in range(12)]
    groups[3] = dataclasses.replace(groups[3], continuations=(*groups[3].continuations, (7,) * 40))
    groups.append(Group((7,), tuple({tokens(30) for _ in range(60)})))  # as rolling log-likelihoods ask
    if window is not None:
        model = init_random(dataclasses.replace(TINY, sliding_window=window), seed=3, std=0.3)
    scorer = Continuations(model, groups, batch_tokens=256, columns=columns)
    assert scorer.targets < 60, "no row has all of them"
    found = {key: value for batch in scorer.batches for key, value in scorer.score(batch).items()}
    assert len(found) == sum(len(group.continuations) for group in groups)
    whole = [[*group.context, *ids] for group in groups for ids in group.continuations]
    longest = max(map(len, whole))
    padded = np.array([row + [0] * (longest - len(row)) for row in whole])
    segments = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in whole])
    logprobs = np.asarray(jax.nn.log_softmax(model(padded, segments, record="none").logits_BTV), np.float64)
    rows = iter(range(len(whole)))
    for index, group in enumerate(groups):
        for number, ids in enumerate(group.continuations):
            row, start = next(rows), len(group.context) - 1
            steps = logprobs[row, start : start + len(ids)]
            expected = steps[np.arange(len(ids)), ids].sum()
            greedy = bool((steps.argmax(-1) == ids).all())
            np.testing.assert_allclose(found[index, number][0], expected, atol=1e-4)
            assert found[index, number][1] == greedy


def test_a_common_beginning_runs_once_and_changes_no_score(model):
    """Two sets of contexts with solved examples, some options of several tokens, one context alone."""
    rng = np.random.default_rng(0)

    def tokens(size):
        return tuple(rng.integers(0, 300, size).tolist())

    examples = tokens(150), tokens(100)
    groups = [
        Group(
            examples[number % 2] + tokens(int(rng.integers(1, 70))),
            tuple(tokens(1 if number < 9 else size) for size in (1, 3, 2)),
        )
        for number in range(30)
    ]
    groups += [Group(tokens(90), ((5,), (6, 7))), Group(examples[0][:50], ((8, 9),))]
    scorer = Continuations(model, groups, batch_tokens=512)
    found = {key: value for batch in scorer.batches for key, value in scorer.score(batch).items()}
    assert {batch.prefix.tokens for batch in scorer.batches if batch.prefix} == {examples[0], examples[1]}
    assert sum(len(batch.rows) for batch in scorer.batches if batch.prefix) == 30
    run = sum(batch.tokens_BT.size for batch in scorer.batches)
    assert run < sum(len(group.context) for group in groups)
    window = init_random(dataclasses.replace(TINY, sliding_window=512), seed=3, std=0.3)
    alone = Continuations(window, groups, batch_tokens=512)
    assert not any(batch.prefix for batch in alone.batches)
    expected = {key: value for batch in alone.batches for key, value in alone.score(batch).items()}
    assert found.keys() == expected.keys()
    for key, (logprob, greedy) in expected.items():
        np.testing.assert_allclose(found[key][0], logprob, atol=1e-4)
        assert found[key][1] == greedy
    ban = RoutingPlan.ban(model.config, 0)
    assert not any(batch.prefix for batch in Continuations(model, groups, ban).batches), "plans are by position"


def test_a_short_beginning_runs_once_in_each_line_and_changes_no_score(model, monkeypatch):
    """The oracle is each question alone. One context is the beginning itself."""
    rng = np.random.default_rng(1)
    message = tuple(rng.integers(0, 300, 20).tolist())
    rest = [(), *(tuple(rng.integers(0, 300, rng.integers(1, 30)).tolist()) for _ in range(24))]
    options = [tuple({tuple(rng.integers(0, 300, rng.integers(1, 6)).tolist()) for _ in range(3)}) for _ in rest]
    groups = [Group(message + own, some) for own, some in zip(rest, options, strict=True)]
    scorer = Continuations(model, groups, batch_tokens=256, columns=96)
    assert {batch.shared for batch in scorer.batches} == {19}
    assert all((batch.tokens_BT[:, :19] == message[:19]).all() for batch in scorer.batches)
    run = sum(batch.tokens_BT.size for batch in scorer.batches)
    assert run < sum(
        batch.tokens_BT.size for batch in Continuations(model, groups, record="choices", columns=96).batches
    )
    found = {key: value for batch in scorer.batches for key, value in scorer.score(batch).items()}
    for index, group in enumerate(groups):
        alone = Continuations(model, [group])
        assert not any(batch.shared for batch in alone.batches)
        for batch in alone.batches:
            for (_, number), (logprob, greedy) in alone.score(batch).items():
                np.testing.assert_allclose(found[index, number][0], logprob, atol=1e-4)
                assert found[index, number][1] == greedy
    monkeypatch.setattr("bimedix_jax.inference.continuations.WIDTHS", (40,))  # some rows are longer
    assert not any(batch.shared for batch in Continuations(model, groups).batches)


def test_wrong_groups_raise(model):
    for group in (Group((), ((1,),)), Group((1,), ((),)), Group((1,) * 500, ((2,) * 20,)), Group((1,), ((999,),))):
        with pytest.raises(BimedixError):
            Continuations(model, [group])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (" vitamin C", "has 10 tokens, but --max-length is 4; give 10 or more, at most 512"),
        ("x" * 600, "has 600 tokens, but the model takes at most 512; remove its question"),
        ("", "has no tokens; give each option of the task a text"),
    ],
)
def test_a_continuation_that_does_not_fit_names_what_limits_it(model, tokenizer, text, problem):
    lm = HarnessModel(model, tokenizer, max_length=4)
    with pytest.raises(BimedixError, match=problem):
        lm._loglikelihood_tokens([(None, [1], tokenizer.encode(text))])


def test_unknown_options_of_a_task_raise(ours):
    with pytest.raises(BimedixError, match="num_beams"):
        ours.generate_until(requests(("x", {"num_beams": 3, "until": []})), disable_tqdm=True)


def test_a_mesh_does_not_change_scores(model, tokenizer, ours):
    sharded = HarnessModel(place(model, make_mesh(data=4, fsdp=1, expert=2)), tokenizer, batch_tokens=512)
    mine = sharded.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    expected = ours.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    np.testing.assert_allclose([one[0] for one in mine], [one[0] for one in expected], atol=1e-3)


@pytest.mark.parametrize("where", [{"language": "ar"}, {"role": "answer", "language": "ar"}])
def test_rules_change_only_what_they_are_for(model, tokenizer, ours, where):
    rules = Interventions(parse_rules([{"op": "ban", "experts": [0, 1], "where": where}], "test"))
    lm = HarnessModel(model, tokenizer, rules, batch_tokens=512)
    found = lm.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    plain = ours.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    changed = [abs(one[0] - other[0]) > 1e-3 for one, other in zip(found, plain, strict=True)]
    assert changed[4]
    assert not any(changed[:3])
    assert (rules.applied > 0).all()
