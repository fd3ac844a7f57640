"""`bimedix data chats`: consultations between patient and doctor from exam questions, checked against their answers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from bimedix_jax.curation.llm.config import JudgeConfig, LlmConfig

if TYPE_CHECKING:
    from bimedix_jax.curation.annotate.chats import WriteChats
    from bimedix_jax.curation.annotate.job import Forecast, Outcomes
    from bimedix_jax.data.records import Record


@dataclass(frozen=True)
class Config:
    """Write a chat on each multiple-choice question, check that it keeps the answer, and revise it if it does not.

    Estimate requests and cost without sending anything:

        bimedix data chats --sources train.jsonl --out chats --llm.model gpt-4o-mini \\
            --prices gpt-4o-mini=0.15/0.075/0.60 --dry-run

    Let the patient switch between English and Arabic in every fifth chat:

        bimedix data chats --sources train.jsonl --out chats --switch-share 0.2 --llm.model gpt-4o-mini \\
            --judge.model qwen3-32b --judge.base-url http://127.0.0.1:8000/v1 --judge.api-key-env ''

    A turn is an exchange: the patient speaks and the doctor replies. To resume after Ctrl-C, SIGTERM or SIGKILL, run
    the same command again. No reply is paid for twice.
    """

    sources: tuple[str, ...]
    """The questions: NAME=PATH with a reader's name, `sample`, or the path of a JSONL file of records."""

    out: Path
    """Folder to write: chats.jsonl, rejected.jsonl (questions without a chat, and why), report.json."""

    llm: LlmConfig
    """The model that writes."""

    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """The model that judges; options that are not given are those of the writer."""

    store: Path | None = None
    """SQLite file with all replies; by default next to --out, with `.sqlite` added to its name."""

    turns: float = 4.7
    """Mean number of turns; the paper's English chats have 4.71."""

    most_turns: int = 10
    """Maximum number of turns of a chat; the minimum is 2. The number has a binomial distribution."""

    switch_share: float = 0.1
    """Share of the chats in which the patient changes the language and the doctor follows."""

    language: Literal["same", "en", "ar"] = "same"
    """First language of a chat: that of its question, English or Arabic."""

    threshold: float = 80.0
    """Lowest accepted score, from 0 to 100."""

    rounds: int = 2
    """Maximum number of revisions of a chat."""

    seed: int = 0
    """Seed of the length, the languages and the turn of the answer of each chat."""

    temperature: float = 0.8
    """Temperature of the writer; the judge always has 0. Give -1 for models that reject the field."""

    max_tokens: int = 8192
    """Maximum tokens of a chat; requests for short chats have a lower limit."""

    prompts: Path | None = None
    """Folder whose chats/*.txt and chats_judge/*.txt replace the prompts that ship with the package."""

    prices: tuple[str, ...] = ()
    """MODEL=PROMPT/CACHED/COMPLETION in US dollars per million tokens, or JSON files with such prices."""

    budget_usd: float | None = None
    """Limit in US dollars, which includes earlier runs with the same store."""

    budget_tokens: int | None = None
    """Limit in tokens, which includes earlier runs with the same store."""

    limit: int | None = None
    """Maximum number of questions of each source."""

    give_up: bool = False
    """Reject questions for which the endpoint gave no usable reply. Otherwise the run ends without output, and the next
    run tries again."""

    dry_run: bool = False
    """Print the estimate and send nothing."""

    overwrite: bool = False
    """Replace --out if it exists."""

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
    from bimedix_jax.curation.annotate import chats_output
    from bimedix_jax.curation.annotate.command import JobOptions, annotate

    task = task_of(config)

    def announce(forecast: "Forecast") -> dict[str, Any]:
        return _print_forecast(forecast, console)

    def write(folder: Path, outcomes: "Outcomes", forecast: "Forecast", provenance: dict[str, Any]) -> dict[str, Any]:
        return chats_output.write(folder, outcomes, task.style, forecast.left_out, provenance)

    result = annotate(JobOptions.of(config), task, not_a_question, announce, write, console)
    if not config.dry_run:
        _print(result, config, console)
    return result


def task_of(config: Config) -> "WriteChats":
    """The task that the options describe."""
    from bimedix_jax.curation.annotate.chat_shapes import ChatStyle
    from bimedix_jax.curation.annotate.chats import WriteChats
    from bimedix_jax.curation.llm.prompts import load_prompts

    return WriteChats(
        style=ChatStyle(
            mean=config.turns,
            most=config.most_turns,
            switch_share=config.switch_share,
            language=config.language,
            seed=config.seed,
        ),
        threshold=config.threshold,
        rounds=config.rounds,
        max_tokens=config.max_tokens,
        temperature=None if config.temperature < 0 else config.temperature,
        prompts=load_prompts("chats", config.prompts),
        judge_prompts=load_prompts("chats_judge", config.prompts),
    )


def not_a_question(record: "Record") -> str | None:
    """Why no chat is built on a record, or None."""
    return None if record.kind == "mcqa" else f"of kind {record.kind} are not multiple-choice questions"


def _print_forecast(forecast: "Forecast", console: Console) -> dict[str, Any]:
    mean = forecast.exchanges / forecast.records
    console.print(
        f"{forecast.records:,} questions, {forecast.finished:,} of them already finished; {mean:.2f} turns drawn on "
        "average",
        highlight=False,
    )
    for reason, number in forecast.left_out.most_common():
        console.print(f"  {number:,} questions are left out: {reason}", highlight=False)
    return {
        "questions": forecast.records,
        "finished": forecast.finished,
        "planned_mean_turns": mean,
        "left_out": dict(sorted(forecast.left_out.items())),
    }


def _print(report: dict[str, Any], config: Config, console: Console) -> None:
    mean = "" if report["mean_turns"] is None else f", {report['mean_turns']:.2f} turns on average"
    console.print(
        f"{report['chats']:,} chats of {report['questions']:,} questions in {config.out}{mean}, "
        f"{report['switched']:,} with a change of language",
        highlight=False,
    )
    if report["rejected"]:
        listed = ", ".join(f"{name} {number:,}" for name, number in report["rejected_for"].items())
        listed += f"{', ' if listed else ''}duplicates {report['duplicates']:,}" if report["duplicates"] else ""
        console.print(f"[bold yellow]{report['rejected']:,} questions have no chat[/]: {listed}", highlight=False)
