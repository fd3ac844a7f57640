"""What a run logs besides the metrics of its steps: time, speed, changes by expert, and warnings."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
from rich.console import Console

from bimedix_jax import distributed
from bimedix_jax.costs.devices import peak_flops
from bimedix_jax.costs.flops import training_flops
from bimedix_jax.experiment import Experiment
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.training.alarms import Alarms
from bimedix_jax.training.goodput import Goodput
from bimedix_jax.training.groups import Groups
from bimedix_jax.training.metadata import add_to_start
from bimedix_jax.training.metrics import plain
from bimedix_jax.training.norms import make_weight_change
from bimedix_jax.training.state import Params, Structure, TrainState
from bimedix_jax.training.stopping import Interrupted

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Speed:
    """Useful FLOPs of a token, and the peak of all devices of the run.

    Attributes:
      linear, attention: FLOPs of a token in all products with matrices, and for each key that it attends to.
      window: most keys that a token attends to.
      peak: FLOP/s; None where it is not known.
    """

    linear: float
    attention: float
    window: float
    peak: float | None

    @classmethod
    def of(cls, model: Mixtral, devices: int) -> "Speed":
        flops = training_flops(model, 1, 1)
        peak = peak_flops(jax.devices()[0].device_kind, str(model.dtype))
        window = model.config.sliding_window or math.inf
        linear = flops["matrices"] + flops["adapters"]
        return cls(linear, flops["attention"], window, None if peak is None else peak * devices)

    def line(self, tokens: float, context: float, seconds: float) -> dict[str, float]:
        """`flops_per_second`, and `peak_share` where the peak is known."""
        rate = tokens * (self.linear + min(context, self.window) * self.attention) / seconds
        return {"flops_per_second": rate} | ({} if self.peak is None else {"peak_share": rate / self.peak})


@dataclasses.dataclass(frozen=True)
class Observer:
    """What the loop calls. All of it runs on the host while a step is on the devices.

    Attributes:
      change: `make_weight_change`, from `first`, the trained parameters before the first step.
      every, last: steps between the numbers by expert, 0 for none, and the last step, which has them too.
    """

    goodput: Goodput
    speed: Speed
    alarms: Alarms
    groups: Groups
    change: Callable[[Params, Params, dict[str, Any]], jax.Array | None]
    first: Params
    every: int
    last: int

    @classmethod
    def of_run(
        cls,
        experiment: Experiment,
        folder: Path,
        model: Mixtral,
        structure: Structure,
        first: Params,
        groups: Groups,
        free: bool,
        goodput: Goodput,
        console: Console,
    ) -> "Observer":
        assert experiment.steps is not None  # those of its rows
        devices = 1 if structure.layout is None else structure.layout.mesh.size
        speed = Speed.of(model, devices)
        alarms = Alarms.of_run(console, folder, model.config.router.top_k, free)
        change, every = make_weight_change(structure), experiment.log_experts_every
        return cls(goodput, speed, alarms, groups, change, first, every, experiment.steps)

    def timed(self, what: str, action: Callable[[], T]) -> T:
        """The result of an action whose time is lost to `what`."""
        with self.goodput.on(what):
            return action()

    def lost(self, what: str, seconds: float) -> float:
        """Counts these seconds as lost to `what`, and returns them."""
        self.goodput.lost[what] += seconds
        return seconds

    def waited(self, seconds: float) -> None:
        """The devices were idle for want of a batch."""
        self.lost("data", seconds)

    def with_experts(
        self, step: int, metrics: dict[str, Any], state: TrainState, frozen: dict[str, Any]
    ) -> dict[str, Any]:
        """The metrics of a launched step, with its numbers by expert if they are due."""
        if not self.every or (step % self.every and step != self.last):
            return {name: value for name, value in metrics.items() if name != "expert_grad_norm"}
        change = self.change(state.params, self.first, {**frozen, **state.router})
        return metrics if change is None else metrics | {"expert_weight_change": change}

    def plain(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """The numbers of a line."""
        return plain(metrics, self.groups)

    def timings(self, line: dict[str, Any]) -> dict[str, Any]:
        """Keys of a line that depend on the clock, besides its seconds."""
        speed = self.speed.line(line["tokens"], line["mean_context"], line["seconds"])
        return speed | self.goodput.line(line["seconds"])

    @contextlib.contextmanager
    def reported(self, folder: Path, console: Console) -> Iterator[None]:
        """Prints where the time went when the run ends or is interrupted, and writes it into run.json."""
        try:
            yield
        except Interrupted:
            self._report(folder, console)
            raise
        self._report(folder, console)

    def _report(self, folder: Path, console: Console) -> None:
        console.print(self.goodput.sentence(), highlight=False)
        if distributed.is_process_zero():
            add_to_start(folder, {"goodput": self.goodput.summary()})
