"""Knock-outs and replay find the causes that scripts/measure_planted_causes.py builds into models, and no others."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from bimedix_jax.kernels import backends

PATH = Path(__file__).resolve().parents[2] / "scripts/measure_planted_causes.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("measure_planted_causes", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def quick_kernels():
    """Kernels that compile fast; what they compute is tested elsewhere."""
    with backends.use(expert_mlp="composed", grouped_matmul="ragged_dot"):
        yield


def test_the_needed_expert_is_found_and_no_other(script: Any) -> None:
    rows = script.measure_knockouts(records=300, tokens=48, seed=0)
    assert len(rows) == 7
    for row in rows:
        assert row["low"] <= row["truth"] <= row["high"]
        assert row["found"] in ("(1, 3)", "ar")
        if row["truth"]:
            assert row["estimate"] == pytest.approx(row["truth"], rel=0.1)
    assert sum(row["truth"] > 0.3 for row in rows) == 4


def test_adapters_with_one_cause_get_exactly_that_split(script: Any) -> None:
    experts, router, relabelled = script.measure_splits(records=40, tokens=16, seed=0)
    assert (experts["found"], router["found"]) == ("experts", "routes"), "all other parts are below 1e-9"
    for row in (experts, router):
        assert abs(row["truth"]) > 1e-3
        assert row["estimate"] == pytest.approx(row["truth"], abs=1e-6)
    assert abs(relabelled["estimate"]) < 1e-6
    assert relabelled["found"] in ("100 % of sets changed", "99 % of sets changed")


def test_all_coalitions_equal_models_built_for_them(script: Any) -> None:
    row = script.measure_coalitions(records=40, tokens=16, seed=0)
    assert row["found"] == "8 of 8 coalitions within 1e-6"
    assert row["estimate"] <= 1e-6
