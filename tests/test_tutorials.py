"""The tutorials run as they are written, on a small model."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from tiny import tiny

from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.data.tokenizer import byte_tokenizer
from bimedix_jax.kernels import backends
from bimedix_jax.models import routers
from bimedix_jax.models.mixtral import init_random

TUTORIALS = Path(__file__).resolve().parent.parent / "docs/tutorials"
TINY = tiny(tie_embeddings=True)


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    text = (TUTORIALS / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with the mixture that the tutorial makes, only smaller."""
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    export_hf(init_random(TINY, dtype="bfloat16", std=0.2), tmp_path / "runs/noisy", tokenizer_from=tokenizer.folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_banning_each_expert(folder, capsys) -> None:
    study, *_ = blocks("router.md", "python")
    assert len(study.splitlines()) <= 25
    (folder / "study.py").write_text(study, "utf-8")
    with backends.use(expert_mlp="composed", grouped_matmul="ragged_dot"):  # they compile fast
        runpy.run_path("study.py")
    shown = capsys.readouterr().out.splitlines()
    rows = [line for line in shown if re.match(r"(\[\]|\d) ", line)]
    assert len(rows) == 5
    assert len({line[8:] for line in rows}) == 5, "each ban changes the loss"
    assert shown[-1] == "expert 3 was used: False"


def test_adding_a_router(folder, monkeypatch) -> None:
    monkeypatch.setattr(routers, "ROUTERS", routers.ROUTERS.copy())
    _, router, test = blocks("router.md", "python")
    (folder / "my_router.py").write_text(router, "utf-8")
    (folder / "test_my_router.py").write_text(test, "utf-8")
    checks = runpy.run_path("test_my_router.py")
    for name in ("test_weights_are_shares_of_sigmoids", "test_bans_are_obeyed"):
        checks[name]()
    sys.modules.pop("my_router")


def test_training_with_another_router(folder, capsys) -> None:
    from bimedix_jax.checkpoint.load import load
    from bimedix_jax.cli import main

    command = next(
        line for block in blocks("router.md", "bash") for line in block.splitlines() if "train smoke" in line
    )
    assert command == "bimedix train smoke --steps 4 --set 'router.variant=\"sigmoid_bias\"' --out runs/balanced"
    with backends.use(expert_mlp="composed", grouped_matmul="ragged_dot"):
        main(["train", "smoke", "--steps", "4", "--set", 'router.variant="sigmoid_bias"', "--out", "runs/balanced"])
    assert "trained 4 steps" in capsys.readouterr().out
    model = load(folder / "runs/balanced")
    assert model.config.router.variant == "sigmoid_bias"
    assert model.layers.moe.state is not None
    assert (model.layers.moe.state.get_value() != 0).any()
