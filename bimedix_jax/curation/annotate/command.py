"""The steps that both commands share: read the sources, print the estimate, run, print the ledger, write the output."""

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from bimedix_jax import files
from bimedix_jax.curation.annotate import job as jobs
from bimedix_jax.curation.annotate.job import Forecast, Job, Outcomes
from bimedix_jax.curation.annotate.task import Task
from bimedix_jax.curation.llm.account import Account, parse_prices
from bimedix_jax.curation.llm.config import JudgeConfig, LlmConfig
from bimedix_jax.curation.llm.estimate import show
from bimedix_jax.curation.llm.runner import Interrupted, Progress
from bimedix_jax.curation.llm.store import open_copy, open_store
from bimedix_jax.curation.quarantine import Quarantine
from bimedix_jax.curation.readers import read
from bimedix_jax.data.records import Record
from bimedix_jax.errors import BimedixError


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """The options that both commands have; their help describes them."""

    sources: tuple[str, ...]
    out: Path
    llm: LlmConfig
    judge: JudgeConfig
    store: Path | None
    prompts: Path | None
    prices: tuple[str, ...]
    budget_usd: float | None
    budget_tokens: int | None
    limit: int | None
    give_up: bool
    dry_run: bool
    overwrite: bool

    @classmethod
    def of(cls, config: Any) -> Self:
        """The options of a command's configuration."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})


def annotate(
    options: JobOptions,
    task: Task[Any],
    refusal: Callable[[Record], str | None],
    announce: Callable[[Forecast], dict[str, Any]],
    write: Callable[[Path, Outcomes, Forecast, dict[str, Any]], dict[str, Any]],
    console: Console,
) -> dict[str, Any]:
    """Estimate, run and write.

    Args:
      refusal: why a record of the sources is not used, or None; see `wanted_records`.
      announce: prints a forecast and returns its figures.
      write: writes the output into a folder, with the models and prompts, and returns the report.

    Returns:
      The document that `--json` prints.
    """
    if not options.dry_run:
        files.check_replaceable(options.out, options.overwrite)
    prices = parse_prices(options.prices)
    if options.prompts is not None:
        for prompts in (task.prompts, task.judge_prompts):
            console.print(f"prompts of {prompts.stage} from {options.prompts}: {', '.join(prompts.own) or 'none'}")
    judge = options.judge.over(options.llm)
    if judge.model == options.llm.model:
        console.print(f"[bold yellow]{judge.model} judges its own {task.products}[/]: models favour their own work")
    records = wanted_records(options.sources, options.limit, refusal, console)
    job = Job(records=records, task=task, writer=options.llm, judge=judge)
    replies = options.store or options.out.with_name(f"{options.out.name}.sqlite")
    with (open_copy if options.dry_run else open_store)(replies) as store:
        forecast = jobs.forecast(job, store)
        rows = show(forecast.estimates, prices, console)
        figures = announce(forecast)
        account = Account(store, prices, options.budget_usd, options.budget_tokens)
        if options.dry_run:
            account.print(console)
            return {**figures, "estimate": rows, "ledger": account.rows()}
        running = jobs.annotate(job, account, forecast.records)
        unanswered = run_to_end(running, account, forecast.records, task, options.give_up, console)
        with files.new_folder(options.out, options.overwrite) as folder:
            report = write(folder, jobs.outcomes(job, store), forecast, job.provenance())
        ledger = account.rows()
    return {"output": str(options.out), **report, "unanswered": unanswered, "estimate": rows, "ledger": ledger}


def wanted_records(
    sources: tuple[str, ...], limit: int | None, refusal: Callable[[Record], str | None], console: Console
) -> Callable[[], Iterator[Record]]:
    """A function that reads the sources, up to `limit` wanted records of each.

    The first complete pass prints how many records were left out and how many rows could not be read.

    Args:
      refusal: why a record is not wanted, to be read after "N records", or None.
    """
    printed = False

    def records() -> Iterator[Record]:
        nonlocal printed
        quarantine, refused = Quarantine(), Counter[str]()
        for source in sources:
            taken = 0
            for record in read(source, quarantine):
                if taken == limit:
                    break
                reason = refusal(record)
                if reason is None:
                    taken += 1
                    yield record
                else:
                    refused[reason] += 1
        if printed:
            return
        printed = True
        for reason, number in refused.items():
            console.print(f"[bold yellow]{number:,} records {reason}[/] and are left out")
        if quarantine.rejected:
            console.print(f"[bold yellow]{len(quarantine.rejected):,} rows could not be read[/]:")
            for (source, reason), number in quarantine.reasons().most_common(12):
                console.print(f"  {number:,} of {source}: {reason}", highlight=False, markup=False)

    return records


def run_to_end(
    running: Coroutine[Any, Any, Progress],
    account: Account,
    total: int,
    task: Task[Any],
    give_up: bool,
    console: Console,
) -> int:
    """Run, print the ledger even after an error, and return how many records got no answer.

    Raises:
      BimedixError: records have no answer, and `give_up` is False.
      KeyboardInterrupt: the user or the machine stopped the run; replies are kept.
    """
    if account.lost:
        console.print(
            f"[bold yellow]{account.lost:,} requests were in flight when an earlier run was killed[/]: they are sent "
            "again and may have been paid for"
        )
    try:
        progress = asyncio.run(running)
    except Interrupted as stop:
        raise KeyboardInterrupt(str(stop)) from stop
    finally:
        account.print(console)
    if progress.unanswered and not give_up:
        name, why = progress.unanswered[0]
        raise BimedixError(
            f"{len(progress.unanswered):,} of {total:,} {task.items} have no answer, for example {name}: {why}. All "
            f"replies are kept: run the same command again, or pass --give-up to {task.give_up}"
        )
    return len(progress.unanswered)
