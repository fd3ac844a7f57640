"""What a run logs, on packed rows in two languages: the keys of a line, and how its numbers add up."""

import json

import numpy as np
import pytest

from bimedix_jax.data import pack
from bimedix_jax.experiment import DataSource, RouterTraining
from bimedix_jax.kernels import backends
from bimedix_jax.models.config import LoraConfig
from bimedix_jax.models.init import init_random
from bimedix_jax.training import loop
from bimedix_jax.training.loop import train
from bimedix_jax.training.metrics import ORDER, TIMINGS
from bimedix_jax.training.metrics_file import read_metrics
from bimedix_jax.training.observe import Speed

LORA = LoraConfig(rank=2, alpha=4.0, targets=("q", "w2", "router"))
LENGTH = 16


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A packed folder of records in two languages and two kinds, several in a row."""
    folder, random = tmp_path_factory.mktemp("packed"), np.random.default_rng(0)
    examples = []
    for number in range(24):
        language, kind = ("en", "ar", "ar")[number % 3], ("qa", "chat")[number // 3 % 2]
        size = int(random.integers(4, 9))
        tokens = random.integers(1, 300, size, dtype=np.int32)
        examples.append(pack.Example(str(number), language, kind, "test", tokens, np.arange(size) >= 2))
    report = pack.PackReport()
    pack.write(folder, pack.pack(examples, LENGTH, report=report), report, LENGTH, {"pad_id": 0})
    return str(folder)


@pytest.fixture(scope="module")
def run(rows, tmp_path_factory, experiment):
    """(folder, lines) of a finished run."""
    folder = tmp_path_factory.mktemp("run") / "run"
    data = DataSource(path=rows, heldout=rows, sequence_length=LENGTH)
    with backends.use(expert_mlp="composed", grouped_matmul="ragged_dot"):
        train(experiment(lora=LORA, data=data, steps=4, eval_every=2, checkpoint_every=2, log_experts_every=3), folder)
    return folder, read_metrics(folder)


def test_the_keys_of_a_line(run):
    lines = run[1]
    experts = {"expert_grad_norm", "expert_weight_change"}
    assert ["expert_grad_norm" in line for line in lines] == [False, False, True, True], "every third, and the last"
    for line in lines:
        always = {"step", *ORDER, *TIMINGS} - {"router_learning_rate", "peak_share", "save_stall_seconds"}
        heldout = {"heldout_nll", "heldout_targets"} if line["step"] % 2 == 0 else set()
        after_save = {"save_stall_seconds"} if line["step"] == 3 else set()
        assert set(line) | experts == always | heldout | after_save
        assert list(line["by_language"]) == ["ar", "en"]
        assert list(line["by_group"]) == ["ar/chat", "ar/qa", "en/chat", "en/qa"]
        assert np.shape(line["load"]) == np.shape(line["by_language"]["ar"]["load"]) == (2, 4)


def test_languages_and_kinds_add_up_to_all_tokens(run):
    for line in run[1]:
        for groups in (line["by_language"].values(), line["by_group"].values()):
            targets = sum(group["supervised_tokens"] for group in groups)
            assert targets == line["supervised_tokens"]
            assert sum(group["tokens"] for group in groups) == line["tokens"]
            nll = sum(group["nll"] * group["supervised_tokens"] for group in groups) / targets
            assert nll == pytest.approx(line["nll"], rel=1e-5)
            load = sum(group["tokens"] * np.asarray(group["load"]) for group in groups) / line["tokens"]
            np.testing.assert_allclose(load, line["load"], rtol=1e-5)
        assert line["padding"] == pytest.approx(1 - line["tokens"] / (2 * LENGTH))
        assert 1 < line["mean_context"] < 6, "a token sees only its own record"


def test_numbers_by_expert_add_up(run):
    for line in run[1][2:]:
        experts = np.sqrt(np.sum(np.square(line["expert_grad_norm"])))
        assert experts == pytest.approx(line["grad_norms"]["experts"], rel=1e-5)
    third, last = (np.asarray(line["expert_weight_change"]) for line in run[1][2:])
    assert (third > 0).all()
    assert last.sum() > third.sum()


def test_the_time_of_a_run_is_in_run_json(run):
    folder, lines = run
    start = json.loads((folder / "run.json").read_text())["starts"][0]
    found = start["goodput"]
    assert found["lost"]["compile"] == start["compile_seconds"] == lines[0]["lost"]["compile"]
    assert found["lost"]["save"] > 0
    assert lines[2]["lost"]["save"] > 0, "in the line after the save"
    assert lines[1]["lost"]["evaluation"] > 0
    assert found["steps"] + sum(found["lost"].values()) == pytest.approx(found["seconds"])
    assert 0 < lines[-1]["goodput"] < 1


def test_languages_that_are_asked_for(rows, experiment):
    data = DataSource(path=rows, sequence_length=LENGTH)
    opened = loop.open_rows(experiment(data=data, router=RouterTraining(languages=("en",))), 304)
    assert opened.groups.pairs == (("en", "chat"), ("en", "qa"))
    batch = opened.batch(0, np.arange(2))
    assert set(batch["group_BT"].ravel()) <= {0, 1, 2}
    assert (batch["group_BT"][batch["segment_ids_BT"] == 0] == 2).all()


def test_the_share_of_the_peak_is_known_for_known_devices(config, monkeypatch):
    import jax

    class Device:
        device_kind = "NVIDIA H200"

    model = init_random(config, dtype="float32")
    assert Speed.of(model, 1).peak is None
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    speed = Speed.of(model, 4)
    peak = 4 * 494e12
    assert speed.peak == peak
    line = speed.line(tokens=1e6, context=10.0, seconds=0.5)
    assert line["flops_per_second"] == pytest.approx(2e6 * (speed.linear + 10 * speed.attention))
    assert line["peak_share"] == line["flops_per_second"] / peak
