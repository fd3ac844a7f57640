"""Command-line options from the fields of a frozen dataclass, read by tyro.

The type of a field determines the values of its option, and the text below the field is its help. Some rules are added
to those of tyro:

- an option that may be left out (`X | None = None`) takes an X and not the word None; its text says what happens
  without it;
- an option with several values takes them after one flag or after repeated flags, `--set a=1 b=2` or
  `--set a=1 --set b=2`; any other option is refused if it is given twice;
- one name means one thing in every command (METAVARS), and an earlier name is refused with the present one (RENAMED);
- the description above the options is wrapped to the width of the terminal.
"""

import collections
import dataclasses
import inspect
import itertools
import json
import shutil
import textwrap
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any

import docstring_parser
import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
)

from bimedix_jax.errors import BimedixError, UsageError

WIDEST = 100
"""Most columns of the description, since longer lines are hard to read."""

METAVARS = {
    "model": "MODEL",
    "adapter": "DIR",
    "router": "VARIANT",
    "data": "DIR",
    "out": "DIR",
    "tokenizer": "DIR",
    "tokenizer-from": "DIR",
    "template": "NAME",
    "revision": "REVISION",
    "records": "FILE",
    "items": "FILE",
    "limit": "N",
    "seed": "N",
}
"""Name of an option -> what the help shows for its value, in every command that has the option."""

RENAMED = {"output": "out", "base": "model", "prompts": "batch", "prompt": "prompt-tokens"}
"""Earlier name -> present name, for commands that have an option of the present name only."""


@dataclasses.dataclass(frozen=True)
class ChangesField:
    """Marks an option that replaces one field of an experiment, named with dots."""

    name: str


def changed_fields(config: Any) -> dict[str, Any]:
    """Field of the experiment -> value, for the options with ChangesField that were given."""
    changes = {}
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        marks = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, ChangesField)]
        if value is not None:
            changes |= {mark.name: value for mark in marks}
    return changes


