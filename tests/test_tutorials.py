"""The tutorials run as they are written, and print what they say. `router.md` runs on a smaller model."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import quick_kernels, tiny

from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.data.tokenizer import byte_tokenizer
from bimedix_jax.models import routers
from bimedix_jax.models.init import init_random

pytestmark = pytest.mark.whole_process

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = ROOT / "docs/tutorials"
TINY = tiny(tie_embeddings=True, max_position_embeddings=4096)


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
    with quick_kernels():
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
    with quick_kernels():
        main(["train", "smoke", "--steps", "4", "--set", 'router.variant="sigmoid_bias"', "--out", "runs/balanced"])
    assert "trained 4 steps" in capsys.readouterr().out
    model = load(folder / "runs/balanced")
    assert model.config.router.variant == "sigmoid_bias"
    assert model.layers.moe.state is not None
    assert (model.layers.moe.state.get_value() != 0).any()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the code that a tutorial may edit, with the programs of the environment it asks for."""
    for name in ("bimedix_jax", "kernels", "models", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "bin").mkdir()
    for name, module in (("python", ""), ("pytest", "-m pytest -p no:cacheprovider"), ("bimedix", "-m bimedix_jax")):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n', "utf-8")
        program.chmod(0o755)
    return tmp_path


def shell(script: str, folder: Path) -> str:
    """What a reader sees on stdout, without what tests/conftest.py sets; but programs compile as fast as there.

    The page on ablations sets XLA_FLAGS itself, so JAX is asked for the same by its own name.
    """
    env = {key: value for key, value in os.environ.items() if key != "JAX_NUMPY_RANK_PROMOTION"}
    env["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"  # the last one counts
    env |= {"PYTHONPATH": str(folder), "PATH": f"{folder / 'bin'}:{env['PATH']}", "COLUMNS": "120"}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def apply(diff: str, path: Path) -> None:
    """Lines that begin with - or a space must stand in the file once; those with + or a space take their place."""
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in "- ")
    new = "".join(line[1:] for line in lines if line[0] in "+ ")
    text = path.read_text("utf-8")
    assert text.count(old) == 1, f"{path.name} has these lines {text.count(old)} times:\n{old}"
    path.write_text(text.replace(old, new), "utf-8")


def read_page(page: str, folder: Path) -> list[tuple[str, str]]:
    """Does what a page says, block by block: saves, edits, runs. Returns each text block with the output before it.

    A block belongs to the file whose name ends the sentence before it, as in "Save this as `file`:".
    """
    text = (TUTORIALS / page).read_text("utf-8")
    found = re.findall(r"(?:`([\w./]+)`:\n\n)?^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    compared, shown = [], ""
    for name, language, block in found:
        if language == "bash":
            shown = shell(block, folder)
        elif language == "text":
            compared.append((block, shown))
        elif language == "diff":
            apply(block, folder / name)
        else:
            (folder / name).write_text(block, "utf-8")
    return compared


def missing(expected: str, shown: str) -> list[str]:
    """Lines of a page with which no printed line begins; the width of spaces does not count."""
    printed = [" ".join(line.split()) for line in shown.splitlines()]
    wanted = [" ".join(line.split()) for line in expected.splitlines()]
    return [line for line in wanted if not any(found.startswith(line) for found in printed)]


@pytest.mark.parametrize("page", ["dataset.md", "kernel.md"])
def test_a_page_prints_what_it_says(page, checkout) -> None:
    compared = read_page(page, checkout)
    assert compared
    for expected, shown in compared:
        assert not missing(expected, shown), shown


def test_the_parity_suite_finds_the_mistake_that_the_page_suggests(checkout) -> None:
    *_, run = (block for block in blocks("kernel.md", "bash"))
    kernel, *_ = blocks("kernel.md", "python")
    (checkout / "kernels/grouped_low_rank/by_row.py").write_text(kernel.replace('"right"', '"left"'), "utf-8")
    for diff in blocks("kernel.md", "diff"):
        apply(diff, checkout / "kernels/grouped_low_rank/api.py")
    with pytest.raises(AssertionError, match="failed"):
        shell(f"{run.strip()} -x\n", checkout)


def test_an_ablation_on_eight_devices(checkout) -> None:
    ((expected, shown),) = read_page("ablation.md", checkout)
    wanted, got = (
        re.findall(r"^│ (attention|everything) +│(.*)│$", table, re.MULTILINE) for table in (expected, shown)
    )
    assert [name for name, _ in got] == [name for name, _ in wanted] == ["attention", "everything"]
    for (name, mine), (_, theirs) in zip(got, wanted, strict=True):
        numbers = [[float(word) for word in re.findall(r"[-+.\d]+", line.replace(",", ""))] for line in (mine, theirs)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.01), name
    assert not missing("Primary contrast, declared beforehand: nll of everything minus attention", shown)
    (report,) = checkout.glob("runs/ablation/report.md")
    assert "over 1 seed, as expected" in report.read_text("utf-8")
