"""Where the time of a run goes."""

import pytest

from bimedix_jax.training import goodput
from bimedix_jax.training.goodput import Goodput


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told to."""
    now = [0.0]
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_all_time_is_accounted_for(clock):
    spent = Goodput()
    clock(5)  # the model is read
    clock(15)
    spent.compiled(15)
    clock(10)
    spent.lost["data"] += 2
    first = spent.line(10)
    assert first["lost"] == {"setup": 5, "compile": 15, "data": 2}
    assert first["goodput"] == pytest.approx(8 / 30)
    with spent.on("save"):
        clock(4)
    with pytest.raises(RuntimeError), spent.on("evaluation"):
        clock(1)
        raise RuntimeError
    clock(10)
    second = spent.line(10)
    assert second["lost"] == {"save": 4, "evaluation": 1}
    clock(5)
    found = spent.summary()
    assert found["seconds"] == 50
    assert found["steps"] == 18
    assert found["lost"]["other"] == 5
    assert found["steps"] + sum(found["lost"].values()) == found["seconds"]
    assert (
        spent.sentence()
        == "goodput 36 % of 50 s; lost to compile 15 s, setup 5 s, other 5 s, save 4 s, data 2 s, evaluation 1 s"
    )
