"""`--fit` first makes changes that cost only time, and reports its changes."""

import dataclasses
import json

import pytest

from bimedix_jax import cli
from bimedix_jax.costs.devices import target
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import override
from bimedix_jax.models.config import MIXTRAL_8X7B
from bimedix_jax.plan import fit, report
from bimedix_jax.plan.step import CompiledStep
from bimedix_jax.presets import bimedix_mixtral_8x7b

GIB = 2**30


@pytest.fixture
def compiled(monkeypatch):
    """Replaces the compiler by a rule for memory, and returns the experiments that were tried."""
    tried = []

    def use(rule):
        def estimate_training(config, experiment, where):
            tried.append(experiment)
            arguments, working = rule(experiment, where.count)
            done = CompiledStep("", {"base": int(arguments * GIB)}, int((arguments + working) * GIB), 0.0)
            return report.Estimate(experiment, config, where, done, None, None)

        for module in (fit, report):
            monkeypatch.setattr(module, "estimate_training", estimate_training)
        return tried

    return use


def tensor(experiment):
    return experiment.mesh.tensor if experiment.mesh else 1


def search(devices, **changes):
    return fit.fit(MIXTRAL_8X7B, override(bimedix_mixtral_8x7b(), changes), target(devices), lambda line: None)


def test_an_experiment_that_fits_is_not_changed(compiled):
    tried = compiled(lambda experiment, count: (5, 10))
    estimate, changed = search("a100-80gb:8")
    assert estimate.fits
    assert changed == []
    assert len(tried) == 1


def test_rows_are_reduced_first_and_the_step_keeps_its_size(compiled):
    """One device and 16 rows of 20 GiB each. Numbers of rows that cannot fit are not compiled."""
    tried = compiled(lambda experiment, count: (40, 20 * experiment.batch.rows))
    estimate, changed = search("a100-80gb:1")
    assert estimate.fits
    assert changed == ["batch.rows: 1, 16 asked for", "batch.accumulation: 16, 1 asked for"]
    assert [experiment.batch.rows for experiment in tried] == [16, 1]
    assert {experiment.batch.size for experiment in tried} == {16}


def test_order_is_recomputation_mesh_optimiser_shorter_rows(compiled):
    def rule(experiment, count):
        small = (experiment.remat == "layer", tensor(experiment) == 8, experiment.optimiser.state_dtype == "bfloat16")
        return 5, 3 * (4 - sum(small)) + experiment.data.sequence_length / 1024

    tried = compiled(rule)
    estimate, changed = search("v5e:8", remat="none", batch={"rows": 8, "accumulation": 2})
    assert estimate.fits
    order = [(e.remat, tensor(e), e.optimiser.state_dtype, e.data.sequence_length) for e in tried]
    assert order[:2] == [("none", 1, "float32", 4096), ("layer", 1, "float32", 4096)]
    assert [tensor(e) for e in tried[2:5]] == [2, 4, 8]
    assert changed, "the changes are reported"
    assert {e.batch.size * e.data.sequence_length for e in tried} == {65536}


def test_rows_become_divisible_by_the_devices(compiled):
    compiled(lambda experiment, count: (1, 1))
    estimate, changed = search("v5p:16", **{"batch.rows": 8, "batch.accumulation": 2})
    assert (estimate.experiment.batch.rows, estimate.experiment.batch.accumulation) == (16, 1)
    assert changed == ["batch.rows: 16, 8 asked for", "batch.accumulation: 1, 2 asked for"]


def test_if_nothing_fits_the_last_candidate_is_returned(compiled):
    compiled(lambda experiment, count: (500, 1))
    estimate, changed = search("v5e:1")
    assert not estimate.fits
    assert any("sequence_length" in line for line in changed)


def test_a_mesh_that_does_not_divide_the_devices_raises(compiled):
    compiled(lambda experiment, count: (1, 1))
    with pytest.raises(BimedixError, match=r"mesh\.tensor 3 does not divide 8 devices"):
        search("v5e:8", **{"mesh.tensor": 3})


def test_a_step_that_does_not_fit_is_reported():
    done = CompiledStep(None, {"base": 5 * GIB}, 20 * GIB, 1.0)
    estimate = report.Estimate(bimedix_mixtral_8x7b(), MIXTRAL_8X7B, target("v5e:8"), done, None, None)
    document = report.to_document(estimate)
    assert document["fits"] is False
    assert document["peak_bytes_per_device"] == 20 * GIB
    assert dataclasses.asdict(done)["text"] is None


@pytest.mark.parametrize("words", [[], ["--fit"]])
def test_the_command_fails_with_a_hint_if_nothing_fits(words, compiled, capsys):
    compiled(lambda experiment, count: (500, 1))
    assert cli.main(["plan", "--devices", "a100-80gb:1", "--no-inference", "--json", *words]) == 1
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["fits"] is False
    assert ("pass --fit" in document["error"]) == (not words)
    assert document["error"] in captured.err
    assert "does NOT fit" in captured.err
