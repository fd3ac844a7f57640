"""The answers of one model as a result has them, and the questions that two results have in common."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bimedix_jax.errors import BimedixError
from bimedix_jax.evals import comparison, samples
from bimedix_jax.evals.samples import Sample
from bimedix_jax.evals.statistics import confidences
from bimedix_jax.files import read_json

RESULT = "result.json"
"""The result in a folder of `bimedix eval harness`."""
REMEDY = "name a NAME.json of `bimedix eval run --out`, or a folder of `bimedix eval harness --out`"
VARIANT = "@"
"""Sets of predictions with this character in their name are variants of a set: other orders of the options, other
wordings."""
_LANGUAGE = re.compile(r"_(en|ar)(?=_|$)")
_OURS = re.compile(r"bimedix_\w+?_(?:en|ar)(?:_(abjad|text|gen))?")
EVAL_RUN = "eval run"
"""Protocol of `bimedix eval run`: the chat template; by letter, or by text where options have no letters."""
PROTOCOLS = {None: "letters", "abjad": "Arabic letters", "text": "texts", "gen": "generated"}
"""Ending of the name of one of our tasks -> its protocol in the harness."""

Key = tuple[str, str, str, str, int]
"""Identifies a question: task, filter, language, id, and the number of questions before it with the same four."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """A result: `about` is its JSON document, `samples` its questions."""

    path: Path
    about: Mapping[str, Any]
    samples: dict[Key, Sample]

    @property
    def name(self) -> str:
        """The model, with its adapter, as a short text."""
        parts = [self.about.get("model"), self.about.get("adapter")]
        return " + ".join(Path(str(part)).name or str(part) for part in parts if part) or self.path.stem

    def tasks(self) -> list[str]:
        """Names of the tasks, in the order of the file. A task in several languages counts once for each."""
        return list(dict.fromkeys(self.task_of(key) for key in self.samples))

    def task_of(self, key: Key) -> str:
        """Name of the task of a question; with its filter and its language where there are several."""
        name, kind, language, *_ = key
        filters, languages = self._kinds[name]
        return name + (f" ({kind})" if len(filters) > 1 else "") + (f" {language}" if len(languages) > 1 else "")

    def protocol_of(self, key: Key) -> str:
        """How the answer to a question was got. One question may be there under several protocols."""
        name, kind, *_ = key
        if "predictions" in self.about:
            return EVAL_RUN
        ours = _OURS.fullmatch(name)
        if ours is not None:
            found = PROTOCOLS[ours[1]]
        elif self.samples[key].logprobs is None:
            found = PROTOCOLS["gen"]
        else:
            found = str(_value(self.about, f"tasks.{name}.primary") or "likelihood")
        return f"{found} ({kind})" if len(self._kinds[name][0]) > 1 else found

    @property
    def _kinds(self) -> dict[str, tuple[set[str], set[str]]]:
        found = self.__dict__.get("_found")
        if found is None:
            found = {}
            for name, kind, language, *_ in self.samples:
                filters, languages = found.setdefault(name, (set(), set()))
                filters.add(kind)
                languages.add(language)
            self.__dict__["_found"] = found
        return found


def read(path: str | Path) -> Answers:
    """The answers in a result of `bimedix eval run` or `bimedix eval harness`.

    Raises:
      BimedixError: it is neither, or it has no question.
    """
    place = Path(path)
    place = place / RESULT if place.is_dir() else place
    about = read_json(place, dict[str, Any], REMEDY)
    predictions = about.get("predictions")
    name = predictions.get("file") if isinstance(predictions, dict) else samples.NAME
    if "/" in str(name) or not (place.parent / str(name)).is_file():
        raise BimedixError(f"{place} has no file with the answers to its questions next to it; {REMEDY}")
    rows = samples.read(place.parent / str(name))
    damage = damaged(about, rows)
    if damage is not None:
        raise BimedixError(f"{place.parent / str(name)} does not belong to {place}: {damage}; evaluate again")
    found: dict[Key, Sample] = {}
    seen: dict[tuple[str, str, str, str], int] = {}
    for sample in rows:
        if VARIANT in sample.task:
            continue
        sample = dataclasses.replace(sample, task=without_folder(sample.task))
        known = (sample.task, sample.filter, sample.language, sample.id)
        seen[known] = seen.get(known, 0) + 1
        found[(*known, seen[known] - 1)] = sample
    if not found:
        raise BimedixError(f"{place} has no question with an answer; evaluate on questions with choices or on tasks")
    return Answers(Path(path), about, found)


def without_folder(name: str) -> str:
    """The name of a set; of NAME=PLACE?options and of a path without the folder, so that two copies are one set."""
    reader, separator, rest = name.rpartition("=") if "?" not in name else name.partition("=")
    place, mark, options = rest.partition("?")
    return f"{reader}{separator}{place.rpartition('/')[2]}{mark}{options}"


def damaged(about: Mapping[str, Any], rows: Sequence[Sample]) -> str | None:
    """What contradicts the result in the answers that are next to it; None if nothing does."""
    lines = _value(about, "predictions.lines")
    if lines is not None and lines != len(rows):
        return f"it has {len(rows):,} complete lines, and the result names {lines:,}"
    for sample in rows:
        named = [value for value in (sample.chosen, sample.target) if isinstance(value, int)]
        if lines is None and not (_OURS.fullmatch(sample.task) and len(named) == 2 and sample.logprobs):
            continue  # of others' tasks only they know what is right; a generated answer is a text
        if any(not 0 <= value < len(sample.logprobs or ()) for value in named):
            return f"question {sample.id} of {sample.task} names an option that it does not have"
        if sample.correct != (sample.chosen == sample.target):
            marked = "right" if sample.correct else "wrong"
            return (
                f"question {sample.id} of {sample.task} is marked as {marked}, but option {sample.chosen} was chosen "
                f"and {sample.target} is the answer"
            )
    return _other_accuracy(about, rows)


def _other_accuracy(about: Mapping[str, Any], rows: Sequence[Sample]) -> str | None:
    """Whose number of questions or of right answers differs from that of the result."""
    counts: dict[tuple[str, str], list[int]] = {}
    for sample in rows:
        count = counts.setdefault((sample.task, sample.filter), [0, 0])
        count[0] += 1
        count[1] += sample.correct
    tasks = about.get("tasks") or {}
    stated = {(name, task.get("filter", "none")): task for name, task in tasks.items()}
    by_group = _value(about, "choice.by_group") or {}
    languages = [score for group, score in by_group.items() if "/" not in group]
    own = [key for key in counts if key[0] not in tasks and VARIANT not in key[0]]
    if languages and len(own) == 1:
        stated[own[0]] = {name: sum(score[name] for score in languages) for name in ("n", "correct")}
    for key, score in stated.items():
        if "n" not in score or "correct" not in score:
            continue
        n, right = counts.get(key, (0, 0))
        if (n, right) != (score["n"], score["correct"]):
            return (
                f"it has {right:,} right answers to {n:,} questions of {key[0]}, and the result has "
                f"{score['correct']:,} of {score['n']:,}"
            )
    return None


def differing(a: Answers, b: Answers) -> list[str]:
    """Descriptions of what must be equal for a comparison, and differs: data, prompts and program, and their versions.

    Models, adapters, storage and rules may differ: they are what is compared.
    """
    found = []
    for key, label in SAME.items():
        values = [_value(one.about, key) for one in (a, b)]
        if values[0] != values[1]:
            shown = [comparison.shown(value) for value in values]
            found.append(f"the {label} is {shown[0]} in A and {shown[1]} in B")
    records = [comparison.records_of(one.about) for one in (a, b)]
    common = records[0].keys() & records[1].keys()
    found += [f"the records of {name} differ" for name in sorted(common) if records[0][name] != records[1][name]]
    tasks = [one.about.get("tasks") or {} for one in (a, b)]
    for name in sorted(tasks[0].keys() & tasks[1].keys()):
        values = [{key: task.get(key) for key in OF_TASK} for task in (tasks[0][name], tasks[1][name])]
        labels = [label for key, label in OF_TASK.items() if values[0][key] != values[1][key]]
        if labels:
            found.append(f"task {name} has another {' and another '.join(labels)}")
    return found


SAME = {
    "harness": "program",
    "versions.bimedix_jax": "version of bimedix_jax",
    "versions.jax": "version of JAX",
    "versions.lm_eval": "version of lm-evaluation-harness",
    "hashes.prompt": "hash of the prompts",
    "max_length": "maximum length",
    "chat": "use of the chat template",
}
"""Key of a result -> what it is."""
OF_TASK = {
    "version": "version",
    "documents": "set of questions",
    "prompts": "set of prompts",
    "num_fewshot": "number of solved examples",
    "primary": "metric",
    "filter": "answer extraction",
}
"""Key of a task's result -> what it is."""


