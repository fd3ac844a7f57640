"""`bimedix eval run --out` is checked before anything is loaded."""

from pathlib import Path

import pytest
from rich.console import Console

from bimedix_jax.commands import eval_run
from bimedix_jax.errors import BimedixError

RESULT = '{"model": "m", "template": "chatml", "heldout": {}}'
PREDICTION = '{"set": "sample", "id": "1"}\n'


def evaluate(out: Path, overwrite: bool) -> None:
    eval_run.run(eval_run.Config(model="no/model/here", heldout="sample", out=out, overwrite=overwrite), Console())


@pytest.mark.parametrize(
    ("files", "overwrite", "problem"),
    [
        ({"r.json": RESULT}, False, "r.json exists; name another file or pass --overwrite"),
        ({"r.predictions.jsonl": PREDICTION}, False, "r.predictions.jsonl exists; name another file"),
        ({"r.json": "{}"}, True, "r.json exists, and bimedix did not write it"),
        ({"r.json": "not JSON"}, True, "r.json exists, and bimedix did not write it"),
        ({"r.json": RESULT, "r.predictions.jsonl": "notes"}, True, "predictions.jsonl exists, and bimedix did not"),
        ({"r.json/x": ""}, True, "r.json is a folder"),
        ({"r.json": RESULT, "r.predictions.jsonl": PREDICTION}, True, "no/model/here"),
        ({}, False, "no/model/here"),
    ],
)
def test_only_results_are_replaced_and_only_on_request(tmp_path, files, overwrite, problem):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(BimedixError, match=problem):
        evaluate(tmp_path / "r.json", overwrite)
    assert {name: (tmp_path / name).read_text() for name in files} == files


def test_a_place_that_cannot_be_written_is_found_first():
    with pytest.raises(BimedixError, match=r"cannot create /proc/r\.json"):
        evaluate(Path("/proc/r.json"), overwrite=False)
