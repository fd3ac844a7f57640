"""`bimedix data mix`: records in both languages into one training set at an exact ratio."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console


@dataclass(frozen=True)
class Config:
    """Choose, at an exact ratio of Arabic to English in each kind, what neither repeats itself nor meets an evaluation.

    A record that overlaps an evaluation question is left out, and with it its translations and the chats made from it.
    """

    sources: tuple[str, ...]
    """What to choose from: NAME=PLACE with a reader's name, `sample`, or paths of JSONL files of records. Of records
    with one id or nearly one text, the first stays."""

    output: Path
    """Folder to write: train.jsonl, README.md (the data card), report.json, and a line for each record removed."""

    evaluation: tuple[str, ...] = ()
    """Sources, in either language, that the set must not overlap; what they mark for training does not count."""

    benchmarks: Path | None = None
    """Folder with the files of the paper's nine tasks, as `bimedix eval run` takes it: more of the same."""

    ratio: str = "1:2"
    """Arabic to English, in each kind."""

    preset: Literal["paper", "paper-english", "paper-arabic"] | None = None
    """The paper's counts of each kind instead of a ratio: its bilingual, its English or its Arabic set."""

    scale: bool = False
    """With a preset: keep its proportions where there are fewer records, instead of stopping."""

    near_duplicates: float = 0.8
    """Share of common runs of five words from which on a record is a near-duplicate; 0 keeps them all."""

    ngram: int = 8
    """Words in the runs that are compared with evaluation questions."""

    overlap: float = 0.5
    """Share of such runs of a question from which on a record counts as containing it."""

    tokenizer: Path | None = None
    """Checkpoint folder whose tokenizer counts tokens: the ratio is then known by tokens and supervised tokens too."""

    template: str | None = None
    """Chat template by name (mixtral, mixtral-2023, chatml, plain) instead of the checkpoint's own."""

    limit: int | None = None
    """At most so many records of each source, for a trial."""

    seed: int = 0
    """Decides which records are chosen, and their order."""

    workers: int | None = None
    """Processes, by default one a core; 0 works in this one. The set does not depend on it."""

    overwrite: bool = False
    """Replace the output folder if it exists."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Mix and report."""
    from bimedix_jax import files
    from bimedix_jax.curation.mix import targets
    from bimedix_jax.curation.mix.build import Settings, mix
    from bimedix_jax.curation.mix.decontaminate import benchmark_sources
    from bimedix_jax.data.parallel import workers_of
    from bimedix_jax.errors import BimedixError

    if not 0 <= config.near_duplicates <= 1 or not 0 < config.overlap <= 1 or config.ngram < 1:
        raise BimedixError("--near-duplicates lies in 0..1, --overlap above 0 and up to 1, --ngram is at least 1")
    if config.scale and config.preset is None:
        raise BimedixError("--scale concerns a preset's counts; name one with --preset, or leave --scale out")
    if config.preset is not None and config.ratio != Config.ratio:
        raise BimedixError("a preset has ratios of its own; give --ratio or --preset, not both")
    benchmarks = () if config.benchmarks is None else benchmark_sources(config.benchmarks)
    settings = Settings(
        sources=config.sources,
        evaluation=(*config.evaluation, *benchmarks),
        ratio=targets.parse_ratio(config.ratio),
        preset=config.preset,
        scale=config.scale,
        near_duplicates=config.near_duplicates,
        ngram=config.ngram,
        share=config.overlap,
        limit=config.limit,
        seed=config.seed,
        tokenizer=None if config.tokenizer is None else str(config.tokenizer),
        template=config.template,
        workers=workers_of(config.workers),
    )
    with files.new_folder(config.output, config.overwrite) as folder:
        report = mix(settings, folder)
    _print(report, config, console)
    return {"output": str(config.output), **report}


def _print(report: dict[str, Any], config: Config, console: Console) -> None:
    from rich.table import Table

    from bimedix_jax.commands.data_stats import print_tables
    from bimedix_jax.curation.counts import shown_ratio
    from bimedix_jax.curation.mix.candidates import MEANING, Fate

    print_tables(report["tables"], config.tokenizer is not None, console)
    measures = {"samples": "by samples", "tokens": "by tokens", "learned_tokens": "by supervised tokens"}
    shown = list(measures) if config.tokenizer is not None else ["samples"]
    table = Table("kind", *(measures[name] for name in shown), title=f"Arabic to English in {config.output}")
    for row in report["ratios"]:
        table.add_row(row["kind"], *(shown_ratio(row[name]) for name in shown))
    console.print(table)
    for fate, meaning in MEANING.items():
        count = report["fates"][fate.name.lower()]
        if fate != Fate.KEPT and count:
            console.print(f"[bold yellow]{count:,}[/] left out: {meaning}")
    if report["rejected_rows"] or report["evaluation"]["rejected_rows"]:
        console.print(
            f"[bold yellow]{report['rejected_rows']:,} rows of the sources and "
            f"{report['evaluation']['rejected_rows']:,} of the evaluation sets could not be read[/]"
        )
    for name in report["kinds_left_out"]:
        console.print(f"[bold yellow]no {name} in the set: one language has none of it to spare[/]")
    if not report["evaluation"]["sets"]:
        console.print(
            "[bold yellow]no evaluation set was named: nothing was kept out; see --evaluation, --benchmarks[/]"
        )
    if config.tokenizer is None:
        console.print("with --tokenizer the ratio is printed by tokens and supervised tokens too")