def _value(about: Mapping[str, Any], key: str) -> Any:
    found: Any = about
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


@dataclasses.dataclass(frozen=True)
class Matched:
    """The questions that both results answer, in the order of A, and how many only one has."""

    keys: list[Key]
    only_a: int
    only_b: int


def matched(a: Answers, b: Answers) -> Matched:
    """The common questions.

    Raises:
      BimedixError: there is none.
    """
    keys = [key for key in a.samples if key in b.samples]
    if not keys:
        both = next((name for name in a.tasks() if name in b.tasks()), None)
        has = f"the first has {a.tasks()[0]}, the second {b.tasks()[0]}"
        if both is not None:
            has = f"both have {both}, but with other questions"
        raise BimedixError(f"{a.path} and {b.path} have no question in common: {has}; evaluate both on the same sets")
    return Matched(keys, len(a.samples) - len(keys), len(b.samples) - len(keys))


def correct(answers: Answers, keys: list[Key]) -> np.ndarray:
    """1 where a question is answered correctly, else 0."""
    return np.array([answers.samples[key].correct for key in keys], np.float64)


def confidence(sample: Sample) -> float | None:
    """Share of the chosen option in the probability of all options; None for generated answers."""
    if sample.logprobs is None or not isinstance(sample.chosen, int):
        return None
    return confidences(sample.logprobs)[sample.chosen]


def pair_of(sample: Sample) -> tuple[str, str]:
    """What a question has in common with its translation: the task without its language, and the pair or id."""
    return _LANGUAGE.sub("", sample.task), sample.pair or sample.id
