"""`bimedix data translate`: English records into Arabic through any OpenAI-compatible endpoint, judged and refined."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bimedix_jax.curation.llm.config import JudgeConfig, LlmConfig

if TYPE_CHECKING:
    from bimedix_jax.curation.translate.job import Job
    from bimedix_jax.data.records import Record


@dataclass(frozen=True)
class Config:
    """Translate records, score the translations, refine those below the threshold, and queue the rest for people.

    What it would ask and cost, without asking:

        bimedix data translate --sources train.jsonl --output arabic --llm.model small-model \\
            --prices small-model=0.15/0.075/0.60 --dry-run

    A judge of another maker, limits, and a cap on what is spent:

        bimedix data translate --sources train.jsonl --output arabic --llm.model small-model \\
            --llm.requests-per-minute 500 --llm.tokens-per-minute 200000 --llm.concurrency 32 \\
            --judge.model other-model --judge.base-url http://127.0.0.1:8000/v1 --judge.api-key-env '' \\
            --budget-tokens 2000000

    Ctrl-C, SIGTERM, SIGKILL: run the same command again. Each reply is in the store and is not paid for twice.
    """

    sources: tuple[str, ...]
    """What to translate: NAME=PATH with a reader's name, `sample`, or the path of a JSONL file of records."""

    output: Path
    """Folder to write: translated.jsonl, review.jsonl (for `bimedix data review`), report.json."""

    llm: LlmConfig
    """The model that translates."""

    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """The model that scores; what is not given is as for the one that translates."""

    store: Path | None = None
    """SQLite file that keeps every reply; by default beside the output folder, with `.sqlite` added to its name."""

    threshold: float = 85.0
    """Lowest score, of 100, that is accepted where no check raises a flag. The paper does not give its own."""

    rounds: int = 3
    """Refinements at most; what is then below the threshold goes to people, in its best version."""

    review_share: float = 0.02
    """Share of the accepted translations that people check, of each kind, specialty and score band, at least one."""

    seed: int = 0
    """Draws those."""

    temperature: float | None = 0.0
    """Of translator and judge; None: the field is not sent, for models that refuse it."""

    max_tokens: int = 8192
    """Most tokens of a translation; less is asked for where the text is short."""

    prompts: Path | None = None
    """Folder whose translate/*.txt and judge/*.txt replace the prompts that ship with the package."""

    prices: tuple[str, ...] = ()
    """MODEL=PROMPT/CACHED/COMPLETION in US dollars per million tokens, or JSON files with such prices."""

    budget_usd: float | None = None
    """Stop before so many US dollars are passed, earlier runs with the same store included."""

    budget_tokens: int | None = None
    """Stop before so many tokens are passed, earlier runs with the same store included."""

    limit: int | None = None
    """At most so many English records of each source."""

    give_up: bool = False
    """Send records that got no answer to review, instead of ending without output so that the next run asks again."""

    dry_run: bool = False
    """Print what would be asked and cost, and send nothing."""

    overwrite: bool = False
    """Replace the output folder if it exists."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 100:
            raise ValueError("threshold must be from 0 to 100")
        if not 0 <= self.review_share <= 1:
            raise ValueError("review_share must be from 0 to 1")
        if self.rounds < 0:
            raise ValueError("rounds must be 0 or more")


def run(config: Config, console: Console) -> dict[str, Any]:
    """Estimate, translate, write."""
    from bimedix_jax import files
    from bimedix_jax.curation.llm.account import Account, parse_prices
    from bimedix_jax.curation.llm.estimate import show
    from bimedix_jax.curation.llm.store import open_store
    from bimedix_jax.curation.llm.whole_run import run_to_end
    from bimedix_jax.curation.translate import job as jobs
    from bimedix_jax.curation.translate import output

    if not config.dry_run:
        files.check_replaceable(config.output, config.overwrite)
    prices = parse_prices(config.prices)
    job = _job(config, console)
    with open_store(config.store or config.output.with_name(f"{config.output.name}.sqlite")) as store:
        forecast = jobs.forecast(job, store)
        rows = show(forecast.estimates, prices, console)
        console.print(f"{forecast.records:,} records, {forecast.finished:,} of them finished before", highlight=False)
        account = Account(store, prices, config.budget_usd, config.budget_tokens)
        if config.dry_run:
            account.print(console)
            counts = {"records": forecast.records, "finished": forecast.finished}
            return {**counts, "estimate": rows, "ledger": account.rows()}
        give_up = None if config.give_up else "send those records to review"
        running = jobs.translate(job, account, forecast.records)
        unanswered = run_to_end(running, account, forecast.records, "records", give_up, console)
        with files.new_folder(config.output, config.overwrite) as folder:
            sampling = output.Sampling(config.review_share, config.seed)
            report = output.write(folder, jobs.outcomes(job, store), sampling, config.threshold, job.provenance())
        ledger = account.rows()
    _print(report, config, console)
    return {"output": str(config.output), **report, "unanswered": unanswered, "estimate": rows, "ledger": ledger}


def _job(config: Config, console: Console) -> "Job":
    """The job that the options describe; says what of the sources cannot be read."""
    from bimedix_jax.curation.llm.prompts import load_prompts
    from bimedix_jax.curation.llm.whole_run import wanted_records
    from bimedix_jax.curation.translate.job import Job
    from bimedix_jax.curation.translate.pipeline import Settings

    settings = Settings(
        threshold=config.threshold,
        rounds=config.rounds,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        translate=load_prompts("translate", config.prompts),
        judge=load_prompts("judge", config.prompts),
    )
    for prompts in (settings.translate, settings.judge):
        if config.prompts is not None:
            console.print(f"prompts of {prompts.stage} from {config.prompts}: {', '.join(prompts.own) or 'none'}")
    judge = config.judge.over(config.llm)
    if judge.model == config.llm.model:
        console.print(f"[bold yellow]{judge.model} judges its own translations[/]: models favour their own work")
    records = wanted_records(config.sources, config.limit, not_english, console)
    return Job(records, config.llm, judge, settings)


def not_english(record: "Record") -> str | None:
    """Why a record is not translated, or None."""
    return None if record.language == "en" else "are not English"


def _print(report: dict[str, Any], config: Config, console: Console) -> None:
    share = report["accepted"] / report["records"] if report["records"] else 0.0
    console.print(
        f"{report['accepted']:,} of {report['records']:,} translations accepted ({share:.1%}), in {config.output}"
    )
    if report["review"]:
        listed = ", ".join(f"{number:,} {reason}" for reason, number in report["review"].items())
        console.print(f"for people to look at, with `bimedix data review`: {listed}", highlight=False)
    for name, number in report["flags"].items():
        console.print(f"  flag {name}: {number:,} records", highlight=False)
