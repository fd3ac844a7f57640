"""Reading ahead and writing late: the order of events, what is not saved, and the seconds of a step."""

import os
import signal
import threading

import numpy as np
import pytest
from rich.console import Console

from bimedix_jax.checkpoint.steps import steps_in
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.config import LoraConfig
from bimedix_jax.training import loop, pipeline
from bimedix_jax.training.loop import train
from bimedix_jax.training.metrics import ORDER, MetricsLog
from bimedix_jax.training.metrics_file import read_metrics
from bimedix_jax.training.pipeline import LateLines, ReadAhead
from bimedix_jax.training.rows import open_rows
from bimedix_jax.training.skips import Skips

LORA = LoraConfig(rank=2, alpha=4.0, targets=("q", "w2", "router"))


@pytest.fixture
def around_steps(monkeypatch):
    """Calls `before(step)` when a step (from 1) is launched, and passes its metrics through `change`."""

    def install(before=lambda step: None, change=lambda step, metrics: metrics):
        original = loop.compile_step

        def compile_step(function, state, *rest):
            compiled, cost = original(function, state, *rest)
            number = int(state.step)

            def step(*arguments):
                nonlocal number
                number += 1
                before(number)
                state, metrics = compiled(*arguments)
                return state, change(number, metrics)

            return step, cost

        monkeypatch.setattr(loop, "compile_step", compile_step)

    return install


def test_reading_and_writing_overlap_with_a_step(experiment, tmp_path, monkeypatch, around_steps):
    events, reading = [], [threading.Event() for _ in range(6)]
    checked, write, save_step = loop.checked, MetricsLog.write, loop.Saver.save

    def read(batch, vocab_size, step):
        assert threading.current_thread() is not threading.main_thread()
        reading[step].set()
        return checked(batch, vocab_size, step)

    def before(step):
        events.append(f"step {step}")
        assert all(event.wait(30) for event in reading[: step + 1]), "the batch of the next step"
        assert not any(event.is_set() for event in reading[step + 1 :]), "no more than one batch waits"

    def log(self, line):
        write(self, line)
        events.append(f"line {line['step']}")

    def save(self, step, *rest):
        assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, step + 1))
        events.append(f"save {step}")
        return save_step(self, step, *rest)

    around_steps(before)
    monkeypatch.setattr(loop, "checked", read)
    monkeypatch.setattr(MetricsLog, "write", log)
    monkeypatch.setattr(loop.Saver, "save", save)
    train(experiment(lora=LORA, checkpoint_every=4), tmp_path / "run")
    assert ", ".join(events) == (
        "step 1, step 2, line 1, step 3, line 2, step 4, line 3, line 4, save 4, step 5, step 6, line 5, line 6, save 6"
    )


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("every", [2, 4])
def test_a_diverged_step_is_not_saved(experiment, tmp_path, around_steps, stopped, every):
    """Step 3 diverges, and none may be skipped. Step 4, after which a save is due, is launched before that is known."""
    launched = []

    def before(step):
        launched.append(step)
        if stopped and step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    around_steps(before, lambda step, metrics: metrics | ({"loss": np.float32(np.nan)} if step == 3 else {}))
    since = "the last checkpoint is that of step 2" if every == 2 else "there is no checkpoint before it"
    with pytest.raises(BimedixError, match=f"Step 3: loss nan.*{since}"):
        train(experiment(lora=LORA, checkpoint_every=every, skip_limit=1, reorders=0), tmp_path / "run")
    assert launched == [1, 2, 3, 4]
    assert steps_in(tmp_path / "run/checkpoints") == ([2] if every == 2 else [])
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]


def test_batches_are_in_order_and_errors_are_raised_at_their_step():
    def read(step):
        if step == 5:
            raise OSError("the disk is gone")
        return step

    with ReadAhead(read, 3, 7) as batches:
        assert [batches.next(), batches.next()] == [3, 4]
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                batches.next()
    with ReadAhead(read, 6, 7) as batches:
        assert batches.next() == 6
        with pytest.raises(IndexError, match="no step 7"):
            batches.next()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_seconds_are_between_the_ends_of_two_steps(experiment, tmp_path, monkeypatch):
    """Held-out measurements and checkpoints do not count, and two steps in flight share no time."""
    now, written = [0.0], []
    monkeypatch.setattr(pipeline.time, "perf_counter", lambda: now[0])
    skips = Skips(experiment(), tmp_path, open_rows(experiment(), 304), 0, 0, Console(), writes=False)
    lines = LateLines(skips, [written.append])

    def pass_time(seconds):
        now[0] += seconds
        return {"heldout_nll": 1.0}

    metrics = dict.fromkeys(ORDER, 1.0) | {"tokens": 12.0}
    lines.add(1, metrics)
    pass_time(2)
    lines.add(2, metrics)  # writes the line of the first step
    pass_time(3)
    lines.settle(lambda: pass_time(100))
    pass_time(1000)
    lines.restart_clock()
    lines.add(3, metrics)
    pass_time(4)
    lines.settle()
    lines.settle()
    assert [(line["step"], line["seconds"], line["tokens_per_second"]) for line in written] == [
        (1, 2.0, 6.0),
        (2, 3.0, 4.0),
        (3, 4.0, 3.0),
    ]
    assert ["heldout_nll" in line for line in written] == [False, True, False]
    assert lines.last is written[-1]
