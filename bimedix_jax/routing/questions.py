"""From tables to claims: the one entry point of the statistics of routes.

    analysis = analyse(tables, fields=("language",), unit="document")
    analysis.to_dict()  # claims.json, less the hashes and the command

NumPy and SciPy only: an analysis of a recording needs neither JAX nor the model.
"""

from collections.abc import Sequence

import numpy as np

from bimedix_jax.errors import BimedixError
from bimedix_jax.routing import answers
from bimedix_jax.routing.claims import Analysis, Cell, Claim, Exploration, Layer, Question, Refusal, Verdict, highest
from bimedix_jax.routing.clusters import FEW_CLUSTERS, MIN_CLUSTERS, generator
from bimedix_jax.routing.contrasts import Contrast, contrasts
from bimedix_jax.routing.evidence import geometry, learned, token_evidence
from bimedix_jax.routing.exploration import explore_pairs, explore_tokens
from bimedix_jax.routing.information import Divergence, divergence
from bimedix_jax.routing.intervals import intraclass
from bimedix_jax.routing.ladder import (
    Evidence,
    Rungs,
    divergence_gate,
    levels,
    plain_difference,
    refusals,
    token_weighted,
)
from bimedix_jax.routing.stats import PERMUTATIONS, Test, compare, detectable, equivalent, holm
from bimedix_jax.routing.tables import MISSING, Tables

MARGIN = 0.02
"""Differences in load below 2 points count as equivalent, unless told otherwise."""


def analyse(
    tables: Tables,
    *,
    fields: Sequence[str] = ("language",),
    unit: str = "record",
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    alpha: float = 0.05,
    margin: float = MARGIN,
    explore: bool = True,
) -> Analysis:
    """Asks of each field whether routes depend on it, and claims what the tables carry.

    A field of two groups is one question; of more, each group against all others.

    Args:
      unit: the name of what `tables.cluster_R` holds. permutations: of each test, and resamples of each interval.
      margin: loads that differ by less are equivalent. explore: whether to search single tokens and pairs of experts.

    Raises:
      BimedixError: fewer than 1,999 permutations, or a field that is named twice.
    """
    check_fields(fields)
    if permutations < PERMUTATIONS:
        raise BimedixError(f"{permutations} permutations are too few for adjusted p-values; use {PERMUTATIONS} or more")
    by_field = {field: contrasts(tables, field) if field in tables.groups else [] for field in fields}
    asked = [contrast for found in by_field.values() for contrast in found]
    empty = [field for field, found in by_field.items() if not found]
    refused = [Refusal(claim=f"routes depend on {field}", why=_no_groups(tables, field)) for field in empty]
    untested = {contrast.name: why for contrast in asked if (why := _too_few(contrast)) is not None}
    refused += [Refusal(claim=f"routes depend on {name}: claims, intervals", why=why) for name, why in untested.items()]
    tested = [_evidence(tables, c, permutations, seed) for c in asked if c.name not in untested]
    gate, questions, claims = divergence_gate(tables, seed), [], []
    joined = answers.answers_of(tables, permutations, seed)
    count = len(tested) + (joined.test is not None)
    rungs_Q, p_L = _adjusted(tested, joined.test)
    for evidence, rungs in zip(tested, rungs_Q, strict=True):
        cells = [(layer, expert) for layer in tables.layers for expert in range(tables.counts_RLE.shape[2])]
        found = levels(evidence, rungs, gate, cells, alpha)
        name = evidence.contrast.name
        claims += [Claim(question=name, layer=c[0], expert=c[1], level=x) for c, x in zip(cells, found, strict=True)]
        refused += refusals(evidence, tables, gate, found)
        questions.append(_question(tables, evidence, rungs, unit, count, alpha, margin, seed, highest(found)))
    questions += [_untested(tables, contrast, unit) for contrast in asked if contrast.name in untested]
    questions.sort(key=lambda question: [contrast.name for contrast in asked].index(question.name))
    last, last_claims = answers.question_of(joined, p_L, tables.layers, unit, alpha, alpha / max(count, 1))
    refused += answers.refusals_of(joined)
    return Analysis(
        gate=gate,
        questions=(*questions, *last),
        claims=(*claims, *last_claims),
        refused=tuple(refused),
        exploration=_explored(tables, tested, seed) if explore else (),
        warnings=(*(x for contrast in asked for x in _warnings(contrast, unit)), *answers.warnings_of(joined, unit)),
        alpha=alpha,
        margin=margin,
        permutations=permutations,
        seed=seed,
    )


def check_fields(fields: Sequence[str]) -> None:
    """Raises BimedixError if a field is named twice: its question would count twice in the adjustment."""
    twice = [field for place, field in enumerate(fields) if field in fields[:place]]
    if twice:
        raise BimedixError(f"the fields of --group have {twice[0]} twice; name each field once")


def _explored(tables: Tables, tested: list[Evidence], seed: int) -> tuple[Exploration, ...]:
    tokens = (one for evidence in tested for one in explore_tokens(tables, evidence.contrast))
    return (*tokens, *explore_pairs(tables, seed))


