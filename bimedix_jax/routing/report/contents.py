"""The CSV files of a report, from an analysis and from what is described besides."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from bimedix_jax.routing.claims import LEVELS, Analysis, Cell, Exploration, Layer, Question, Verdict
from bimedix_jax.routing.measures import DeadExpert
from bimedix_jax.routing.report.describe import Load, Measure
from bimedix_jax.routing.report.figures import Axes
from bimedix_jax.routing.report.sheets import Settings, Sheet

QUESTION_COLUMNS = (
    "question", "first", "second", "unit", "paired", "clusters_first", "clusters_second", "clusters", "tokens", "icc",
    "design_effect", "family", "overlap", "token_mix", "within_token", "unshared", "distance", "equivalent", "level",
    "different", "mde80_least", "mde80_most", "largest_layer", "largest_expert", "largest", "largest_low",
    "largest_high",
)  # fmt: skip
FIGURE_COLUMNS = ("figure", "file", "question", "title", "layers", "tokens", "clusters", "unit", "seed")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Contents:
    """All sheets of a report."""

    settings: Settings
    gate: Sheet
    questions: Sheet
    cells: Sheet
    ladder: Sheet
    layers: Sheet
    load: Sheet
    refused: Sheet
    warnings: Sheet
    exploration: Sheet
    measures: Sheet
    dead: Sheet
    roles: Sheet
    answers: Sheet
    figures: Sheet
    axes: Axes

    @property
    def sheets(self) -> list[Sheet]:
        """Those with rows."""
        found = [getattr(self, field.name) for field in dataclasses.fields(self)]
        found = [one if isinstance(one, Sheet) else one.sheet for one in found]
        return [sheet for sheet in found if sheet.rows]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Described:
    """What a report has besides the analysis.

    Attributes:
      layers: their numbers. answers: rows of `answers.mean_distances`; empty without pairs of both groups.
    """

    layers: Sequence[int]
    loads: Sequence[Load]
    measures: Sequence[Measure]
    dead: Sequence[DeadExpert]
    roles: Sequence[tuple[str, int, bool]]
    answers: Sequence[tuple[int, float, float]] = ()


def contents_of(analysis: Analysis, described: Described, settings: dict[str, Any]) -> Contents:
    """Fills the sheets. The figures and their axes are added when the page is drawn."""
    known = Settings()
    known.update(
        settings
        | {
            "alpha": analysis.alpha,
            "margin": analysis.margin,
            "permutations": analysis.permutations,
            "seed": analysis.seed,
            "confidence": 0.95,
            "power": 0.8,
        }
    )
    gate = Sheet("gate.csv", ("delta_nll", "low", "high", "floor", "diverged"))
    if analysis.gate is not None:
        gate.add(*dataclasses.astuple(analysis.gate))
    measures = Sheet("measures.csv", ("measure", "what", "layer", "mean", "low", "high", "clusters"))
    layers = described.layers
    for one in described.measures:
        for layer, (mean, low, high) in zip(layers, one.values_L3.tolist(), strict=True):
            measures.add(one.name, one.what, layer, mean, low, high, one.clusters)
    return Contents(
        settings=known,
        gate=gate,
        questions=_questions(analysis),
        cells=_cells(analysis),
        ladder=_ladder(analysis),
        layers=_layers(analysis),
        load=_load(described.loads, layers),
        refused=_rows("refused.csv", ("claim", "why"), [(x.claim, x.why) for x in analysis.refused]),
        warnings=_rows("warnings.csv", ("warning",), [(x,) for x in analysis.warnings]),
        exploration=_exploration(analysis.exploration),
        measures=measures,
        dead=_rows("dead.csv", ("layer", "expert", "bound"), [dataclasses.astuple(x) for x in described.dead]),
        roles=_rows("roles.csv", ("role", "tokens", "counts"), described.roles),
        answers=_rows("answers.csv", ("layer", "differ", "agree"), described.answers),
        figures=Sheet("figures.csv", FIGURE_COLUMNS),
        axes=Axes(),
    )


def _rows(name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Sheet:
    return Sheet(name, columns, list(rows))


def _questions(analysis: Analysis) -> Sheet:
    sheet = Sheet("questions.csv", QUESTION_COLUMNS)
    for one in analysis.questions:
        detectable = [cell.mde80 for cell in one.cells if cell.mde80 is not None]
        largest = max(one.cells, key=lambda cell: abs(cell.estimate)) if one.cells else None
        sheet.add(
            one.name, *one.groups, one.unit, one.paired, *one.clusters.values(), by_group(one.clusters),
            by_group(one.tokens), one.icc, one.design_effect, one.family, one.overlap, one.token_mix, one.within_token,
            one.unshared, one.distance, one.equivalent, one.level,
            sum(cell.verdict == Verdict.DIFFERENT for cell in one.cells),
            min(detectable, default=None), max(detectable, default=None),
            *((None,) * 5 if largest is None else
              (largest.layer, largest.expert, largest.estimate, largest.low, largest.high)),
        )  # fmt: skip
    return sheet


def by_group(numbers: dict[str, int]) -> str:
    """'40 ar, 40 en'."""
    return ", ".join(f"{count} {group}" for group, count in numbers.items())


def _cells(analysis: Analysis) -> Sheet:
    names = tuple(field.name for field in dataclasses.fields(Cell))
    sheet = Sheet("cells.csv", ("question", *names, "level"))
    reached = {(claim.question, claim.layer, claim.expert): claim.level for claim in analysis.claims}
    for question in analysis.questions:
        for cell in question.cells:
            level = reached.get((question.name, cell.layer, cell.expert))
            sheet.add(question.name, *(getattr(cell, name) for name in names), level)
    return sheet


def _layers(analysis: Analysis) -> Sheet:
    names = tuple(field.name for field in dataclasses.fields(Layer))
    sheet = Sheet("layers.csv", ("question", *names))
    for question in analysis.questions:
        for layer in question.layers:
            sheet.add(question.name, *(getattr(layer, name) for name in names))
    return sheet


def _ladder(analysis: Analysis) -> Sheet:
    """How many cells of each question reach a level or a higher one."""
    sheet = Sheet("ladder.csv", ("question", "level", "cells", "of"))
    for question in _claimed(analysis):
        found = [LEVELS.index(claim.level) for claim in analysis.claims if claim.question == question.name]
        for height, level in enumerate(LEVELS[1:], start=1):
            sheet.add(question.name, level, sum(own >= height for own in found), len(found))
    return sheet


def _claimed(analysis: Analysis) -> list[Question]:
    return [question for question in analysis.questions if question.level is not None]


def _load(loads: Sequence[Load], layers: Sequence[int]) -> Sheet:
    sheet = Sheet("load.csv", ("question", "group", "clusters", "tokens", "layer", "expert", "share"))
    for one in loads:
        for layer, share_E in zip(layers, one.share_LE.tolist(), strict=True):
            for expert, share in enumerate(share_E):
                sheet.add(one.question, one.group, one.clusters, one.tokens, layer, expert, share)
    return sheet


def _exploration(found: Sequence[Exploration]) -> Sheet:
    sheet = Sheet("exploration.csv", ("kind", "what", "layer", "experts", "token", "estimate", "p", "q"))
    for one in found:
        experts = " ".join(map(str, one.experts))
        sheet.add(one.kind, one.what, one.layer, experts, one.token, one.estimate, one.p, one.q)
    return sheet
