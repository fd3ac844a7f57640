"""Compares the answers of two models to the same questions: by task, by group, calibration, and between languages."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bimedix_jax.evals import statistics
from bimedix_jax.evals.accuracy import ties
from bimedix_jax.evals.answers import Answers, Key, confidence, correct, differing, matched, pair_of
from bimedix_jax.evals.samples import Sample

FEWEST = 20
"""Groups with fewer questions have no row."""
QUARTERS = ("shortest quarter", "second quarter", "third quarter", "longest quarter")


@dataclasses.dataclass(frozen=True)
class Row:
    """Two accuracies over the same questions, and the paired difference B - A.

    Attributes:
      a, b: with Wilson's intervals, as in the results.
      p_holm: McNemar's p, adjusted for all rows of its table.
      detectable: the smallest difference that a test with alpha = 0.05 finds in four of five cases, given how often the
        two models disagree here; None if there is none.
      detectable_unrelated: the same if the errors of the two models had nothing in common. It depends on the number of
        questions and the mean accuracy only, and is what one can plan with.
    """

    name: str
    a: statistics.Interval
    b: statistics.Interval
    paired: statistics.Paired
    p_holm: float
    detectable: float | None
    detectable_unrelated: float | None

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON and CSV."""
        found, paired = self.paired.difference, self.paired
        return {
            "name": self.name,
            "n": paired.n,
            "a": self.a.value,
            "a_low": self.a.low,
            "a_high": self.a.high,
            "b": self.b.value,
            "b_low": self.b.low,
            "b_high": self.b.high,
            **found.to_dict("difference"),
            "only_a": paired.only_a,
            "only_b": paired.only_b,
            "p": paired.p,
            "p_bootstrap": paired.p_bootstrap,
            "p_holm": self.p_holm,
            "detectable": self.detectable,
            "detectable_unrelated": self.detectable_unrelated,
        }


