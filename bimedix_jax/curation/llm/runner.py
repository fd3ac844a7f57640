"""Many items through models at once: bounded in memory, stopped cleanly, gone on with where it ended.

An item's outcome is kept in the store under a key of what it depends on, so that items that are done cost a look-up and
no request. What could not be answered is counted and left for the next run.
"""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from bimedix_jax.curation.llm.account import Account, Stopped
from bimedix_jax.curation.llm.client import Client, Unanswered


class Interrupted(Stopped):
    """The user pressed Ctrl-C, or the machine is about to be taken away (SIGTERM)."""


@dataclass
class Progress:
    """What a run came to: items worked out now, found done, and without an answer (id, why)."""

    done: int = 0
    found: int = 0
    unanswered: list[tuple[str, str]] = field(default_factory=list)


async def run_items(
    items: Iterable[tuple[str, str, Any]],
    work: Callable[[Any], Awaitable[str]],
    account: Account,
    clients: Iterable[Client],
    total: int | None = None,
    title: str = "",
) -> Progress:
    """Work out the outcome of each item (id, result key, what `work` takes) that the store does not have yet.

    Raises:
        Stopped: by the user, by the budget, by the endpoint. Everything that came back is in the store.
    """
    from tqdm import tqdm

    clients = list(clients)
    at_once = sum(c.config.batch_size if c.config.batch else c.config.concurrency for c in clients)
    progress = Progress()
    source = iter(items)
    with tqdm(total=total, desc=title, unit=" records", disable=None) as bar, _signals(account):

        async def settle(name: str, key: str, item: Any) -> None:
            if account.store.result(key) is not None:
                progress.found += 1
                await asyncio.sleep(0)  # found items never wait, and signals must get their turn
                return
            try:
                account.store.keep_result(key, await work(item))
                progress.done += 1
            except Unanswered as error:
                progress.unanswered.append((name, str(error)))

        async def worker() -> None:
            try:
                for name, key, item in source:
                    account.check()
                    await settle(name, key, item)
                    bar.set_postfix_str(_spent(account, clients), refresh=False)
                    bar.update()
            except BaseException as error:
                account.stop(Stopped(f"stopped by {type(error).__name__}: {error}"))
                raise

        # a worker that fails must not cut off what the others have in flight: each gets to its end
        ended = await asyncio.gather(*(worker() for _ in range(at_once)), return_exceptions=True)
    unexpected = [error for error in ended if isinstance(error, BaseException) and not isinstance(error, Stopped)]
    if unexpected:
        raise unexpected[0]
    account.check()
    return progress


def _spent(account: Account, clients: list[Client]) -> str:
    sent = sum(client.sent for client in clients)
    dollars = f", ${account.dollars:,.2f}" if account.prices else ""
    return f"{sent:,} sent, {account.tokens:,} tokens{dollars}"


@contextmanager
def _signals(account: Account) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM lets what is in flight come back; the second Ctrl-C ends at once."""
    loop = asyncio.get_running_loop()

    def stop(name: str) -> None:
        account.stop(Interrupted(f"{name}: replies are kept, run the same command again to go on"))
        loop.remove_signal_handler(signal.SIGINT)
        print(f"{name}: waiting for the replies in flight, Ctrl-C again to give them up", file=sys.stderr)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number.name)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
