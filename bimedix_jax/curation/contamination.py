"""Which evaluation questions a training set contains: as a record, as a question, or word for word in longer texts.

The rules are those by which `bimedix data mix` removes training records (mix/decontaminate.py). Here each question is
told what was found for it, so that its accuracy can be reported apart.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence

from bimedix_jax.curation import fingerprints
from bimedix_jax.curation.mix.decontaminate import build_index
from bimedix_jax.curation.mix.scan import text_of
from bimedix_jax.data.records import Record, question_of

NGRAM, SHARE = 8, 0.5
"""Length of the runs of words, and the share of a question's runs that a training record must have."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """The training record that overlaps a question most.

    Attributes:
      by: "id" (the same record, or one made from it), "question" (the same words) or "words" (common runs).
      share: of the question's runs of words that the record has; 1 for the first two.
      record: id of the training record.
    """

    by: str
    share: float
    record: str


def seen(questions: Sequence[Record], training: Iterable[Record]) -> dict[int, Seen]:
    """What a training set has of each question, by the question's index; nothing for the others.

    Questions with the same words count as seen together. A training record that overlaps several different questions is
    counted for the one that it overlaps most.
    """
    index = build_index(questions, NGRAM, SHARE)
    same: dict[int, list[int]] = defaultdict(list)
    words = [fingerprints.whole(fingerprints.words(question_of(question))) for question in questions]
    for number, key in enumerate(words):
        same[key].append(number)
    found: dict[int, Seen] = {}
    for row, record in enumerate(training):
        hit = index.find(row, record, fingerprints.words(text_of(record)))
        if hit is None:
            continue
        for number in same[words[hit.evaluation]]:
            by = "question" if hit.by == "id" and number != hit.evaluation else hit.by
            new = Seen(by, hit.share, record.id)
            if number not in found or found[number].share < new.share:
                found[number] = new
    return dict(sorted(found.items()))
