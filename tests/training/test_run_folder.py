"""A run folder has one writer, a failed start leaves none, and what a killed process left is removed."""

from pathlib import Path

import pytest

from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import DataSource
from bimedix_jax.process import folders
from bimedix_jax.training import loop, run_folder
from bimedix_jax.training.loop import train


def test_a_second_run_in_the_same_folder_is_refused(experiment, tmp_path):
    out = tmp_path / "run"
    with run_folder.one_writer(out, experiment(), resume=False):
        with pytest.raises(BimedixError, match=r"process \d+ on .* trains in .*run; wait"):
            train(experiment(), out)
        run_folder.begin(out, experiment())
        with pytest.raises(BimedixError, match=r"process \d+ on .* trains in .*run; wait"):
            train(experiment(), out, resume=True)
        (out / "metrics.jsonl").write_text("{}\n")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "metrics.jsonl"]


@pytest.mark.parametrize("error", [BimedixError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("existed", [False, True])
def test_a_failed_start_leaves_no_folder(experiment, tmp_path, monkeypatch, error, existed):
    def failing(*_args, **_options):
        assert (out / "config.json").is_file()
        raise error("stop")

    out = tmp_path / "deep" / "run"
    if existed:
        out.mkdir(parents=True)
    monkeypatch.setattr(loop, "compile_step", failing)
    with pytest.raises(error):
        train(experiment(), out)
    assert not existed or list(out.iterdir()) == []
    assert existed or list(tmp_path.iterdir()) == []


def test_wrong_data_are_an_error_that_leaves_no_folder(experiment, tmp_path):
    data = DataSource(path=str(tmp_path / "nothing"), sequence_length=16)
    with pytest.raises(BimedixError, match="nothing"):
        train(experiment(data=data), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_found_first(experiment, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(BimedixError, match="cannot write to"):
            train(experiment(data=DataSource(path="nothing", sequence_length=16)), out)


def test_files_of_others_are_kept(experiment, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    with pytest.raises(BimedixError, match="contains no run; name another folder"):
        train(experiment(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_killed_start_does_not_hinder_the_next_run(experiment, tmp_path):
    (tmp_path / folders.LOCK).write_text("process 1 on elsewhere\n")
    run_folder.check_folder(tmp_path, experiment(), resume=False)
    with run_folder.one_writer(tmp_path, experiment(), resume=False):
        pass


def test_partial_checkpoints_of_a_killed_run_are_removed(experiment, tmp_path):
    run_folder.begin(tmp_path, experiment())
    (tmp_path / "checkpoints" / "00000002").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".00000004.0123abcd.partial" / "state").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".00000001.removed").mkdir()
    (tmp_path / ".run.json.0123abcd.partial").touch()
    with run_folder.one_writer(tmp_path, experiment(), resume=True):
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000002"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "config.json", folders.LOCK]
