import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest


def load_script() -> Any:
    path = Path(__file__).parents[1] / "scripts/count_rooms.py"
    spec = importlib.util.spec_from_file_location("count_rooms", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rooms = load_script()

SOURCES = {
    "kernels/permute/api.py": "import jax\n",
    "models/moe.py": "from bimedix_jax.kernels.permute import api\n",
    "bimedix_jax/errors.py": "class BimedixError(Exception):\n    pass\n",
    "bimedix_jax/data/pack.py": (
        "def run():\n    from bimedix_jax.data import loader\n    from bimedix_jax import errors\n"
    ),
    "bimedix_jax/data/loader.py": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from bimedix_jax.data.pack import run\n"
    ),
    "bimedix_jax/training/loop.py": (
        "from bimedix_jax.data.loader import rows\nfrom bimedix_jax.errors import BimedixError\n"
        "import bimedix_jax.models.moe\nclass Loop:\n    async def run(self): ...\n"
    ),
}


def test_packages_imports_and_cycles_are_counted():
    found = rooms.count(SOURCES)
    assert found["lines"] == {
        "bimedix_jax/data": 6,
        "bimedix_jax/errors.py": 2,
        "bimedix_jax/training": 5,
        "kernels": 1,
        "models": 1,
    }
    assert found["rooms"] == 5
    assert found["arrows"] == 5  # models -> kernels, data -> errors, training -> data, errors, models
    assert found["module_cycles"] == [["bimedix_jax.data.loader", "bimedix_jax.data.pack"]]
    assert found["room_cycles"] == []
    assert found["top_level_modules"] == 1
    assert found["functions_named_run"] == 2


def test_packages_that_reach_each_other_are_a_cycle():
    back = {**SOURCES, "bimedix_jax/data/back.py": "import bimedix_jax.training.loop\n"}
    assert rooms.count(back)["room_cycles"] == [["bimedix_jax/data", "bimedix_jax/training"]]


def test_the_linked_folders_are_counted_once():
    assert rooms.is_source("kernels/permute/api.py")
    assert not rooms.is_source("bimedix_jax/kernels/permute/api.py")
    assert not rooms.is_source("setup.py")


def test_a_commit_and_the_working_tree_give_one_json_document(capsys):
    rooms.main(["--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["now"]["lines"]["kernels"] > 1000
    if shown["before"] is not None:  # a shallow clone has no history
        assert shown["commit_before"] == "4e3f1a1"
        assert shown["before"]["top_level_modules"] == 27
        assert shown["before"]["lines"]["bimedix_jax/data"] == 12610


def test_an_unknown_commit_is_an_error():
    with pytest.raises(SystemExit, match="no commit 0000000"):
        rooms.main(["--before", "0000000"])
