"""The lock of a folder, against processes of this machine, of other machines, and of this machine before a reboot."""

import json
import subprocess
import sys
import threading
import time

import pytest

from bimedix_jax.errors import BimedixError
from bimedix_jax.process import folders, lock

HERE = {"host": "here", "machine": "m1", "boot": "b1"}
THERE = {"host": "there", "machine": "m2", "boot": "b2"}


@pytest.fixture
def on(monkeypatch):
    """Pretends to be on a machine, with short times; with `flocks=False` on a file system without flocks."""
    for name, seconds in (("BEAT", 0.05), ("STALE", 0.8), ("NAMELESS", 0.3), ("SETTLE", 0.3)):
        monkeypatch.setattr(lock, f"{name}_SECONDS", seconds)

    def pretend(machine, flocks=True):
        monkeypatch.setattr(lock, "machine", lambda: dict(machine))
        if not flocks:
            monkeypatch.setattr(lock, "flock", lambda file: None)

    return pretend


def abandoned(folder, content):
    (folder / folders.LOCK).write_text(content if isinstance(content, str) else json.dumps(content))


def take(folder):
    with folders.one_writer(folder, "trains"):
        pass


def test_a_living_holder_on_another_machine_keeps_the_lock(on, tmp_path, monkeypatch):
    """No flock is shared: only the heartbeat tells that the holder lives."""
    on(HERE, flocks=False)
    monkeypatch.setattr(lock, "STALE_SECONDS", 20.0)
    with folders.one_writer(tmp_path, "trains"):
        on(THERE)
        for _ in range(2):
            with pytest.raises(BimedixError, match=r"process \d+ on .* trains in .*; wait until"):
                take(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("holder", "waits"),
    [
        ({"holder": "process 7 on there", **THERE, "token": "t", "beat": "1"}, True),
        ({"holder": "process 7 on here", **HERE, "machine": "m3", "boot": "b3", "token": "t"}, True),  # a namesake
        ({"holder": "process 7 on here", **HERE, "boot": "b0", "token": "t"}, False),  # before a reboot
        ({"holder": "process 7 on here", **HERE, "token": "t"}, False),  # killed
        ("process 1 on elsewhere\n", False),  # of an older version
        ("", True),  # killed before it wrote its name
        ("\0" * 40, True),  # the content was lost with the power
    ],
    ids=["elsewhere", "namesake", "rebooted", "killed", "older", "nameless", "lost"],
)
def test_a_lock_of_a_dead_process_is_taken_over(on, tmp_path, holder, waits, caplog):
    on(HERE)
    abandoned(tmp_path, holder)
    take(tmp_path)
    assert ("whether that one is alive" in caplog.text) == waits
    assert list(tmp_path.iterdir()) == []


def test_containers_of_one_name_are_told_apart_by_the_boot(on, tmp_path, caplog):
    """They have no machine id. Another kernel may be another machine."""
    own = {"host": "job-0", "machine": "", "boot": "b1"}
    on(own)
    abandoned(tmp_path, {"holder": "process 1 on job-0", **own, "token": "t"})
    take(tmp_path)
    assert "whether" not in caplog.text
    abandoned(tmp_path, {"holder": "process 1 on job-0", **own, "boot": "b2", "token": "t"})
    take(tmp_path)
    assert "process 1 on job-0; watching" in caplog.text


def test_one_of_two_processes_takes_over_a_stale_lock(on, tmp_path):
    on(HERE, flocks=False)
    abandoned(tmp_path, {"holder": "process 7 on there", **THERE, "token": "t"})
    holding, refused, together = [], [], threading.Barrier(2)

    def run():
        together.wait()
        try:
            with folders.one_writer(tmp_path, "trains"):
                holding.append(1)
                time.sleep(1.0)
        except BimedixError:
            refused.append(1)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(holding), len(refused)) == (1, 1)


def test_a_holder_that_was_suspended_too_long_stops(on, tmp_path, monkeypatch):
    on(HERE)
    stopped, said = threading.Event(), []
    monkeypatch.setattr(lock, "stop", lambda text: (said.append(text), stopped.set()))
    with folders.one_writer(tmp_path, "trains"):
        abandoned(tmp_path, {"holder": "process 7 on there", **THERE, "token": "t", "beat": "1"})
        assert stopped.wait(5)
    assert "process 7 on there has taken over" in said[0]
    assert (tmp_path / folders.LOCK).exists(), "the lock of the other process stays"


def test_the_end_of_a_process_that_lost_its_lock():
    """It exits with 1 and one sentence, and removes nothing."""
    code = "from bimedix_jax.process import signals; signals.fail('another has taken over')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: another has taken over\n")
