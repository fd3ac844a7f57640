"""Files of a run: metrics, their copy in Weights & Biases, fingerprints."""

import dataclasses
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Tracking
from bimedix_jax.kernels.nf4 import quantize
from bimedix_jax.training.goodput import LOST
from bimedix_jax.training.metadata import fingerprint
from bimedix_jax.training.metrics import ORDER, TIMINGS, MetricsLog, plain
from bimedix_jax.training.metrics_file import METRICS, read_metrics, rewind
from bimedix_jax.training.progress import duration
from bimedix_jax.training.rows import micro_batches, synthetic
from bimedix_jax.training.tracking import Mirror, flat_numbers, labels, run_id

CODE = re.compile(r"`([a-z_]+)`")


def test_rewinding_twice_keeps_both_copies(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.write({"step": step, "loss": 0.1})
    assert rewind(tmp_path, 5) is None
    assert rewind(tmp_path, 3) == tmp_path / "metrics.superseded-1.jsonl"
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"ste')
    assert rewind(tmp_path, 3) == tmp_path / "metrics.superseded-2.jsonl"
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert rewind(tmp_path / "nothing", 1) is None


def test_nan_raises(tmp_path):
    with MetricsLog(tmp_path) as log, pytest.raises(ValueError, match="JSON"):
        log.write({"step": 1, "loss": float("nan")})
    with pytest.raises(ValueError, match="surprise"):
        plain({"surprise": jnp.ones(())})


def test_the_mirror_receives_numbers_only(monkeypatch, experiment, tmp_path):
    import wandb

    seen = {}

    class Run:
        def log(self, values, step):
            seen[step] = values

        def finish(self, exit_code):
            seen["exit"] = exit_code

    def init(**options):
        seen["options"] = options
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    run = dataclasses.replace(experiment(), tracking=Tracking(mode="offline", project="test"))
    with Mirror(run, tmp_path, 7) as mirror:
        mirror.write({"step": 8, "loss": 2.0, "load_entropy": [0.5, 1.0]})
    both = {"load_entropy/layer_0": 0.5, "load_entropy/layer_1": 1.0}
    means = {"load_entropy/mean": 0.75, "load_entropy/min": 0.5, "load_entropy/max": 1.0}
    assert seen[8] == {"loss": 2.0, **means, **both}
    assert seen["exit"] == 0
    assert seen["options"]["config"] == labels(run, tmp_path)["config"]
    assert seen["options"]["id"] == run_id(tmp_path)
    settings = seen["options"]["settings"]
    assert settings.console == "off"
    assert not settings.save_code
    assert settings.x_disable_meta
    assert settings.x_disable_machine_info


def test_a_mirror_that_cannot_start_raises(monkeypatch, experiment, tmp_path):
    import wandb
    from wandb.errors import UsageError

    def init(**options):
        raise UsageError("no API key configured")

    monkeypatch.setattr(wandb, "init", init)
    run = dataclasses.replace(experiment(), tracking=Tracking(mode="online"))
    with pytest.raises(BimedixError, match=r"mode online \(no API key configured\)"):
        Mirror(run, tmp_path, 0)
    with Mirror(dataclasses.replace(run, tracking=Tracking(mode="disabled")), tmp_path, 0) as mirror:
        mirror.write({"step": 1})


def test_every_key_of_a_line_is_documented():
    page = (Path(__file__).parents[2] / "docs/metrics.md").read_text("utf-8")
    documented = {
        name for line in page.splitlines() if line.startswith("|") for name in CODE.findall(line.split("|")[1])
    }
    heldout = {"heldout_nll", "heldout_targets"}
    assert documented == {"step", *ORDER, *TIMINGS, *heldout, *LOST}


def test_flat_numbers_drop_the_step_and_cap_the_layers():
    assert flat_numbers({"step": 3, "loss": 1.0}) == {"loss": 1.0}
    by_layer = [float(layer) for layer in range(32)]
    line = {"router_z": by_layer, "load": [[0.5, 0.5]] * 32, "by_language": {"ar": {"nll": 2.0, "z": by_layer}}}
    found = flat_numbers(line)
    shown = [name for name in found if "/layer_" in name]
    assert shown == [f"router_z/layer_{layer}" for layer in (0, 4, 9, 13, 18, 22, 27, 31)]
    assert found["router_z/layer_31"] == 31.0
    assert found["by_language/ar/nll"] == 2.0
    assert len(found) == 8 + 3 + 1 + 3


def test_fingerprint_depends_on_values_order_and_4_bit_parts():
    base = {"a": jnp.arange(12, dtype=jnp.bfloat16), "b": quantize(jnp.arange(128.0).reshape(2, 64))}
    found = {
        fingerprint(base),
        fingerprint(base | {"a": base["a"][::-1]}),
        fingerprint(base | {"a": base["a"].at[3].set(7.5)}),
        fingerprint(base | {"b": quantize(jnp.arange(128.0)[::-1].reshape(2, 64))}),
    }
    assert len(found) == 4
    assert fingerprint(dict(reversed(base.items()))) == fingerprint(base)


def test_synthetic_rows_are_deterministic():
    rows = synthetic(3, 32, 61, seed=4)
    assert all((rows[name] == again).all() for name, again in synthetic(3, 32, 61, seed=4).items())
    assert rows["loss_mask_BT"].any(axis=1).all()
    assert not rows["loss_mask_BT"][rows["segment_ids_BT"] == 0].any()
    assert micro_batches(synthetic(4, 32, 61, 0), 2)["tokens_BT"].shape == (2, 2, 32)


@pytest.mark.parametrize(("seconds", "text"), [(3.4, "3 s"), (187, "3:07"), (7509, "2:05:09")])
def test_duration(seconds, text):
    assert duration(seconds) == text
