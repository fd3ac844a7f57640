"""`bimedix data chats`: consultations between patient and doctor from exam questions, checked against their answers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from bimedix_jax.curation.llm.config import JudgeConfig, LlmConfig

if TYPE_CHECKING:
    from bimedix_jax.curation.chats.job import Forecast, Job
    from bimedix_jax.data.records import Record


@dataclass(frozen=True)
class Config:
    """Write a chat on each multiple-choice question, check that it keeps the answer, write it again where it does not.

    What it would ask and cost, without asking:

        bimedix data chats --sources train.jsonl --output chats --llm.model gpt-4o-mini \\
            --prices gpt-4o-mini=0.15/0.075/0.60 --dry-run

    In which every fifth patient switches between English and Arabic:

        bimedix data chats --sources train.jsonl --output chats --switch-share 0.2 --llm.model gpt-4o-mini \\
            --judge.model qwen3-32b --judge.base-url http://127.0.0.1:8000/v1 --judge.api-key-env ''

    A turn is an exchange: the patient says something and the doctor replies. Ctrl-C, SIGTERM, SIGKILL: run the same
    command again. Each reply is in the store and is not paid for twice.
    """

    sources: tuple[str, ...]
    """Where the questions are: NAME=PATH with a reader's name, `sample`, or the path of a JSONL file of records."""

    output: Path
    """Folder to write: chats.jsonl, rejected.jsonl (questions without a chat, and why), report.json."""

    llm: LlmConfig
    """The model that writes."""

    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """The model that judges; what is not given is as for the one that writes."""

    store: Path | None = None
    """SQLite file that keeps every reply; by default beside the output folder, with `.sqlite` added to its name."""

    turns: float = 4.7
    """Mean number of turns; the paper's English chats have 4.71."""

    most_turns: int = 10
    """Turns of the longest; the shortest has 2. Between them they are drawn from a binomial distribution."""

    switch_share: float = 0.1
    """Share of the chats in which the patient changes the language and the doctor follows."""

    language: Literal["same", "en", "ar"] = "same"
    """What a chat begins in: its question's language, English or Arabic."""

    threshold: float = 80.0
    """Lowest score, of 100, that the judge must give."""

    rounds: int = 2
    """How often a chat may be written again."""

    seed: int = 0
    """Draws length, languages and the turn of the answer for each question."""

    temperature: float = 0.8
    """Of the chats; the judge always has 0. Below 0: the field is not sent, for models that refuse it."""

    max_tokens: int = 8192
    """Most tokens of a chat; less is asked for where the plan is short."""

    prompts: Path | None = None
    """Folder whose chats/*.txt and chats_judge/*.txt replace the prompts that ship with the package."""

    prices: tuple[str, ...] = ()
    """MODEL=PROMPT/CACHED/COMPLETION in US dollars per million tokens, or JSON files with such prices."""

    budget_usd: float | None = None
    """Stop before so many US dollars are passed, earlier runs with the same store included."""

    budget_tokens: int | None = None
    """Stop before so many tokens are passed, earlier runs with the same store included."""

    limit: int | None = None
    """At most so many questions of each source."""

    give_up: bool = False
    """Count questions that got no answer as rejected, instead of ending without output for the next run to ask anew."""

    dry_run: bool = False
    """Print what would be asked and cost, and send nothing."""

    overwrite: bool = False
    """Replace the output folder if it exists."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 100:
            raise ValueError("threshold must be from 0 to 100")
        if self.rounds < 0:
            raise ValueError("rounds must be 0 or more")
        if self.most_turns < 2 or not 2 <= self.turns <= self.most_turns:
            raise ValueError("turns must be from 2 to most_turns")
        if not 0 <= self.switch_share <= 1:
            raise ValueError("switch_share must be from 0 to 1")


def run(config: Config, console: Console) -> dict[str, Any]:
    """Estimate, write, check."""
    from bimedix_jax import files
    from bimedix_jax.curation.chats import job as jobs
    from bimedix_jax.curation.chats import output
    from bimedix_jax.curation.llm.account import Account, parse_prices
    from bimedix_jax.curation.llm.estimate import show
    from bimedix_jax.curation.llm.store import open_store
    from bimedix_jax.curation.llm.whole_run import run_to_end

    if not config.dry_run:
        files.check_replaceable(config.output, config.overwrite)
    prices = parse_prices(config.prices)
    job = _job(config, console)
    with open_store(config.store or config.output.with_name(f"{config.output.name}.sqlite")) as store:
        forecast = jobs.forecast(job, store)
        rows = show(forecast.estimates, prices, console)
        planned = _print_forecast(forecast, console)
        if config.dry_run:
            return {**planned, "estimate": rows}
        account = Account(store, prices, config.budget_usd, config.budget_tokens)
        give_up = None if config.give_up else "count them as rejected"
        running = jobs.write_chats(job, account, forecast.questions)
        unanswered = run_to_end(running, account, forecast.questions, "questions", give_up, console)
        with files.new_folder(config.output, config.overwrite) as folder:
            style = job.settings.style
            report = output.write(folder, jobs.outcomes(job, store), style, forecast.left_out, job.provenance())
        ledger = account.rows()
    _print(report, config, console)
    return {"output": str(config.output), **report, "unanswered": unanswered, "estimate": rows, "ledger": ledger}


def _job(config: Config, console: Console) -> "Job":
    from bimedix_jax.curation.chats.job import Job
    from bimedix_jax.curation.chats.pipeline import JUDGE, STAGE, Settings
    from bimedix_jax.curation.chats.shapes import Style
    from bimedix_jax.curation.llm.prompts import load_prompts
    from bimedix_jax.curation.llm.whole_run import wanted_records

    style = Style(config.turns, config.most_turns, config.switch_share, config.language, config.seed)
    settings = Settings(
        style=style,
        threshold=config.threshold,
        rounds=config.rounds,
        max_tokens=config.max_tokens,
        temperature=None if config.temperature < 0 else config.temperature,
        write=load_prompts(STAGE, config.prompts),
        judge=load_prompts(JUDGE, config.prompts),
    )
    judge = config.judge.over(config.llm)
    if judge.model == config.llm.model:
        console.print(f"[bold yellow]{judge.model} judges its own chats[/]: models favour their own work")
    records = wanted_records(config.sources, config.limit, not_a_question, console)
    return Job(records, config.llm, judge, settings)


def not_a_question(record: "Record") -> str | None:
    """Why no chat is built on a record, or None."""
    return None if record.kind == "mcqa" else f"of kind {record.kind} are no multiple-choice questions"


def _print_forecast(forecast: "Forecast", console: Console) -> dict[str, Any]:
    mean = forecast.exchanges / forecast.questions
    console.print(
        f"{forecast.questions:,} questions, {forecast.finished:,} of them finished before; {mean:.2f} turns planned in "
        "the mean",
        highlight=False,
    )
    for reason, number in forecast.left_out.most_common():
        console.print(f"  {number:,} questions are left out: {reason}", highlight=False)
    return {
        "questions": forecast.questions,
        "finished": forecast.finished,
        "planned_mean_turns": mean,
        "left_out": dict(sorted(forecast.left_out.items())),
    }


def _print(report: dict[str, Any], config: Config, console: Console) -> None:
    mean = "" if report["mean_turns"] is None else f", {report['mean_turns']:.2f} turns in the mean"
    console.print(
        f"{report['chats']:,} chats of {report['questions']:,} questions in {config.output}{mean}, "
        f"{report['switched']:,} with a change of language",
        highlight=False,
    )
    if report["rejected"]:
        listed = ", ".join(f"{name} {number:,}" for name, number in report["rejected_for"].items())
        listed += f"{', ' if listed else ''}duplicates {report['duplicates']:,}" if report["duplicates"] else ""
        console.print(f"[bold yellow]{report['rejected']:,} questions gave no chat[/]: {listed}", highlight=False)
