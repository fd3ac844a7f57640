"""A training run on a mesh."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from bimedix_jax.checkpoint import store
from bimedix_jax.checkpoint.steps import read_arrays
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import BatchConfig, MeshConfig, RouterTraining
from bimedix_jax.models.init import init_random
from bimedix_jax.sharding.placement import gather_for_export
from bimedix_jax.training import loop
from bimedix_jax.training.loop import train
from bimedix_jax.training.metrics_file import read_metrics
from bimedix_jax.training.state import split_params


def assert_alike(ours, theirs, tolerance):
    for path, value in theirs.items():
        limit = tolerance * max(np.max(np.abs(np.asarray(value))), 1e-6)
        np.testing.assert_allclose(ours[path], value, rtol=0, atol=limit, err_msg=str(path))


def test_a_run_on_a_mesh_equals_the_run_on_one_device(tmp_path, experiment):
    """Metrics and saved adapters are equal up to rounding."""
    plain = experiment(
        batch=BatchConfig(rows=4), router=RouterTraining(aux_loss_coef=0.01, aux_scope="global"), steps=4
    )
    mesh = dataclasses.replace(plain, mesh=MeshConfig(fsdp=4, expert=2))
    with pytest.raises(BimedixError, match="4 rows of a micro-batch cannot be divided among the 8 shards"):
        train(mesh, tmp_path / "refused")
    mesh = dataclasses.replace(plain, mesh=MeshConfig(data=1, fsdp=2, expert=2, tensor=2), model=plain.model)
    with pytest.raises(BimedixError, match="1 key heads cannot be divided"):
        train(mesh, tmp_path / "refused too")
    mesh = dataclasses.replace(plain, batch=BatchConfig(rows=8), mesh=MeshConfig(fsdp=2, expert=4))
    whole = dataclasses.replace(plain, batch=BatchConfig(rows=8))
    ours, theirs = train(mesh, tmp_path / "mesh"), train(whole, tmp_path / "whole")
    assert ours.steps == theirs.steps == 4
    for ours_line, theirs_line in zip(read_metrics(ours.folder), read_metrics(theirs.folder), strict=True):
        np.testing.assert_allclose(ours_line["loss"], theirs_line["loss"], rtol=1e-5)
        np.testing.assert_allclose(ours_line["grad_norm"], theirs_line["grad_norm"], rtol=1e-4)
        assert ours_line["tokens"] == theirs_line["tokens"]
    base = init_random(plain.model.random, seed=0, dtype="float32")
    saved = [split_params(store.load_adapter(base, result.trained))[1] for result in (ours, theirs)]
    assert_alike(*saved, tolerance=1e-3)
    assert_alike(split_params(gather_for_export(ours.model))[1], saved[0], tolerance=0)


def test_a_run_resumes_on_another_mesh(tmp_path, experiment, monkeypatch, caplog):
    """Two steps on one device, two on eight: both moments equal those of four steps on one device, up to rounding."""
    plain = experiment(
        batch=BatchConfig(rows=8), router=RouterTraining(aux_loss_coef=0.01, aux_scope="global"), steps=4
    )
    train(plain, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved/checkpoints/00000004")
    save, specs = loop.Saver.save, {}

    def saved(self, step, state, position):
        leaves, _ = jax.tree.flatten_with_path(state)
        specs.update({jax.tree_util.keystr(path): str(getattr(x.sharding, "spec", "")) for path, x in leaves})
        return save(self, step, state, position)

    monkeypatch.setattr(loop.Saver, "save", saved)
    train(dataclasses.replace(plain, mesh=MeshConfig(fsdp=2, expert=4)), tmp_path / "moved", resume=True)
    assert "one device and resumes on MeshConfig(data=1, fsdp=2, expert=4, tensor=1)" in caplog.text
    for name in ("params", "optimiser[0].mu", "optimiser[0].nu"):
        assert "expert" in specs[f".{name}['layers.moe.w1.lora.a']"], "each device has the values of its experts"
    ours, theirs = (read_arrays(tmp_path / name / "checkpoints", 4) for name in ("moved", "one"))
    moments = {name: ours[name] for name in ours if "['mu']" in name or "['nu']" in name}
    assert len(moments) == 2 * sum("['params']" in name for name in ours) > 0
    assert all(np.any(value) for name, value in moments.items() if ".lora.b" in name)
    assert ours.keys() == theirs.keys()
    assert_alike(ours, theirs, tolerance=1e-3)
    assert int(ours["['step']"]) == 4
    lines = [read_metrics(tmp_path / name) for name in ("moved", "one")]
    for line, other in zip(*lines, strict=True):
        assert (line["step"], line["tokens"], line["learning_rate"]) == (
            other["step"],
            other["tokens"],
            other["learning_rate"],
        )
        np.testing.assert_allclose(line["loss"], other["loss"], rtol=1e-5)
