"""Processes many items concurrently, with bounded memory, a clean stop, and resume.

The outcome of an item is stored under a key of everything it depends on, so that a finished item costs a look-up and no
request. Items without an answer are counted, and the next run tries them again.
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
    """The user pressed Ctrl-C, or the process was told to end (SIGTERM)."""


@dataclass
class Progress:
    """Numbers of items that were computed now and found finished, and those without an answer (id, why)."""

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
    """Compute and store the outcome of each item (id, result key, argument of `work`) that the store does not have.

    Raises:
        Stopped: by the user, the budget or the endpoint. All replies are in the store.
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
                await asyncio.sleep(0)  # finished items never wait for anything, and signals need a turn of the loop
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

        # if one worker fails, the others still finish what they have in flight
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
    """After the first Ctrl-C or SIGTERM, requests in flight still finish; a second Ctrl-C ends immediately."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    wakeup = signal.set_wakeup_fd(-1)  # asyncio replaces both, and does not restore them

    def stop(name: str) -> None:
        account.stop(Interrupted(f"{name}: replies are kept, run the same command again to resume"))
        loop.remove_signal_handler(signal.SIGINT)
        print(f"{name}: waiting for the replies in flight; press Ctrl-C again to give them up", file=sys.stderr)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number.name)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
            signal.signal(number, before[number] or signal.SIG_DFL)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
