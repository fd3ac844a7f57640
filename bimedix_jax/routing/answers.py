"""Accuracy joined to routes: questions that were asked in both languages, and answered right in one language alone.

Are the routes of a question and its translation further apart where one answer is right and the other wrong? The unit
is the pair of records, or the cluster of pairs. The labels "one right answer" and "two right answers or none" are
permuted among the units, and p-values are adjusted for all layers (max-T). What is found is an association: a long,
rare or badly translated question can have both.

Letters: R records, P pairs, L layers, E experts.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from bimedix_jax.routing.claims import Cell, Claim, Question, Refusal, Verdict
from bimedix_jax.routing.clusters import FEW_CLUSTERS, MIN_CLUSTERS, generator
from bimedix_jax.routing.contrasts import Contrast, contrasts, joined_units
from bimedix_jax.routing.stats import Test, compare, detectable
from bimedix_jax.routing.tables import MISSING, Tables

NAME = "answers in both languages"
"""The name of the question."""
DIFFERENT, SAME = "one right answer", "two right answers or none"
"""Names of the groups of pairs, in alphabetical order, as estimates are the first minus the second."""
CLAIM = "the routes of a question in two languages are further apart where only one answer is right"
NO_CAUSE = "the distance of the routes decides which answer is right"
WHY_NO_CAUSE = (
    "an association only: a long, rare or badly translated question can have distant routes and a wrong answer"
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Pairs of records in two languages whose answers are known; they are what `contrasts` groups.

    Attributes:
      distance_PL: squared distance of the records' loads in each layer, see `squared_distances`.
      differ_P: whether one answer is right and the other wrong.
      cluster_P: the unit of analysis. tokens_P: number of tokens of both records.
      left_out: records with a pair and an answer that have no counterpart with one.
    """

    distance_PL: np.ndarray
    differ_P: np.ndarray
    cluster_P: np.ndarray
    tokens_P: np.ndarray
    left_out: int

    pair_R = stratum_R = None

    @property
    def cluster_R(self) -> np.ndarray:
        return self.cluster_P

    @property
    def groups(self) -> Mapping[str, np.ndarray]:
        return {NAME: np.where(self.differ_P, DIFFERENT, SAME)}


def squared_distances(
    counts_RLE: np.ndarray, tokens_R: np.ndarray, first_P: np.ndarray, second_P: np.ndarray
) -> np.ndarray:
    """[P, L]: squared Euclidean distance of the loads of two records, without the part that few tokens add.

    A load of n tokens varies around the one of endless text with the variance p (1 - p) / n, so that short records are
    far apart by chance. The unbiased estimate of this variance is subtracted, and a distance may be below zero.
    """
    tokens_R1 = np.asarray(tokens_R, np.float64)[:, None]
    chosen_RLE = counts_RLE / tokens_R1[:, :, None]  # a token chooses an expert at most once
    slots_RL = chosen_RLE.sum(-1)
    noise_RL = (chosen_RLE * (1 - chosen_RLE)).sum(-1) / np.maximum(tokens_R1 - 1, 1) / slots_RL**2
    load_RLE = chosen_RLE / slots_RL[..., None]
    plain_PL = ((load_RLE[first_P] - load_RLE[second_P]) ** 2).sum(-1)
    return plain_PL - noise_RL[first_P] - noise_RL[second_P]