def _no_groups(tables: Tables, field: str) -> str:
    if field not in tables.groups:
        known = ", ".join(sorted(tables.groups)) or "no field"
        return f"not available: the recording has {known}, but not {field}"
    labels = sorted(set(np.asarray(tables.groups[field]).astype(str).tolist()) - {MISSING})
    return (
        f"all records have the {field} {labels[0]}, so there is nothing to compare" if labels else "no record has one"
    )


def _too_few(contrast: Contrast) -> str | None:
    """Why a contrast has neither interval nor claim; None if it may have them."""
    few = [(group, count) for group, count in contrast.clusters.items() if count < MIN_CLUSTERS]
    if few:
        found = [f"{count} cluster{'s' * (count != 1)} of {group}" for group, count in few]
        return f"only {' and '.join(found)} can be compared, and each group needs {MIN_CLUSTERS}"
    if contrast.side_U is not None and contrast.stratum_U is not None:
        mixed = [len(set(contrast.side_U[contrast.stratum_U == name])) > 1 for name in np.unique(contrast.stratum_U)]
        if not any(mixed):
            return "no stratum has clusters of both groups, so no labels can be exchanged"
    return None


def _warnings(contrast: Contrast, unit: str) -> list[str]:
    found = [
        f"{contrast.name}: {group} has only {count} clusters ({unit}); with fewer than {FEW_CLUSTERS} the tests find "
        "little, and intervals are rough"
        for group, count in contrast.clusters.items()
        if MIN_CLUSTERS <= count < FEW_CLUSTERS
    ]
    if contrast.dropped:
        kind = "have records of one group only" if contrast.paired else "have records of both groups"
        found.append(f"{contrast.name}: {contrast.dropped} clusters ({unit}) {kind} and were left out")
    return found


def _evidence(tables: Tables, contrast: Contrast, permutations: int, seed: int) -> Evidence:
    load = compare(contrast.comparison(tables.counts_RLE), generator(seed, contrast.name, "load"), permutations)
    interactions = None
    if tables.interactions is not None and contrast.name == contrast.field:
        own = [item for item in tables.interactions if item.field == contrast.field]
        interactions = {(item.layer, item.expert): (item.estimate, item.p_adjusted) for item in own} or None
    return Evidence(
        contrast=contrast,
        load=load,
        token=token_evidence(tables, contrast, permutations, seed),
        geometry=geometry(tables, contrast),
        learned=learned(tables, contrast, permutations, seed),
        interactions=interactions,
    )


def _adjusted(tested: list[Evidence], joined: Test | None) -> tuple[list[Rungs], np.ndarray | None]:
    """The p-values of each rung, adjusted over the questions that were tested on it, and those of the answers.

    Args:
      joined: the test of the answers, one of the questions of "association".
    """
    count = tested[0].load.p_X.size if tested else 0
    by_rung, answered_p_L = [], None
    for rung in ("association", "token", "geometry", "learned"):
        given = [_rung(evidence, rung, count) for evidence in tested]
        more = [joined.p_X] if rung == "association" and joined is not None else []
        adjusted = iter(holm([p_X for p_X in (*given, *more) if p_X is not None]))
        by_rung.append([None if p_X is None else next(adjusted) for p_X in given])
        answered_p_L = next(adjusted) if more else answered_p_L
    found = [
        Rungs(association=association, token=token, geometry=beyond, learned=change)
        for association, token, beyond, change in zip(*by_rung, strict=True)
    ]
    return found, answered_p_L


