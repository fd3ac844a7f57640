"""Printed text: nothing is cut at any width, a narrow table becomes blocks, and a pipe gets plain text."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from bimedix_jax.process.terminal import FittedTable, Screen, wrapped

LONG = "en-mcqa/a-source-with-a-rather-long-name-that-no-terminal-should-cut"


def table() -> FittedTable:
    shown = FittedTable("group", title=f"Results in /tmp/{LONG}", caption="A note that explains some of the numbers.")
    for header in ("accuracy %", "95 % interval", "tokens per second"):
        shown.add_column(header, justify="right")
    shown.add_prose_column("note")
    shown.add_row("mcqa", "31.25", "20.12 - 44.99", "1,234,567", "the first 100 of 1,273 questions were read")
    shown.add_row(LONG, "99.99", "98.11 - 99.99", "7", "")
    return shown


def printed(width: int, shown: object) -> str:
    screen = Screen()
    screen.file, screen.width = io.StringIO(), width
    screen.print(shown)
    return screen.file.getvalue()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 200])
def test_no_number_and_no_name_is_cut(width):
    text = printed(width, table())
    for whole in (LONG, f"/tmp/{LONG}", "31.25", "20.12 - 44.99", "1,234,567", "98.11 - 99.99", "mcqa"):
        assert whole in text
    assert "…" not in text
    words = f"the first 100 of 1,273 questions were read A note that explains some of the numbers. {LONG}".split()
    assert not set(words) - set(text.split())


def test_a_table_that_fits_stays_a_table_and_others_become_blocks():
    wide, narrow = printed(160, table()), printed(60, table())
    assert [line.split()[0] for line in wide.splitlines() if "31.25" in line] == ["mcqa"] or "┃" in wide
    lines = narrow.splitlines()
    assert "group mcqa" in lines
    assert "  accuracy %         31.25" in lines
    assert "  tokens per second  1,234,567" in lines


def test_headers_wrap_before_a_table_becomes_blocks():
    shown = FittedTable("", "tokens per second", "of the limit", box=None)
    shown.add_row("train", "1,234", "0.97")
    assert "tokens per second" in printed(60, shown)
    narrow = printed(26, shown)
    assert "second" in narrow
    assert "tokens per second" not in narrow
    assert max(map(len, narrow.splitlines())) <= 26
    assert "  tokens per second  1,234" in printed(18, shown).splitlines()


@pytest.mark.parametrize("width", [10, 30, 80])
def test_lines_break_between_words_only(width):
    text = f"The result is in {LONG}, with  two blanks\n  and an indented line."
    shown = printed(width, text)
    assert shown.split() == text.split()
    assert all(len(line) <= width or " " not in line.strip() for line in shown.splitlines())
    assert [line.plain for line in wrapped(Text("you> "), width)] == ["you> "]


def test_brackets_of_names_are_printed():
    assert printed(80, "[bold]in[/] runs/a[b] [/c] and \\[x] [yellow]x[/]") == "in runs/a[b] [/c] and \\[x] x\n"
    shown = FittedTable("a[b]", title="t[b]")
    shown.add_row("c[d]")
    assert all(name in printed(80, shown) for name in ("a[b]", "t[b]", "c[d]"))
    assert ":warning:" in printed(80, "a:warning:b")


def test_a_plain_console_prints_the_table_too():
    screen = io.StringIO()
    Console(file=screen, width=50).print(table())
    assert "1,234,567" in screen.getvalue()


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, {}])
def test_without_colour_the_text_is_plain(variables, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    text = printed(80, "[bold yellow]warning[/] 12 of /tmp/x")
    assert text == "warning 12 of /tmp/x\n"
    assert "\x1b" not in printed(80, table())
