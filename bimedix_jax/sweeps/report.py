"""The report of a sweep: Markdown, CSV and one HTML page without requests, and the timings in files of their own.

Everything but the timings depends on metrics.jsonl and evaluation.json alone. A report of runs that were killed and
resumed has the same bytes as one of runs that were not.
"""

import base64
import csv
import html
import io
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bimedix_jax import files
from bimedix_jax.errors import listed
from bimedix_jax.sweeps.folder import read_incidents, read_studies
from bimedix_jax.sweeps.picture import draw_curves, draw_effects
from bimedix_jax.sweeps.results import read_results
from bimedix_jax.sweeps.statistics import Difference
from bimedix_jax.sweeps.study import EVALUATED, LOGGED
from bimedix_jax.sweeps.table import StudyTable, adjusted, named, plural, tabulate

MARKDOWN, CSV, HTML, TIMINGS, TIMINGS_CSV = "report.md", "report.csv", "report.html", "timings.md", "timings.csv"
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;
overflow-wrap:anywhere}table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
th,td{border-bottom:1px solid #ccc;padding:.25rem .7rem;text-align:right;overflow-wrap:normal}
th:first-child,td:first-child{text-align:left}td+td{white-space:nowrap}td:first-child{min-width:8rem}
.scroll{overflow-x:auto}img{max-width:100%}pre{white-space:pre-wrap;background:#f6f6f6;padding:.7rem}
@media print{body{max-width:none;margin:0;font-size:10pt}table{font-size:8pt}td+td{white-space:normal}
td:first-child{min-width:0}th,td{padding:.2rem .3rem;overflow-wrap:anywhere}
.scroll{overflow:visible}h2,h3{break-after:avoid}tr,img{break-inside:avoid}}"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Quote:
    text: str


@dataclass(frozen=True)
class Grid:
    """A table: the header, and rows of the same length."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG: inside the HTML page, and a file of this name for Markdown."""

    alt: str
    png: bytes
    name: str


Block = Heading | Paragraph | Quote | Grid | Picture


def write_report(out: Path) -> list[StudyTable]:
    """Reads every study in `out` and writes the files of the report there. Returns the tables."""
    studies = read_studies(out)
    tables = adjusted([tabulate(study, read_results(folder, study)) for folder, study in studies])
    incidents = [read_incidents(folder) for folder, _ in studies]
    blocks = [block for table in tables for block in study_blocks(table)]
    title = Heading(1, "Sweep")
    write(out / MARKDOWN, markdown([title, *blocks, *page_notes()]))
    write(out / CSV, comparisons_csv(tables))
    write(out / HTML, page([title, *blocks, *page_notes()]))
    for block in blocks:
        if isinstance(block, Picture):
            write_picture(out / block.name, block.png)
    write(out / TIMINGS, markdown([Heading(1, "Timings and incidents"), *timing_blocks(tables, incidents)]))
    write(out / TIMINGS_CSV, timings_csv(tables))
    return tables


def write(path: Path, text: str) -> None:
    """Writes a file if its text differs."""
    if not path.is_file() or path.read_text("utf-8") != text:
        files.write_text(path, text)


def write_picture(path: Path, png: bytes) -> None:
    """Writes a file if its bytes differ."""
    if not path.is_file() or path.read_bytes() != png:
        with files.new_file(path) as partial:
            partial.write_bytes(png)


def study_blocks(table: StudyTable) -> Iterator[Block]:
    """The page of one study."""
    yield Heading(2, f"{table.study}, size {table.size}")
    yield Quote(table.question)
    yield Paragraph(primary_sentence(table))
    if (errors := table.primary.errors) is not None:
        yield Paragraph(
            f"Standard error of this difference: {errors.seeds:.4f} from seeds, {errors.records:.4f} from the held-out "
            f"records, {errors.both:.4f} from both."
        )
    whole = [name for name in table.metrics if "/" not in name]
    if table.comparisons and any(table.comparisons.values()):
        yield Heading(3, f"Difference to {table.primary.baseline}")
        others = [arm for arm in table.arms if arm != table.primary.baseline]
        if groups := effects(table):
            yield Picture(
                f"Difference to {table.primary.baseline} in {described(table.primary.metric.partition('/')[0])}: mean "
                "over seeds and 95 % interval of each arm",
                draw_effects(groups, others, f"difference to {table.primary.baseline}"),
                f"{table.study}-{table.size}-effects.png",
            )
        yield Grid(["metric", *others], [[described(name), *cells(table, name, others)] for name in whole])
        for name in EVALUATED:
            groups = [metric for metric in table.metrics if metric.startswith(f"{name}/")]
            if groups:
                yield Heading(3, f"By language and kind: {EVALUATED[name]}")
                rows = [[metric.removeprefix(f"{name}/"), *cells(table, metric, others)] for metric in groups]
                yield Grid(["group", *others], rows)
    if table.metrics:
        yield Heading(3, "Values, means over seeds")
        yield Grid(["metric", *table.arms], [[described(name), *value_cells(table, name)] for name in table.metrics])
        yield Heading(3, "Training loss")
        curves = {arm: [result.curve for result in table.of(arm)] for arm in table.arms if table.of(arm)}
        yield Picture(
            "Training loss by step: mean and range over seeds of each arm",
            draw_curves(curves),
            f"{table.study}-{table.size}-curves.png",
        )
        yield Heading(3, "Compute")
        yield Grid(
            ["arm", "finished seeds", "trained parameters", "tokens a run", "useful FLOPs a run"], compute(table)
        )
    if table.missing:
        yield Heading(3, "Runs that are not finished")
        yield Grid(["arm", "seed", "state", "reason"], missing_rows(table))


def effects(table: StudyTable) -> dict[str, dict[str, tuple[float, float | None, float | None]]]:
    """Of the primary metric and of each language: arm -> (mean, low, high)."""
    name = table.primary.metric.partition("/")[0]
    found = {}
    for metric, comparisons in table.comparisons.items():
        own, _, group = metric.partition("/")
        if own == name and "/" not in group and comparisons:
            differences = {one.arm: one.difference for one in comparisons}
            found[group or "all records"] = {arm: (d.mean, d.low, d.high) for arm, d in differences.items()}
    return found


def page_notes() -> Iterator[Block]:
    yield Paragraph(
        "Differences are paired by seed, arm minus baseline, with 95 % intervals over seeds (Student's t). p is that "
        "of the exact two-sided sign-flip test over seeds, for the declared contrast only. Holm's adjustment covers "
        "the declared contrasts of all studies of the same size in this folder. Metrics of training are means over "
        "the last tenth of the steps. Curves are running means over a twentieth of the steps; bands reach from the "
        "lowest to the highest seed. Wall time, restarts and crashes are in timings.md."
    )


def primary_sentence(table: StudyTable) -> str:
    primary = table.primary
    when = "declared beforehand" if primary.declared_beforehand else "not declared beforehand, so exploratory"
    contrast = {name: getattr(primary, name) for name in ("metric", "arm", "baseline", "sign")}
    declared = f"**Primary contrast**, {when}: {named(contrast)}."
    if primary.comparison is None or primary.p is None:
        return f"{declared} No seed of both arms is finished."
    difference = primary.comparison.difference
    outcome = "as expected" if math.copysign(1, difference.mean) == primary.sign else "not as expected"
    found = f"{shown(difference)} over {plural(difference.seeds)}, {outcome}; p = {primary.p:.4f}"
    if primary.p_holm is not None:
        found += f", with Holm {primary.p_holm:.4f}"
    notes = [note for note in (primary.note(), seeds_note(table), *primary.changes()) if note]
    return f"{declared} Difference {found}." + "".join(f" {note}." for note in notes)


def seeds_note(table: StudyTable) -> str | None:
    """Which declared seeds the primary contrast lacks, and which of its seeds were not declared."""
    declarations = table.primary.declarations
    if not declarations:
        return None
    both = [{result.seed for result in table.of(arm)} for arm in (table.primary.arm, table.primary.baseline)]
    used, declared = both[0] & both[1], {*declarations[-1]["seeds"]}
    notes = []
    if declared - used:
        notes.append(f"{len(declared & used)} of {len(declared)} declared seeds are finished")
    if used - declared:
        notes.append(f"seeds that were not declared: {listed([str(seed) for seed in sorted(used - declared)])}")
    text = "; ".join(notes)
    return text[:1].upper() + text[1:] or None


def described(metric: str) -> str:
    name, _, group = metric.partition("/")
    text = {**EVALUATED, **LOGGED}.get(name, name)
    return f"{text}, {group}" if group else text


def shown(difference: Difference) -> str:
    interval = "" if difference.low is None else f" [{difference.low:+.4f}, {difference.high:+.4f}]"
    return f"{difference.mean:+.4f}{interval}"


def cells(table: StudyTable, metric: str, arms: Sequence[str]) -> list[str]:
    found = {comparison.arm: shown(comparison.difference) for comparison in table.comparisons[metric]}
    return [found.get(arm, "") for arm in arms]


def value_cells(table: StudyTable, metric: str) -> list[str]:
    found = table.values[metric]
    return [f"{found[arm][0]:.4f}" if arm in found else "" for arm in table.arms]


def compute(table: StudyTable) -> list[list[str]]:
    rows = []
    for arm in table.arms:
        costs = [result.cost for result in table.of(arm)]
        if not costs:
            rows.append([arm, "0", "", "", ""])
            continue
        tokens, flops = (sum(cost[name] for cost in costs) / len(costs) for name in ("tokens", "training_flops"))
        rows.append([arm, str(len(costs)), f"{costs[0]['trainable_parameters']:,}", f"{tokens:,.0f}", f"{flops:.3g}"])
    return rows


def missing_rows(table: StudyTable) -> list[list[str]]:
    return [[result.arm, str(result.seed), result.state, result.reason or ""] for result in table.missing]


def comparisons_csv(tables: Sequence[StudyTable]) -> str:
    """A line for each study, metric and arm. p is given for the primary contrast only."""
    header = "study size metric group arm baseline seeds value baseline_value difference low high p p_holm"
    rows = []
    for table in tables:
        primary = table.primary
        for metric, found in table.comparisons.items():
            name, _, group = metric.partition("/")
            for one in found:
                own = (metric, one.arm) == (primary.metric, primary.arm)
                d, p = one.difference, (primary.p, primary.p_holm) if own else (None, None)
                numbers = (one.value, one.baseline, d.mean, d.low, d.high, *p)
                fixed = (table.study, table.size, name, group, one.arm, primary.baseline, d.seeds)
                rows.append([*fixed, *("" if x is None else f"{x:.8g}" for x in numbers)])
    return written([header.split(), *rows])


def timings_csv(tables: Sequence[StudyTable]) -> str:
    rows: list[list[Any]] = [["study", "size", "arm", "seed", "state", "steps", "seconds"]]
    for table in tables:
        for result in table.results:
            steps = len(result.curve) or ""
            rows.append(
                [table.study, table.size, result.arm, result.seed, result.state, steps, f"{result.seconds:.1f}"]
            )
    return written(rows)


def written(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def timing_blocks(tables: Sequence[StudyTable], incidents: Sequence[list[dict[str, Any]]]) -> Iterator[Block]:
    """Wall time, starts and crashes by arm."""
    for table, lines in zip(tables, incidents, strict=True):
        yield Heading(2, f"{table.study}, size {table.size}")
        events = counted(lines, {result.identity for result in table.results})
        rows = []
        for arm in table.arms:
            seconds = [result.seconds for result in table.of(arm)]
            mean = f"{sum(seconds) / len(seconds):.1f}" if seconds else ""
            counts = [str(events[arm, event]) for event in ("start", "crash", "interrupt", "killed")]
            rows.append([arm, str(len(seconds)), mean, f"{sum(seconds):.1f}", *counts])
        header = ["arm", "finished", "seconds of steps a run", "in all", "starts", "crashes", "interruptions", "kills"]
        yield Grid(header, rows)
        crashes = [[line["time"], line["arm"], str(line["seed"]), line["reason"]] for line in lines
                   if line["event"] == "crash"]  # fmt: skip
        if crashes:
            yield Grid(["time", "arm", "seed", "crash"], crashes)


def counted(lines: Sequence[dict[str, Any]], identities: Collection[str]) -> Counter[tuple[str, str]]:
    """How often each event happened to the runs that count, by arm.

    A start that found another process running the run is none. `killed`: it started again, and the start before had no
    end.
    """
    events, started = Counter[tuple[str, str]](), set[str]()
    for line in lines:
        arm, event, run = line["arm"], line["event"], line["identity"]
        if run not in identities:
            continue
        if event == "elsewhere":
            events[arm, "start"] -= 1
        else:
            events[arm, event] += 1
        if event == "start" and run in started:
            events[arm, "killed"] += 1
        if event == "start":
            started.add(run)
        else:
            started.discard(run)
    return events


def markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(text for block in blocks if (text := as_markdown(block))) + "\n"


def as_markdown(block: Block) -> str:
    """A block as Markdown; a picture is a file beside it."""
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Quote(text):
            return "\n".join(f"> {line}".rstrip() for line in text.splitlines())
        case Grid(header, rows):
            lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
            return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        case Picture(alt, _, name):
            return f"![{alt}]({name})"


def page(blocks: Sequence[Block]) -> str:
    """One HTML file that needs no other file and no network."""
    body = "\n".join(as_html(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<title>Sweep</title>\n<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def as_html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            first, bold, rest = html.escape(text).partition("**")
            strong, _, after = rest.partition("**")
            return f"<p>{first}{f'<strong>{strong}</strong>{after}' if bold else ''}</p>"
        case Quote(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Grid(header, rows):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
            rows_of = "".join(f"<tr>{line}</tr>" for line in lines)
            return f'<div class="scroll"><table><tr>{head}</tr>{rows_of}</table></div>'
        case Picture(alt, content, _):
            data = base64.b64encode(content).decode()
            return f'<p><img alt="{html.escape(alt)}" src="data:image/png;base64,{data}"></p>'
