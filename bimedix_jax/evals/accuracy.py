"""Accuracy with Wilson's interval, and ties."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from scipy.stats import binomtest

TIE = 1e-5
"""Nats by which rounding may change a log-likelihood, for example in a batch of another size."""


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """`correct` of `total`, with Wilson's 95 % interval (Wilson 1927), which is valid for few questions too."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        """Share of correct answers."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the 95 % interval."""
        found = binomtest(self.correct, self.total).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON."""
        low, high = self.interval
        return {"accuracy": self.value, "low": low, "high": high, "correct": self.correct, "n": self.total}


def ties(scored: Iterable[tuple[Sequence[str], Sequence[float]]]) -> dict[str, int]:
    """For each group, the questions whose two most likely options differ by at most TIE: rounding decides them. One
    option is never a tie.

    Args:
      scored: (groups of a question, log p of its options).
    """
    found: dict[str, int] = {}
    for groups, logprobs in scored:
        best = sorted(logprobs)[-2:]
        tied = len(best) == 2 and best[1] - best[0] <= TIE
        for group in groups:
            found[group] = found.get(group, 0) + tied
    return dict(sorted(found.items()))