def parse_assignment(text: str) -> tuple[str, Any]:
    """'a.b=1' as ('a.b', 1); a value that is not JSON is a text.

    Raises:
      ValueError: there is no name or no equals sign.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"{text} is not FIELD=VALUE; write optimiser.weight_decay=0.1, for example")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


Assignment = Annotated[
    tuple[str, Any],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="FIELD=VALUE",
        instance_from_str=lambda words: parse_assignment(words[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda pair: [f"{pair[0]}={json.dumps(pair[1])}"],
    ),
]
"""A field of an experiment and its new value."""


def read_options(config: type, words: Sequence[str], prog: str, note: str = "") -> Any:
    """The `config` that the words of a command line describe; the help has its docstring and then `note`.

    Raises:
      SystemExit: 0 after printing the help, 2 after printing an error in the options.
      UsageError: an earlier name, an option given twice, or a word that belongs to no option.
    """
    check_words(config, words, prog)
    registry = ConstructorRegistry()
    registry.struct_rule(lambda info: options_of(info.type, info.default) if _is_dataclass(info.type) else None)
    # cleandoc, because Python 3.13 removes the indentation of a docstring and its predecessors do not
    description = wrapped(f"{inspect.cleandoc(config.__doc__ or '')}\n\n{note}")
    found = tyro.cli(config, prog=prog, description=description, args=words, registry=registry)
    check_assignments(found)
    check_seed(found)
    return found


def check_words(config: type, words: Sequence[str], prog: str) -> None:
    """Raises UsageError for earlier names, repeated options and words that belong to no option."""
    if {"-h", "--help"} & set(words):
        return
    positionals, options = options_by_name(config)
    values: dict[str, list[str]] = collections.defaultdict(list)  # as they were given, by the name of the option
    loose, taker = [], ("", 0.0)  # words without an option; the option that takes the next words, and how many
    for place, word in enumerate(words):
        if word == "--":
            loose += words[place + 1 :]
            break
        if not word.startswith("--"):
            if taker[1]:
                values[taker[0]][-1] += f" {word}"
                taker = (taker[0], taker[1] - 1)
            else:
                loose.append(word)
            continue
        flag, equals, value = word[2:].partition("=")
        name, several = _known(flag.replace("_", "-"), options)
        if name not in options:
            if RENAMED.get(name) in options:
                raise UsageError(f"--{name} is now --{RENAMED[name]} in `{prog}`; write --{RENAMED[name]}")
            return  # tyro suggests options with a similar name
        values[name].append(f"--{flag}{equals}{value}")
        taker = (name, 0 if equals and several < 2 else several)
    for name, given in values.items():
        if len(given) > 1 and options[name] < 2:
            raise UsageError(f"--{name} is given {_times(len(given))} ({', '.join(given)}); give it once")
    most = most_positionals(config)
    if len(loose) > most:
        takes = f"takes {' '.join(positionals)} and no" if positionals else "takes no"
        remedy = "; the folder to write is named with --out DIR" if "out" in options and "out" not in values else ""
        raise UsageError(f"`{prog}` {takes} further word, and got {loose[int(most)]!r}{remedy}")


def most_positionals(config: type) -> float:
    """Number of words that the positionals take, inf for a list."""
    most = 0.0
    for hint in typing.get_type_hints(config, include_extras=True).values():
        kind, marks = _parts(hint)
        if tyro.conf.Positional in marks:
            values = typing.get_args(kind) if typing.get_origin(kind) is tuple else (kind,)
            most += float("inf") if Ellipsis in values else len(values)
    return most


def options_by_name(config: type, prefix: str = "") -> tuple[list[str], dict[str, float]]:
    """(the positionals as the help shows them, option -> number of words that it takes, inf for a list)."""
    positionals, options = [], {}
    for name, hint in typing.get_type_hints(config, include_extras=True).items():
        kind, marks = _parts(hint)
        if tyro.conf.Positional in marks:
            positionals.append(next((mark.metavar for mark in marks if getattr(mark, "metavar", None)), name.upper()))
        elif _is_dataclass(kind):
            options |= options_by_name(kind, f"{prefix}{name.replace('_', '-')}.")[1]
        else:
            several = any(typing.get_origin(option) is tuple for option in _alternatives(kind))
            options[prefix + name.replace("_", "-")] = float("inf") if several else 0 if kind is bool else 1
    return positionals, options


def _known(name: str, options: dict[str, float]) -> tuple[str, float]:
    """The name of an option and the number of its words, where `--no-NAME` belongs to NAME."""
    parents, dot, last = name.rpartition(".")
    positive = f"{parents}{dot}{last.removeprefix('no-')}"
    name = positive if name not in options and options.get(positive) == 0 else name
    return name, options.get(name, 0)


def _times(number: int) -> str:
    return "twice" if number == 2 else f"{number} times"


def check_assignments(config: Any) -> None:
    """Raises UsageError if two options change the same field of an experiment, or a field and a part of it."""
    given: list[tuple[str, str]] = []  # (the field, how the user named it)
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        option, value = f"--{name.replace('_', '-')}", getattr(config, name)
        if hint == tuple[Assignment, ...]:
            given += [(field, f"{option} {field}") for field, _ in value]
        elif value is not None:
            given += [(mark.name, option) for mark in _parts(hint)[1] if isinstance(mark, ChangesField)]
    for (one, first), (other, second) in itertools.combinations(given, 2):
        if one == other and first == second:
            raise UsageError(f"{first} is given twice; give it once")
        if f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}."):
            raise UsageError(f"{first} and {second} change the same field; give one of them")


def require_at_least_one(config: Any, *names: str) -> None:
    """Raises BimedixError if one of these fields is a number below 1; None is allowed."""
    for name in names:
        if (value := getattr(config, name)) is not None and value < 1:
            raise BimedixError(f"--{name.replace('_', '-')} is {value}; give at least 1")


def check_seed(config: Any) -> None:
    """Raises BimedixError for a seed that no generator takes."""
    seed = getattr(config, "seed", None)
    if isinstance(seed, int) and seed < 0:
        raise BimedixError(f"--seed is {seed}; give at least 0")


def wrapped(text: str) -> str:
    """Paragraphs wrapped to the terminal's width; indented paragraphs, which are commands to copy, are unchanged."""
    columns = min(shutil.get_terminal_size().columns, WIDEST)
    lines = []
    for paragraph in filter(None, text.split("\n\n")):
        if paragraph.startswith(" "):
            lines += paragraph.split("\n")
        else:  # tyro joins lines that begin with a letter, which would undo a wrapping without indentation
            filled = textwrap.fill(_one_line(paragraph), columns, subsequent_indent="  ", break_on_hyphens=False)
            lines += ["", filled] if lines else [filled]
    return "\n".join(lines)


