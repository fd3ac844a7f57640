"""Options from the fields of a dataclass: what is read, what the help says, and how wide it is."""

import contextlib
import dataclasses
import importlib
import io
from typing import Annotated, Literal

import pytest
import tyro

from bimedix_jax.cli import COMMANDS
from bimedix_jax.errors import UsageError
from bimedix_jax.options import RENAMED, Assignment, ChangesField, changed_fields, options_by_name, read_options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Server:
    """A server."""

    url: str = "http://here"
    """Address."""
    limit: int | None = None
    """Requests; by default any number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Do something.

    A second paragraph, which is long enough to be wrapped on every terminal that is narrower than one hundred and
    twenty columns.

        bimedix test --rows 1 \\
            --set a=1
    """

    name: str | None = None
    """Whose; by default
    everybody's."""
    base: Literal["nf4", "float32"] | None = None
    """Storage; by default the checkpoint's."""
    rows: Annotated[int | None, ChangesField("batch.rows")] = None
    """Rows."""
    sizes: tuple[int, ...] = (1, 8)
    """Sizes."""
    layers: tuple[str, ...] | None = None
    """Layers; by default all."""
    set: tuple[Assignment, ...] = ()
    """Fields."""
    out: str | None = None
    """Where it goes."""
    loud: bool = False
    """Whether."""
    max_rows: int = 1
    """Most rows."""
    server: Server = dataclasses.field(default_factory=Server)
    """Where it is done."""
    other: Server = Server(url="http://there")
    """Another one."""


def read(*words: str) -> Config:
    return read_options(Config, words, "bimedix test")


def help_at(columns: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = io.TextIOWrapper(io.BytesIO(), "utf-8", newline="\n")
    with contextlib.redirect_stdout(stream), pytest.raises(SystemExit) as left:
        read_options(Config, ["--help"], "bimedix test", "A note.")
    assert left.value.code == 0
    stream.seek(0)
    return stream.read().splitlines()


def test_omitted_fields_have_their_defaults():
    assert read() == Config()


def test_values_follow_one_flag_or_repeated_flags():
    for words in (["--set", "a=1", "b.c=x"], ["--set", "a=1", "--set", "b.c=x"]):
        assert read(*words).set == (("a", 1), ("b.c", "x"))
    assert read("--sizes", "3", "--sizes", "4", "5").sizes == (3, 4, 5)
    assert read("--layers", "q").layers == ("q",)
    assert read("--layers").layers == ()


def test_an_assignment_takes_json_or_text():
    pairs = dict(read("--set", "a=null", "b=[1, 2]", "c=1e-3", "d=text", "e=x=y", "f=").set)
    assert pairs == {"a": None, "b": [1, 2], "c": 1e-3, "d": "text", "e": "x=y", "f": ""}


@pytest.mark.parametrize(
    "words", [["--set", "a"], ["--set", "=1"], ["--rows", "None"], ["--base", "int8"], ["--nam", "x"]]
)
def test_wrong_options_exit_with_2(words, capsys):
    with pytest.raises(SystemExit) as left:
        read(*words)
    assert left.value.code == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name", "a", "--name", "b"], "--name is given twice (--name a, --name b); give it once"),
        (["--name=a", "--rows", "2", "--name=b"], "--name is given twice (--name=a, --name=b)"),
        (["--name", "a", "--name", "a", "--name", "a"], "--name is given 3 times"),
        (["--loud", "--no-loud"], "--loud is given twice (--loud, --no-loud)"),
        (["--max_rows", "1", "--max-rows", "2"], "--max-rows is given twice (--max_rows 1, --max-rows 2)"),
        (["--server.limit", "1", "--server.limit", "2"], "--server.limit is given twice"),
        (["--set", "a.b=1", "a.b=2"], "--set a.b is given twice"),
        (["--set", "a.b=1", "--set", "a=null"], "--set a.b and --set a change the same field"),
        (["--set", "batch.rows=1", "--rows", "2"], "--rows and --set batch.rows change the same field"),
        (["--set", "batch=null", "--rows", "2"], "--rows and --set batch change the same field"),
        (["--output", "x"], "--output is now --out in `bimedix test`; write --out"),
        (["--output=x"], "--output is now --out"),
        (["more"], "`bimedix test` takes no further word, and got 'more'; the folder to write is named with --out DIR"),
        (["--loud", "more", "--out", "x"], "`bimedix test` takes no further word, and got 'more'"),
        (["--", "more"], "takes no further word, and got 'more'"),
    ],
)
def test_repeated_options_old_names_and_loose_words_are_refused(words, message):
    with pytest.raises(UsageError) as refused:
        read(*words)
    assert message in str(refused.value)


