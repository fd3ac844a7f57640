"""docs/reproduce.md: every command runs, on tiny models in folders of the published layout."""

import re
import shlex
from pathlib import Path

import pytest
from tiny import tiny
from tiny_benchmarks import write_arabic, write_benchmarks

from bimedix_jax import cli
from bimedix_jax.checkpoint import hub
from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.commands import plan
from bimedix_jax.costs.devices import target
from bimedix_jax.data.tokenizer import byte_tokenizer
from bimedix_jax.kernels import backends
from bimedix_jax.models.init import init_random
from bimedix_jax.options import read_options

PAGE = (Path(__file__).resolve().parents[1] / "docs/reproduce.md").read_text("utf-8")
TINY = tiny(num_layers=1, hidden_size=32, intermediate_size=64, max_position_embeddings=1024)
LINES = [
    line for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()
]
PUBLISHED = dict(re.findall(r"`(BiMediX/BiMediX-\w+)` \| `(refs/pr/\d+)`", PAGE))
MAY_NOT_RUN = ("hf", "export")
"""Commands of other programs; their arguments are checked."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with the benchmarks in both languages, and the Arabic model as a folder."""
    folder = tmp_path_factory.mktemp("reproduce")
    tokenizer = byte_tokenizer(folder / "tokenizer")
    for name in (*(f"hub/{published}" for published in PUBLISHED), "safetensors/ara"):
        export_hf(init_random(TINY, dtype="bfloat16", std=0.2), folder / name, tokenizer_from=tokenizer.folder)
    (folder / "data").mkdir()
    write_arabic(write_benchmarks(folder / "data"))
    return folder


def words_of(program):
    return [words[1:] for line in LINES if (words := shlex.split(line))[0] == program]


def test_only_known_programs_are_named():
    assert {shlex.split(line)[0] for line in LINES} == {"bimedix", *MAY_NOT_RUN}
    assert len(PUBLISHED) == 2


def test_downloads_name_the_published_revisions_and_what_is_read():
    downloads = [words for words in words_of("hf") if words[0] == "download"]
    assert {words[1]: words[words.index("--revision") + 1] for words in downloads} == PUBLISHED
    for words in downloads:
        assert set(words[words.index("--include") + 1 :]) <= {*hub.WANTED, "*.jinja"}


def test_the_commands_run_in_order(place, monkeypatch, capsys):
    """Hub ids are folders of tiny models here, and one question of each task is asked."""
    asked = []

    def local(name, revision):
        asked.append((name, revision))
        return place / "hub" / name

    monkeypatch.setattr(hub, "_download", local)
    monkeypatch.chdir(place)
    with backends.use(expert_mlp="composed", grouped_matmul="ragged_dot"):
        for words in words_of("bimedix"):
            words = ["any" if word == "MODEL" else word for word in words]
            if words[0] == "plan":  # compiles for minutes; tests/plan runs it
                config = read_options(plan.Config, words[1:], "bimedix plan", "")
                assert target(config.devices).count == 8
                assert plan.resolve(config).name == plan.DEFAULT
                continue
            more = ["--limit", "1"] if words[:2] == ["eval", "harness"] else []
            assert cli.main([*words, *more, "--json"]) == 0, capsys.readouterr().err
            capsys.readouterr()
    assert set(asked) == set(PUBLISHED.items())
    tables = {path.stem for path in (place / "results/tables").iterdir()}
    assert {"table3", "table4", "table5"} <= tables
    assert "BiMediX-Bi, ours" in (place / "results/tables/table3.md").read_text("utf-8")


def test_sizes_on_the_page_are_right():
    """4.127 bits for each packed weight, 16 for the others."""
    from bimedix_jax.models.config import MIXTRAL_8X7B
    from bimedix_jax.plan.latency import packed_weights
    from bimedix_jax.plan.published_speed import NF4_BITS

    packed, others = packed_weights(MIXTRAL_8X7B)
    assert f"{(packed + others) * 2 / 1e9:.1f} GB in 16 bits" in PAGE
    size = (packed * NF4_BITS + others * 16) / 8 / 1e9
    assert f"{size:.1f} GB for each model" in PAGE
    assert f"| `store/`, all three models | {3 * size + 0.5:.0f} |" in PAGE
