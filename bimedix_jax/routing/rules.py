"""The rules file of interventions: a JSON list of rules, checked when it is read. docs/routing.md describes it.

[{"op": "ban", "experts": [3], "layers": ["0:8"], "where": {"language": "ar", "role": "answer"}}]
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from bimedix_jax import files
from bimedix_jax.data.records import Kind, Language
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.config import MixtralConfig

MOST_BIAS = 1_000_000.0
"""Largest bias: logits that are larger would lose all digits to it, and sums of 32 of them are still finite."""
MOST_RULES = 32
"""Rules of a file: a record of what was done has a bit for each in an unsigned integer of 32 bits."""
LISTED = "docs/routing.md lists the rules"
REMEDY = f"correct it; {LISTED}"


def as_tuple(value: Any) -> Any:
    """A single value as a tuple of one."""
    return (value,) if isinstance(value, str | int) and not isinstance(value, bool) else value


def check_slice(value: str | int) -> str | int:
    parts = value.split(":") if isinstance(value, str) else []
    if isinstance(value, str) and (len(parts) != 2 or not all(part == "" or part.isdecimal() for part in parts)):
        raise ValueError(f"{value!r} is not a range; write a number, or a range as in Python: '4:8', '4:' or ':8'")
    low, high = bounds(value)
    if high is not None and low >= high:
        raise ValueError(f"{value!r} is an empty range; its first number must be below its second")
    return value


def bounds(span: str | int) -> tuple[int, int | None]:
    """The first number of a span, and the first one after it; None if it has no end."""
    low, _, high = span.partition(":") if isinstance(span, str) else (str(span), "", str(span + 1))
    return int(low or 0), int(high) if high else None


Whole = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Experts = Annotated[tuple[Whole, ...], Field(min_length=1)]
Names = Annotated[tuple[Annotated[str, Field(strict=True)], ...], BeforeValidator(as_tuple), Field(min_length=1)]
Span = Annotated[Whole | Annotated[str, Field(strict=True)], BeforeValidator(check_slice)]
Spans = Annotated[tuple[Span, ...], BeforeValidator(as_tuple), Field(min_length=1)]
"""Numbers and ranges, such as [0, "4:8"]."""
Role = Literal["first", "template", "prompt", "answer"]


def within(spans: Spans, numbers: np.ndarray) -> np.ndarray:
    """Whether each number is in one of the spans."""
    found = np.zeros(numbers.shape, bool)
    for span in spans:
        low, high = bounds(span)
        found |= (numbers >= low) & (True if high is None else numbers < high)
    return found


class Checked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Where(Checked):
    """The tokens that a rule applies to: all conditions that are given must hold; without any, all tokens."""

    language: Annotated[tuple[Language, ...], BeforeValidator(as_tuple), Field(min_length=1)] | None = None
    kind: Annotated[tuple[Kind, ...], BeforeValidator(as_tuple), Field(min_length=1)] | None = None
    role: Annotated[tuple[Role, ...], BeforeValidator(as_tuple), Field(min_length=1)] | None = None
    positions: Spans | None = None
    token_ids: Annotated[tuple[Whole, ...], BeforeValidator(as_tuple), Field(min_length=1)] | None = None
    records: Names | None = None
    specialty: Names | None = None
    source: Names | None = None
    split: Names | None = None
    pair: Names | None = None
    document: Names | None = None

    def given(self) -> dict[str, Any]:
        """The conditions that are given, by name."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}


class Base(Checked):
    layers: Spans | None = None
    where: Where = Where()

    def layer_mask(self, config: MixtralConfig) -> np.ndarray:
        """bool [L]: the layers of the rule."""
        numbers = np.arange(config.num_layers)
        return np.ones(len(numbers), bool) if self.layers is None else within(self.layers, numbers)

    def problem(self, config: MixtralConfig) -> str | None:
        """What does not fit the model, with the remedy; None if all does."""
        for span in self.layers or ():
            low, high = bounds(span)
            if isinstance(span, str) and low >= config.num_layers:
                return f"names no layer of this model with {span!r}; give some of 0 .. {config.num_layers - 1}"
            if high is not None and high > config.num_layers:
                what = f"layers {span!r}" if isinstance(span, str) else f"layer {span}"
                return f"names {what}, but this model has layers 0 .. {config.num_layers - 1}"
        wrong = [expert for expert in self.named() if expert >= config.router.num_experts]
        if wrong:
            return f"names expert {wrong[0]}, but this model has experts 0 .. {config.router.num_experts - 1}"
        return None

    def named(self) -> tuple[int, ...]:
        """The experts that the rule names."""
        return getattr(self, "experts", ())


class Distinct(Base):
    experts: Experts

    @field_validator("experts")
    @classmethod
    def _distinct(cls, experts: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(experts)) != len(experts):
            raise ValueError(f"experts names an expert twice: {list(experts)}; name each once")
        return experts


class Ban(Distinct):
    op: Literal["ban"]


class Force(Distinct):
    op: Literal["force"]
    weights: tuple[NotNegative, ...] | None = None

    @model_validator(mode="after")
    def _weights_for_experts(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.experts):
            raise ValueError(f"{len(self.weights)} weights for {len(self.experts)} experts; give one for each")
        return self

    def problem(self, config: MixtralConfig) -> str | None:
        top_k = config.router.top_k
        if len(self.experts) != top_k:
            return f"forces {len(self.experts)} experts, but this model's k is {top_k}; name {top_k}, or use include"
        return super().problem(config)


class Include(Distinct):
    op: Literal["include"]

    def problem(self, config: MixtralConfig) -> str | None:
        if len(self.experts) > config.router.top_k:
            return f"includes {len(self.experts)} experts, more than this model's k of {config.router.top_k}"
        return super().problem(config)


