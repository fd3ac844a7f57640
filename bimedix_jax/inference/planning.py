"""Plans that depend on the tokens: what a rule may know of a token, and the plan of each batch that a model runs.

A `RoutingPlan` is fixed before the tokens are known. `Rules` (bimedix_jax/routing/interventions.py) make a plan for
each batch from the records, positions, roles and ids of its tokens. Every function that takes a plan takes rules too.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from flax import nnx

from bimedix_jax.data.encoding import roles_of_chat
from bimedix_jax.data.records import Record as DataRecord
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import Record, Routing, RoutingPlan

UNKNOWN = 255
"""Role of a token whose data do not tell it."""


@dataclasses.dataclass(frozen=True)
class Source:
    """What is known of one sequence of tokens; None is not known.

    Attributes:
      id: of the record; noise and random choices depend on it.
      roles: uint8, the index in data.encoding.ROLES of each token; tokens after its end belong to the answer.
      fields: other fields of the record by name, such as specialty.
      where: where the sequence comes from, for messages.
    """

    id: str
    language: str | None = None
    kind: str | None = None
    roles: np.ndarray | None = None
    fields: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    where: str = "these tokens"


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of a batch, int32 NumPy arrays.

    Attributes:
      items_BT: the index of each token's sequence; [B, 1] if all tokens of a row share one.
      positions_BT: the position in its sequence, from 0; negative at padding.
    """

    tokens_BT: np.ndarray
    items_BT: np.ndarray
    positions_BT: np.ndarray


@dataclasses.dataclass(frozen=True)
class Planned:
    """The plan of a batch, and what it does to which token.

    Attributes:
      done_BT: uint32; bit i is set where rule i applies to the token. 0 at padding.
    """

    plan: RoutingPlan
    done_BT: np.ndarray


@runtime_checkable
class Planner(Protocol):
    """Makes the plan of each batch of known sequences.

    Attributes:
      free: a plan without effect that sets the same fields for all tokens at once.
      by_token: whether plans depend on the tokens; otherwise all are the same.
    """

    free: RoutingPlan
    by_token: bool

    def references(self, model: Mixtral) -> dict[str, Mixtral]:
        """The models that must run a batch, without a plan, before its plan can be made; by name."""
        ...

    def plan(self, tokens: Tokens, routes: Mapping[str, Routing]) -> Planned:
        """The plan of a batch, given the routes of the references."""
        ...


@runtime_checkable
class Rules(Protocol):
    """What routers are told to do, for tokens that are not known yet."""

    def planner(self, config: MixtralConfig, sources: Sequence[Source]) -> Planner:
        """The planner for batches of these sequences.

        Raises:
          BimedixError: a rule does not fit the model, or it asks for what is not known of the sequences.
        """
        ...


AnyPlan = RoutingPlan | Rules | None
"""What functions that run a model take as `plan`."""

Run = Callable[[str, nnx.GraphDef, nnx.State, RoutingPlan], Routing | None]
"""Runs the batch with the model of this name and records the choices."""


class Plans:
    """The plan of each batch that a model runs, from a plan for all sequences or from a planner."""

    def __init__(self, plan: RoutingPlan | Planner, model: Mixtral):
        self.source = plan
        references = {} if isinstance(plan, RoutingPlan) else plan.references(model)
        self._references = {name: nnx.split(reference) for name, reference in references.items()}

    def record(self, asked: Record) -> Record:
        """What the model has to record. With rules always the choices, so that runs with and without share programs."""
        return "choices" if asked == "none" and not isinstance(self.source, RoutingPlan) else asked

    def of(self, tokens: Tokens, run: Run) -> RoutingPlan:
        """The plan of a batch."""
        if isinstance(self.source, RoutingPlan):
            return self.source.at(tokens.items_BT, tokens.positions_BT)
        routes: dict[str, Any] = {
            name: run(name, graph, weights, self.source.free) for name, (graph, weights) in self._references.items()
        }
        return self.source.plan(tokens, routes).plan


def of_sequences(plan: Any, config: MixtralConfig, sources: Callable[[], Sequence[Source]]) -> Any:
    """The planner of rules for these sequences; any other plan unchanged."""
    return plan.planner(config, sources()) if isinstance(plan, Rules) else plan


def source_of(record: DataRecord, tokenizer: Tokenizer, asked: bool = False) -> Source:
    """What is known of a record as tokens; `asked` leaves its last turn out, so that all tokens after it are answer."""
    fields = {"specialty": record.specialty, "source": record.source, "split": record.split}
    fields |= {name: record.provenance.get(name) for name in ("pair", "document")}
    turns = record.conversations[:-1] if asked else record.conversations
    roles = roles_of_chat(tokenizer, turns, add_generation_prompt=asked)
    return Source(record.id, record.language, record.kind, roles, fields, "these records")


def of_prompts(plan: Any, model: Mixtral, count: int) -> Any:
    """`of_sequences` for prompts to continue.

    Raises:
      BimedixError: the rules need routes of a reference.
    """
    sources = [Source(f"prompt {row}", where="the prompts") for row in range(count)]
    plan = of_sequences(plan, model.config, lambda: sources)
    if isinstance(plan, Planner) and plan.references(model):
        raise BimedixError(
            "shuffle and freeze need the routes of a whole text, and generated tokens have none; use them in "
            "`bimedix eval run`"
        )
    return plan


def plan_of_rows(planner: Planner, tokens_BT: np.ndarray, positions_BT: np.ndarray) -> RoutingPlan:
    """The plan for tokens of which row b belongs to sequence b."""
    return planner.plan(Tokens(tokens_BT, np.arange(len(tokens_BT))[:, None], positions_BT), {}).plan


def language_of(text: str) -> str:
    """ "ar" if most of the letters are Arabic, else "en"."""
    letters = [letter for letter in text if letter.isalpha()]
    return "ar" if 2 * sum("\u0600" <= letter <= "\u06ff" for letter in letters) > len(letters) else "en"
