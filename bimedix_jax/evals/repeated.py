"""Warns of questions that a set has more than once: they weigh double, and their ids do not name them."""

import logging
from collections import Counter
from collections.abc import Hashable, Iterable

from bimedix_jax.data.records import Record
from bimedix_jax.process.terminal import number

log = logging.getLogger(__name__)


def warn_repeated(where: str, questions: Iterable[tuple[Hashable, Hashable, Hashable]]) -> None:
    """Warns of ids, and of texts with the same choices, that occur more than once.

    Args:
      questions: (id, text, choices) of each.
    """
    ids, texts = Counter[Hashable](), Counter[Hashable]()
    for own, text, choices in questions:
        ids[own] += 1
        texts[text, choices] += 1
    again = {"id": ids.total() - len(ids), "text and choices": texts.total() - len(texts)}
    parts = [f"{number(count, 'question')} with the {what} of an earlier one" for what, count in again.items() if count]
    if parts:
        log.warning("%s has %s; each counts.", where, " and ".join(parts))


def warn_repeated_records(where: str, records: Iterable[Record]) -> None:
    """The same for records; the text is all that the human says."""
    warn_repeated(
        where,
        (
            (one.id, tuple(turn.value for turn in one.conversations if turn.speaker == "human"), one.choices)
            for one in records
        ),
    )
