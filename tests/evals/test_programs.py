"""`eval run` compiles few programs, and none when it runs again."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from rich.console import Console
from tiny import quick_kernels

from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.commands import eval_run
from bimedix_jax.data.records import write_jsonl
from bimedix_jax.evals import programs
from bimedix_jax.inference.continuations import Continuations, Group
from bimedix_jax.inference.steps import first_max


@quick_kernels()
def test_a_second_run_compiles_nothing(model, tokenizer, mixed, tmp_path):
    """As in a fresh process: JAX forgets what is in memory, and reads the programs on disk."""
    export_hf(model, tmp_path / "model", tokenizer_from=tokenizer.folder)
    write_jsonl(tmp_path / "records.jsonl", mixed)
    config = eval_run.Config(
        model=str(tmp_path / "model"), base="float32", heldout=str(tmp_path / "records.jsonl"), out=tmp_path / "r.json"
    )
    first = eval_run.run(config, Console(quiet=True))
    jax.clear_caches()
    again = eval_run.run(dataclasses.replace(config, out=None), Console(quiet=True))
    assert again["choice"] == first["choice"]
    assert again["compiled_programs"] == 0
    assert again["cached_programs"] > 0
    assert "compiled_programs" not in json.loads((tmp_path / "r.json").read_text("utf-8"))


def test_programs_are_counted():
    before = programs.count()
    jax.jit(lambda x: x * 3.25 + 1.125)(np.ones(7))
    assert sum(programs.since(before).values()) == 1


def test_the_first_of_equal_logits_is_the_most_likely_token():
    logits_RV = np.random.default_rng(0).integers(-3, 3, (50, 40)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(first_max)(logits_RV), logits_RV.argmax(-1))


@pytest.mark.parametrize("seed", range(3))
def test_sets_of_questions_share_their_shapes(model, seed):
    """Questions of any number and length; options of one token and of several, one of them very long."""
    rng = np.random.default_rng(seed)
    groups = [
        Group((number, *(5,) * int(rng.integers(19, 109))), tuple((7,) * int(size) for size in rng.integers(1, 12, 4)))
        for number in range(int(rng.integers(60, 200)))
    ]
    groups.append(Group((299, *(5,) * 59), ((7,), (7, 8), (9,), (7,) * 60)))
    found = {batch.tokens_BT.shape for batch in Continuations(model, groups).batches}
    assert found == {(8, 512)}
    examples = tuple(rng.integers(0, 300, 150).tolist())
    after = [Group((*examples, *group.context), group.continuations) for group in groups[:-1]]
    continued = Continuations(model, after).batches
    assert all(batch.prefix for batch in continued)
    assert len({batch.tokens_BT.shape for batch in continued}) <= 4
