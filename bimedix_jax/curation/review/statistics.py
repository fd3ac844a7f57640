"""Statistics of verdicts: agreement of reviewers, correlation with the judge, and bounds on unreviewed errors."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from bimedix_jax.curation.review.agreement import bootstrap, cohen_kappa, krippendorff_alpha, stratified_wilson, wilson
from bimedix_jax.curation.review.items import ReviewItem, Verdict
from bimedix_jax.curation.review.verdicts import latest

GRADE = {"reject": 0.0, "edit": 1.0, "accept": 2.0}
"""Decisions in order, from bad to good."""


def statistics(items: Mapping[str, ReviewItem], verdicts: Sequence[Verdict], seed: int = 0) -> dict[str, Any]:
    """All figures as one document; None where there is too little data."""
    last = latest(verdicts)
    return {
        "items": len(items),
        "reviewed": len({verdict.item for verdict in last}),
        "verdicts": len(last),
        "reviewers": dict(sorted(Counter(verdict.reviewer for verdict in last).items())),
        "decisions": dict(sorted(Counter(verdict.decision for verdict in last).items())),
        "agreement": agreement(last),
        "judge": judge(items, last, seed),
        "unseen": unseen(items, last),
    }


def agreement(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Agreement between reviewers on the items that two or more of them reviewed."""
    by_item: dict[str, dict[str, Verdict]] = defaultdict(dict)
    for verdict in verdicts:
        by_item[verdict.item][verdict.reviewer] = verdict
    shared = [group for group in by_item.values() if len(group) > 1]
    pairs = []
    for one, other in itertools.combinations(sorted({name for group in shared for name in group}), 2):
        both = [(group[one].decision, group[other].decision) for group in shared if one in group and other in group]
        if both:
            left, right = zip(*both, strict=True)
            same = sum(a == b for a, b in both) / len(both)
            pairs.append({"reviewers": [one, other], "n": len(both), "same": same, "kappa": cohen_kappa(left, right)})
    graded = [[GRADE[verdict.decision] for verdict in group.values()] for group in shared]
    scored = [[verdict.score for verdict in group.values() if verdict.score is not None] for group in shared]
    return {
        "items": len(shared),
        "pairs": pairs,
        "alpha_decision": krippendorff_alpha(graded, "ordinal"),
        "alpha_score": krippendorff_alpha(scored, "interval"),
    }


def judge(items: Mapping[str, ReviewItem], verdicts: Sequence[Verdict], seed: int) -> dict[str, Any]:
    """Correlation of the judge's score with the reviewers' mean decision and mean score.

    `sample_only` is the same for the random sample alone. Items that are reviewed because of a low score widen the
    range of scores, so the first figures are higher than for accepted translations.
    """
    by_item: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        by_item[verdict.item].append(verdict)

    def figures(wanted: Sequence[str]) -> dict[str, Any]:
        grades, scores = [], []
        for name in wanted:
            own = [verdict.score for verdict in by_item[name] if verdict.score is not None]
            said = [GRADE[verdict.decision] for verdict in by_item[name]]
            grades.append((_score(items[name]), sum(said) / len(said)))
            scores += [(_score(items[name]), sum(own) / len(own))] if own else []
        return {
            "decision": {"spearman": _interval("spearman", grades, seed)},
            "score": {"spearman": _interval("spearman", scores, seed), "pearson": _interval("pearson", scores, seed)},
        }

    scored = [name for name in sorted(by_item) if items[name].score is not None]
    sampled = [name for name in scored if items[name].reason == "sample"]
    return {**figures(scored), "sample_only": figures(sampled)}


def _score(item: ReviewItem) -> float:
    assert item.score is not None
    return item.score


def _interval(kind: Literal["pearson", "spearman"], pairs: list[tuple[float, float]], seed: int) -> dict[str, Any]:
    return bootstrap(kind, [x for x, _ in pairs], [y for _, y in pairs], seed=seed)


def unseen(items: Mapping[str, ReviewItem], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Bounds on the share of wrong translations among those that were accepted without review.

    Only the random sample of accepted translations counts. `rejected`: a reviewer rejected it. `changed`: a reviewer
    rejected or edited it; an edit may be a matter of taste. Intervals are Wilson's at 95 %, weighted by stratum if the
    items of the sample have the sizes of their strata.
    """
    by_item: dict[str, set[str]] = defaultdict(set)
    for verdict in verdicts:
        by_item[verdict.item].add(verdict.decision)
    sampled = [item for item in items.values() if item.reason == "sample"]
    seen = [item for item in sampled if item.id in by_item]
    sizes = {item.stratum: item.stratum_accepted for item in sampled}
    stratified = bool(sizes) and all(name is not None and size is not None for name, size in sizes.items())
    result: dict[str, Any] = {
        "sampled": len(sampled),
        "seen": len(seen),
        "accepted": sum(size or 0 for size in sizes.values()) if stratified else None,
    }
    for kind, wrong in (("rejected", {"reject"}), ("changed", {"reject", "edit"})):
        errors = [item for item in seen if by_item[item.id] & wrong]
        share = len(errors) / len(seen) if seen else None
        low, high = wilson(len(errors), len(seen))
        result[kind] = {"errors": len(errors), "share": share, "low": low, "high": high}
        if stratified:
            rows = {
                str(name): (
                    sum(item.stratum == name for item in errors),
                    sum(item.stratum == name for item in seen),
                    size or 0,
                )
                for name, size in sizes.items()
            }
            result[kind]["weighted"] = stratified_wilson(rows) if seen else None
    return result
