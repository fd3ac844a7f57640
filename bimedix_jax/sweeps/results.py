"""The metrics of finished runs, from metrics.jsonl and evaluation.json: one number for each metric and group."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bimedix_jax import files
from bimedix_jax.errors import BimedixError
from bimedix_jax.sweeps.folder import CRASH, EVALUATION, TRAINING, is_finished
from bimedix_jax.sweeps.study import EVALUATED, LOGGED
from bimedix_jax.training.metrics_file import METRICS, read_metrics

ALL = "all"
"""The group of all records."""
LAST = 10
"""The last tenth of the steps gives the metrics of training."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One run of a study.

    Attributes:
      metrics: value by metric; a group follows after a slash, as nats_per_token/en.
      records: of evaluation.json.
      curve: (step, training loss) in the order of the steps.
      seconds: wall time of the steps. It is never a part of the results.
    """

    arm: str
    seed: int
    identity: str
    folder: Path
    state: str
    reason: str | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    records: Sequence[Mapping[str, Any]] = ()
    curve: Sequence[tuple[int, float]] = ()
    cost: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


def read_results(folder: Path, study: Mapping[str, Any]) -> list[Result]:
    """The runs of study.json in its folder, finished or not."""
    return [read_result(folder / run["folder"], run) for run in study["runs"]]


def read_result(folder: Path, run: Mapping[str, Any]) -> Result:
    own = (run["arm"], run["seed"], run["identity"], folder)
    lines = read_lines(folder / TRAINING / METRICS)
    seconds = math.fsum(line.get("seconds", 0.0) for line in lines)
    if not is_finished(folder):
        crash = files.peek_json(folder / CRASH)
        state = "crashed" if crash else "unfinished" if lines else "waiting"
        reason = crash.get("reason")
        if (folder / EVALUATION).is_file():
            reason = f"{EVALUATION} is damaged; run the sweep again, which evaluates again"
        return Result(*own, state, reason, seconds=seconds)
    evaluation = files.peek_json(folder / EVALUATION)
    records = evaluation.get("records", ())
    groups = by_group(records)
    metrics = {
        name if group == ALL else f"{name}/{group}": row[name] for name in EVALUATED for group, row in groups.items()
    } | logged(lines)
    cost = {name: evaluation[name] for name in ("trainable_parameters", "tokens", "training_flops")}
    curve = [(line["step"], line["nll"]) for line in lines]
    return Result(*own, "finished", metrics=metrics, records=records, curve=curve, cost=cost, seconds=seconds)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without an incomplete last line; empty where there is none.

    Raises:
      BimedixError: a line is damaged, or a step is missing.
    """
    lines = read_metrics(path.parent) if path.is_file() else []
    for number, (before, line) in enumerate(pairwise(lines), 2):
        if line["step"] != before["step"] + 1:
            raise BimedixError(
                f"{path}, line {number}: step {line['step']} follows step {before['step']}; restore the file from a "
                "copy, or remove the folder of the run and run the sweep again."
            )
    return lines


def logged(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The metrics of training: means over the last tenth of the steps that have them, and over layers."""
    found: dict[str, float] = {}
    for name in LOGGED:
        values = [value for line in lines if (value := mean_of(line, name)) is not None]
        if values:
            last = values[-max(1, len(values) // LAST) :]
            found[name] = math.fsum(last) / len(last)
    return found


def mean_of(line: Mapping[str, Any], name: str) -> float | None:
    """A metric of a line; of one by layer, the mean."""
    value = line.get(name)
    if isinstance(value, list):
        return math.fsum(value) / len(value)
    return value


def by_group(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Loss of all records, by language, and by language and kind."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for record in records:
        language = record["language"]
        for group in (ALL, language, f"{language}/{record['kind']}"):
            for place, value in enumerate((record["nats"], record["tokens"], record["bytes"], 1)):
                sums[group][place] += value
    return {
        group: {
            "nats_per_token": nats / tokens,
            "bits_per_byte": nats / math.log(2) / size,
            "tokens": int(tokens),
            "records": int(count),
        }
        for group, (nats, tokens, size, count) in sorted(sums.items(), key=lambda item: (item[0] != ALL, item[0]))
    }