def options_of(config: type, given: Any = tyro.MISSING_NONPROP) -> StructConstructorSpec:
    """An option for each field of a dataclass, and how to build an instance; `given` is an instance with defaults."""
    texts = {text.arg_name: text.description for text in docstring_parser.parse_from_object(config).params}
    hints = typing.get_type_hints(config, include_extras=True)
    options: list[StructFieldSpec] = []
    repeatable: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        kind, marks = _parts(hints[field.name])
        default = getattr(given, field.name) if isinstance(given, config) else _default(field, kind)
        shown = _default_shown(default, marks)
        several = next((option for option in _alternatives(kind) if typing.get_origin(option) is tuple), None)
        if several is not None and tyro.conf.Positional not in marks:
            repeatable[field.name] = default
            kind, marks, default = types.GenericAlias(tuple, (several, ...)), (*marks, tyro.conf.UseAppendAction), ()
        elif default is None:
            marks = (*marks, tyro.conf.DisallowNone)
        metavar = None if field.name in repeatable or _has_choices(kind) else METAVARS.get(field.name.replace("_", "-"))
        hint = _annotated(kind, (tyro.conf.arg(help_behavior_hint=shown, metavar=metavar), *marks))
        options.append(StructFieldSpec(field.name, hint, default, _one_line(texts.get(field.name))))

    def build(**values: Any) -> Any:
        for name, default in repeatable.items():
            values[name] = tuple(itertools.chain(*values[name])) if values[name] else default
        missing = [f"--{name.replace('_', '-')}" for name in repeatable if values[name] is tyro.MISSING_NONPROP]
        if missing:  # tyro calls no repeatable option required
            raise ValueError(f"{', '.join(missing)} is required")
        return config(**values)

    return StructConstructorSpec(build, tuple(options))


def _default(field: dataclasses.Field[Any], kind: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is dataclasses.MISSING or _is_dataclass(kind):
        return tyro.MISSING_NONPROP  # the fields of a nested dataclass have their own defaults
    return field.default_factory()


def _default_shown(default: Any, marks: Sequence[Any]) -> str | None:
    if any(isinstance(mark, ChangesField) for mark in marks):
        return "(default: the preset's)"
    if default is tyro.MISSING_NONPROP:
        return "(required)"
    if default is None or default == ():
        return "(optional)"  # the text says what happens without it
    return f"(default: {' '.join(map(str, default))})" if isinstance(default, tuple) else None


def _is_dataclass(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type and the metadata of an annotation."""
    return (hint.__origin__, hint.__metadata__) if typing.get_origin(hint) is Annotated else (hint, ())


def _has_choices(kind: Any) -> bool:
    return any(typing.get_origin(option) is typing.Literal for option in _alternatives(kind))


def _annotated(kind: Any, marks: tuple[Any, ...]) -> Any:
    alias: Any = Annotated
    return alias[(kind, *marks)]


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type that `kind` is."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
