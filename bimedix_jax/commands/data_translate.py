"""`bimedix data translate`: English records into Arabic through any OpenAI-compatible endpoint, judged and refined."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bimedix_jax.curation.llm.config import JudgeConfig, LlmConfig

if TYPE_CHECKING:
    from bimedix_jax.curation.annotate.job import Forecast, Outcomes
    from bimedix_jax.curation.annotate.translation import Translate
    from bimedix_jax.data.records import Record


@dataclass(frozen=True)
class Config:
    """Translate records, score the translations, refine those below the threshold, and write doubtful ones for review.

    Estimate requests and cost without sending anything:

        bimedix data translate --sources train.jsonl --out arabic --llm.model small-model \\
            --prices small-model=0.15/0.075/0.60 --dry-run

    With another model as judge, limits on requests, and a budget:

        bimedix data translate --sources train.jsonl --out arabic --llm.model small-model \\
            --llm.requests-per-minute 500 --llm.tokens-per-minute 200000 --llm.concurrency 32 \\
            --judge.model other-model --judge.base-url http://127.0.0.1:8000/v1 --judge.api-key-env '' \\
            --budget-tokens 2000000

    To resume after Ctrl-C, SIGTERM or SIGKILL, run the same command again. No reply is paid for twice.
    """

    out: Path
    """Folder to write: translated.jsonl, review.jsonl (for `bimedix data review`), report.json."""

    llm: LlmConfig
    """The model that translates."""

    sources: tuple[str, ...] = ()
    """What to translate: NAME=PATH with a reader's name, `sample`, or the path of a JSONL file of records."""

    benchmarks: Path | None = None
    """Folder with the English files of the paper's nine tasks, as for `bimedix eval run`: translates the test questions
    and also writes TASK_ar.jsonl into --out, doubtful questions with their flags; by default none."""

    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """The model that scores; options that are not given are those of the translator."""

    store: Path | None = None
    """SQLite file with all replies; by default next to --out, with `.sqlite` added to its name."""

    threshold: float = 85.0
    """Lowest accepted score, from 0 to 100. A flag of the checks also prevents acceptance. The paper does not state its
    threshold."""

    rounds: int = 3
    """Maximum number of refinements. If none is accepted, people review the best version."""

    review_share: float = 0.02
    """Share of the accepted translations that people review: at least one of each kind, specialty and score band."""

    seed: int = 0
    """Seed of that sample."""

    temperature: float | None = 0.0
    """Temperature of translator and judge; None for models that reject the field."""

    max_tokens: int = 8192
    """Maximum tokens of a translation; requests for short texts have a lower limit."""

    prompts: Path | None = None
    """Folder whose translate/*.txt and judge/*.txt replace the prompts that ship with the package."""

    prices: tuple[str, ...] = ()
    """MODEL=PROMPT/CACHED/COMPLETION in US dollars per million tokens, or JSON files with such prices."""

    budget_usd: float | None = None
    """Limit in US dollars, which includes earlier runs with the same store."""

    budget_tokens: int | None = None
    """Limit in tokens, which includes earlier runs with the same store."""

    limit: int | None = None
    """Maximum number of English records of each source."""

    give_up: bool = False
    """Send records to review for which the endpoint gave no usable reply. Otherwise the run ends without output, and
    the next run tries again."""

    dry_run: bool = False
    """Print the estimate and send nothing."""

    overwrite: bool = False
    """Replace --out if it exists."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 100:
            raise ValueError("threshold must be from 0 to 100")
        if not 0 <= self.review_share <= 1:
            raise ValueError("review_share must be from 0 to 1")
        if self.rounds < 0:
            raise ValueError("rounds must be 0 or more")
        if bool(self.sources) == (self.benchmarks is not None):
            raise ValueError("give --sources or --benchmarks, one of them")


def run(config: Config, console: Console) -> dict[str, Any]:
    """Estimate, translate, write."""
    from bimedix_jax.curation.annotate import benchmark_output, translation_output
    from bimedix_jax.curation.annotate.command import JobOptions, annotate
    from bimedix_jax.curation.mix.decontaminate import benchmark_sources

    def announce(forecast: "Forecast") -> dict[str, Any]:
        console.print(f"{forecast.records:,} records, {forecast.finished:,} of them already finished", highlight=False)
        return {"records": forecast.records, "finished": forecast.finished}

    def write(folder: Path, outcomes: "Outcomes", forecast: "Forecast", provenance: dict[str, Any]) -> dict[str, Any]:
        del forecast
        sampling = translation_output.Sampling(config.review_share, config.seed)
        arguments = (folder, outcomes, sampling, config.threshold, provenance)
        if config.benchmarks is None:
            return translation_output.write(*arguments)
        tasks = benchmark_output.Benchmarks(folder)
        report = translation_output.write(*arguments, tasks.add) | {"benchmarks": tasks.report()}
        (folder / translation_output.REPORT).write_text(
            json.dumps(report, ensure_ascii=False, indent=2) + "\n", "utf-8"
        )
        return report

    options, refusal = JobOptions.of(config), not_english
    if config.benchmarks is not None:
        options = replace(options, sources=benchmark_sources(config.benchmarks))
        refusal = benchmark_output.not_a_question
    result = annotate(options, task_of(config), refusal, announce, write, console)
    if not config.dry_run:
        _print(result, config, console)
    return result


def task_of(config: Config) -> "Translate":
    """The task that the options describe."""
    from bimedix_jax.curation.annotate.translation import Translate
    from bimedix_jax.curation.llm.prompts import load_prompts

    return Translate(
        threshold=config.threshold,
        rounds=config.rounds,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        judge_temperature=config.temperature,
        prompts=load_prompts("translate", config.prompts),
        judge_prompts=load_prompts("judge", config.prompts),
    )


def not_english(record: "Record") -> str | None:
    """Why a record is not translated, or None."""
    return None if record.language == "en" else "are not English"


def _print(report: dict[str, Any], config: Config, console: Console) -> None:
    share = report["accepted"] / report["records"] if report["records"] else 0.0
    console.print(
        f"{report['accepted']:,} of {report['records']:,} translations accepted ({share:.1%}), in {config.out}"
    )
    if report["review"]:
        listed = ", ".join(f"{number:,} {reason}" for reason, number in report["review"].items())
        console.print(f"for people to review, with `bimedix data review`: {listed}", highlight=False)
    for name, task in report.get("benchmarks", {}).items():
        missing = f", {len(task['missing']):,} without a translation" if task["missing"] else ""
        console.print(
            f"  {name}: {task['questions']:,} questions, {task['flagged']:,} flagged{missing}", highlight=False
        )
    for name, number in report["flags"].items():
        console.print(f"  flag {name}: {number:,} records", highlight=False)
