"""The part of `bimedix eval run` that looks for the questions in a training set."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bimedix_jax.curation.contamination import Seen
    from bimedix_jax.data.records import Record
    from bimedix_jax.evals.multiple_choice import Prediction

Found = dict[str, dict[tuple[str, int], "Seen"]]
"""For each set, what the training set has of its questions, by their name (`variants.named`)."""


def look_for(sets: "dict[str, list[Record]]", training: Path) -> Found:
    """Reads the training set once.

    Raises:
      BimedixError: it is no file of records.
    """
    from tqdm import tqdm

    from bimedix_jax.curation.contamination import seen
    from bimedix_jax.data.records import read_jsonl
    from bimedix_jax.evals.variants import named

    names = [(set_name, name) for set_name, records in sets.items() for name in named(records)]
    questions = [record for records in sets.values() for record in records]
    records = tqdm(read_jsonl(training), desc="training set", unit=" records", disable=None)
    found: Found = {name: {} for name in sets}
    for number, one in seen(questions, records).items():
        set_name, name = names[number]
        found[set_name][name] = one
    return found


def report(found: Found, predictions: "dict[str, list[Prediction]]", training: Path) -> dict[str, Any]:
    """For each set: how many questions are in the training set, and the accuracy on them and on the others."""
    from bimedix_jax.evals.accuracy import Accuracy
    from bimedix_jax.evals.variants import named
    from bimedix_jax.files import sha256

    def accuracy(correct: list[bool]) -> dict[str, Any]:
        return Accuracy(sum(correct), len(correct)).to_dict() if correct else {"n": 0}

    sets: dict[str, Any] = {}
    for set_name, own in found.items():
        scored = named(predictions[set_name])
        ways = [one.by for one in own.values()]
        sets[set_name] = {
            "seen": accuracy([one.chosen == one.answer for name, one in scored.items() if name in own]),
            "others": accuracy([one.chosen == one.answer for name, one in scored.items() if name not in own]),
            "by": {way: ways.count(way) for way in ("id", "question", "words")},
            "questions": {f"{name}": [one.record, one.by, round(one.share, 4)] for (name, _), one in own.items()},
        }
    return {"file": str(training), "sha256": sha256(training), "sets": sets}
