"""Requests and tokens per minute."""

import asyncio
from collections.abc import Awaitable, Callable


class Pace:
    """Token bucket: `per_minute` units a minute, with a capacity of one second's units. First come, first served.

    An amount above the capacity waits for a full bucket and makes it negative, so that the next callers wait longer.
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
        """Wait until `amount` units are available, and use them."""
        if self._rate is None:
            return
        async with self._turn:
            self._fill(self._rate)
            while (missing := min(amount, self._most) - self._level) > 1e-9:
                await self._sleep(missing / self._rate)
                self._fill(self._rate)
            self._level -= amount

    def correct(self, amount: float) -> None:
        """Return what an estimate was too high by; a negative `amount` uses more."""
        self._level = min(self._most, self._level + amount)

    def _fill(self, rate: float) -> None:
        now = self._clock()
        self._level = min(self._most, self._level + (now - self._filled) * rate)
        self._filled = now
