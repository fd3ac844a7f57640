"""Find training records that overlap evaluation sets, by identity, by words, and through translations and chats.

A record is contaminated when

- its id, or its PubMed id, is that of an evaluation record, or it was made from one (MADE_FROM);
- its question has exactly the words of an evaluation question;
- it contains at least `share` of the runs of `ngram` words of an evaluation question, or of the text that the question
  is about. If that has fewer than twice `ngram` words, it must contain all runs, since short questions begin alike;
- it belongs to the family of such a record: its source, its translations, the chats made from it.

Words are compared as `fingerprints.words` gives them, that is after `arabic.normalise`.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from bimedix_jax.curation import fingerprints
from bimedix_jax.data.records import Record, multiple_choice_question, question_of
from bimedix_jax.errors import BimedixError

MADE_FROM = ("source_id", "translation_of")
"""Keys of a record's provenance that name the record it was made or translated from. Translated chats have both."""

BENCHMARKS = ("mmlu_medical_en", "medmcqa_en", "medqa_usmle_en", "pubmedqa")
"""Readers of the files of the nine tasks. A test compares them with evals/tasks.py, whose import would import JAX."""

FILTER_BITS = 24


@dataclasses.dataclass(frozen=True)
class Hit:
    """Row `row` of a batch overlaps evaluation record number `evaluation`, of whose runs of words it has `share`."""

    row: int
    evaluation: int
    by: str
    share: float


@dataclasses.dataclass(frozen=True)
class EvaluationIndex:
    """An index of the evaluation records, small enough to send to every worker process.

    Attributes:
      ngram, share: see the module docstring.
      grams: hashes of all runs of words, sorted, uint64 [G].
      passage_of: the passage that each run is from, int32 [G].
      sizes: number of distinct runs of each passage, int32 [P].
      owner: evaluation record of each passage, int32 [P].
      questions: hash of all words of a question -> evaluation record.
      ids: digest of an id or of a PubMed id -> evaluation record.
    """

    ngram: int
    share: float
    grams: np.ndarray
    passage_of: np.ndarray
    sizes: np.ndarray
    owner: np.ndarray
    questions: dict[int, int]
    ids: dict[int, int]

    @cached_property
    def _filter(self) -> np.ndarray:
        """Whether a hash with these highest bits may be in `grams`. Rules out most runs of most records."""
        found = np.zeros(1 << FILTER_BITS, bool)
        found[self.grams >> np.uint64(64 - FILTER_BITS)] = True
        return found

    def find(self, row: int, record: Record, hashes: np.ndarray) -> Hit | None:
        """The strongest hit of a record, None if there is none. `hashes` are those of the words of its turns."""
        for key in _identities(record):
            if key in self.ids:
                return Hit(row, self.ids[key], "id", 1.0)
        asked = hashes if record.kind == "chat" else fingerprints.words(question_of(record))
        same = self.questions.get(fingerprints.whole(asked)) if len(asked) else None
        if same is not None:
            return Hit(row, same, "question", 1.0)
        found = fingerprints.runs(hashes, self.ngram)
        found = np.unique(found[self._filter[found >> np.uint64(64 - FILTER_BITS)]])
        if not len(found):
            return None
        starts, stops = (np.searchsorted(self.grams, found, side) for side in ("left", "right"))
        passages = [self.passage_of[a:b] for a, b in zip(starts, stops, strict=True) if b > a]
        if not passages:
            return None
        passage, shared = np.unique(np.concatenate(passages), return_counts=True)
        shares = shared / self.sizes[passage]
        needed = np.where(self.sizes[passage] <= self.ngram, 1.0, self.share)
        best = int(np.argmax(np.where(shares >= needed, shares, -1)))
        if shares[best] < needed[best]:
            return None
        return Hit(row, int(self.owner[passage[best]]), "words", float(shares[best]))


def build_index(evaluation: Iterable[Record], ngram: int, share: float) -> EvaluationIndex:
    """Index evaluation records. A hit refers to a record by its position in `evaluation`."""
    grams, owner, sizes = [np.empty(0, np.uint64)], [], []
    questions: dict[int, int] = {}
    ids: dict[int, int] = {}
    for number, record in enumerate(evaluation):
        for key in _identities(record):
            ids.setdefault(key, number)
        texts = _passages(record)
        if len(texts[0]):
            questions.setdefault(fingerprints.whole(texts[0]), number)
        for text in texts:
            found = np.unique(fingerprints.runs(text, ngram))
            if len(found):
                grams.append(found)
                owner.append(number)
                sizes.append(len(found))
    passage_of = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    flat = np.concatenate(grams)
    order = np.argsort(flat, kind="stable")
    return EvaluationIndex(
        ngram,
        share,
        flat[order],
        passage_of[order],
        np.array(sizes, np.int32),
        np.array(owner, np.int32),
        questions,
        ids,
    )


def families(ids: np.ndarray, parents: np.ndarray, contaminated: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Rows that are contaminated or related to such a row, or to an evaluation record: bool [N].

    Args:
      ids: digest of each row's id, uint64 [N].
      parents: digests of the ids that each row was made from (0 for none), uint64 [MADE_FROM, N].
      contaminated: rows with a hit, bool [N].
      known: digests of the evaluation records' ids.
    """
    removed = contaminated.copy()
    while True:
        named = np.concatenate([ids[removed], *parents[:, removed], known])
        named = np.unique(named[named != 0])
        again = removed | np.isin(ids, named) | np.isin(parents, named).any(axis=0)
        if (again == removed).all():
            return removed
        removed = again


def benchmark_sources(folder: Path) -> tuple[str, ...]:
    """The paper's nine tasks as sources, from the folder that `bimedix eval run` takes.

    Raises:
        BimedixError: one of them is missing.
    """
    missing = [name for name in BENCHMARKS if not (folder / name).is_dir()]
    if missing:
        raise BimedixError(
            f"{folder} lacks the folder {missing[0]}; put the benchmark files there, or name those that you have "
            "with --evaluation"
        )
    return tuple(f"{name}={folder / name}" for name in BENCHMARKS)


def parents_of(record: Record) -> list[str | None]:
    """For each key of MADE_FROM the id that the record names, None where it names none."""
    found = (record.provenance.get(key) for key in MADE_FROM)
    return [None if name is None else str(name) for name in found]


def _identities(record: Record) -> list[int]:
    names = [record.id, *(parent for parent in parents_of(record) if parent is not None)]
    if "pmid" in record.provenance:
        names.append(f"pmid:{record.provenance['pmid']}")
    return [fingerprints.digest(name) for name in names]


def _passages(record: Record) -> Sequence[np.ndarray]:
    """Words of the question, and of all that is asked with it where that is much more (an abstract, a vignette)."""
    question = fingerprints.words(question_of(record))
    asked = "\n".join(turn.value for turn in record.conversations if turn.speaker == "human")
    if record.choices is not None:
        asked = asked.removesuffix(multiple_choice_question("", record.choices))
    everything = fingerprints.words(asked)
    return [question, everything] if len(everything) > 1.5 * len(question) else [question]
