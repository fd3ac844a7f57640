"""Checkpoints in the background: what is saved, what waits, and what a save that fails says."""

import errno
import logging
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from bimedix_jax.checkpoint import saver, steps
from bimedix_jax.checkpoint.saver import Saver
from bimedix_jax.checkpoint.steps import newest_valid, restore_step, steps_in
from bimedix_jax.errors import BimedixError
from bimedix_jax.process import clock

state_at = jax.jit(lambda step: {"params": jnp.full((64, 128), step * 1.0), "step": step})
advance = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)


@pytest.fixture
def gate(monkeypatch):
    """(reached, go): a save sets the first when its state is copied, and waits for the second before it is complete."""
    reached, go, finish = threading.Event(), threading.Event(), steps.finish

    def late(*arguments):
        reached.set()
        assert go.wait(30)
        finish(*arguments)

    monkeypatch.setattr(steps, "finish", late)
    return reached, go


def test_steps_go_on_while_a_state_is_written_and_do_not_change_it(tmp_path, gate, capsys):
    reached, go = gate
    state = state_at(jnp.int32(5))
    with Saver(tmp_path, keep=2) as writer:
        writer.save(5, state, {"seed": 0})
        for _ in range(3):
            state = advance(state)  # donates the arrays that are being written
        assert reached.wait(30)
        assert int(state["step"]) == 8
        assert steps_in(tmp_path) == [], "not complete yet"
        go.set()
        writer.wait()
        assert newest_valid(tmp_path) == 5
        writer.save(8, state, {"seed": 0})
    assert steps_in(tmp_path) == [5, 8]
    restored, position = restore_step(tmp_path, 5, state)
    assert (int(restored["step"]), position["seed"]) == (5, 0)
    np.testing.assert_array_equal(restored["params"], np.full((64, 128), 5.0))
    assert len(writer.stalls) == len(writer.writes) == 2
    writer.finish(Console(stderr=True, width=200))
    assert "2 checkpoints: the steps waited" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error", "there"), OSError(errno.ENOSPC, "full")])
def test_a_failed_save_is_one_sentence_that_names_the_newest_checkpoint(tmp_path, monkeypatch, error):
    def fail(*_arguments):
        raise error

    state = state_at(jnp.int32(1))
    said = r"00000009 cannot be written: .*; the newest checkpoint is that of step 5\. "
    with pytest.raises(BimedixError, match=said), Saver(tmp_path, keep=2) as writer:
        writer.save(5, state, {})
        writer.wait()
        monkeypatch.setattr(steps, "finish", fail)
        writer.save(9, state, {})
    assert steps_in(tmp_path) == [5]
    assert [path.name for path in tmp_path.iterdir()] == ["00000005"], "nothing half-written is left"
    with pytest.raises(BimedixError, match="there is no earlier checkpoint"), Saver(tmp_path / "new", 2) as writer:
        writer.save(1, state, {})
        while True:  # a run learns of it at its next step
            writer.check()


def test_a_full_disk_is_one_sentence(tmp_path):
    """In a process of its own, whose files cannot become large. Orbax alone prints 200 lines of tracebacks."""
    code = f"""
import logging, resource
import jax.numpy as jnp, numpy as np
from bimedix_jax.checkpoint.saver import Saver
from bimedix_jax.errors import BimedixError
logging.basicConfig()
state = {{name: jnp.asarray(np.random.default_rng(0).random((256, 512))) for name in "abcdefgh"}}
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    with Saver(__import__("pathlib").Path({str(tmp_path)!r}), 2) as writer:
        writer.save(1, state, {{}})
except BimedixError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"The checkpoint {tmp_path}/00000001 cannot be written: File too large; there is no earlier checkpoint. "
        "Correct this and resume the run with --resume.\n"
    )
    assert "Traceback" not in done.stderr
    assert "loop" not in done.stderr


def test_an_error_of_the_run_is_not_hidden_by_that_of_a_save(tmp_path, monkeypatch, caplog):
    def fail(*_arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(steps, "finish", fail)
    with pytest.raises(KeyError, match="of the run"), Saver(tmp_path, keep=2) as writer:
        writer.save(5, state_at(jnp.int32(1)), {})
        raise KeyError("of the run")
    assert "00000005 cannot be written: Input/output error" in caplog.text


def test_a_bug_is_not_a_sentence(tmp_path, monkeypatch):
    def wrong(*_arguments):
        raise AttributeError("a bug")

    monkeypatch.setattr(steps, "finish", wrong)
    with pytest.raises(AttributeError, match="a bug"), Saver(tmp_path, keep=2) as writer:
        writer.save(5, state_at(jnp.int32(1)), {})


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_a_clock_that_jumps_is_named_and_changes_nothing(tmp_path, monkeypatch, caplog, jump):
    caplog.set_level(logging.WARNING)
    now = clock.time.time
    with Saver(tmp_path, keep=1) as writer:
        writer.save(5, state_at(jnp.int32(5)), {})
        with monkeypatch.context() as patch:
            patch.setattr(clock.time, "time", lambda: now() + jump)
            writer.save(10, state_at(jnp.int32(10)), {})
            writer.wait()
    assert f"jumped by {jump:+.0f} s before step 10" in caplog.text
    assert newest_valid(tmp_path) == 10
    assert saver.steps_in(tmp_path) == [10]