def test_positionals_are_counted_and_named():
    @dataclasses.dataclass(frozen=True)
    class Conversion:
        """Convert."""

        source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
        """What."""
        out: str
        """Where."""

    assert read_options(Conversion, ["a", "--out", "b"], "x") == Conversion("a", "b")
    with pytest.raises(UsageError, match="takes SRC and no further word, and got 'b'"):
        read_options(Conversion, ["a", "b"], "x")


def test_fields_that_do_not_overlap_may_be_set_together():
    assert read("--set", "a.b=1", "a.bc=2", "a.c=3", "--rows", "4").rows == 4


def test_the_help_takes_precedence_over_errors(capsys):
    with pytest.raises(SystemExit) as left:
        read("--output", "x", "--help")
    assert left.value.code == 0
    capsys.readouterr()


def test_the_name_none_is_an_ordinary_text():
    assert read("--name", "None").name == "None"


def test_a_nested_dataclass_has_options_with_its_name():
    assert read("--server.limit", "3").server == Server(limit=3)
    assert read("--other.limit", "3").other == Server(url="http://there", limit=3)


def test_an_option_without_a_default_is_required(capsys):
    @dataclasses.dataclass(frozen=True)
    class Required:
        """Do something."""

        files: tuple[str, ...]
        """Files."""

    assert read_options(Required, ["--files", "a", "--files", "b"], "x").files == ("a", "b")
    with pytest.raises(SystemExit) as left:
        read_options(Required, [], "x")
    assert left.value.code == 2
    assert "--files is required" in capsys.readouterr().err


def test_marked_options_change_fields():
    assert changed_fields(Config(rows=3, name="x")) == {"batch.rows": 3}
    assert changed_fields(Config()) == {}


def test_the_help_shows_values_and_defaults_without_none(monkeypatch):
    text = "\n".join(help_at(100, monkeypatch))
    assert "None" not in text
    assert "default: )" not in text
    for shown in ("--name STR", "by default everybody's.", "--base {nf4,float32}", "(default: 1 8)", "FIELD=VALUE"):
        assert shown in text
    assert "Rows. (default: the preset's)" in text
    assert "Storage; by default the checkpoint's. (optional)" in text
    assert "\n    bimedix test --rows 1 \\\n        --set a=1\n" in text
    assert "A note." in text


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 140, 250])
def test_no_line_of_the_help_is_wider_than_the_terminal(columns, monkeypatch):
    lines = help_at(columns, monkeypatch)
    assert max(map(len, lines)) <= columns
    assert lines[2] == "Do something."


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_no_earlier_names_and_no_second_positional(command):
    config = importlib.import_module(COMMANDS[command][1]).Config
    positionals, options = options_by_name(config)
    assert len(positionals) <= 1
    for old, new in RENAMED.items():
        if new in options and old not in options:
            with pytest.raises(UsageError, match=f"--{old} is now --{new} in `bimedix {command}`; write --{new}"):
                read_options(config, [f"--{old}", "x"], f"bimedix {command}")
    assert not {"output", "destination", "output-dir"} & options.keys()


def test_a_positional_takes_as_many_words_as_its_type():
    config = importlib.import_module(COMMANDS["eval compare"][1]).Config
    found = read_options(config, ["a", "b", "--force"], "bimedix eval compare")
    assert list(map(str, found.results)) == ["a", "b"]
    with pytest.raises(UsageError, match="takes A B and no further word, and got 'c'"):
        read_options(config, ["a", "b", "c"], "bimedix eval compare")
    config = importlib.import_module(COMMANDS["routes import"][1]).Config
    assert (
        len(read_options(config, ["a", "b", "c", "--out", "d", "--format", "vllm"], "bimedix routes import").files) == 3
    )
    config = importlib.import_module(COMMANDS["train"][1]).Config
    with pytest.raises(UsageError, match="no further word, and got 'b'"):
        read_options(config, ["a", "b"], "bimedix train")


@pytest.mark.parametrize("command", ["convert", "export"])
def test_the_folder_to_write_is_an_option(command):
    config = importlib.import_module(COMMANDS[command][1]).Config
    found = read_options(config, ["a", "--out", "b"], f"bimedix {command}")
    assert (found.source, str(found.out)) == ("a", "b")
    with pytest.raises(UsageError, match="takes SRC and no further word, and got 'b'; the folder to write is named"):
        read_options(config, ["a", "b"], f"bimedix {command}")
