"""Simulates answers of two models: how often do the intervals and tests of `bimedix eval compare` keep their promise?

    python scripts/measure_answer_intervals.py --json              # about one minute
    python scripts/measure_answer_intervals.py --sets 200          # a trial

Each row is a task of `n` questions on which two models of the given accuracies disagree in a share `discordant` of the
questions. `coverage`: how often the 95 % interval contains the true difference, accuracy or kappa. `rejected`: how
often a test with alpha = 0.05 finds a difference; where the true difference is zero, that is its rate of false
positives, and where it is the smallest detectable one, its power.
"""

import argparse
import json
import sys
from typing import Any

import numpy as np

from bimedix_jax.errors import positive, run_script
from bimedix_jax.evals import statistics

TASKS = {"medical genetics": 100, "clinical knowledge": 265, "PubMedQA": 500, "MedQA": 1273, "MedMCQA": 4183}


def answers(rng: np.random.Generator, n: int, accuracy: float, discordant: float, gain: float) -> np.ndarray:
    """[2, N]: whether A and B are correct, with P(only B) - P(only A) = gain."""
    both = accuracy - (discordant - gain) / 2
    shares = [both, (discordant - gain) / 2, (discordant + gain) / 2, 1 - both - discordant]
    kinds = np.array([[1, 1], [1, 0], [0, 1], [0, 0]])
    return kinds[rng.choice(4, n, p=shares)].T.astype(float)


def paired_row(name: str, n: int, discordant: float, gain: float, sets: int) -> dict[str, Any]:
    rng = np.random.default_rng([n, round(1000 * discordant), round(1e6 * gain)])
    covered = covered_a = found = found_bootstrap = 0
    for number in range(sets):
        a_N, b_N = answers(rng, n, 0.5, discordant, gain)
        result = statistics.paired(a_N, b_N, seed=number)
        covered += result.difference.low <= gain <= result.difference.high
        found += result.p < statistics.ALPHA
        found_bootstrap += result.p_bootstrap < statistics.ALPHA
        own = statistics.wilson(float(a_N.mean()), n)
        covered_a += own.low <= 0.5 <= own.high
    return {
        "task": name,
        "n": n,
        "discordant": discordant,
        "difference": gain,
        "coverage": covered / sets,
        "coverage_of_accuracy": covered_a / sets,
        "rejected_mcnemar": found / sets,
        "rejected_bootstrap": found_bootstrap / sets,
    }


def kappa_row(n: int, agreement: float, sets: int) -> dict[str, Any]:
    """Choices among four options; B repeats A's with probability `agreement` and is otherwise independent of it."""
    rng = np.random.default_rng([n, round(100 * agreement)])
    covered = 0
    for number in range(sets):
        a_N = rng.integers(0, 4, n)
        b_N = np.where(rng.random(n) < agreement, a_N, rng.integers(0, 4, n))
        found = statistics.kappa(a_N, b_N, seed=number)
        covered += found.low <= agreement <= found.high
    return {"n": n, "kappa": agreement, "coverage": covered / sets}


def measure(sets: int) -> dict[str, Any]:
    rows = []
    for name, n in TASKS.items():
        for discordant in (0.05, 0.2, 0.5):
            smallest = statistics.detectable(n, discordant)
            gains = [0.0] if smallest is None else [0.0, smallest]
            rows += [paired_row(name, n, discordant, gain, sets) for gain in gains]
    kappas = [kappa_row(n, agreement, sets) for n in (100, 500) for agreement in (0.2, 0.8)]
    return {"sets": sets, "rows": rows, "kappa": kappas}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sets", type=positive, default=2000, help="simulated data sets of each row")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.sets)
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    for row in [*result["rows"], *result["kappa"]]:
        print("  ".join(f"{name} {value:.4g}" if name != "task" else value for name, value in row.items()))


if __name__ == "__main__":
    run_script(main)
