"""Hand-built models that go through record and report: each is found for what it is, and no further."""

import importlib.util
from pathlib import Path

from bimedix_jax.kernels import backends

PATH = Path(__file__).resolve().parents[2] / "scripts/measure_planted_routing.py"


def test_planted_models_are_found_for_what_they_are():
    spec = importlib.util.spec_from_file_location("measure_planted_routing", PATH)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with backends.use(expert_mlp="composed", grouped_matmul="ragged_dot"):
        rows = script.measured(44, routers=100, seed=0, truth=2)
    assert [row["level_found"] for row in rows] == ["association", "learned", "geometry", "token"]
    by_name = {row["planted"]: row for row in rows}
    for row in rows:
        assert abs(row["estimate"] - row["truth"]) < 0.05
        assert row["low"] < row["estimate"] < row["high"]
    assert by_name["language routes over equal experts"]["gate"]["delta_nll"] == 0
    assert by_name["language written into shared tokens by attention"]["gate"]["low"] > 1
