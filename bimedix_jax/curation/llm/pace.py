"""Requests and tokens per minute."""

import asyncio
from collections.abc import Awaitable, Callable


class Pace:
    """Lets through `per_minute` units a minute, evenly: what may be used at once is a second's worth.

    Whoever comes first goes first. A single amount above that waits for a full second's worth and leaves a debt that
    those behind it wait out.
    """

    def __init__(
        self, per_minute: int | None, clock: Callable[[], float], sleep: Callable[[float], Awaitable[None]]
    ) -> None:
        self._rate = None if per_minute is None else per_minute / 60
        self._most = max(1.0, self._rate or 1.0)
        self._level = self._most
        self._clock, self._sleep = clock, sleep
        self._filled = clock()
        self._turn = asyncio.Lock()

    async def take(self, amount: float) -> None:
        """Wait until `amount` units may be used."""
        if self._rate is None:
            return
        async with self._turn:
            self._fill(self._rate)
            while (missing := min(amount, self._most) - self._level) > 1e-9:
                await self._sleep(missing / self._rate)
                self._fill(self._rate)
            self._level -= amount

    def correct(self, amount: float) -> None:
        """Give back (or, below zero, take) what an estimate was too high by."""
        self._level = min(self._most, self._level + amount)

    def _fill(self, rate: float) -> None:
        now = self._clock()
        self._level = min(self._most, self._level + (now - self._filled) * rate)
        self._filled = now
