"""`bimedix eval tables`: the paper's Tables 3 to 6 with its published rows beside ours."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from bimedix_jax.errors import BimedixError

if TYPE_CHECKING:
    from bimedix_jax.evals.typeset import Sheet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Print Tables 3 to 6 of the paper: its published rows, their errors as footnotes, and ours beside them.

    Without a result, only the published rows and the planner's are printed. A model that has results in English and in
    Arabic also gets a row in the bilingual table, the mean of the two as in the paper.
    """

    results: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME=]RESULT")] = ()
    """What `bimedix eval run --out` or a harness run wrote, a JSON file or a folder with result.json. Results of the
    same NAME are one row; by default the name is that of the model, with its adapter."""
    tables: tuple[int, ...] = (3, 4, 5, 6)
    """Tables to print."""
    format: Literal["terminal", "markdown", "latex", "csv"] = "terminal"
    """Format on stdout; --out writes the other three."""
    speed: tuple[Path, ...] = ()
    """JSON that `bimedix bench decode --json` or `bimedix plan --json` printed, for rows of our own in Table 6."""
    out: Path | None = None
    """Folder to write each table to, in Markdown, LaTeX and CSV; by default none."""
    overwrite: bool = False
    """Replace the tables in --out."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Log the tables to Weights & Biases. Offline, the local files are written to --out."""
    project: str = "bimedix"
    """Project in Weights & Biases."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Prints the tables, and writes them."""
    from bimedix_jax.evals import typeset

    if config.wandb == "offline" and config.out is None:
        raise BimedixError("--wandb offline writes local files, and no folder is named; pass --out DIR")
    sheets = make(config)
    for sheet in sheets:
        if config.format == "terminal":
            console.print(typeset.terminal(sheet))
        else:
            text = typeset.render(sheet, config.format)
            console.print(text, highlight=False, markup=False, soft_wrap=True)
    document: dict[str, Any] = {sheet.name: sheet.to_dict() for sheet in sheets}
    if config.out is not None:
        document["files"] = write(config.out, sheets, config.overwrite)
        console.print(f"written: {', '.join(document['files'])}", highlight=False)
    if config.wandb != "disabled":
        log_tables(config, sheets)
    return document


def make(config: Config) -> "list[Sheet]":
    """The tables that the options ask for."""
    from bimedix_jax.evals import paper
    from bimedix_jax.plan import published_speed

    found = paper.published()
    numbers = {number: name for name, number in paper.BENCHMARKS.items()}
    unknown = set(config.tables) - {*numbers, found.efficiency.number}
    if unknown:
        raise BimedixError(f"--tables names {min(unknown)}; the tables of results are 3, 4, 5 and 6")
    ours = [paper.by_benchmark(name, group) for name, group in read_results(config.results).items()]
    used = {benchmark for one in ours for benchmark in one}
    if config.results and not used:
        raise BimedixError("no result has one of the nine tasks; evaluate with `bimedix eval run --tasks all`")
    sheets = [
        paper.sheet(found, name, [one[name] for one in ours if name in one])
        for number, name in numbers.items()
        if number in config.tables
    ]
    if found.efficiency.number in config.tables:
        rates = [row for path in config.speed for row in published_speed.measured_rows(path)]
        sheets.append(published_speed.sheet(found, rates))
    return sheets


def read_results(words: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """Name of a row -> the results that belong to it."""
    from bimedix_jax.commands.eval_run import read_result

    grouped: dict[str, list[dict[str, Any]]] = {}
    for word in words:
        name, _, path = word.rpartition("=")
        place = Path(path)
        result = read_result(place / "result.json" if place.is_dir() else place)
        grouped.setdefault(name or name_of(result), []).append(result)
    return grouped


def name_of(result: dict[str, Any]) -> str:
    """The last part of the model's name, and that of the adapter's run."""
    model, adapter = Path(str(result.get("model", "ours"))).name, result.get("adapter")
    if adapter is None:
        return model
    folder = Path(str(adapter))
    return f"{model} + {folder.parent.name if folder.name == 'adapter' else folder.name}"


def write(folder: Path, sheets: "list[Sheet]", overwrite: bool) -> list[str]:
    """Writes each table in each format. Raises BimedixError if a file exists and `overwrite` is not set."""
    from bimedix_jax.evals.typeset import FORMATS, render
    from bimedix_jax.files import write_text

    texts = {
        folder / f"{sheet.name}{suffix}": render(sheet, form) for sheet in sheets for form, suffix in FORMATS.items()
    }
    existing = [path for path in texts if path.exists()]
    if existing and not overwrite:
        raise BimedixError(f"{existing[0]} exists; name another folder or pass --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        write_text(path, text)
    return [str(path) for path in texts]


def log_tables(config: Config, sheets: "list[Sheet]") -> None:
    """Logs the tables as one run of Weights & Biases, with a summary of our averages."""
    import tempfile

    from bimedix_jax.training.tracking import open_run

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) if config.out is None else config.out
        place.mkdir(parents=True, exist_ok=True)
        run = open_run(config.wandb, config.project, place, "--wandb", name="paper tables", job_type="evaluation")
        import wandb

        for sheet in sheets:
            data: list[Any] = [[cell.shown for cell in row] for row in sheet.rows]
            run.log({sheet.name: wandb.Table(columns=list(sheet.columns), data=data)})
            ours = {row[0].text: row[-1].value for row in sheet.rows if row[0].ours and sheet.columns[-1] == "AVG"}
            run.summary.update({f"{sheet.name}/{name}": value for name, value in ours.items() if value is not None})
        run.finish()
