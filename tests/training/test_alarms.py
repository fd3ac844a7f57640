"""Warnings about a loss that jumps and experts that collapse."""

from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bimedix_jax.training import alarms
from bimedix_jax.training.alarms import UNUSED, Alarms

EVEN = [[0.25, 0.25, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25]]


def line(step: int, nll: float = 2.0, load: Any = EVEN, **groups: float) -> dict[str, Any]:
    by_group = {name: {"nll": loss, "supervised_tokens": 5.0} for name, loss in groups.items()}
    return {"step": step, "nll": nll, "tokens": 1000.0, "load": load, "by_group": by_group}


def watched(*lines: dict[str, Any], **options: Any) -> dict[int, list[str]]:
    """The warnings of each step."""
    watch = Alarms(Console(quiet=True), top_k=2, **options)
    return {one["step"]: found for one in lines if (found := watch.look(one))}


def test_a_spike_warns_once_and_names_the_group_that_rose_most():
    noise = np.random.default_rng(0).normal(0, 0.02, 40)
    calm = [line(step, 2 + noise[step], en=2.0, ar=2.0) for step in range(30)]
    found = watched(*calm, line(30, 3.5, en=2.5, ar=4.5), line(31, 3.6), *(line(step) for step in range(32, 40)))
    assert list(found) == [30]
    usual = np.median(2 + noise[:30])
    assert found[30] == [f"the loss jumped to 3.500, from {usual:.3f} (median); most in ar, by 2.500"]


def test_noise_and_a_falling_loss_do_not_warn():
    random = np.random.default_rng(1)
    for run in range(20):
        losses = 1 + 2 * np.exp(-np.arange(300) / 60) + random.normal(0, 0.1, 300)
        assert not watched(*(line(step, loss) for step, loss in enumerate(losses))), run


@pytest.mark.parametrize(
    ("load", "what"),
    [
        ([0.4, 0.3, 0.3, 0.0], "layer 1 expert 3 got no token in the last 20 steps"),
        ([0.49, 0.17, 0.17, 0.17], "layer 1 expert 0 got 95% of all tokens in the last 20 steps"),
    ],
)
def test_a_collapsing_expert_warns_once_with_layer_and_expert(load, what):
    healthy = [line(step) for step in range(5)]
    collapsed = [line(step, load=[EVEN[0], load]) for step in range(5, 60)]
    back = [line(step) for step in range(60, 90)]
    found = watched(*healthy, *collapsed, *back)
    (step,) = found
    assert found[step] == [what]
    assert 5 < step < 5 + UNUSED


def test_many_experts_are_counted():
    load = [[0.5, 0.5, 0.0, 0.0]] * 4
    found = watched(*(line(step, load=load) for step in range(UNUSED)))
    assert found[UNUSED - 1][0].startswith(
        "layer 0 expert 2, layer 0 expert 3, layer 1 expert 2, layer 1 expert 3 and 4 more"
    )


def test_few_tokens_and_planned_routes_do_not_warn():
    load = [[0.5, 0.5, 0.0, 0.0]]
    few = [line(step, load=load) | {"tokens": 4.0} for step in range(50)]
    assert not watched(*few)
    assert not watched(*(line(step, load=load) for step in range(50)), free=False)


def test_a_resumed_run_does_not_repeat_a_warning(capsys):
    load = [[0.5, 0.5, 0.0, 0.0]]
    before = [line(step, load=load) for step in range(30)]
    resumed = Alarms(Console(stderr=True), 2, True, before)
    resumed.update(line(30, load=load))
    assert capsys.readouterr().err == ""
    resumed.update(line(31, nll=9.0, load=load))
    assert "step 31: the loss jumped" in capsys.readouterr().err
    assert alarms.named([(0, 1)]) == "layer 0 expert 1"