class Swap(Distinct):
    op: Literal["swap"]
    experts: Annotated[tuple[Whole, ...], Field(min_length=2, max_length=2)]


class Permute(Base):
    """Where the router chose expert e, expert to[e] computes."""

    op: Literal["permute"]
    to: Experts

    @field_validator("to")
    @classmethod
    def _permutation(cls, to: tuple[int, ...]) -> tuple[int, ...]:
        if sorted(to) != list(range(len(to))):
            raise ValueError(
                f"to is {list(to)}, which is no permutation; name each expert from 0 to {len(to) - 1} once"
            )
        return to

    def problem(self, config: MixtralConfig) -> str | None:
        if sorted(self.to) != list(range(config.router.num_experts)):
            return f"has {list(self.to)}, which is no permutation of the {config.router.num_experts} experts"
        return super().problem(config)


class Gain(Distinct):
    op: Literal["gain"]
    value: NotNegative


class Bias(Distinct):
    op: Literal["bias"]
    value: Annotated[float, Field(strict=True, ge=-MOST_BIAS, le=MOST_BIAS)]
    unit: Literal["logits", "deviations"] = "logits"


class Temperature(Base):
    op: Literal["temperature"]
    value: Positive


class TopK(Base):
    op: Literal["top_k"]
    k: Annotated[int, Field(strict=True, ge=1)]

    def problem(self, config: MixtralConfig) -> str | None:
        if self.k > config.router.top_k:
            return f"asks for {self.k} experts a token, but this model's k is {config.router.top_k}; ask for fewer"
        return super().problem(config)


class Noise(Base):
    op: Literal["noise"]
    std: NotNegative
    seed: Whole = 0


class Shuffle(Base):
    op: Literal["shuffle"]
    seed: Whole = 0


class Freeze(Base):
    """The routes of the base model: of its own forward pass, or those that a recording of it has."""

    op: Literal["freeze"]
    recording: Annotated[str, Field(strict=True, min_length=1)] | None = None


class Uniform(Base):
    op: Literal["uniform"]


class Hash(Base):
    op: Literal["hash"]
    seed: Whole = 0


class Random(Base):
    op: Literal["random"]
    seed: Whole = 0


class ByLanguage(Base):
    """A fixed set of experts for each language; a set of more than k leaves the choice within it to the router."""

    op: Literal["by_language"]
    experts: Annotated[dict[Language, Experts], Field(min_length=1)]

    def named(self) -> tuple[int, ...]:
        return tuple(expert for chosen in self.experts.values() for expert in chosen)

    def problem(self, config: MixtralConfig) -> str | None:
        for language, chosen in self.experts.items():
            if len(set(chosen)) < config.router.top_k:
                return f"has {len(set(chosen))} experts for {language}, but this model's k is {config.router.top_k}"
        return super().problem(config)


AnyRule = Ban | Force | Include | Swap | Permute | Gain | Bias | Temperature | TopK | Noise | Shuffle | Freeze | Uniform
Rule = Annotated[AnyRule | Hash | Random | ByLanguage, Field(discriminator="op")]


def parse_rules(value: Any, where: str) -> tuple[Any, ...]:
    """The rules in a JSON value.

    Raises:
      BimedixError: it is not a list of 1 to 32 rules; the message begins with `where`.
    """
    if isinstance(value, dict):
        raise BimedixError(f"{where} is a JSON object, but rules are a list: put [ ] around it ({LISTED}).")
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_RULES:
        raise BimedixError(f"{where} is not a list of 1 to {MOST_RULES} rules; {REMEDY}.")
    return files.validate(value, tuple[Rule, ...], where, REMEDY)


def read_rules(path: str | Path) -> tuple[Any, ...]:
    """The rules in a JSON file. Raises BimedixError if it cannot be read or is not a list of rules."""
    return parse_rules(files.read_json(path, object, REMEDY, unique_keys=True), str(path))


def training_rules(path: str | Path) -> tuple[Any, ...]:
    """The rules in a JSON file, for training. Errors as `read_rules`, and for a rule that is not available there."""
    rules = read_rules(path)
    unable = [rule.op for rule in rules if rule.op in ("shuffle", "freeze")]
    if unable:
        raise BimedixError(
            f"{unable[0]} needs another pass of a model in every step and is not available in training; leave it out "
            f"of {path}."
        )
    return rules


def check_rules(rules: Sequence[Any], config: MixtralConfig) -> None:
    """Raises BimedixError if a rule does not fit the model, or if rules for all tokens ban too many experts."""
    left_LE = np.ones((config.num_layers, config.router.num_experts), bool)
    needed_L = np.full(config.num_layers, config.router.top_k)
    for number, rule in enumerate(rules):
        problem = rule.problem(config)
        if problem is not None:
            raise BimedixError(f"rule {number} ({rule.op}) {problem}")
        if rule.op == "ban" and not rule.where.given():
            left_LE[np.ix_(rule.layer_mask(config), np.isin(np.arange(left_LE.shape[1]), rule.experts))] = False
        elif rule.op == "top_k" and not rule.where.given():
            needed_L[rule.layer_mask(config)] = rule.k
    short = np.flatnonzero(left_LE.sum(1) < needed_L)
    if len(short):
        raise too_many_bans(int(short[0]), int(left_LE[short[0]].sum()), int(needed_L[short[0]]))


def too_many_bans(layer: int, left: int, needed: int) -> BimedixError:
    return BimedixError(
        f"the bans leave a token of layer {layer} only {left} of its experts, but the router needs {needed}; ban fewer"
    )


def label(rule: Base) -> str:
    """The rule as compact JSON without defaults."""
    return json.dumps(rule.model_dump(mode="json", exclude_defaults=True), ensure_ascii=False)
