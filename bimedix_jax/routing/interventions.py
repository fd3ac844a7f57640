"""Interventions: rules that tell routers what to do with which tokens. They make a plan for each batch.

    rules = Interventions.read("rules.json")
    heldout_loss(model, tokenizer, records, plan=rules)

All plans of a batch shape set the same fields, either for all tokens at once or by token. So a model is compiled at
most twice for a batch shape, whatever the rules are.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from bimedix_jax.checkpoint.architecture import known_config
from bimedix_jax.data.encoding import ROLES
from bimedix_jax.errors import BimedixError
from bimedix_jax.inference.planning import UNKNOWN, Planned, Source, Tokens
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import Routing, RoutingPlan
from bimedix_jax.routing.chance import draws, number_of
from bimedix_jax.routing.draft import FIELDS, Draft, NoSlotLeft
from bimedix_jax.routing.parts import SUPPLIED_BY
from bimedix_jax.routing.recorded_routes import RecordedRoutes
from bimedix_jax.routing.rules import Base, check_rules, label, parse_rules, read_rules, too_many_bans, within

BY_TOKEN = ("noise", "shuffle", "freeze", "hash", "random", "by_language")
"""Ops that differ between tokens even without a condition."""


@dataclasses.dataclass(frozen=True)
class Interventions:
    """An ordered list of rules, as inference.planning.Rules.

    Attributes:
      base: the model whose routes `freeze` uses.
      sparse: set only the fields that the rules need, so that other rules compile another program.
      applied: number of tokens that each rule was applied to, over all batches.
    """

    rules: tuple[Any, ...]
    base: Mixtral | None = None
    sparse: bool = False
    applied: np.ndarray = dataclasses.field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "applied", np.zeros(len(self.rules), np.int64))

    @classmethod
    def read(cls, path: str | Path) -> "Interventions":
        """The rules in a JSON file. Raises BimedixError if it is not a list of rules."""
        return cls(read_rules(path))

    @classmethod
    def of(cls, *rules: dict[str, Any]) -> "Interventions":
        """Rules from Python: `Interventions.of({"op": "ban", "experts": [3]})`. Raises BimedixError for a wrong one."""
        return cls(parse_rules(list(rules), "the list of rules"))

    @property
    def names(self) -> list[str]:
        """The rules in order, as compact JSON: bit i of a record belongs to rule i."""
        return [label(rule) for rule in self.rules]

    @property
    def by_token(self) -> bool:
        """Whether plans depend on the tokens."""
        return any(rule.where.given() or rule.op in BY_TOKEN for rule in self.rules)

    @property
    def needs_base(self) -> bool:
        """Whether a rule needs a forward pass of the base model."""
        return any(rule.op == "freeze" and rule.recording is None for rule in self.rules)

    @functools.cached_property
    def recordings(self) -> dict[str, RecordedRoutes]:
        """The recordings that rules name, by path. Raises BimedixError if one cannot be used."""
        paths = {rule.recording for rule in self.rules if rule.op == "freeze"} - {None}
        return {path: RecordedRoutes(path) for path in sorted(paths)}

    def digest(self) -> str:
        """SHA-256 of the rules, and of the recordings that they name."""
        named = [*self.names, *(routes.digest for routes in self.recordings.values())]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()

    def check(self, config: MixtralConfig) -> None:
        """Raises BimedixError if a rule does not fit the model."""
        check_rules(self.rules, config)
        sizes = config.num_layers, config.router.num_experts, config.router.top_k
        for number, rule in enumerate(self.rules):
            if rule.op == "freeze" and rule.recording is not None:
                problem = self.recordings[rule.recording].problem(*sizes)
                if problem is not None:
                    raise BimedixError(f"rule {number} ({rule.op}) {problem}")

    def planner(self, config: MixtralConfig, sources: Sequence[Source]) -> "RulePlanner":
        """The planner for batches of these sequences; errors as inference.planning.Rules."""
        self.check(config)
        for number, rule in enumerate(self.rules):
            asked = rule.where.given()
            needed = {*asked, *(["language"] if rule.op == "by_language" else [])} - {"positions", "token_ids", "role"}
            for name in sorted(needed):
                if all(value_of(source, name) is None for source in sources):
                    raise not_available(number, name, sources)
            if "role" in asked and all(source.roles is None for source in sources):
                raise not_available(number, "role", sources)
        return RulePlanner(self, config, tuple(sources))

    def to_dict(self) -> dict[str, Any]:
        """The rules and how many tokens each was applied to, for JSON."""
        rules = [
            {"rule": json.loads(name), "tokens": int(tokens)}
            for name, tokens in zip(self.names, self.applied, strict=True)
        ]
        return {"digest": self.digest(), "rules": rules}


class RulePlanner:
    """Makes the plans of batches of known sequences from rules; see inference.planning.Planner."""

    def __init__(self, interventions: Interventions, config: MixtralConfig, sources: tuple[Source, ...]):
        self.interventions, self.config, self.sources = interventions, config, sources
        self.rules = interventions.rules
        self.by_token = interventions.by_token
        touched = frozenset(name for rule in self.rules for name in FIELDS[rule.op])
        self.fields = touched if interventions.sparse else None
        self.free = Draft(config, 1, 1).plan(self.fields)
        self.records = np.array([number_of(source.id) for source in sources], np.uint64)

    def references(self, model: Mixtral) -> dict[str, Mixtral]:
        """The model itself for `shuffle`, its base for `freeze`."""
        base = self.interventions.base
        if self.interventions.needs_base and base is None:
            raise BimedixError(
                "freeze needs the base model, and none was given; run it where an adapter is loaded onto a base, or "
                "pass Interventions(rules, base=MODEL)"
            )
        wanted = {"model": model} if any(rule.op == "shuffle" for rule in self.rules) else {}
        return wanted | ({} if base is None or not self.interventions.needs_base else {"base": base})

    @functools.cached_property
    def same_for_all(self) -> RoutingPlan:
        """The plan of rules that do not depend on tokens."""
        draft = Draft(self.config, 1, 1)
        for number, rule in enumerate(self.rules):
            try:
                _apply_alike(draft, rule, rule.layer_mask(self.config)[:, None, None])
            except NoSlotLeft:
                raise no_slot_left(number) from None
        _check_bans(draft)
        return draft.plan(self.fields)

    def plan(self, tokens: Tokens, routes: Mapping[str, Routing]) -> Planned:
        """The plan of a batch, given the routes of the references."""
        valid_BT = tokens.positions_BT >= 0
        done_BT = np.zeros(valid_BT.shape, np.uint32)
        draft = Draft(self.config, *valid_BT.shape) if self.by_token else None
        seen = Seen(tokens, self.sources, self.records)
        for number, rule in enumerate(self.rules):
            mask_BT = valid_BT & seen.matches(number, rule)
            if draft is not None:
                mask_BT = self.apply(draft, number, mask_BT, seen, routes)
            done_BT |= mask_BT.astype(np.uint32) << np.uint32(number)
            self.interventions.applied[number] += int(mask_BT.sum())
        if draft is None:
            return Planned(self.same_for_all, done_BT)
        _check_bans(draft)
        return Planned(draft.plan(self.fields), done_BT)

    def apply(
        self, draft: Draft, number: int, mask_BT: np.ndarray, seen: "Seen", routes: Mapping[str, Routing]
    ) -> np.ndarray:
        """Applies a rule to the tokens of a mask. Returns the mask of the tokens that it changed something for."""
        rule = self.rules[number]
        mask_LBT = rule.layer_mask(self.config)[:, None, None] & mask_BT
        if rule.op == "noise":
            draft.add_noise(mask_LBT, rule.std, rule.seed, seen.records_BT, seen.positions_BT)
        elif rule.op == "random":
            draft.force_drawn(mask_LBT, rule.op, rule.seed, seen.records_BT, seen.positions_BT)
        elif rule.op == "hash":
            draft.force_drawn(mask_LBT, rule.op, rule.seed, seen.tokens.tokens_BT)
        elif rule.op == "freeze" and rule.recording is not None:
            names = [source.id for source in self.sources]
            where = seen.items_BT, seen.positions_BT, np.asarray(seen.tokens.tokens_BT)
            draft.force(mask_LBT, *self.interventions.recordings[rule.recording].at(names, *where, mask_BT))
        elif rule.op == "freeze":
            draft.force(mask_LBT, *_arrays(routes["base"]))
        elif rule.op == "shuffle":
            from_BT = seen.others(mask_BT, rule.seed)
            mask_BT = mask_BT & (from_BT >= 0)
            taken = [
                x_LBTK.reshape(len(x_LBTK), -1, x_LBTK.shape[-1])[:, from_BT] for x_LBTK in _arrays(routes["model"])
            ]
            draft.force(mask_LBT & mask_BT, *taken)
        elif rule.op == "by_language":
            changed_BT = np.zeros(mask_BT.shape, bool)
            for language, experts in rule.experts.items():
                own_BT = mask_BT & seen.equal("language", (language,))
                draft.keep_only(mask_LBT & own_BT, experts)
                changed_BT |= own_BT
            mask_BT = changed_BT
        else:
            try:
                _apply_alike(draft, rule, mask_LBT)
            except NoSlotLeft:
                raise no_slot_left(number) from None
        return mask_BT


class Seen:
    """What rules may ask of the tokens of a batch."""

    def __init__(self, tokens: Tokens, sources: tuple[Source, ...], records: np.ndarray):
        self.tokens, self.sources = tokens, sources
        self.items_BT = np.broadcast_to(tokens.items_BT, tokens.tokens_BT.shape)
        self.positions_BT = np.broadcast_to(tokens.positions_BT, tokens.tokens_BT.shape)
        self.records_BT = records[self.items_BT]

    def equal(self, name: str, values: Sequence[str]) -> np.ndarray:
        """bool [B, T]: whether a field of the token's record has one of these values."""
        return np.array([value_of(source, name) in values for source in self.sources])[self.items_BT]

    @functools.cached_property
    def roles_BT(self) -> np.ndarray:
        """uint8: the index in ROLES; UNKNOWN where the data do not tell it, and at padding."""
        roles_BT = np.full(self.items_BT.shape, UNKNOWN, np.uint8)
        for item in np.unique(self.items_BT[self.positions_BT >= 0]):
            own_BT, roles = (self.items_BT == item) & (self.positions_BT >= 0), self.sources[item].roles
            if roles is not None:
                positions = self.positions_BT[own_BT]
                known = roles[np.minimum(positions, len(roles) - 1)] if len(roles) else UNKNOWN
                roles_BT[own_BT] = np.where(positions < len(roles), known, ROLES.index("answer"))
        return roles_BT

    def matches(self, number: int, rule: Base) -> np.ndarray:
        """bool [B, T]: the tokens that satisfy all conditions of a rule; padding may be among them."""
        found_BT = np.ones(self.items_BT.shape, bool)
        for name, values in rule.where.given().items():
            if name == "positions":
                found_BT &= within(values, self.positions_BT)
            elif name == "token_ids":
                found_BT &= np.isin(self.tokens.tokens_BT, values)
            elif name == "role":
                unknown_BT = (self.roles_BT == UNKNOWN) & (self.positions_BT >= 0)
                if unknown_BT.any() and not {"first", "answer"}.issuperset(values):
                    raise not_available(number, "role", self.sources)
                found_BT &= np.isin(self.roles_BT, [ROLES.index(value) for value in values])
            else:
                found_BT &= self.equal(name, values)
        return found_BT

    def others(self, mask_BT: np.ndarray, seed: int) -> np.ndarray:
        """int [B, T]: for each token of the mask, the place (in the flat batch) of another one of its sequence and row.

        Every token is taken once. -1 outside of the mask, and where there is no other token.
        """
        flat_N = np.flatnonzero(mask_BT)
        group_N = (flat_N // mask_BT.shape[1]) * len(self.sources) + self.items_BT.reshape(-1)[flat_N]
        drawn_BT = draws("shuffle", seed, self.records_BT, self.positions_BT)
        order_N = np.lexsort((drawn_BT.reshape(-1)[flat_N], group_N))
        flat_N, group_N = flat_N[order_N], group_N[order_N]
        from_N = np.full(mask_BT.size, -1)
        ends_N = np.append(np.flatnonzero(group_N[1:] != group_N[:-1]) + 1, len(flat_N))
        start = 0
        for end in ends_N.tolist():  # each token takes from the next one in the order of the draws
            if end - start > 1:
                from_N[flat_N[start:end]] = np.roll(flat_N[start:end], -1)
            start = end
        return from_N.reshape(mask_BT.shape)


def _apply_alike(draft: Draft, rule: Any, mask_LBT: np.ndarray) -> None:
    """Applies a rule that tells the same to all tokens of its mask."""
    match rule.op:
        case "ban":
            draft.ban(mask_LBT, rule.experts)
        case "force":
            draft.force(mask_LBT, np.asarray(rule.experts), None if rule.weights is None else np.asarray(rule.weights))
        case "include":
            draft.include(mask_LBT, rule.experts)
        case "swap":
            draft.swap(mask_LBT, *rule.experts)
        case "permute":
            draft.permute(mask_LBT, rule.to)
        case "gain":
            draft.multiply_gain(mask_LBT, rule.experts, rule.value)
        case "bias":
            draft.add_bias(mask_LBT, rule.experts, rule.value, rule.unit)
        case "temperature":
            draft.temperature_LBT[mask_LBT] *= np.float32(rule.value)
        case "top_k":
            draft.active_LBT[mask_LBT] = rule.k
        case "uniform":
            draft.weights_LBTK[mask_LBT] = -1
            draft.uniform_LBT[mask_LBT] = True


def _check_bans(draft: Draft) -> None:
    short = draft.bans_too_many()
    if short is not None:
        raise too_many_bans(*short)


def _arrays(routing: Routing) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(routing.experts_LBTK), np.asarray(routing.weights_LBTK)


def value_of(source: Source, name: str) -> str | None:
    """A field of a sequence's record."""
    known = {"language": source.language, "kind": source.kind, "records": source.id}
    return known[name] if name in known else source.fields.get(name)


def not_available(number: int, name: str, sources: Sequence[Source]) -> BimedixError:
    where = sources[0].where if sources else "these tokens"
    supplier = SUPPLIED_BY.get(name, "the readers of `bimedix data assemble` supply it where the data have it")
    return BimedixError(f"rule {number} asks for {name}, which is not available: {where} lack it; {supplier}")


def no_slot_left(number: int) -> BimedixError:
    return BimedixError(
        f"rule {number} (include) finds a token whose slots earlier rules force already; put it before them, or leave "
        "it out"
    )


def rules_of(path: Path | None, adapter: Path | None = None) -> Interventions | None:
    """The rules of a command's option --intervene, before the model is loaded.

    Raises:
      BimedixError: the file is not a list of rules, a rule needs a base model and there is no adapter, or a recording
        that a rule names cannot be used.
    """
    if path is None:
        return None
    rules = Interventions.read(path)
    assert rules.recordings is not None  # reads them
    if rules.needs_base and adapter is None:
        raise BimedixError(
            f"{path} has the op freeze, which uses the routes of the base of an adapter; name an --adapter in "
            "`bimedix eval run`, or a recording of the base (`recording`), or leave the rule out"
        )
    return rules


def check_fit(rules: Interventions | None, folder: str | Path) -> None:
    """Checks rules against the configuration of a model folder, so that a wrong one is found before weights are read.

    Raises:
      BimedixError: a rule does not fit the model.
    """
    config = None if rules is None else known_config(folder)
    if rules is not None and config is not None:
        rules.check(config)


def report(rules: Interventions | None, console: Console) -> dict[str, Any]:
    """The part of a result about the rules. Warns of each rule that was applied to no token."""
    if rules is None:
        return {}
    for number in np.flatnonzero(rules.applied == 0).tolist():
        console.print(
            f"[bold yellow]rule {number} was applied to no token[/]: {escape(rules.names[number])}", highlight=False
        )
    return {"intervene": rules.to_dict()}
