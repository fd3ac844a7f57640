"""README.md is true: its Python and its commands run, its files exist, its notices are the product's own."""

import html
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from tiny import GROUPED, quick_kernels, tiny

from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.checkpoint.safetensors_io import read_folder
from bimedix_jax.cli import COMMANDS, SHORT, main
from bimedix_jax.data.tokenizer import byte_tokenizer
from bimedix_jax.models.init import init_random
from bimedix_jax.notice import NOTICE_AR, NOTICE_EN

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

TINY = tiny(GROUPED, tie_embeddings=True)


FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a language; "" for those of none."""
    return [block for found, block in FENCED.findall(text) if found == language]


def normal(text: str) -> str:
    """Text without markup, quote marks and line breaks."""
    return " ".join(re.sub(r"[*>]", " ", html.unescape(re.sub(r"<[^>]+>", " ", text))).split())


def commands_in(text: str) -> set[str]:
    """Every command line of `bimedix` in code, by its command, or its first word where that is no command."""
    code = [*blocks("bash", text), *re.findall(r"`([^`]+)`", FENCED.sub("", text))]
    found = set()
    for words in (match.split() for part in code for match in re.findall(r"\bbimedix\s+((?:[a-z]+\s*){1,2})", part)):
        two = " ".join(words[:2])
        found.add(two if two in COMMANDS else words[0])
    return found


def test_the_tour_runs(tmp_path, monkeypatch, capsys):
    (block,) = blocks("python")
    assert len([line for line in block.splitlines() if line and not line.startswith(("import", "from"))]) <= 12
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    export_hf(init_random(TINY, dtype="bfloat16", std=0.1), tmp_path / "runs/mixture", tokenizer_from=tokenizer.folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tour.py").write_text(block, "utf-8")
    names = runpy.run_path("tour.py")
    assert capsys.readouterr().out
    assert (names["out"].routing.experts_LBTK == 3).any()
    assert not (names["banned"].routing.experts_LBTK == 3).any()
    before, after = (read_folder(Path(folder)) for folder in ("runs/mixture", "runs/exported"))
    assert {name: tensor.read().tobytes() for name, tensor in before.items()} == {
        name: tensor.read().tobytes() for name, tensor in after.items()
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_exists(page):
    assert commands_in(page.read_text("utf-8")) <= {*COMMANDS, *SHORT}


def test_help_and_messages_name_commands_that_exist():
    groups = {name.split()[0] for name in COMMANDS}
    for path in sorted((ROOT / "bimedix_jax").rglob("*.py")):
        text = re.sub(r'"\n\s+f?"', "", path.read_text("utf-8"))  # texts over several lines
        for words in re.findall(r"`bimedix\s+((?:[a-z]+\b(?![=.])\s*){1,2})", text):
            named = words.split()
            known = named[0] in {*COMMANDS, *SHORT} or " ".join(named) in {*COMMANDS, *groups}
            assert known, f"{path}: bimedix {words}"


@pytest.mark.parametrize("group", sorted({name.split()[0] for name in COMMANDS if " " in name}))
def test_the_help_of_a_group_has_its_commands_and_its_short_form(group, capsys):
    assert main([group, "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS if name.startswith(f"{group} "))
    assert (f"`bimedix {group} FILE` is short for" in shown) == (group in SHORT)


def test_the_table_has_every_command():
    table = (ROOT / "docs/commands.md").read_text("utf-8")
    listed = re.findall(r"^\| `bimedix ([a-z ]+)` \|", table, re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)


def test_the_three_commands_run(tmp_path, monkeypatch, capsys):
    """Training with fewer steps, and all of them on a tiny model."""
    (block,) = (block for block in blocks("bash") if "bimedix train" in block)
    model = init_random(tiny(tie_embeddings=True, max_position_embeddings=1024), dtype="bfloat16", std=0.1)
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    export_hf(model, tmp_path / "runs/mixture", tokenizer_from=tokenizer.folder)
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line)[1:] for line in block.splitlines()]
    assert len(commands) == 3
    documents = []
    with quick_kernels():
        for words in commands:
            fewer = ["--steps", "6"] if words[0] == "train" else []
            assert main([*words, *fewer, "--json"]) == 0
            documents.append(json.loads(capsys.readouterr().out))
    assert {"en", "ar"} <= set(documents[-1]["heldout"]["nats_per_token"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_linked_file_exists(page):
    targets = re.findall(r"\]\(([^)#\s]+)\)", page.read_text("utf-8"))
    local = [target for target in targets if not target.startswith(("http://", "https://"))]
    assert not [target for target in local if not (page.parent / target).exists()]


def test_every_file_of_the_tree_exists():
    (tree,) = blocks("")
    paths = [line.split()[0] for line in tree.splitlines()]
    assert len(paths) > 10
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_scripts_that_are_named_exist():
    named = {
        name
        for page in PAGES
        for name in re.findall(r"\b((?:scripts|experiments)/\w+\.(?:sh|py))", page.read_text("utf-8"))
    }
    assert {"scripts/quickstart.sh", "scripts/test.sh"} <= named
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_notices_are_the_products_own():
    assert normal(NOTICE_EN) in normal(README)
    assert normal(NOTICE_AR) in normal(README)
    assert 'lang="ar" dir="rtl"' in README


def test_the_count_of_the_paper_is_right(capsys):
    (command,) = re.findall(r"`bimedix (coverage --model mixtral-8x7b[^`]*)` prints 1,904,246,784", README)
    assert main(command.split()) == 0
    assert "1,904,246,784" in capsys.readouterr().out


def test_every_variable_of_the_project_is_documented():
    files = [path for part in ("bimedix_jax", "scripts", "tests") for path in (ROOT / part).rglob("*")]
    texts = [path.read_text("utf-8") for path in files if path.suffix in (".py", ".sh") and path.is_file()]
    used = set(re.findall(r"\bBIMEDIX_[A-Z_]*[A-Z]\b", "\n".join(texts)))
    page = (ROOT / "docs/environment.md").read_text("utf-8")
    assert "BIMEDIX_CACHE" in used
    assert used == set(re.findall(r"BIMEDIX_[A-Z_]*[A-Z]", page))


def test_examples_start_from_experts_that_differ():
    """Between copies of one expert a ban or another router changes the logits by rounding only."""
    study = (ROOT / "experiments/router_training.py").read_text("utf-8")
    for text in (README, study):
        upcycled = re.findall(r"^\s*bimedix upcycle .*$", text, re.MULTILINE)
        assert upcycled
        assert all("--noise 0.1" in line and "--drop-rate" not in line for line in upcycled)
