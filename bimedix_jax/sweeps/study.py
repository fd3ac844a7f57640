"""A study: arms as named deltas of a preset, seeds, sizes, and the contrast that was declared before it ran.

A study is a Python file that the user names on the command line. It defines

    the docstring             the command that runs it, and its question
    ARMS                      dict of Experiment by the name of the arm
    SEEDS                     a number of seeds (0, 1, ...), or the seeds
    PRIMARY                   Contrast
    SIZES                     dict of Size by name (smoke, lab, full); without it the one size is `lab`, as ARMS say

No JAX is imported here, and a study should import none either.
"""

import dataclasses
import re
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from bimedix_jax.errors import BimedixError, listed
from bimedix_jax.experiment import Experiment, differences, override, require
from bimedix_jax.sweeps.inputs import Inputs

SizeName = Literal["smoke", "lab", "full"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
FEWEST_SEEDS = 6
"""The least number of seeds whose exact two-sided sign-flip test can reach 0.05: 2 / 2**6 = 0.031, 2 / 2**5 = 0.063."""

EVALUATED = {
    "nats_per_token": "held-out loss, nats per token",
    "bits_per_byte": "held-out loss, bits per UTF-8 byte",
}
"""Metrics of evaluation.json; each also by group, as nats_per_token/ar or nats_per_token/en/qa."""
LOGGED = {
    "nll": "training loss, nats per token",
    "loss": "training objective",
    "aux_loss": "load-balancing loss",
    "z_loss": "router z-loss",
    "grad_norm": "gradient norm",
    "load_entropy": "entropy of the load, 1 is even",
    "load_max_share": "share of the busiest expert",
    "dead_experts": "experts that no token of a step chose",
    "router_entropy": "entropy of the router, nats",
    "router_margin": "margin of the router, last chosen expert over the best refused one",
    "router_top_margin": "margin of the router, best expert over the second best",
    "router_z": "squared logsumexp of the router's logits",
    "heldout_nll": "loss of the packed held-out rows, nats per token",
}
"""Metrics of metrics.jsonl: means over the last tenth of the steps, and over layers."""


@dataclasses.dataclass(frozen=True)
class Contrast:
    """The comparison that a study is about: the paired difference of a metric, arm minus baseline, over seeds.

    Attributes:
      metric: a key of EVALUATED or LOGGED; one of EVALUATED may name a group, as in nats_per_token/ar.
      sign: the expected sign of the difference, -1 if the arm should be lower. The test is two-sided all the same.
    """

    metric: str
    arm: str
    baseline: str
    sign: Literal[-1, 1]

    def __post_init__(self) -> None:
        name, _, group = self.metric.partition("/")
        require(
            name in EVALUATED or (name in LOGGED and not group),
            f"PRIMARY.metric is {self.metric!r}; choose one of {', '.join((*EVALUATED, *LOGGED))}.",
        )
        require(self.sign in (-1, 1), f"PRIMARY.sign is {self.sign!r}; set -1 or 1.")
        require(self.arm != self.baseline, f"PRIMARY compares {self.arm} with itself; name another baseline.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How large a study runs.

    Attributes:
      changes: fields of every arm that differ at this size, by dotted name.
      seeds: how many of the study's seeds run; None for all.
      minutes: the longest that a run should take, for the total that is printed before the start.
      inputs: what is made before the first run; None where the experiments name their own base and data.
      heldout: records of the evaluation after training: `sample`, a JSONL file, or None for no evaluation.
      limit: use so many of them, spread over the file.
    """

    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: int | None = None
    minutes: float | None = None
    inputs: Inputs | None = None
    heldout: str | None = None
    limit: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A study as its file declares it. `question` is the docstring."""

    path: Path
    question: str
    arms: dict[str, Experiment]
    seeds: tuple[int, ...]
    primary: Contrast
    sizes: dict[str, Size]

    @property
    def name(self) -> str:
        return self.path.stem

    def size(self, name: str) -> Size:
        require(name in self.sizes, f"{self.path} has no size {name}; choose one of {', '.join(self.sizes)}.")
        return self.sizes[name]

    def seeds_of(self, size: Size, number: int | None = None) -> tuple[int, ...]:
        """The first `number` seeds, by default those of the size. Past the study's own they continue by one."""
        number = (size.seeds or len(self.seeds)) if number is None else number
        require(number >= 1, f"--seeds is {number}; give at least 1.")
        return (*self.seeds, *range(max(self.seeds) + 1, max(self.seeds) + 1 + number))[:number]

    def experiment(self, arm: str, seed: int, size: str, changes: Mapping[str, Any] | None = None) -> Experiment:
        """The resolved experiment of an arm and seed. `changes` come last: the paths of base and data."""
        name = f"{self.name}-{size}/{arm}"
        fields = {**self.size(size).changes, **(changes or {}), "name": name, "seed": seed}
        try:
            return override(self.arms[arm], fields)
        except BimedixError as error:
            raise BimedixError(f"{self.path}, arm {arm} at size {size}: {error}") from error


def delta(old: Experiment, new: Experiment) -> dict[str, Any]:
    """The fields of `new` that differ from `old`, without its name: what turns an arm of one preset into the other's.

    `override(arm, delta(quickstart(), bimedix_mixtral_8x7b()))` keeps the arm's own changes to fields that both have.
    """
    found = changed(old.to_dict(), new.to_dict(), "")
    found.pop("name", None)
    return found


def changed(old: dict[str, Any], new: dict[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            found |= changed(old[key], value, f"{prefix}{key}.")
        elif old.get(key) != value:
            found[f"{prefix}{key}"] = value
    return found


def load_study(path: str | Path) -> Study:
    """Runs the file of a study and checks what it declares.

    Raises:
      BimedixError: there is no such file, it fails, or it does not declare a study.
    """
    file = Path(path)
    if not file.is_file():
        raise BimedixError(f"there is no file {file}; name the Python file of a study, such as those in experiments/.")
    try:
        found = runpy.run_path(str(file))
    except BimedixError as error:
        raise BimedixError(f"{file}: {error}") from error
    except (Exception, SystemExit) as error:
        raise BimedixError(f"{file} fails with {type(error).__name__}: {error}; correct it.") from error
    missing = [name for name in ("ARMS", "SEEDS", "PRIMARY") if name not in found]
    require(not missing, f"{file} is no study: it lacks {', '.join(missing)}; see docs/tutorials/ablation.md.")
    question = (found.get("__doc__") or "").strip()
    require(bool(question), f"{file} has no docstring; begin it with the study's question and its command.")
    require(bool(NAME.fullmatch(file.stem)), f"the name {file.stem!r} names the sweep's folder; rename the file.")
    study = Study(
        path=file,
        question=question,
        arms=checked_arms(found["ARMS"], file),
        seeds=checked_seeds(found["SEEDS"], file),
        primary=found["PRIMARY"],
        sizes=checked_sizes(found.get("SIZES", {"lab": Size()}), file),
    )
    require(isinstance(study.primary, Contrast), f"{file}: PRIMARY is no Contrast; import it from sweeps.study.")
    for arm in (study.primary.arm, study.primary.baseline):
        require(arm in study.arms, f"{file}: PRIMARY names the arm {arm}; the arms are {', '.join(study.arms)}.")
    return study


def checked_arms(arms: Any, file: Path) -> dict[str, Experiment]:
    good = isinstance(arms, dict) and len(arms) > 1 and all(isinstance(arm, Experiment) for arm in arms.values())
    require(good, f"{file}: ARMS must be a dict of at least two Experiments by name.")
    for name in arms:
        require(
            isinstance(name, str) and bool(NAME.fullmatch(name)),
            f"{file}: the arm {name!r} names folders; use letters, digits, - and _ only.",
        )
    names = list(arms)
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            different = [line for line in differences(arms[one], arms[other]) if not line.startswith("name:")]
            require(bool(different), f"{file}: the arms {one} and {other} are equal; change one or remove it.")
    return dict(arms)


def checked_seeds(seeds: Any, file: Path) -> tuple[int, ...]:
    found = tuple(range(seeds)) if type(seeds) is int else seeds
    good = isinstance(found, Sequence) and len(found) > 0 and all(type(seed) is int and seed >= 0 for seed in found)
    require(good, f"{file}: SEEDS must be a number of seeds of at least 1, or the seeds, got {seeds!r}.")
    require(len(set(found)) == len(found), f"{file}: SEEDS names a seed twice.")
    return tuple(found)


def checked_sizes(sizes: Any, file: Path) -> dict[str, Size]:
    known = get_args(SizeName)
    good = isinstance(sizes, dict) and bool(sizes) and all(isinstance(size, Size) for size in sizes.values())
    require(good, f"{file}: SIZES must be a dict of Size by name ({', '.join(known)}).")
    unknown = [name for name in sizes if name not in known]
    require(not unknown, f"{file}: SIZES has {listed(unknown)}; the sizes are {', '.join(known)}.")
    return dict(sizes)
