"""Rows that overflow: their steps are skipped on the device, written down, and reordered where there are several."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bimedix_jax.adapters import add_lora
from bimedix_jax.checkpoint.steps import restore_step, steps_in
from bimedix_jax.data import pack
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import DataSource, KernelChoice
from bimedix_jax.models.config import LoraConfig
from bimedix_jax.models.init import init_random
from bimedix_jax.training import loop
from bimedix_jax.training.loop import train
from bimedix_jax.training.metrics_file import read_metrics
from bimedix_jax.training.optimiser import make_optimiser, schedule
from bimedix_jax.training.rows import open_rows
from bimedix_jax.training.skips import ORDERS, SKIPPED, read_orders, read_skips, reordered
from bimedix_jax.training.state import init_state, split_params
from bimedix_jax.training.step import keep_if

LORA = LoraConfig(rank=2, alpha=4.0, targets=("q", "w2", "router"))
FAST = KernelChoice(expert_mlp="composed", grouped_matmul="ragged_dot")
HUGE = 303
"""A token whose embedding has overflowed, so that loss and gradient of its row are NaN."""


def overflowing(config):
    """A base in which rows with the token HUGE overflow."""
    model = init_random(config, seed=0, dtype="float32")
    model.embed.table.set_value(model.embed.table.get_value().at[HUGE].set(np.inf))
    return model


def write_rows(folder, bad=()):
    """Twelve records, a row each, of which those in `bad` contain HUGE."""
    random = np.random.default_rng(0)
    examples = []
    for number in range(12):
        tokens = random.integers(1, 60, 16, dtype=np.int32)
        tokens[8] = HUGE if f"r{number}" in bad else tokens[8]
        examples.append(pack.Example(f"r{number}", "en", "qa", "test", tokens, np.arange(16) >= 2))
    folder.mkdir()
    report = pack.PackReport()
    packed = pack.pack(examples, 16, packing="none", report=report)
    pack.write(folder, packed, report, 16, {"pad_id": 0})
    return str(folder)


def ids_of(rows, step):
    return [segment.id for row in rows.whole(step) for segment in row.segments]


@pytest.fixture(scope="module")
def compiled():
    return []


@pytest.fixture
def run(tmp_path, experiment, config, monkeypatch, compiled):
    """(experiment, folder, ids of each step) of a run in which the rows of the steps `bad` (from 0) overflow.

    All runs of this file share one compiled step.
    """
    compile_step = loop.compile_step

    def compile_once(*arguments):
        if not compiled:
            compiled.append(compile_step(*arguments))
        return compiled[0]

    monkeypatch.setattr(loop, "compile_step", compile_once)

    def go(bad, **changes):
        data = DataSource(path=write_rows(tmp_path / "plain"), sequence_length=16)
        plain = experiment(lora=LORA, data=data, kernels=FAST, steps=6, **changes)
        rows = open_rows(plain, config.vocab_size)
        ids = [ids_of(rows, step) for step in range(6)]
        path = write_rows(tmp_path / "rows", {ids[step][0] for step in bad})
        return dataclasses.replace(plain, data=dataclasses.replace(data, path=path)), tmp_path / "run", ids

    return go


def steps_of(folder):
    return [line["step"] for line in read_metrics(folder)]


def state_of(folder, step, experiment, config):
    """The saved training state after `step`."""
    structure, params, frozen = split_params(add_lora(init_random(config, dtype="float32"), LORA))
    template = init_state(params, make_optimiser(experiment.optimiser, 6), structure.router_state(frozen))
    return restore_step(folder / "checkpoints", step, template)[0]


def test_a_step_that_overflows_changes_neither_weights_nor_moments(run, config, capsys):
    experiment, folder, ids = run([3], checkpoint_every=1, keep=9)
    result = train(experiment, folder, model=overflowing(config))
    assert steps_of(folder) == [1, 2, 3, 5, 6]
    (line,) = read_skips(folder)
    assert (line["step"], line["order"], sorted(line["records"])) == (4, 0, sorted(ids[3]))
    assert result.skipped == 1
    warned = " ".join(capsys.readouterr().err.split())
    assert "step 4 skipped" in warned
    assert "skipped steps: 1" in warned
    before, after = (state_of(folder, step, experiment, config) for step in (3, 4))
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    adam = [optax.tree.get_all_with_path(state.optimiser, "mu") for state in (before, after)]
    jax.tree.map(np.testing.assert_array_equal, adam[0][0][1], adam[1][0][1])
    last = state_of(folder, 6, experiment, config)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last))
    # the schedule of the learning rate counts the steps of the run
    rate = schedule(experiment.optimiser, 6)
    rates = [line["learning_rate"] for line in read_metrics(folder)]
    np.testing.assert_allclose(rates, np.asarray([rate(step) for step in (0, 1, 2, 4, 5)]), rtol=1e-5)
    (position,) = {int(x) for _, x in optax.tree.get_all_with_path(last.optimiser, "count")} - {5}
    assert position == 6, "Adam counts five updates, the schedule six steps"


def test_several_steps_in_a_row_go_back_to_another_order(run, config, capsys):
    """Steps 4 and 5 overflow. Another order separates their batches, and both are skipped one at a time."""
    experiment, folder, ids = run([3, 4], checkpoint_every=2, skip_limit=2, reorders=3)
    train(experiment, folder, model=overflowing(config))
    orders = read_orders(folder)
    assert orders
    assert set(orders) == {2, 4} & set(orders)
    rows = reordered(open_rows(experiment, config.vocab_size), orders, experiment.seed)
    seen = [ids_of(rows, step) for step in range(6)]
    assert sorted(itertools.chain(*seen)) == sorted(itertools.chain(*ids)), "every record is still read once"
    assert seen[: orders[0]] == ids[: orders[0]]
    last = {line["step"]: line["records"] for line in read_skips(folder) if line["step"] not in steps_of(folder)}
    assert sorted([*last, *steps_of(folder)]) == [1, 2, 3, 4, 5, 6]
    assert sorted(last.values()) == sorted([ids[3], ids[4]])
    assert "another order of the data" in " ".join(capsys.readouterr().err.split())


def test_a_killed_run_skips_and_reorders_as_an_undisturbed_one(run, config, monkeypatch):
    experiment, folder, _ = run([3, 4], checkpoint_every=2, skip_limit=2, reorders=3)
    train(experiment, folder, model=overflowing(config))
    other, save = folder.with_name("killed"), loop.Saver.save

    def killed(self, step, *rest):
        save(self, step, *rest)
        raise RuntimeError("killed")

    resume = False
    with monkeypatch.context() as patch:
        patch.setattr(loop.Saver, "save", killed)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="killed"):
                train(experiment, other, model=overflowing(config), resume=resume)
            resume = True
            with (other / SKIPPED).open("a") as file:
                file.write('{"step": 6, "ord')  # an incomplete line
    train(experiment, other, model=overflowing(config), resume=True)
    assert read_skips(other) == read_skips(folder)
    assert (other / ORDERS).read_bytes() == (folder / ORDERS).read_bytes()
    assert [line["loss"] for line in read_metrics(other)] == [line["loss"] for line in read_metrics(folder)]


def test_a_run_that_may_not_go_back_stops_with_a_report(run, config):
    experiment, folder, ids = run([3, 4], checkpoint_every=2, skip_limit=2, reorders=0)
    with pytest.raises(BimedixError, match=r"Step 5: .*2 steps were skipped in a row.*step 4, and .*skipped.jsonl"):
        train(experiment, folder, model=overflowing(config))
    assert [line["records"] for line in read_skips(folder)] == [ids[3], ids[4]]
    assert steps_in(folder / "checkpoints") == [2, 4]


def test_what_is_not_finite_is_left_out_of_every_leaf():
    old = {"a": jnp.ones(3), "count": optax.ScaleByScheduleState(jnp.int32(4))}
    new = {"a": jnp.full(3, jnp.nan), "count": optax.ScaleByScheduleState(jnp.int32(5))}
    kept = keep_if(jnp.asarray(False), new, old)
    assert np.isfinite(kept["a"]).all()
    assert int(kept["count"].count) == 5
    assert np.isnan(keep_if(jnp.asarray(True), new, old)["a"]).all()


def test_orders_that_cannot_be_read_are_one_sentence(tmp_path):
    (tmp_path / ORDERS).write_text(json.dumps({"from_step": "two"}))
    with pytest.raises(BimedixError, match=r"orders.json.*start a new run"):
        read_orders(tmp_path)