def pairs_of(tables: Tables) -> Pairs | str:
    """The pairs with two known answers, or why there is none."""
    if tables.pair_R is None:
        return "not available: no record has a pair, which names a question and its translation"
    if tables.correct_R is None:
        return "not tested: no answers were given; name them with --answers, or label records with correct, 0 or 1"
    language_R = np.asarray(tables.groups.get("language", np.full(len(tables.tokens_R), MISSING))).astype(str)
    pair_R = np.asarray(tables.pair_R).astype(str)
    usable_R = (pair_R != MISSING) & np.isfinite(tables.correct_R) & (language_R != MISSING) & (tables.tokens_R > 1)
    members: dict[str, list[int]] = {}
    for row in np.flatnonzero(usable_R).tolist():
        members.setdefault(str(pair_R[row]), []).append(row)
    both = [sorted(rows, key=lambda row: language_R[row]) for rows in members.values() if len(rows) == 2]
    both = [rows for rows in both if language_R[rows[0]] != language_R[rows[1]]]
    if not both:
        return "not tested: no pair has an answer in each of two languages"
    first_P, second_P = np.array(both).T
    return Pairs(
        distance_PL=squared_distances(tables.counts_RLE, tables.tokens_R, first_P, second_P),
        differ_P=tables.correct_R[first_P] != tables.correct_R[second_P],
        cluster_P=joined_units(tables.cluster_R, tables.pair_R, usable_R)[first_P],
        tokens_P=tables.tokens_R[first_P] + tables.tokens_R[second_P],
        left_out=int(usable_R.sum()) - 2 * len(both),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """What was found of the question.

    Attributes:
      contrast: of the pairs; None without any pair of each group. test: None if it cannot be tested, for `why_not`.
      estimate_L: mean squared distance of the pairs with one right answer, less that of the others.
    """

    pairs: Pairs | None = None
    contrast: Contrast | None = None
    estimate_L: np.ndarray | None = None
    test: Test | None = None
    why_not: str | None = None


def answers_of(tables: Tables, permutations: int, seed: int) -> Answers:
    """Tests the distances of the pairs with one right answer against those of the others."""
    pairs = pairs_of(tables)
    if isinstance(pairs, str):
        return Answers(why_not=pairs)
    found = contrasts(pairs, NAME)
    if not found:
        same = DIFFERENT if pairs.differ_P.all() else SAME
        return Answers(pairs=pairs, why_not=f"not tested: all {len(pairs.differ_P)} pairs have {same}")
    contrast = found[0]
    few = [f"{count} clusters of pairs with {group}" for group, count in contrast.clusters.items()]
    few = [text for text, count in zip(few, contrast.clusters.values(), strict=True) if count < MIN_CLUSTERS]
    comparison = contrast.means(pairs.distance_PL, np.ones(len(pairs.differ_P)))
    estimate_L, test = None, None
    if min(contrast.clusters.values()) > 0:
        parts = comparison.parts()
        estimate_L = parts[0].mean(0) - (parts[1].mean(0) if len(parts) > 1 else 0.0)
    if not few:
        test = compare(comparison, generator(seed, NAME), permutations, limit=2.0)
    why_not = f"not tested: there are only {' and '.join(few)}, and {MIN_CLUSTERS} of each are needed" if few else None
    return Answers(pairs=pairs, contrast=contrast, estimate_L=estimate_L, test=test, why_not=why_not)


def mean_distances(tables: Tables) -> list[tuple[int, float, float]]:
    """(layer, mean squared distance of pairs with one right answer, that of the others); every pair counts once."""
    pairs = pairs_of(tables)
    if isinstance(pairs, str) or len(set(pairs.differ_P.tolist())) < 2:
        return []
    differ_L, agree_L = (pairs.distance_PL[pairs.differ_P == which].mean(0) for which in (True, False))
    return list(zip(tables.layers, differ_L.tolist(), agree_L.tolist(), strict=True))


def unit_of(unit: str) -> str:
    """The unit of the question, where the one of others is `unit`."""
    return "pair" if unit == "record" else unit


def refusals_of(answers: Answers) -> list[Refusal]:
    """What is not claimed of answers."""
    if answers.why_not is not None:
        return [Refusal(claim=CLAIM, why=answers.why_not)]
    return [Refusal(claim=NO_CAUSE, why=WHY_NO_CAUSE)]


def warnings_of(answers: Answers, unit: str) -> list[str]:
    """What a reader must know of the pairs."""
    found = []
    if answers.pairs is not None and answers.pairs.left_out:
        found.append(f"{NAME}: {answers.pairs.left_out} records with an answer have no counterpart with one")
    if answers.contrast is not None and answers.test is not None:
        found += [
            f"{NAME}: only {count} clusters ({unit_of(unit)}) have pairs with {group}; with fewer than {FEW_CLUSTERS} "
            "the test finds little, and intervals are rough"
            for group, count in answers.contrast.clusters.items()
            if count < FEW_CLUSTERS
        ]
        if answers.contrast.dropped:
            kind = "pairs of one kind only" if answers.contrast.paired else "pairs of both kinds"
            found.append(f"{NAME}: {answers.contrast.dropped} clusters ({unit_of(unit)}) have {kind} and were left out")
    return found


def question_of(
    answers: Answers, p_L: np.ndarray | None, layers: list[int], unit: str, alpha: float, own_alpha: float
) -> tuple[list[Question], list[Claim]]:
    """The question and its claims, which end at "association"; none without pairs of both groups.

    Args:
      p_L: p-values that are adjusted for the layers and the questions. own_alpha: alpha divided by their number.
    """
    contrast, test, estimate_L, pairs = answers.contrast, answers.test, answers.estimate_L, answers.pairs
    if contrast is None or estimate_L is None or pairs is None:
        return [], []
    known = test is not None and p_L is not None
    mde_L = detectable(test, own_alpha) if test is not None else None
    cells = tuple(
        Cell(
            layer=layer,
            expert=None,
            estimate=float(estimate_L[place]),
            low=float(test.low_X[place]) if test is not None else None,
            high=float(test.high_X[place]) if test is not None else None,
            p_adjusted=float(p_L[place]) if p_L is not None else None,
            mde80=float(mde_L[place]) if mde_L is not None else None,
            verdict=(Verdict.DIFFERENT if p_L[place] < alpha else Verdict.NOT_RESOLVED) if p_L is not None else None,
            token_weighted=None,
            p_load=None,
        )
        for place, layer in enumerate(layers)
    )
    levels = ["association" if cell.verdict == Verdict.DIFFERENT else "none" for cell in cells]
    question = Question(
        name=NAME,
        groups=contrast.groups,
        unit=unit_of(unit),
        paired=contrast.paired,
        clusters=contrast.clusters,
        tokens=contrast.by_group(pairs.tokens_P),
        family=len(cells),
        cells=cells,
        level=None if not known else "association" if "association" in levels else "none",
    )
    made = zip(layers, levels, strict=True) if known else ()
    return [question], [Claim(question=NAME, layer=layer, expert=None, level=level) for layer, level in made]
