"""Runs end to end: files, interruption, bitwise resumption, invalid arguments."""

import dataclasses
import itertools
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from rich.console import Console

from bimedix_jax.adapters import add_lora
from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.checkpoint.steps import read_arrays, steps_in
from bimedix_jax.checkpoint.store import load_adapter
from bimedix_jax.data import pack
from bimedix_jax.data.tokenizer import byte_tokenizer
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import BatchConfig, DataSource, ModelSource, OptimiserConfig, Tracking, read
from bimedix_jax.models.config import LoraConfig
from bimedix_jax.models.init import init_random
from bimedix_jax.training import loop
from bimedix_jax.training.loop import train
from bimedix_jax.training.metrics import TIMINGS
from bimedix_jax.training.metrics_file import read_metrics
from bimedix_jax.training.rows import check_tokenizer
from bimedix_jax.training.skips import read_skips
from bimedix_jax.training.state import split_params
from bimedix_jax.training.stopping import Interrupted

LORA = LoraConfig(rank=2, alpha=4.0, targets=("q", "w2", "router"))
RUN = {"lora": LORA, "log_experts_every": 2}


def numbers(folder):
    """The lines of metrics.jsonl without timings."""
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in read_metrics(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, experiment):
    """An uninterrupted run: (result, folder)."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    return train(experiment(**RUN), folder), folder


def at_step(monkeypatch, step, action):
    """Calls `action` when the batch of `step` (from 0) is read."""
    original = loop.checked

    def hooked(batch, vocab_size, number):
        if number == step:
            action()
        return original(batch, vocab_size, number)

    monkeypatch.setattr(loop, "checked", hooked)


def at_launch(monkeypatch, number, action):
    """Calls `action` when step `number` of this process (from 1) is launched."""
    original = loop.compile_step

    def compile_step(*arguments):
        compiled, cost = original(*arguments)
        launches = itertools.count(1)

        def step(*arguments):
            if next(launches) == number:
                action()
            return compiled(*arguments)

        return step, cost

    monkeypatch.setattr(loop, "compile_step", compile_step)


def test_files_of_a_run(whole, experiment):
    result, folder = whole
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "run.json",
    ]
    assert read(folder / "config.json") == experiment(**RUN)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["00000004", "00000006"], "keep is 2"
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert result.metrics == lines[-1]
    assert {"loss", "nll", "aux_loss", "z_loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens"} <= set(
        lines[0]
    )
    assert len(lines[0]["load_entropy"]) == len(lines[0]["load_max_share"]) == 2
    facts = json.loads((folder / "run.json").read_text())
    assert facts["coverage"]["trainable_parameters"] == sum(x.size for x in split_params(result.model)[1].values())
    assert facts["starts"][0]["backend"] == "cpu"
    assert facts["starts"][0]["versions"]["jax"] == jax.__version__


def test_the_loss_falls_on_repeated_rows(whole):
    losses = [line["loss"] for line in read_metrics(whole[1])]
    assert all(second < first for first, second in zip(losses[:3], losses[3:], strict=True))


def test_the_adapter_folder_has_the_trained_values(whole, config):
    """Loaded on a fresh base, it equals the trained model."""
    result, folder = whole
    restored = load_adapter(init_random(config, seed=0, dtype="float32"), folder / "adapter")
    ours, theirs = split_params(result.model)[1], split_params(restored)[1]
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert any(np.any(x) for name, x in theirs.items() if name.endswith(".b"))


def test_a_resumed_run_is_bitwise_equal(whole, experiment, tmp_path, monkeypatch, capsys):
    """A crash between two checkpoints, then Ctrl-C, then the rest: the same metrics and adapters."""
    run, folder = experiment(**RUN), tmp_path / "run"

    def crash():
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        at_step(patch, 5, crash)
        train(run, folder)
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3, 4, 5]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # an incomplete line, as after a kill

    with (
        monkeypatch.context() as patch,
        pytest.raises(Interrupted, match="step 5 of 6 is saved; resume with `bimedix train --resume"),
    ):
        at_launch(patch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        train(run, folder, resume=True)
    side = (folder / "metrics.superseded-1.jsonl").read_text().splitlines()
    assert json.loads(side[0])["step"] == 5
    assert side[1] == '{"step": 6, "lo'
    assert "metrics.superseded-1.jsonl" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    result = train(run, folder, resume=True)
    assert numbers(folder) == numbers(whole[1])
    assert ["expert_weight_change" in line for line in numbers(folder)] == [False, True] * 3
    jax.tree.map(np.testing.assert_array_equal, split_params(result.model)[1], split_params(whole[0].model)[1])
    starts = json.loads((folder / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 4, 5]
    assert all(start["restore_seconds"] > 0 for start in starts[1:])
    saved = [read_arrays(place / "checkpoints", 6) for place in (folder, whole[1])]
    assert any("['nu']" in name for name in saved[0]), "both moments"
    jax.tree.map(np.testing.assert_array_equal, *saved)
    positions = [(place / "checkpoints/00000006/position.json").read_bytes() for place in (folder, whole[1])]
    assert positions[0] == positions[1]
    assert ["save_stall_seconds" in line for line in read_metrics(folder)] == [False, False, True, False, False, False]


def test_resuming_another_experiment_or_base_raises(whole, experiment, config):
    folder = whole[1]
    run = experiment(**RUN)
    with pytest.raises(BimedixError, match="seed: 1 here, 0 there"):
        train(dataclasses.replace(run, seed=1), folder, resume=True)
    other = add_lora(init_random(config, seed=9), LORA)
    with pytest.raises(BimedixError, match="base_fingerprint differs"):
        train(run, folder, resume=True, model=other)
    with pytest.raises(BimedixError, match="pass --resume"):
        train(run, folder)


def test_resuming_without_a_run_raises(experiment, tmp_path):
    with pytest.raises(BimedixError, match="contains no run to resume"):
        train(experiment(), tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_a_nan_loss_stops_the_run(experiment, config, tmp_path):
    """No checkpoint of these steps is saved. After one reordering of the data, the skipped steps are reported."""
    broken = init_random(config)
    broken.norm.scale.set_value(broken.norm.scale.get_value().at[0].set(np.nan))
    with pytest.raises(BimedixError, match=r"Step 2: loss nan.*reordered 1 times.*there is no checkpoint before it"):
        train(experiment(lora=LORA, skip_limit=2), tmp_path / "run", model=broken)
    assert read_metrics(tmp_path / "run") == []
    assert steps_in(tmp_path / "run/checkpoints") == []
    skipped = [(line["step"], line["order"]) for line in read_skips(tmp_path / "run")]
    assert skipped == [(1, 0), (2, 0), (1, 1), (2, 1)]


def packed(folder, rows, length, seed, highest=61, **facts):
    random = np.random.default_rng(seed)
    examples = [
        pack.Example(str(i), "en", "qa", "test", random.integers(1, highest, n, dtype=np.int32), np.arange(n) >= 2)
        for i, n in enumerate(random.integers(length // 2, length + 1, rows))
    ]
    folder.mkdir()
    report = pack.PackReport()
    pack.write(
        folder, pack.pack(examples, length, packing="none", report=report), report, length, {"pad_id": 0, **facts}
    )
    return str(folder)


def test_epochs_of_a_packed_folder_with_heldout_rows(experiment, tmp_path):
    """Two epochs of 5 rows are 3 steps of 4 rows. The last batch is padded with empty rows."""
    data = DataSource(
        path=packed(tmp_path / "train", 5, 16, 0),
        heldout=packed(tmp_path / "heldout", 3, 16, 1),
        sequence_length=16,
    )
    run = experiment(
        lora=LORA, data=data, batch=BatchConfig(rows=2, accumulation=2), steps=None, epochs=2, eval_every=2
    )
    run = dataclasses.replace(run, tracking=Tracking(mode="offline", project="test"))
    result = train(run, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert read(tmp_path / "run/config.json").steps == result.steps == 3
    assert lines[2]["tokens"] < lines[0]["tokens"]
    assert ["heldout_nll" in line for line in lines] == [False, True, False]
    assert lines[1]["heldout_nll"] == pytest.approx(np.log(304), rel=0.05)
    mirrored = list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len(mirrored) == 1


def test_data_that_do_not_fit_raise(experiment, tmp_path):
    run = experiment(lora=LORA)
    short = packed(tmp_path / "short", 2, 8, 0)
    with pytest.raises(BimedixError, match="packed with 8 tokens a row, the experiment has 16"):
        train(dataclasses.replace(run, data=DataSource(path=short, sequence_length=16)), tmp_path / "a")
    with pytest.raises(BimedixError, match="names no data"):
        train(dataclasses.replace(run, data=DataSource(sequence_length=16)), tmp_path / "b")
    with pytest.raises(BimedixError, match="exceed the model's 512 positions"):
        train(dataclasses.replace(run, data=DataSource(sequence_length=1024, synthetic_rows=2)), tmp_path / "c")
    assert not any((tmp_path / name).exists() for name in "abc")
    with pytest.raises(BimedixError, match="model's tokenizer"):
        loop.checked({"tokens_BT": np.asarray([[61]])}, 61, 0)


def test_rows_of_another_tokenizer_raise(experiment, config, tmp_path, capsys):
    """Training and held-out rows, before the model is loaded. Folders that cannot be compared give a warning."""
    model = export_hf(init_random(dataclasses.replace(config, vocab_size=304)), tmp_path / "model")
    (model / "model.safetensors").unlink()
    ours = byte_tokenizer(tmp_path / "bytes")
    own, other = (
        packed(tmp_path / name, 4, 16, 0, tokenizer=fingerprint)
        for name, fingerprint in (("own", ours.fingerprint), ("other", "f" * 64))
    )

    def train_on(path, heldout, name):
        data = DataSource(path=path, heldout=heldout, sequence_length=16)
        source = ModelSource(path=str(model), base="float32")
        train(experiment(lora=LORA, data=data, model=source, eval_every=2), tmp_path / name)

    with pytest.raises(BimedixError, match="contains neither model"):
        train_on(other, own, "a")
    assert "2 packed folders not compared with the model's tokenizer" in " ".join(capsys.readouterr().err.split())
    shutil.copyfile(ours.folder / "tokenizer.json", model / "tokenizer.json")
    for pair in ((other, own), (own, other)):
        with pytest.raises(BimedixError, match=r"other was packed with another tokenizer .*--tokenizer .*model"):
            train_on(*pair, "b")
    with pytest.raises(BimedixError, match="contains neither model"):
        train_on(own, own, "c")
    assert "not compared" not in capsys.readouterr().err
    assert not any((tmp_path / name).exists() for name in "abc")


def test_synthetic_rows_need_no_tokenizer(experiment, tmp_path, capsys):
    loop.warn_unchecked(check_tokenizer(experiment()), Console(stderr=True))
    data = DataSource(path=packed(tmp_path / "rows", 4, 16, 0), sequence_length=16)
    loop.warn_unchecked(check_tokenizer(experiment(data=data)), Console(stderr=True, width=200))
    assert capsys.readouterr().err.startswith("1 packed folder not compared")


def test_a_rate_for_frozen_routers_raises(experiment, tmp_path):
    run = experiment(
        lora=LoraConfig(rank=2, alpha=4.0, targets=("q",)),
        optimiser=OptimiserConfig(router_learning_rate=1e-4, warmup_steps=1),
    )
    with pytest.raises(BimedixError, match="the routers are frozen"):
        train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()