def compare(a: Answers, b: Answers) -> dict[str, Any]:
    """All comparisons as JSON values: `tasks`, `average`, `groups`, `calibration`, `languages`, and what differs.

    Protocols are kept apart, since they ask the same questions. `average`, `calibration` and `languages` are of the one
    with most questions, `other_protocols` has those of the others.
    """
    common = matched(a, b)
    tasks: dict[str, list[Key]] = {}
    protocols: dict[str, list[Key]] = {}
    for key in common.keys:
        tasks.setdefault(a.task_of(key), []).append(key)
        protocols.setdefault(a.protocol_of(key), []).append(key)
    rows = rows_of(a, b, tasks)
    once = {name: distinct(a, keys) for name, keys in protocols.items()}
    first, *others = [
        of_protocol(a, b, name, {row.name: (tasks[row.name], row) for row in rows}, once[name])
        for name in sorted(protocols, key=lambda name: -len(protocols[name]))
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, keys in once.items():
        for kind, own in _groups(a, keys).items():
            groups.setdefault(kind, []).extend({"protocol": name, **row.to_dict()} for row in rows_of(a, b, own))
    return {
        "a": _about(a, common.keys, common.only_a),
        "b": _about(b, common.keys, common.only_b),
        "differs": differing(a, b),
        "n": len(common.keys),
        "tasks": [{"protocol": a.protocol_of(tasks[row.name][0]), **row.to_dict()} for row in rows],
        "groups": groups,
        "sensitivity": {name: one.about.get("sensitivity") for name, one in (("a", a), ("b", b))},
        **first,
        "other_protocols": others,
    }


def distinct(one: Answers, keys: Sequence[Key]) -> list[Key]:
    """The questions of one protocol, without those that an earlier task of it has as well."""
    found: dict[tuple[Any, ...], Key] = {}
    for key in keys:
        sample = one.samples[key]
        same = (sample.language, sample.id, key[-1], sample.target, sample.asked_bytes)
        found.setdefault(key if sample.asked_bytes is None else same, key)
    return list(found.values())


def of_protocol(
    a: Answers, b: Answers, name: str, tasks: dict[str, tuple[list[Key], Row]], keys: list[Key]
) -> dict[str, Any]:
    """Mean of the tasks, calibration and agreement of languages over the questions `keys` of one protocol.

    A task whose questions are all in another task is not a part of the mean.
    """
    wanted = set(keys)
    own = [(found, row) for found, row in tasks.values() if not wanted.isdisjoint(found)]
    return {
        "protocol": name,
        "average": _average(a, b, own),
        "calibration": {side: _calibration(one, keys) for side, one in (("a", a), ("b", b))},
        "languages": {side: between_languages(one, keys) for side, one in (("a", a), ("b", b))},
    }


def _about(one: Answers, keys: Sequence[Key], left_out: int) -> dict[str, Any]:
    names = ("model", "adapter", "revision", "base", "dtype", "router", "harness", "versions", "hashes", "records")
    known = {name: one.about[name] for name in names if name in one.about}
    scored = (one.samples[key] for key in keys)
    tied = ties((("all",), sample.logprobs) for sample in scored if sample.logprobs is not None)
    counts = {"questions_of_this_only": left_out, "ties": tied.get("all", 0)}
    return {"result": str(one.path), "name": one.name, **known, **counts}


def rows_of(a: Answers, b: Answers, groups: dict[str, list[Key]]) -> list[Row]:
    """A row for each group of questions; p values are adjusted for all of them."""
    answers = {name: (correct(a, keys), correct(b, keys)) for name, keys in groups.items()}
    clusters = {name: np.array(["/".join(pair_of(a.samples[key])) for key in keys]) for name, keys in groups.items()}
    paired = {name: statistics.paired(*values, clusters[name]) for name, values in answers.items()}
    adjusted = statistics.holm([found.p for found in paired.values()])
    rows = []
    for (name, (a_N, b_N)), p_holm in zip(answers.items(), adjusted, strict=True):
        found = paired[name]
        smallest = statistics.detectable(found.clusters, (found.only_a + found.only_b) / found.n)
        own = [statistics.wilson(float(values_N.mean()), found.clusters) for values_N in (a_N, b_N)]
        unrelated = statistics.detectable(found.clusters, statistics.unrelated((own[0].value + own[1].value) / 2))
        rows.append(Row(name, own[0], own[1], found, p_holm, smallest, unrelated))
    return rows


def _average(a: Answers, b: Answers, tasks: Sequence[tuple[list[Key], Row]]) -> dict[str, Any]:
    """Unweighted means over the tasks. A question and its translation are drawn together, within their task.

    Accuracies have intervals from those of the tasks; the difference too, where few answers differ.
    """
    strata: dict[str, list[tuple[list[Key], Row]]] = {}
    for keys, row in tasks:
        strata.setdefault(pair_of(a.samples[keys[0]])[0], []).append((keys, row))

    def parts(values: Callable[[list[Key]], np.ndarray]) -> list[list[statistics.Task]]:
        return [
            [(values(keys), [pair_of(a.samples[key])[1] for key in keys]) for keys, _ in own] for own in strata.values()
        ]

    def combined(found: list[list[statistics.Task]], interval: Callable[[Row], statistics.Interval]) -> Any:
        ends = [[interval(row) for _, row in own] for own in strata.values()]
        return statistics.combined([list(zip(*both, strict=True)) for both in zip(found, ends, strict=True)])

    gains = parts(lambda keys: correct(b, keys) - correct(a, keys))
    few = sum(row.paired.only_a + row.paired.only_b for _, row in tasks) < statistics.FEW
    found = combined(gains, lambda row: row.paired.difference) if few else statistics.average_interval(gains)
    return {
        "tasks": len(tasks),
        **{f"a{end}": value for end, value in _ends(combined(parts(lambda keys: correct(a, keys)), lambda row: row.a))},
        **{f"b{end}": value for end, value in _ends(combined(parts(lambda keys: correct(b, keys)), lambda row: row.b))},
        **found.to_dict("difference"),
    }


def _ends(found: statistics.Interval) -> list[tuple[str, float]]:
    return [("", found.value), ("_low", found.low), ("_high", found.high)]


def _groups(a: Answers, keys: Sequence[Key]) -> dict[str, dict[str, list[Key]]]:
    """Questions of one protocol by language, by specialty, and by quarter of length within their language."""
    found: dict[str, dict[str, list[Key]]] = {"language": {}, "specialty": {}, "length": {}}
    for key in keys:
        sample = a.samples[key]
        found["language"].setdefault(sample.language, []).append(key)
        if sample.subject:
            found["specialty"].setdefault(sample.subject, []).append(key)
    found["length"] = _quarters({key: a.samples[key] for key in keys})
    kept = {kind: {name: own for name, own in rows.items() if len(own) >= FEWEST} for kind, rows in found.items()}
    return {kind: rows if kind == "length" else dict(sorted(rows.items())) for kind, rows in kept.items()}


def _quarters(known: dict[Key, Sample]) -> dict[str, list[Key]]:
    found: dict[str, list[Key]] = {name: [] for name in QUARTERS}
    for language in sorted({sample.language for sample in known.values()}):
        sizes = {
            key: sample.asked_bytes
            for key, sample in known.items()
            if sample.language == language and sample.asked_bytes is not None
        }
        if not sizes:
            continue
        limits = np.quantile(list(sizes.values()), [0.25, 0.5, 0.75])
        for key, size in sizes.items():
            found[QUARTERS[int(np.searchsorted(limits, size, side="left"))]].append(key)
    return found


def _calibration(one: Answers, keys: Sequence[Key]) -> dict[str, Any] | None:
    """Of all questions whose options have likelihoods; None without any."""
    pairs = [(confidence(one.samples[key]), one.samples[key].correct) for key in keys]
    known = [(value, right) for value, right in pairs if value is not None]
    if not known:
        return None
    confidence_N, correct_N = np.array(known, np.float64).T
    return {"n": len(known), **statistics.calibration(confidence_N, correct_N).to_dict()}


def between_languages(one: Answers, keys: Sequence[Key]) -> dict[str, Any] | None:
    """How far the answers to a question in English and in Arabic agree; None without such questions.

    `kappa` is Cohen's, of the chosen options. `both`, `only_en`, `only_ar`, `neither`: numbers of correct answers.
    """
    sides: dict[tuple[str, str], dict[str, Sample]] = {}
    for key in keys:
        sample = one.samples[key]
        if isinstance(sample.chosen, int):
            sides.setdefault(pair_of(sample), {})[sample.language] = sample
    pairs = [(found["en"], found["ar"]) for found in sides.values() if {"en", "ar"} <= set(found)]
    if not pairs:
        return None
    chosen_2N = np.array([[english.chosen, arabic.chosen] for english, arabic in pairs]).T
    right_2N = np.array([[english.correct, arabic.correct] for english, arabic in pairs], np.float64).T
    gap = statistics.paired(*right_2N)
    both = int(right_2N.min(axis=0).sum())
    return {
        "n": len(pairs),
        "same_option": float((chosen_2N[0] == chosen_2N[1]).mean()),
        **statistics.kappa(*chosen_2N).bootstrapped("kappa", len(pairs)),
        "both": both,
        "only_en": gap.only_a,
        "only_ar": gap.only_b,
        "neither": len(pairs) - both - gap.only_a - gap.only_b,
        "arabic_minus_english": gap.difference.value,
        "arabic_minus_english_low": gap.difference.low,
        "arabic_minus_english_high": gap.difference.high,
        "p": gap.p,
    }