def _rung(evidence: Evidence, rung: str, count: int) -> np.ndarray | None:
    if rung == "association":
        return evidence.association
    if rung == "token":
        return None if evidence.token is None else evidence.token.p_X
    if rung == "learned":
        return None if evidence.learned is None else evidence.learned.p_X
    found = evidence.geometry
    return None if found is None else np.repeat(found.p_L, count // len(found.p_L))


def _question(
    tables: Tables,
    evidence: Evidence,
    rungs: Rungs,
    unit: str,
    questions: int,
    alpha: float,
    margin: float,
    seed: int,
    level: str,
) -> Question:
    contrast, token, load = evidence.contrast, evidence.token, evidence.load
    own_alpha = evidence.load_alpha * alpha / questions
    same_X = equivalent(load, own_alpha, margin)
    cells = _cells(tables, evidence, rungs, detectable(load, own_alpha), same_X, alpha)
    icc, effect = _clustering(tables, contrast)
    parts = (None, None, None) if token is None or token.why_not is not None else token.summary
    return Question(
        name=contrast.name,
        groups=contrast.groups,
        unit=unit,
        paired=contrast.paired,
        clusters=contrast.clusters,
        tokens=contrast.by_group(tables.tokens_R),
        icc=icc,
        design_effect=effect,
        family=len(cells),
        cells=cells,
        layers=_layers(tables, evidence, seed),
        overlap=None if token is None else token.overlap,
        token_mix=parts[0],
        within_token=parts[1],
        unshared=parts[2],
        distance=None if parts[0] is None else float(sum(part for part in parts if part is not None)),
        equivalent=bool(same_X.all()),
        level=level,
    )


def _clustering(tables: Tables, contrast: Contrast) -> tuple[float | None, float | None]:
    lead, trail = contrast.sums(tables.counts_RLE)
    tokens = contrast.sums(tables.tokens_R[:, None, None])
    counts_CX = np.concatenate([lead, trail]).reshape(2 * contrast.units, -1)
    tokens_C, group_C = np.concatenate(tokens).ravel(), np.repeat([0, 1], contrast.units)
    kept_C = tokens_C > 0
    return intraclass(counts_CX[kept_C], tokens_C[kept_C], group_C[kept_C])


def _cells(
    tables: Tables, evidence: Evidence, rungs: Rungs, mde_X: np.ndarray, same_X: np.ndarray, alpha: float
) -> tuple[Cell, ...]:
    load, token, change = evidence.load, evidence.token, evidence.learned
    by_token_X = token_weighted(evidence.contrast, tables.counts_RLE).ravel()
    known, cells = evidence.interactions or {}, []
    experts = tables.counts_RLE.shape[2]
    for place in range(load.p_X.size):
        layer, expert = tables.layers[place // experts], place % experts
        verdict = Verdict.EQUIVALENT if same_X[place] else Verdict.NOT_RESOLVED
        if rungs.association[place] < alpha:
            verdict = Verdict.DIFFERENT
        interaction, p_interaction = known.get((layer, expert), (None, None))
        cell = Cell(
            layer=layer,
            expert=expert,
            estimate=float(load.estimate_X[place]),
            low=float(load.low_X[place]),
            high=float(load.high_X[place]),
            p_adjusted=float(rungs.association[place]),
            mde80=float(mde_X[place]),
            verdict=verdict,
            token_weighted=float(by_token_X[place]),
            p_load=float(load.p_X[place]),
            p_within=None if rungs.token is None else float(rungs.token[place]),
            token_mix=None if token is None else float(token.token_mix_X[place]),
            within_token=None if token is None else float(token.within_X[place]),
            unshared=None if token is None else float(token.unshared_X[place]),
            same_id=None if token is None or token.same_id is None else float(token.same_id.estimate_X[place]),
            p_same_id=None if token is None or token.same_id is None else float(token.same_id.p_X[place]),
            learned=None if change is None else float(change.estimate_X[place]),
            p_learned=None if rungs.learned is None else float(rungs.learned[place]),
            interaction=interaction,
            p_interaction=p_interaction,
        )
        cells.append(cell)
    return tuple(cells)


def _layers(tables: Tables, evidence: Evidence, seed: int) -> tuple[Layer, ...]:
    contrast, token, beyond = evidence.contrast, evidence.token, evidence.geometry
    hard = _divergence(contrast, tables.counts_RLE, seed)
    soft = None if tables.weights_RLE is None else _divergence(contrast, tables.weights_RLE, seed)
    unknown = (None, None, None)
    return tuple(
        Layer(
            layer=layer,
            jsd=float(hard.jsd_L[place]),
            low=float(hard.low_L[place]),
            high=float(hard.high_L[place]),
            geometry_percentile=None if beyond is None else float(beyond.percentile_L[place]),
            p_geometry=None if beyond is None else float(beyond.p_L[place]),
            soft_jsd=None if soft is None else float(soft.jsd_L[place]),
            **dict(zip(_named("vocabulary"), unknown if token is None else token.vocabulary_LI[place], strict=True)),
            **dict(zip(_named("language"), unknown if token is None else token.group_LI[place], strict=True)),
        )
        for place, layer in enumerate(tables.layers)
    )


def _named(what: str) -> tuple[str, str, str]:
    return f"{what}_nats", f"{what}_low", f"{what}_high"


def _divergence(contrast: Contrast, values_RLE: np.ndarray, seed: int) -> Divergence:
    lead, trail = contrast.loads(values_RLE)
    return divergence(lead, trail, contrast.paired, generator(seed, contrast.name, "divergence"))


def _untested(tables: Tables, contrast: Contrast, unit: str) -> Question:
    """A question without interval or claim: estimates only."""
    counts_RLE = tables.counts_RLE
    empty = min(contrast.clusters.values()) == 0
    nothing = np.full(counts_RLE.shape[1:], np.nan)
    plain_X = nothing.ravel() if empty else plain_difference(contrast.comparison(counts_RLE))
    by_token_X = (nothing if empty else token_weighted(contrast, counts_RLE)).ravel()
    experts = counts_RLE.shape[2]
    cells = tuple(
        Cell(
            layer=tables.layers[place // experts],
            expert=place % experts,
            estimate=float(plain_X[place]),
            low=None,
            high=None,
            p_adjusted=None,
            mde80=None,
            verdict=None,
            token_weighted=float(by_token_X[place]),
            p_load=None,
        )
        for place in range(plain_X.size)
    )
    return Question(
        name=contrast.name,
        groups=contrast.groups,
        unit=unit,
        paired=contrast.paired,
        clusters=contrast.clusters,
        tokens=contrast.by_group(tables.tokens_R),
        family=len(cells),
        cells=cells,
    )
