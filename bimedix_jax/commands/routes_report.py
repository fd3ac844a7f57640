"""`bimedix routes report`: what a recording of routes says about language, and what it does not."""

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from bimedix_jax import startup

if TYPE_CHECKING:
    from bimedix_jax.process.terminal import FittedTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Test whether routes depend on the language of records, or on another field, and claim only what the data carry.

    Writes claims.json, report.html (one page without requests) and a CSV file for every figure. What was not recorded
    is "not tested". docs/routing.md says what each level of a claim means, and what you may not conclude.
    """

    recording: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="R")]
    """Folder that `bimedix routes record` or `bimedix routes import` wrote."""
    out: Path
    """Folder to write."""
    baseline: Path | None = None
    """Recording of the base model on the same records, for what was learned in fine-tuning."""
    knockout: Path | None = None
    """JSON file with the interactions of knock-outs, for what is functional."""
    answers: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Answers that `bimedix eval run --out` wrote, NAME.json or NAME.predictions.jsonl: are the routes of a question in
    two languages further apart where only one answer is right? By default the label `correct` of the records."""
    unit: Annotated[str | None, tyro.conf.arg(metavar="FIELD")] = None
    """Field of the records that share a cluster, which counts once; by default cluster or document, where the records
    have one, else each record."""
    group: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD...")] = ("language",)
    """Fields of the records that routes may depend on."""
    figures: bool = True
    """Draw the figures of the page; their CSV files are written in any case."""
    seed: int = 0
    """Seed of permutations and resamples."""
    overwrite: bool = False
    """Replace --out if it is not empty."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Writes the report, prints its claims, and returns what is in claims.json.

    Raises:
      BimedixError: the recording, or what belongs to it, cannot be analysed.
    """
    startup.one_blas_thread()
    from bimedix_jax.routing.recording import Recording
    from bimedix_jax.routing.report.writing import HTML, ReportOptions, write_report

    options = ReportOptions(
        baseline=config.baseline,
        knockout=config.knockout,
        answers=config.answers,
        unit=config.unit,
        groups=config.group,
        pictures=config.figures,
        seed=config.seed,
        command=command_of(config),
    )
    claims = write_report(Recording.open(config.recording), config.out, options, config.overwrite)
    if claims["questions"]:
        console.print(levels_table(claims))
    for warning in claims["warnings"]:
        console.print(warning, style="bold yellow", markup=False, highlight=False)
    for line in not_claimed(claims["refused"]):
        console.print(line, markup=False, highlight=False)
    console.print(f"written: {config.out / HTML}", highlight=False)
    return claims


def command_of(config: Config) -> str:
    """The command line with the options that are not the default."""
    words = ["bimedix", "routes", "report", str(config.recording), "--out", str(config.out)]
    for field in dataclasses.fields(config)[2:]:
        value = getattr(config, field.name)
        if value == field.default:
            continue
        words.append(f"--{'no-' if value is False else ''}{field.name}")
        if not isinstance(value, bool):
            words += [str(part) for part in (value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def not_claimed(refused: list[dict[str, str]]) -> list[str]:
    """A line for each question: the first claim that is refused, and why; of the others what is not claimed."""
    by_question: dict[str, list[tuple[str, str]]] = {}
    for one in refused:
        question, _, claim = one["claim"].partition(": ")
        by_question.setdefault(question, []).append((claim, one["why"]))
    lines = []
    for question, found in by_question.items():
        (claim, why), *others = found
        first = f"{question}: {claim}" if claim else question
        more = f"; nor {', '.join(name for name, _ in others)} (reasons in claims.json)" if others else ""
        lines.append(f"not claimed: {first} ({why}){more}")
    return lines


def levels_table(claims: dict[str, Any]) -> "FittedTable":
    """A line for each question."""
    from bimedix_jax.process.terminal import FittedTable

    found = FittedTable(title="Do routes depend on ...?")
    for name in ("question", "level"):
        found.add_column(name)
    for name in ("clusters", "cells above none"):
        found.add_column(name, justify="right")
    found.add_prose_column("largest difference in load")
    for question in claims["questions"]:
        own = [claim for claim in claims["claims"] if claim["question"] == question["name"]]
        above = sum(claim["level"] != "none" for claim in own)
        clusters = ", ".join(f"{count} {group}" for group, count in question["clusters"].items())
        found.add_row(
            question["name"],
            question["level"] or "not tested",
            clusters,
            f"{above} of {len(own)}" if own else "",
            largest_difference(question),
        )
    return found


def largest_difference(question: dict[str, Any]) -> str:
    """'+3.1 points, ar minus en, layer 2, expert 5'; empty without a difference in load."""
    cells = [cell for cell in question["cells"] if cell["estimate"] is not None and cell["expert"] is not None]
    if not cells:
        return ""
    cell = max(cells, key=lambda cell: abs(cell["estimate"]))
    first, second = question["groups"]
    return (
        f"{100 * cell['estimate']:+.1f} points, {first} minus {second}, layer {cell['layer']}, expert {cell['expert']}"
    )
