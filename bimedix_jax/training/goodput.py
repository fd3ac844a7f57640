"""Where the wall time of a run goes: steps that count, and what the devices waited for."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from bimedix_jax.training.progress import duration

LOST = ("setup", "compile", "data", "evaluation", "probe", "save", "skipped")
"""What time is lost to: reading the model and opening the data; compiling the step; waiting for a batch after the step
before it ended; held-out loss; recordings of the probe; waiting for a checkpoint; steps that were not finite."""


class Goodput:
    """The time since this start of a run began, in seconds, by what it was spent on.

    The goodput is the share of the time in which steps ran that count. Steps that an earlier start lost are in no
    line, so a start that repeats them counts them as its own.
    """

    def __init__(self):
        self.began = time.perf_counter()
        self.lost: dict[str, float] = dict.fromkeys(LOST, 0.0)
        self.useful = 0.0
        self._reported = dict(self.lost)

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Counts the time of the block as lost to `what`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.lost[what] += time.perf_counter() - began

    def compiled(self, seconds: float) -> None:
        """The step is compiled, which took so long; all the time before was for the preparation."""
        self.lost["compile"] = seconds
        self.lost["setup"] = max(0.0, time.perf_counter() - self.began - seconds)

    def line(self, seconds: float) -> dict[str, Any]:
        """`goodput` since the start, and the seconds `lost` since the line before, for a step that took `seconds`."""
        since = {what: spent - self._reported[what] for what, spent in self.lost.items()}
        self._reported = dict(self.lost)
        self.useful += max(0.0, seconds - since["data"])
        return {"goodput": self.share(), "lost": {what: spent for what, spent in since.items() if spent}}

    def share(self) -> float:
        return self.useful / max(time.perf_counter() - self.began, 1e-9)

    def summary(self) -> dict[str, Any]:
        """For run.json, with the time that has no name as `other`."""
        wall = time.perf_counter() - self.began
        other = max(0.0, wall - self.useful - sum(self.lost.values()))
        return {"goodput": self.share(), "seconds": wall, "steps": self.useful, "lost": {**self.lost, "other": other}}

    def sentence(self) -> str:
        """`goodput 91 % of 3:07: compile 12 s, setup 4 s`, without what took less than a hundredth of the time."""
        found = self.summary()
        large = sorted(found["lost"].items(), key=lambda item: -item[1])
        parts = [f"{what} {duration(spent)}" for what, spent in large if spent >= 0.01 * found["seconds"]]
        tail = f"; lost to {', '.join(parts)}" if parts else ""
        return f"goodput {100 * found['goodput']:.0f} % of {duration(found['seconds'])}{tail}"
