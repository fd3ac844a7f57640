"""Writes the outcomes of `translate`: accepted translations, items for review, and a report.

Everything is written in the order of the input and only from the store. A run that was killed and resumed therefore
writes the same bytes as one that was not.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bimedix_jax.curation.annotate.job import Outcomes
from bimedix_jax.curation.annotate.translation import TranslationOutcome
from bimedix_jax.curation.arabic import plain, words
from bimedix_jax.curation.checks.batch import MIN_WORDS, Batch
from bimedix_jax.curation.checks.flags import Flag
from bimedix_jax.curation.review.items import Reason, ReviewItem, Version
from bimedix_jax.data.records import Record

TRANSLATED, REVIEW, REPORT = "translated.jsonl", "review.jsonl", "report.json"
BAND = 5  # scores from 85 up to 90 are one stratum


@dataclass(frozen=True)
class Sampling:
    """The share of accepted translations of each stratum that people review, at least one; drawn by `seed`."""

    share: float
    seed: int


Each = Callable[[Record, Version | None, Record | None, Reason | None], None]
"""Takes a record, the chosen version, its translation, and why people review it."""


def write(
    folder: Path,
    outcomes: Outcomes,
    sampling: Sampling,
    threshold: float,
    provenance: dict[str, Any],
    each: Each | None = None,
) -> dict[str, Any]:
    """Write TRANSLATED, REVIEW and REPORT into an existing folder and return the report.

    `provenance` is added to that of each translation. `each` is called with every record, in order.
    """
    accepted, shared = _accepted(outcomes)
    drawn, strata = _draw(accepted, sampling)
    counts = _Counts()
    with (
        (folder / TRANSLATED).open("w", encoding="utf-8", newline="\n") as translated,
        (folder / REVIEW).open("w", encoding="utf-8", newline="\n") as review,
    ):
        for record, outcome in outcomes():
            version = None if outcome is None else _with_flags(outcome.version, shared.get(record.id, ()))
            translation = None if version is None else _stamped(version, provenance)
            if outcome is not None and version is not None and outcome.accepted and not version.flags:
                assert translation is not None
                counts.accepted_in_round[version.round] += 1
                translated.write(translation.to_json() + "\n")
                reason: Reason | None = "sample" if record.id in drawn else None
            else:
                reason = _reason(outcome, version)
                counts.flags.update({flag.name for flag in (version.flags if version else ())})
            counts.review[reason] += 1
            if each is not None:
                each(record, version, translation, reason)
            if reason is not None:
                stratum = _stratum(record, version) if reason == "sample" else None
                item = ReviewItem(
                    id=record.id,
                    reason=reason,
                    source=record,
                    translation=translation,
                    score=None if version is None else version.score,
                    threshold=threshold,
                    flags=() if version is None else version.flags,
                    history=() if outcome is None else outcome.versions,
                    stratum=stratum,
                    stratum_accepted=None if stratum is None else strata[stratum],
                    provenance=provenance,
                )
                review.write(item.to_json() + "\n")
    report = {
        **counts.report(),
        "strata": {name: strata[name] for name in sorted(strata)},
        "threshold": threshold,
        "review_share": sampling.share,
        "seed": sampling.seed,
        **provenance,
    }
    (folder / REPORT).write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return report


@dataclass
class _Counts:
    """Counts of records; `review` counts those that need no review under None."""

    accepted_in_round: Counter[int] = field(default_factory=Counter)
    review: Counter[Reason | None] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)

    def report(self) -> dict[str, Any]:
        return {
            "records": self.review.total(),
            "accepted": self.accepted_in_round.total(),
            "accepted_in_round": {
                str(number): self.accepted_in_round[number] for number in sorted(self.accepted_in_round)
            },
            "review": dict(sorted((reason, n) for reason, n in self.review.items() if reason is not None)),
            "flags": {name: self.flags[name] for name in sorted(self.flags)},
        }


def _accepted(outcomes: Outcomes) -> tuple[dict[str, list[str]], dict[str, tuple[Flag, ...]]]:
    """Ids of accepted records by stratum; and flags by id for records whose Arabic is also that of another source.

    The first pass keeps only a hash of each text, 8 bytes. The second checks only texts that occur twice.
    """
    strata: dict[str, list[str]] = defaultdict(list)
    once: set[int] = set()
    again: set[int] = set()
    for record, version, turns in _candidates(outcomes()):
        strata[_stratum(record, version)].append(record.id)
        for _, after in turns:
            if (key := _text_key(after)) is not None:
                (again if key in once else once).add(key)
    if not again:
        return strata, {}
    pairs = (pair for _, _, turns in _candidates(outcomes()) for pair in turns if _text_key(pair[1]) in again)
    batch = Batch(pairs)
    shared: dict[str, tuple[Flag, ...]] = {}
    for record, _, turns in _candidates(outcomes()):
        found = [(number, batch.check(*pair)) for number, pair in enumerate(turns, start=1)]
        flags = [flag.model_copy(update={"place": f"turn {number}"}) for number, flag in found if flag is not None]
        if flags:
            shared[record.id] = tuple(flags)
    return {name: [one for one in ids if one not in shared] for name, ids in strata.items()}, shared


def _candidates(
    pairs: Iterable[tuple[Record, TranslationOutcome | None]],
) -> Iterator[tuple[Record, Version, list[tuple[str, str]]]]:
    """Accepted records with their version and the texts of their turns (source, translation)."""
    for record, outcome in pairs:
        version = None if outcome is None or not outcome.accepted else outcome.version
        if version is not None and version.translation is not None:
            turns = zip(record.conversations, version.translation.conversations, strict=True)
            yield record, version, [(before.value, after.value) for before, after in turns]


def _text_key(text: str) -> int | None:
    """Hash of a text's words; None for a text so short that other records may rightly have the same."""
    found = words(plain(text))
    return None if len(found) < MIN_WORDS else _hash(" ".join(found))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _with_flags(version: Version | None, flags: tuple[Flag, ...]) -> Version | None:
    return version.model_copy(update={"flags": (*version.flags, *flags)}) if version is not None and flags else version


def _draw(accepted: dict[str, list[str]], sampling: Sampling) -> tuple[set[str], dict[str, int]]:
    """Ids of the sample, and the size of each stratum. The ids with the lowest hashes are drawn."""
    drawn = set()
    for members in accepted.values():
        number = -int(-sampling.share * len(members) // 1)
        drawn.update(sorted(members, key=lambda name: (_hash(f"{sampling.seed}:{name}"), name))[:number])
    return drawn, {name: len(members) for name, members in accepted.items() if members}


def _stratum(record: Record, version: Version | None) -> str:
    """Kind, specialty and band of the score."""
    score = 0.0 if version is None or version.score is None else version.score
    low = min(int(score // BAND) * BAND, 100 - BAND)
    return f"{record.kind}/{record.specialty or 'any'}/{low}-{low + BAND}"


def _reason(outcome: TranslationOutcome | None, version: Version | None) -> Reason:
    if outcome is None or version is None:
        return "no translation"
    return "flag" if version.flags else outcome.reason()


def _stamped(version: Version, provenance: dict[str, Any]) -> Record | None:
    """The translation with score, models and prompts in its provenance."""
    if version.translation is None:
        return None
    own = {**version.translation.provenance, "translation_score": version.score, **provenance}
    return version.translation.model_copy(update={"provenance": own})
