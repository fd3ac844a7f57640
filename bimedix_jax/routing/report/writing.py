"""From a recording to the folder of a report: claims.json, report.html and a CSV file for every figure and table."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bimedix_jax import __version__, files
from bimedix_jax.routing.answers import mean_distances
from bimedix_jax.routing.questions import analyse, check_fields
from bimedix_jax.routing.recorded import not_available, split_clusters, tables_of, unit_of
from bimedix_jax.routing.recording import MANIFEST, Recording
from bimedix_jax.routing.report import describe
from bimedix_jax.routing.report.answers import read_answers
from bimedix_jax.routing.report.contents import Described, contents_of
from bimedix_jax.routing.report.knockouts import read_interactions
from bimedix_jax.routing.report.page import render

CLAIMS, HTML = "claims.json", "report.html"
INTERVENED = (
    "the routes were recorded with interventions, so claims are about the routes that these left, not about the model"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """How a recording is analysed.

    Attributes:
      answers: file of answers, as `answers.read_answers`; by default the label `correct` of the records.
      unit: field that clusters records; None as `recorded.unit_of`. groups: fields that are asked about.
      command: what was typed, for claims.json. pictures: whether the page has its figures.
    """

    baseline: Path | None = None
    knockout: Path | None = None
    answers: Path | None = None
    unit: str | None = None
    groups: Sequence[str] = ("language",)
    pictures: bool = True
    seed: int = 0
    command: str = ""


def write_report(recording: Recording, out: Path, options: ReportOptions, overwrite: bool = False) -> dict[str, Any]:
    """Writes the folder and returns what is in its claims.json. The same recording and options give the same bytes.

    Raises:
      BimedixError: a field is missing, or the baseline or the knock-outs do not belong to the recording.
    """
    check_fields(options.groups)
    files.check_replaceable(out, overwrite)
    baseline = None if options.baseline is None else Recording.open(options.baseline)
    unit = unit_of(recording, options.unit)
    interactions = None if options.knockout is None else read_interactions(options.knockout, recording)
    given = None if options.answers is None else read_answers(options.answers, recording)
    correct = None if given is None else given.correct
    tables = tables_of(recording, baseline=baseline, unit=unit, interactions=interactions, correct=correct)
    wrong = [field for field in options.groups if field not in tables.groups and field != "language"]
    if wrong:
        raise not_available(recording, wrong[0], sorted(tables.groups))
    analysis = analyse(tables, fields=options.groups, unit=unit, seed=options.seed)
    more = () if given is None else given.warnings
    if options.unit is not None:
        more = (*more, *split_clusters(recording, unit))
    if recording.manifest.interventions:
        more = (*more, INTERVENED)
    analysis = dataclasses.replace(analysis, warnings=(*analysis.warnings, *more))
    hashes = hashes_of(recording, baseline, options.knockout, None if given is None else given.path)
    about = {"hashes": hashes, "command": options.command, "version": __version__}
    claims = analysis.to_dict() | {"unit": unit} | about
    described = Described(
        layers=tables.layers,
        loads=describe.loads(tables, list(options.groups)),
        measures=describe.described(recording, baseline, unit, options.seed),
        dead=describe.dead(tables),
        roles=describe.roles(recording),
        answers=mean_distances(tables),
    )
    settings = {
        "recording": recording.folder.resolve().name,
        "records": len(tables.tokens_R),
        "tokens": int(tables.tokens_R.sum()),
        "unit": unit,
        "command": options.command,
        "version": __version__,
        **{f"hash of {name}": value for name, value in hashes.items() if value is not None},
    }
    contents = contents_of(analysis, described, settings)
    page = render(contents, options.pictures)
    with files.new_folder(out, overwrite) as partial:
        text = json.dumps(claims, ensure_ascii=False, allow_nan=False, indent=2)
        files.write_text(partial / CLAIMS, text + "\n")
        for sheet in contents.sheets:
            files.write_text(partial / sheet.name, sheet.to_csv())
        files.write_text(partial / HTML, page)
    return claims


def hashes_of(
    recording: Recording, baseline: Recording | None, knockout: Path | None, given: Path | None
) -> dict[str, str | None]:
    """SHA-256 of the manifests, which have those of their files, of the knock-outs, of the answers, and what the
    recording knows."""
    return {
        "recording": files.sha256(recording.folder / MANIFEST),
        "baseline": None if baseline is None else files.sha256(baseline.folder / MANIFEST),
        "knockout": None if knockout is None else files.sha256(knockout),
        "answers": None if given is None else files.sha256(given),
        **recording.manifest.hashes,
    }
