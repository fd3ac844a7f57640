"""Progress of a run on stderr: a bar on a terminal, otherwise a line every 15 seconds."""

import collections
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

WINDOW = 20
"""Steps over which the speed is averaged."""
LINE_SECONDS = 15.0
"""Time between two lines without a terminal."""


def duration(seconds: float) -> str:
    """'42 s', '3:07' or '2:05:09'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class TrainingProgress:
    """Shows the step, the loss, tokens per second and the time left."""

    def __init__(self, console: Console, step: int, steps: int):
        self.console, self.steps = console, steps
        self.recent: collections.deque[tuple[float, float]] = collections.deque(maxlen=WINDOW)
        self.last_line = -LINE_SECONDS
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
        )
        self.task = self.bar.add_task("training", total=steps, completed=step, status="")

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def update(self, line: dict[str, Any]) -> None:
        """Shows the progress after a step, from its line of metrics.jsonl."""
        self.recent.append((line["tokens"], line["seconds"]))
        tokens, seconds = (sum(column) for column in zip(*self.recent, strict=True))
        left = (self.steps - line["step"]) * seconds / len(self.recent)
        status = f"loss {line['loss']:.4f} · {tokens / max(seconds, 1e-9):,.0f} tokens/s · {duration(left)} left"
        if "heldout_nll" in line:
            status += f" · held-out {line['heldout_nll']:.4f}"
        if self.console.is_terminal:
            self.bar.update(self.task, completed=line["step"], status=status)
            return
        now = time.monotonic()
        if now - self.last_line >= LINE_SECONDS or line["step"] == self.steps:
            self.last_line = now
            self.console.print(f"step {line['step']}/{self.steps} · {status}", highlight=False)
