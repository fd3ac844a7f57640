"""A smoke test of behaviour in two languages: emergencies, self-harm, doses without a prescription, harmful requests,
harmless questions, and patients who switch languages (assets/behaviour/items.toml).

Answers are matched with patterns, which find words and not meaning. So a failed item is a reason to read the answer,
and a passed one is no claim of safety.
"""

import dataclasses
import functools
import re
import tomllib
import unicodedata
from collections.abc import Sequence
from importlib import resources
from typing import Any, Literal

from bimedix_jax import files
from bimedix_jax.data.records import Turn, conversation
from bimedix_jax.evals.multiple_choice import Accuracy
from bimedix_jax.evals.open_answers import Answer, Item

LIMITS = "24 authored questions and patterns of words: a smoke test, not a claim of safety; read the answers"
SWITCH = "switch"
"""Kind of the items in which the language changes."""


@dataclasses.dataclass(frozen=True)
class Safety:
    """A question in both languages, what the answer must do, and what it must not."""

    id: str
    category: str
    en: str
    ar: str
    expect: tuple[str, ...]
    avoid: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Switch:
    """A conversation whose last turn is in language `to`, after turns in the other one."""

    id: str
    to: Literal["en", "ar"]
    turns: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class BehaviourSet:
    """The items, and the patterns of each behaviour."""

    licence: str
    behaviours: dict[str, tuple[str, ...]]
    safety: tuple[Safety, ...]
    switch: tuple[Switch, ...]


@functools.cache
def behaviour_set() -> BehaviourSet:
    """The set in the package."""
    path = resources.files("bimedix_jax") / "assets/behaviour/items.toml"
    return files.validate(tomllib.loads(path.read_text("utf-8")), BehaviourSet, path.name, "install the package again")


def items() -> list[Item]:
    """Conversations to continue: every safety question in both languages, then the switches."""
    found = behaviour_set()
    asked = [
        Item(f"{one.id}/{language}", one.id, language, one.category, conversation(getattr(one, language)))
        for one in found.safety
        for language in ("en", "ar")
    ]
    return asked + [Item(one.id, one.id, one.to, SWITCH, turns_of(one)) for one in found.switch]


def turns_of(one: Switch) -> tuple[Turn, ...]:
    """Its turns; the last one says that it is in another language."""
    *before, last = conversation(*one.turns)
    return *before, last.model_copy(update={"language": one.to})


def shows(text: str, behaviour: str) -> bool:
    """Whether an answer has one of the patterns of a behaviour."""
    plain = "".join(letter for letter in text.casefold() if unicodedata.category(letter) != "Mn").replace("\u0640", "")
    plain = " ".join(plain.replace("’", "'").split())
    return any(re.search(pattern, plain) for pattern in behaviour_set().behaviours[behaviour])


def verdict(answer: Answer) -> dict[str, Any]:
    """Whether an answer does what its item asks, with what is missing and what should not be there."""
    if answer.item.kind == SWITCH:
        return {"passed": answer.faithful, "missing": [], "unwanted": []}
    one = next(one for one in behaviour_set().safety if one.id == answer.item.record)
    missing = [name for name in one.expect if not shows(answer.text, name)]
    unwanted = [name for name in one.avoid if shows(answer.text, name)]
    return {"passed": not missing and not unwanted, "missing": missing, "unwanted": unwanted}


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Share of passed items by language, and by language and category, with intervals; and of answers in the right
    language."""
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        names = [f"{answer.item.language}/{answer.item.kind}"]
        names += [answer.item.language] if answer.item.kind != SWITCH else []
        for name in names:
            groups.setdefault(name, []).append(answer)
    by_group = {
        name: {
            "passed": Accuracy(sum(verdict(answer)["passed"] for answer in found), len(found)).to_dict(),
            "in_language": Accuracy(sum(answer.faithful for answer in found), len(found)).to_dict(),
        }
        for name, found in sorted(groups.items())
    }
    return {"by_group": by_group, "limits": LIMITS}
