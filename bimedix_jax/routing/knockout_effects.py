"""From knock-outs to statements: changes by group with max-T over cells, and the interaction of the languages.

Only the interaction supports "this expert serves Arabic": an expert that both languages need to the same extent has
large changes and no interaction.

Letters: R records, U clusters, C cells.
"""

import dataclasses
from typing import Any

import numpy as np

from bimedix_jax.routing.clusters import MIN_CLUSTERS, Comparison, generator
from bimedix_jax.routing.contrasts import Contrast, contrasts
from bimedix_jax.routing.knockout import ANSWER, PROMPT, LeftOut, Measured
from bimedix_jax.routing.sequences import Sequences
from bimedix_jax.routing.stats import Test, compare, detectable, holm
from bimedix_jax.routing.tables import MISSING

ALPHA = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Records and the tokens of one role: "en", "en/qa", "en/medmcqa" (a source) or "en/prompt"."""

    name: str
    kept_R: np.ndarray
    role: int = ANSWER


def groups_of(sequences: Sequences) -> list[Group]:
    """The groups whose changes are reported."""
    language_R = sequences.labels("language")
    found = []
    for language in (str(name) for name in np.unique(language_R) if name != MISSING):
        own_R = language_R == language
        found.append(Group(name=language, kept_R=own_R))
        for field in ("kind", "source"):
            labels_R = sequences.labels(field)
            names = [str(name) for name in np.unique(labels_R[own_R]) if name != MISSING]
            if len(names) > 1:
                found += [Group(name=f"{language}/{name}", kept_R=own_R & (labels_R == name)) for name in names]
        found.append(Group(name=f"{language}/prompt", kept_R=own_R, role=PROMPT))
    return found


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """The change of NLL in one group, for each cell, in nats per token. A cluster counts once.

    Attributes:
      by_token_C: the same with tokens counting once. test: None where there are too few clusters.
      p_C: adjusted for all cells and groups.
    """

    clusters: int
    estimate_C: np.ndarray
    by_token_C: np.ndarray
    test: Test | None
    p_C: np.ndarray | None = None


def change_in(measured: Measured, sequences: Sequences, group: Group, seed: int) -> Change | None:
    """The changes in a group; None if it has no token."""
    tokens_R = measured.tokens_R2[:, group.role] * group.kept_R
    used_R = tokens_R > 0
    if not used_R.any():
        return None
    change_CR = measured.change_CR2[:, used_R, group.role]
    unit_R = np.unique(sequences.unit_R[used_R], return_inverse=True)[1]
    units = int(unit_R.max()) + 1
    change_UC, tokens_U = np.zeros((units, len(change_CR))), np.bincount(unit_R, tokens_R[used_R], units)
    np.add.at(change_UC, unit_R, change_CR.T)
    mean_UC = change_UC / tokens_U[:, None]
    test = None
    if units >= MIN_CLUSTERS:
        rng = generator(seed, "knockout", group.name)
        test = compare(Comparison(values_CX=mean_UC), rng, limit=float("inf"))
    return Change(clusters=units, estimate_C=mean_UC.mean(0), by_token_C=change_UC.sum(0) / tokens_U.sum(), test=test)


def changes(measured: Measured, sequences: Sequences, seed: int) -> dict[str, Change]:
    """The changes in every group, with p-values adjusted for cells (max-T) and groups (Holm)."""
    found = {group.name: change_in(measured, sequences, group, seed) for group in groups_of(sequences)}
    kept = {name: change for name, change in found.items() if change is not None}
    tested = [name for name, change in kept.items() if change.test is not None]
    adjusted = holm([test.p_X for name in tested if (test := kept[name].test) is not None])
    return kept | {name: dataclasses.replace(kept[name], p_C=p) for name, p in zip(tested, adjusted, strict=True)}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Interactions:
    """The change in the first group minus that in the second, for each cell.

    Attributes:
      test: None where there are too few clusters. p_C: adjusted for all cells and contrasts.
    """

    contrast: Contrast
    estimate_C: np.ndarray
    test: Test | None
    p_C: np.ndarray | None = None


def interactions(measured: Measured, sequences: Sequences, seed: int) -> list[Interactions]:
    """Those of two languages, or of each with all others; p is adjusted for cells (max-T) and contrasts (Holm)."""
    found = []
    for contrast in contrasts(sequences, "language"):
        comparison = contrast.means(measured.change_CR2[:, :, ANSWER].T, measured.tokens_R2[:, ANSWER])
        if not comparison.sizes or min(comparison.sizes) == 0:
            continue
        parts, test = comparison.parts(), None
        estimate_C = parts[0].mean(0) - (parts[1].mean(0) if len(parts) > 1 else 0.0)
        if comparison.enough:
            test = compare(comparison, generator(seed, "interaction", contrast.name), limit=float("inf"))
            estimate_C = test.estimate_X
        found.append(Interactions(contrast=contrast, estimate_C=estimate_C, test=test))
    adjusted = iter(holm([one.test.p_X for one in found if one.test is not None]))
    return [one if one.test is None else dataclasses.replace(one, p_C=next(adjusted)) for one in found]


def interaction_rows(found: list[Interactions], measured: Measured) -> list[dict[str, Any]]:
    """A row for each contrast and cell; without p where there are too few clusters."""
    rows: list[dict[str, Any]] = []
    tested = sum(one.test is not None for one in found)
    for one in found:
        contrast, test, p_C = one.contrast, one.test, one.p_C
        mde_C = None if test is None else detectable(test, ALPHA / tested)
        for place, cell in enumerate(measured.cells):
            row = {"field": contrast.field, "groups": list(contrast.groups), **dataclasses.asdict(cell)}
            row |= {"estimate": float(one.estimate_C[place])}
            row |= {"clusters": contrast.clusters, "paired": contrast.paired}
            row |= dict.fromkeys(("low", "high", "p_adjusted", "mde80"))
            if test is not None and p_C is not None and mde_C is not None:
                row |= {"low": float(test.low_X[place]), "high": float(test.high_X[place])}
                row |= {"p_adjusted": float(p_C[place]), "mde80": float(mde_C[place])}
            rows.append(row)
    return rows


def families(found: dict[str, Change], joined: list[Interactions], measured: Measured) -> dict[str, Any]:
    """What the p-values are adjusted for: all these cells by max-T, and then these questions by Holm.

    Changes and interactions are two families. Experts that a screen left out belong to neither.
    """
    cells = {"cells": len(measured.cells), "meanings": sorted({cell.meaning for cell in measured.cells})}
    groups = [name for name, change in found.items() if change.p_C is not None]
    return {
        "cells": {**cells, "questions": groups},
        "interaction": {**cells, "questions": [one.contrast.name for one in joined if one.p_C is not None]},
    }


def report(measured: Measured, left_out: LeftOut, sequences: Sequences, seed: int = 0) -> dict[str, Any]:
    """The result of knock-outs for JSON."""
    found, joined = changes(measured, sequences, seed), interactions(measured, sequences, seed)
    cells = []
    for place, cell in enumerate(measured.cells):
        parts: dict[str, dict[str, Any]] = {
            name: {} for name in ("delta", "low", "high", "p_adjusted", "delta_by_token")
        }
        for name, change in found.items():
            parts["delta"][name] = float(change.estimate_C[place])
            parts["delta_by_token"][name] = float(change.by_token_C[place])
            tested = change.test is not None and change.p_C is not None
            parts["low"][name] = float(change.test.low_X[place]) if change.test is not None else None
            parts["high"][name] = float(change.test.high_X[place]) if change.test is not None else None
            parts["p_adjusted"][name] = float(change.p_C[place]) if tested and change.p_C is not None else None
        gradient = {name: float(x[cell.layer, cell.expert]) for name, x in (left_out.gradient_LE or {}).items()}
        cells.append({**dataclasses.asdict(cell), **parts, **({"gradient": gradient} if gradient else {})})
    tokens_2, nll_2 = measured.tokens_R2.sum(0), measured.nll_R2.sum(0)
    return {
        "cells": cells,
        "interaction": interaction_rows(joined, measured),
        "families": families(found, joined, measured),
        "left_out": left_out_rows(left_out),
        "groups": {name: {"clusters": change.clusters} for name, change in found.items()},
        "nll": {
            name: float(nll_2[place] / tokens_2[place]) if tokens_2[place] else None
            for name, place in (("answer", ANSWER), ("prompt", PROMPT))
        },
        "records": len(sequences.ids),
        "too_long": dict(sequences.too_long),
    }


def left_out_rows(left_out: LeftOut) -> list[dict[str, Any]]:
    """What was not measured: experts with their gradients, and meanings."""
    rows: list[dict[str, Any]] = [{"meaning": meaning, "why": why} for meaning, why in left_out.meanings]
    for layer, expert in left_out.cells:
        gradient = {name: float(x_LE[layer, expert]) for name, x_LE in (left_out.gradient_LE or {}).items()}
        why = "its gradient is smaller than those of the experts that were measured"
        rows.append({"layer": layer, "expert": expert, "gradient": gradient, "why": why})
    return rows
