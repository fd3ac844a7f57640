"""`bimedix data assemble`: read data sets, by a recipe or by name, into a training and a held-out file of records."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from bimedix_jax.curation.assembly.recipe import ResolvedRecipe


@dataclass(frozen=True)
class Config:
    """Read data sets, check and split their rows, remove evaluation records, and write records as JSONL.

    Give a recipe by name, the path of your own recipe (a TOML file), or single sources. The recipes are bimed-en, the
    English set of the paper as far as it is known, and published-data, the small set of scripts/published_data.sh. A
    source is NAME=PLACE with the name of a reader (table, records, medqa, medmcqa, mmlu, pubmedqa, pubmedqa_artificial,
    pubmedqa_unlabelled, medquad, liveqa, medicationqa, mts_dialog, chatdoctor, pmc_llama, tico19, sharegpt, messages,
    dialogue, medqa_usmle_en, medmcqa_en, mmlu_medical_en, mmlu_medical_en_dev), `sample` for the sample of the package,
    or the path of a JSONL file of records. PLACE is a file, a folder or hf:owner/name@revision#config/split. It may end
    with options of the reader: `table=qa.csv?question=Q&answer=A&licence=MIT`. docs/data.md lists them.
    """

    out: Path
    """Folder to write: train.jsonl, heldout.jsonl, quarantine.jsonl, report.json."""

    recipe: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE|FILE")] = None
    """Recipe by name or path."""

    sources: tuple[str, ...] = ()
    """Sources to read without a recipe, for instance `medquad=data/medquad sample`."""

    data: Path | None = None
    """Folder with local copies of the recipe's sources. Missing sources are read from the hub."""

    local: tuple[str, ...] = ()
    """Places of single sources of the recipe, as NAME=PLACE."""

    only: tuple[str, ...] = ()
    """Sources and evaluation sets of the recipe to read. The report lists the others as left out."""

    skip: tuple[str, ...] = ()
    """Sources of the recipe to leave out."""

    evaluation: tuple[str, ...] = ()
    """Evaluation sources. Records that overlap them are left out. Records in their training splits are ignored, and no
    record of these sources is written."""

    seed: int | None = None
    """Seed of the random split of records whose source has no split. By default the recipe's, else 0."""

    heldout_fraction: float | None = None
    """Share of these records that is held out. By default the recipe's, else 0.02."""

    limit: int | None = None
    """Maximum number of rows to read from each source. Counts are then not compared with the recipe's."""

    allow_counts: bool = False
    """Only warn if the number of rows of a source differs from the recipe."""

    dry_run: bool = False
    """Print what would be read from where, and exit."""

    overwrite: bool = False
    """Replace --out if it exists."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Assemble and report."""
    from bimedix_jax import files
    from bimedix_jax.curation.assembly import assemble
    from bimedix_jax.curation.assembly.recipe import describe

    recipe = _recipe(config)
    if recipe.left_out:
        console.print(f"[bold yellow]left out of recipe {recipe.name}[/]: {', '.join(recipe.left_out)}")
    if config.dry_run:
        result = {"sources": [*map(describe, recipe.sources)], "evaluation": [*map(describe, recipe.evaluation)]}
        _print_sources(result, console)
        return {"recipe": recipe.name, "left_out": list(recipe.left_out), **result}
    with files.new_folder(config.out, config.overwrite) as folder:
        report = assemble.assemble(recipe, folder, config.allow_counts)
    _print(report, config, console)
    return {"output": str(config.out), **report}


def _recipe(config: Config) -> "ResolvedRecipe":
    """The recipe, or the sources on the command line, with the other options applied."""
    import dataclasses

    from bimedix_jax.curation.assembly import recipe as recipes
    from bimedix_jax.errors import BimedixError

    if (config.recipe is None) == (not config.sources):
        known = ", ".join(recipes.names())
        raise BimedixError(f"give either a recipe ({known}, or a TOML file) or --sources, and not both")
    if config.limit is not None and config.limit < 1:
        raise BimedixError(f"--limit {config.limit} leaves nothing to read; give 1 or more")
    if config.recipe is None:
        if config.data is not None or config.local or config.only or config.skip:
            raise BimedixError("--data, --local, --only and --skip need a recipe; name one, or leave them out")
        resolved = recipes.resolve_sources(config.sources, config.evaluation, limit=config.limit)
    else:
        loaded = recipes.load(config.recipe)
        resolved = recipes.resolve(loaded, config.data, config.only, config.skip, config.local, config.limit)
        others = recipes.resolve_sources((), config.evaluation).evaluation
        resolved = dataclasses.replace(resolved, evaluation=(*resolved.evaluation, *others))
    changes = {name: getattr(config, name) for name in ("seed", "heldout_fraction")}
    return dataclasses.replace(resolved, **{name: value for name, value in changes.items() if value is not None})


def _print_sources(result: dict[str, Any], console: Console) -> None:
    from bimedix_jax.process.terminal import FittedTable

    table = FittedTable("source", "from", "revision", "licence", title="sources to read")
    table.add_column("rows", justify="right")
    for group, style in (("sources", ""), ("evaluation", "dim")):
        for row in result[group]:
            rows = row["expect"].get("rows", "")
            shown = f"{rows[0]:,}-{rows[1]:,}" if isinstance(rows, tuple) else f"{rows:,}" if rows else ""
            revision, licence = (row["revision"] or "")[:12], row["licence"] or "each record's"
            table.add_row(row["name"], row["from"], revision, licence, shown, style=style)
    console.print(table)


def _print(report: dict[str, Any], config: Config, console: Console) -> None:
    from bimedix_jax.curation.assembly.assemble import QUARANTINE
    from bimedix_jax.process.terminal import FittedTable

    table = FittedTable("source", title=f"records in {config.out}")
    for name in ("train", "heldout"):
        table.add_column(name, justify="right")
    for source, row in report["records"].items():
        table.add_row(source, f"{row['train']:,}", f"{row['heldout']:,}")
    table.add_row("all", f"{report['train']:,}", f"{report['heldout']:,}", style="bold")
    console.print(table)
    print_notes(report["sources"] + report["evaluation"], console)
    if report["limit"] is not None:
        console.print(f"[bold yellow]only the first {report['limit']:,} rows of each source were read[/]")
    for sentence in report["unexpected"]:
        console.print(f"[bold yellow]differs from the recipe:[/] {sentence}", highlight=False)
    if report["quarantined"]:
        where = config.out / QUARANTINE
        console.print(f"[bold yellow]{report['quarantined']:,} rows were left out[/], each with its reason in {where}:")
        for row in report["reasons"][:12]:
            console.print(f"  {row['rows']:,} of {row['source']}: {row['reason']}", highlight=False, markup=False)


def print_notes(sources: list[dict[str, Any]], console: Console) -> None:
    """Print where the lines of each source went, and what was decided about it."""
    for source in sources:
        console.print(f"[bold]{source['reader']}[/] {escape(source['from'])}", highlight=False)
        for sentence in source["notes"]:
            console.print(f"  {sentence}", highlight=False, markup=False)
