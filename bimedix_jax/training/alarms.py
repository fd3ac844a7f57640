"""Warnings about a run that trains badly: the loss jumps, an expert gets no tokens, or one gets almost all of them.

All follow from lines of metrics.jsonl. A run that resumes reads those before, so it does not repeat a warning.
"""

import collections
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bimedix_jax.training.metrics_file import METRICS, read_metrics

WINDOW, FEWEST = 50, 10
"""The loss is compared with the median of the last WINDOW lines, once there are FEWEST."""
DEVIATIONS, LEAST_RISE = 6.0, 0.2
"""A spike is above the median by 6 robust standard deviations, and by a fifth of it."""
UNUSED, EXPECTED = 20, 200
"""An expert collapses if no token chose it in UNUSED steps, in which an even load would have given it EXPECTED."""
OVERFULL = 0.95
"""An expert is overfull if in UNUSED steps it had this share of all tokens, of a router that chooses fewer than all."""
SHOWN = 4


class Alarms:
    """Looks at each line, and prints a warning when something begins.

    Args:
      top_k: experts that a token chooses.
      free: whether routers choose freely. Under a routing plan or rules an unused expert is no accident.
      before: lines of earlier starts, whose warnings were printed.
    """

    def __init__(self, console: Console, top_k: int, free: bool = True, before: Iterable[Mapping[str, Any]] = ()):
        self.console, self.top_k, self.free = console, top_k, free
        self.losses: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self.groups: collections.deque[dict[str, float]] = collections.deque(maxlen=WINDOW)
        self.loads: collections.deque[tuple[float, np.ndarray]] = collections.deque(maxlen=UNUSED)
        self.high = False
        self.known: dict[str, set[tuple[int, int]]] = {"unused": set(), "overfull": set()}
        for line in before:
            self.look(line)

    @classmethod
    def of_run(cls, console: Console, folder: Path, top_k: int, free: bool) -> "Alarms":
        """Those of a run that may resume."""
        before = read_metrics(folder) if (folder / METRICS).is_file() else []
        return cls(console, top_k, free, before)

    def update(self, line: Mapping[str, Any]) -> None:
        """Prints the warnings that begin with this line."""
        for warning in self.look(line):
            self.console.print(f"[bold yellow]step {line['step']}:[/] {warning}", highlight=False)

    def look(self, line: Mapping[str, Any]) -> list[str]:
        """The warnings that begin with this line."""
        return [*self._spike(line), *self._collapse(line)]

    def _spike(self, line: Mapping[str, Any]) -> list[str]:
        loss, found = line["nll"], []
        by_group = {
            name: group["nll"] for name, group in line.get("by_group", {}).items() if group["supervised_tokens"]
        }
        if len(self.losses) >= FEWEST:
            usual = statistics.median(self.losses)
            spread = 1.4826 * statistics.median(abs(x - usual) for x in self.losses)
            high = loss > usual + max(DEVIATIONS * spread, LEAST_RISE * abs(usual))
            if high and not self.high:
                found.append(f"the loss jumped to {loss:.3f}, from {usual:.3f} (median){self._most_risen(by_group)}")
            self.high = high
        self.losses.append(loss)
        self.groups.append(by_group)
        return found

    def _most_risen(self, by_group: Mapping[str, float]) -> str:
        rises = {}
        for name, loss in by_group.items():
            before = [group[name] for group in self.groups if name in group]
            if before:
                rises[name] = loss - statistics.median(before)
        if not rises:
            return ""
        worst = max(rises, key=lambda name: rises[name])
        return f"; most in {worst}, by {rises[worst]:.3f}" if rises[worst] > 0 else ""

    def _collapse(self, line: Mapping[str, Any]) -> list[str]:
        if not self.free or "load" not in line or not line["tokens"]:
            return []
        load_LE = np.asarray(line["load"])
        self.loads.append((line["tokens"], load_LE))
        tokens = sum(count for count, _ in self.loads)
        expected = tokens * self.top_k / load_LE.shape[-1]
        if len(self.loads) < UNUSED or expected < EXPECTED or self.top_k >= load_LE.shape[-1]:
            return []
        mean_LE = np.sum([count * share_LE for count, share_LE in self.loads], axis=0) / tokens
        steps = f"in the last {UNUSED} steps"
        return [
            *self._begun("unused", mean_LE == 0, f"got no token {steps}"),
            *self._begun("overfull", mean_LE * self.top_k >= OVERFULL, f"got {OVERFULL:.0%} of all tokens {steps}"),
        ]

    def _begun(self, kind: str, state_LE: np.ndarray, what: str) -> list[str]:
        now = {(int(layer), int(expert)) for layer, expert in np.argwhere(state_LE)}
        new = sorted(now - self.known[kind])
        self.known[kind] = now
        return [f"{named(new)} {what}"] if new else []


def named(places: Sequence[tuple[int, int]]) -> str:
    """`layer 3 expert 1, layer 4 expert 0 and 2 more`."""
    shown = ", ".join(f"layer {layer} expert {expert}" for layer, expert in places[:SHOWN])
    return f"{shown} and {len(places) - SHOWN} more" if len(places) > SHOWN else shown
