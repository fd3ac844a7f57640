"""Presets, parameters, losses, greedy tokens and help equal the files in tests/golden (scripts/golden.py)."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

REMEDY = "If this change is meant, run `python scripts/golden.py --rewrite`; the commit must say why the text changed."


def load_script() -> Any:
    path = Path(__file__).parents[1] / "scripts/golden.py"
    spec = importlib.util.spec_from_file_location("golden", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden = load_script()


@pytest.mark.parametrize("name", golden.names())
def test_text_equals_the_golden_files(name):
    changes = golden.difference(name, golden.current(name))
    if changes:
        pytest.fail(f"{changes}\n{REMEDY}", pytrace=False)
