"""What every command does around its requests to models: reads its sources, runs to the end, says what became of it."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from rich.console import Console

from bimedix_jax.curation.llm.account import Account
from bimedix_jax.curation.llm.runner import Interrupted, Progress
from bimedix_jax.curation.quarantine import Quarantine
from bimedix_jax.curation.readers import read
from bimedix_jax.data.records import Record
from bimedix_jax.errors import BimedixError


def wanted_records(
    sources: tuple[str, ...], limit: int | None, refusal: Callable[[Record], str | None], console: Console
) -> Callable[[], Iterator[Record]]:
    """Reads the sources anew at each call, up to `limit` wanted records of each; says once what else there was.

    Args:
      refusal: why a record is not wanted, to be read after "N records", or None.
    """
    said = False

    def records() -> Iterator[Record]:
        nonlocal said
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
        if said:
            return
        said = True
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
    items: str,
    give_up: str | None,
    console: Console,
) -> int:
    """Runs, prints the ledger whatever happens, and returns how many items got no answer.

    Args:
      items: what they are called, in the plural.
      give_up: what --give-up would do with items without an answer; None where it was given.

    Raises:
      BimedixError: items have no answer, and `give_up` is not None.
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
    if progress.unanswered and give_up is not None:
        name, why = progress.unanswered[0]
        raise BimedixError(
            f"{len(progress.unanswered):,} of {total:,} {items} have no answer, {name} for one: {why}; all replies are "
            f"kept: run the same command again, or pass --give-up to {give_up}"
        )
    return len(progress.unanswered)
