"""What a machine leaves that loses power: the next run understands each state of the folder."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from bimedix_jax import files
from bimedix_jax.checkpoint.steps import save_step, step_folder, steps_in
from bimedix_jax.errors import BimedixError
from bimedix_jax.process import folders
from bimedix_jax.training.metadata import RUN, check_identity
from bimedix_jax.training.metrics_file import read_metrics
from bimedix_jax.training.run_folder import CHECKPOINTS, resume_state
from bimedix_jax.training.skips import read_skips
from bimedix_jax.training.state import TrainState


def state_at(step):
    params = {"a": jnp.full(40, step, jnp.float32)}
    return TrainState(params, {"mu": params["a"] / 2}, jnp.int32(step))


def lines(folder, first, last):
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(first, last + 1))


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of steps 5 and 10, and lines of metrics up to 12."""
    for step in (5, 10):
        save_step(tmp_path / CHECKPOINTS, step, state_at(step), {"seed": 0}, keep=9)
    lines(tmp_path, 1, 12)
    return tmp_path


def resumed(run):
    """The step from which a run resumes; its lines end there."""
    folders.sweep(run / CHECKPOINTS)
    state = resume_state(run, state_at(0), Console(quiet=True))
    step = int(state.step)
    np.testing.assert_array_equal(state.params["a"], np.full(40, step))
    np.testing.assert_array_equal(jax.tree.leaves(state.optimiser)[0], np.full(40, step / 2))
    assert step == 0 or [line["step"] for line in read_metrics(run)] == list(range(1, step + 1))
    return step


def newest(run):
    return step_folder(run / CHECKPOINTS, 10)


def unnamed(run):
    """The content was written, the rename was not."""
    newest(run).rename(newest(run).with_name(".00000010.0123abcd.partial"))


def empty(run):
    """The rename was written, the content was not."""
    for path in newest(run).rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def zeros(run):
    """The sizes of the files were written, their content was not."""
    for path in newest(run).rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))


def bare(run):
    """Only the name of the folder was written."""
    for path in sorted(newest(run).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def shorter(run):
    """Lines of metrics up to the checkpoint were lost, by a disk that says that it has written what it has not."""
    (run / "metrics.jsonl").unlink()
    lines(run, 1, 8)


def torn(run):
    """A block of the metrics was lost before the checkpoint, and a later one was not."""
    (run / "metrics.jsonl").unlink()
    lines(run, 1, 7)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(bytes(100))
    lines(run, 9, 12)


@pytest.mark.parametrize("state", [unnamed, empty, zeros, bare, shorter, torn])
def test_the_run_resumes_from_the_newest_state_that_is_whole(run, state, caplog):
    state(run)
    assert resumed(run) == 5
    assert bool(caplog.text) == (state is not unnamed), "each damage is named"
    if state in (empty, zeros, bare):
        assert "00000010 is damaged" in caplog.text
    elif state is not unnamed:
        assert "before the checkpoint of step 10: lines were lost" in caplog.text


def between(run):
    """A save of the same step replaced the folder: the old one was renamed, the new one was not."""
    newest(run).rename(newest(run).with_name(".00000010.0123abcd.old"))


def zeros_after(run):
    """Blocks of the metrics after the checkpoint were lost."""
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(bytes(100) + b"\n")
    lines(run, 14, 15)


def half_removed(run):
    """An old checkpoint was being removed."""
    old = save_step(run / CHECKPOINTS, 1, state_at(1), {"seed": 0}, keep=9)
    old.rename(old.with_name(".00000001.removed"))


@pytest.mark.parametrize("state", [between, zeros_after, half_removed])
def test_what_was_saved_is_not_lost(run, state, caplog):
    state(run)
    assert resumed(run) == 10
    assert steps_in(run / CHECKPOINTS) == [5, 10]
    assert not list((run / CHECKPOINTS).glob(".*"))
    assert caplog.text == ""


def test_a_run_without_its_metrics_resumes_from_its_checkpoint(run, caplog):
    """Somebody has moved the file. The checkpoint is whole, and there is no other."""
    (run / "metrics.jsonl").unlink()
    assert int(resume_state(run, state_at(0), Console(quiet=True)).step) == 10
    assert "ends at step 0, before the checkpoint of step 10" in caplog.text


def test_lost_blocks_of_skipped_steps_are_left_out(tmp_path):
    (tmp_path / "skipped.jsonl").write_bytes(b'{"step": 3, "order": 0}\n' + bytes(64) + b'\n{"step": 5, "order": 0}\n')
    assert [line["step"] for line in read_skips(tmp_path)] == [3]


def test_a_lost_run_json_is_one_sentence(tmp_path):
    (tmp_path / RUN).write_bytes(bytes(300))
    with pytest.raises(BimedixError, match=r"run.json contains zero bytes only, as after a loss of power; restore it"):
        check_identity(tmp_path, {})


def test_content_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    """Folder, file and text: the files are synced, then renamed, then the folder that contains them is synced."""
    events, names = [], {}
    rename, replace, fsync = files.Path.rename, files.Path.replace, files.os.fsync

    def synced(number):
        path = files.Path(files.os.readlink(f"/proc/self/fd/{number}"))
        events.append(("sync", "parent" if path == tmp_path else path.name))
        fsync(number)

    def renamed(original):
        def call(self, target):
            events.append(("rename", files.Path(target).name))
            names[files.Path(target).name] = self.name
            return original(self, target)

        return call

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.Path, "rename", renamed(rename))
    monkeypatch.setattr(files.Path, "replace", renamed(replace))
    with files.new_folder(tmp_path / "folder") as partial:
        (partial / "deep").mkdir()
        (partial / "deep/file").write_text("content")
    assert {("sync", "file"), ("sync", "deep"), ("sync", names["folder"])} <= set(events[:-2])
    assert events[-2:] == [("rename", "folder"), ("sync", "parent")]
    with files.new_file(tmp_path / "file") as partial:
        partial.write_text("content")
    assert events[-3:] == [("sync", names["file"]), ("rename", "file"), ("sync", "parent")]
    files.write_text(tmp_path / "text", "content")
    assert events[-3:] == [("sync", names["text"]), ("rename", "text"), ("sync", "parent")]
