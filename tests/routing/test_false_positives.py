"""The measurement of scripts/measure_false_positives.py on few data sets, and its recording."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bimedix_jax.errors import BimedixError

PATH = Path(__file__).resolve().parents[2] / "scripts/measure_false_positives.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("measure_false_positives", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shape(script: Any, **changes: Any) -> Any:
    given = {"datasets": 20, "records": 60, "layers": 2, "experts": 4, "top_k": 2, "tokens": 60, "seed": 0}
    given |= {"permutations": 1999, "relabellings": 10, "token_datasets": 3, "recording": script.RECORDING}
    return script.Shape(**(given | changes))


def test_all_figures_have_their_order_of_magnitude(script: Any):
    """20 data sets cannot show 5 %; the page has 1,000."""
    found = script.measure(shape(script))
    assert max(found[name] for name in ("fpr", "fpr_unequal", "fpr_relabelled")) <= 0.2
    assert found["fpr_per_token"] > 0.5
    assert found["fpr_answers"] <= 0.15
    assert found["coverage_answers"] > 0.7
    assert found["detection_answers"] > found["fpr_answers"]
    assert found["fpr_plain"] > found["fpr_unequal"]
    assert 0.9 < found["coverage"] < 0.98  # of 160 cells and more
    assert min(found[name] for name in ("coverage_planted", "coverage_jsd")) > 0.6  # of 10 data sets
    powers = [row["detected"] for row in found["power"]]
    assert powers[0] < 0.5 < powers[-1]
    assert 0.4 < found["detection_at_mde80"] <= 1


def test_planted_data_have_the_stated_difference(script: Any):
    given = shape(script, records=4000)
    first_R, concentration_R = script.balanced(given)
    counts_RLE = script.draw(given, np.random.default_rng(0), first_R, concentration_R, 0.05)
    load_RLE = counts_RLE / counts_RLE.sum(2, keepdims=True)
    difference_LE = load_RLE[first_R].mean(0) - load_RLE[~first_R].mean(0)
    np.testing.assert_allclose(difference_LE, [[0.05, 0, 0, -0.05], [0, 0, 0, 0]], atol=0.01)


def test_the_recording_is_read_and_others_are_refused(script: Any, tmp_path: Path):
    assert script.read_recording(script.RECORDING).shape == (120, 8, 4)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BimedixError, match="is not a recording"):
        script.read_recording(tmp_path / "other.csv")
