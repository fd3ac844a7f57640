"""What a line of metrics.jsonl has, and how it is written."""

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

from bimedix_jax.training.groups import NO_GROUPS, Groups, router_metrics
from bimedix_jax.training.metrics_file import METRICS

ORDER = (
    "loss",  # the objective: nll + aux_loss_coef * aux_loss + z_loss_coef * z_loss
    "nll",  # nats per supervised token
    "aux_loss",  # unscaled, top_k when balanced
    "z_loss",  # unscaled
    "grad_norm",  # before clipping
    "grad_norms",  # of attention, experts, router and other parameters, as far as they train
    "learning_rate",
    "router_learning_rate",  # where it differs
    "tokens",  # of this step, padding excluded
    "supervised_tokens",
    "padding",  # share of the positions
    "mean_context",  # keys that a token attends to, in rows of several segments
    "load",  # by layer: share of each expert
    "load_entropy",  # by layer, over its maximum: 1 is even
    "load_max_share",  # by layer: of the busiest expert
    "load_max_over_mean",  # by layer: the same over the mean, 1 is even
    "dead_experts",  # by layer: experts that no token of the step chose
    "router_entropy",  # by layer: of the router's probabilities, nats a token
    "router_margin",  # by layer: rank of the last chosen expert minus that of the best refused one
    "router_top_margin",  # by layer: rank of the best expert minus that of the second best
    "router_z",  # by layer: squared logsumexp of the logits
    "by_language",  # loss, load and the metrics by layer of each language
    "by_group",  # loss and load of each language and kind
    "expert_grad_norm",  # by layer and expert, every `log_experts_every` steps
    "expert_weight_change",  # by layer and expert: norm of what training added, as often
)
"""The metrics of a step, in the order of a line. docs/metrics.md describes them."""
OPTIONAL = {"router_learning_rate", "by_language", "by_group", "expert_grad_norm", "expert_weight_change"}
TIMINGS = (
    "seconds",  # of this step, without saves and held-out measurements
    "tokens_per_second",
    "save_stall_seconds",  # in the first line after a checkpoint: how long the save blocked the run
    "flops_per_second",
    "peak_share",
    "goodput",
    "lost",
)
"""Further names in a line. A resumed run repeats all numbers but these."""


def plain(metrics: dict[str, Any], groups: Groups = NO_GROUPS) -> dict[str, Any]:
    """What a step returned as the Python numbers of a line, in order.

    Scalars are not rounded. The numbers of a list have the fewest digits that name their float32.
    """
    host = jax.device_get(metrics)
    if "router" in host:
        host |= router_metrics(host.pop("router"), host.pop("group_losses", None), groups)
    if (wrong := set(host) ^ set(ORDER)) - OPTIONAL:
        raise ValueError(f"unexpected or missing metrics: {sorted(wrong)}")
    return jax.tree.map(numbers, {name: host[name] for name in ORDER if name in host})


def numbers(x: Any) -> Any:
    """A number, or a nested list of them."""
    value = np.asarray(x)
    if value.ndim and value.dtype.kind == "f":
        return value.astype(np.float32).astype("U32").astype(np.float64).tolist()
    return value.tolist()


def is_finite(metrics: dict[str, Any]) -> bool:
    """Whether loss and gradient norm are finite."""
    return math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])


class MetricsLog:
    """Appends lines and flushes each. Without a folder it does nothing."""

    def __init__(self, folder: Path | None):
        self._file = None if folder is None else (folder / METRICS).open("a", encoding="utf-8", newline="\n")

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line. Raises ValueError for NaN and infinity, which JSON cannot represent."""
        text = json.dumps(line, allow_nan=False) + "\n"
        if self._file is not None:
            self._file.write(text)
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
