"""Detects that the clock of the machine was set, by comparison with a clock that cannot be."""

import time

TOLERANCE_SECONDS = 5.0
"""NTP corrects a clock in small steps, which are no jump."""


def steady() -> float:
    """Seconds that passed, also while the machine was suspended; nobody can set this clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Clock:
    """The clock of the machine since this object was made, or since the last jump."""

    def __init__(self) -> None:
        self._offset = time.time() - steady()

    def jump(self) -> float:
        """Seconds by which the clock was set forward (or back, negative) since the last call; 0.0 if it was not."""
        before, self._offset = self._offset, time.time() - steady()
        jump = self._offset - before
        return jump if abs(jump) > TOLERANCE_SECONDS else 0.0
