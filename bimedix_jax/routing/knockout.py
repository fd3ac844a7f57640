"""What single experts do: the NLL without them, one (layer, expert) at a time.

A cell is knocked out in three meanings: `silence` multiplies its output by 0, and all other weights stay; `ban` removes
it from the choice, so that the router takes its next best; `swap` lets another expert compute in its place, with its
weight: the next one in number that the token did not choose.

All of them are values of the same plan fields, so one program for each batch shape runs all cells. The layers before a
cell's layer do what they do without a knock-out, so they are run once for all cells.

Letters: R records, C cells; otherwise as in models/axes.py.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from bimedix_jax.errors import BimedixError
from bimedix_jax.inference.scoring import chosen_logprobs, target_logprobs
from bimedix_jax.models.call import Start
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import RoutingPlan
from bimedix_jax.routing.sequences import Batch, Sequences, batches
from bimedix_jax.routing.watch import Watch

Meaning = Literal["silence", "ban", "swap"]
MEANINGS: tuple[Meaning, ...] = get_args(Meaning)
BAN = -1e9
ANSWER, PROMPT = range(2)
"""Places of the roles in `Measured`."""


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    """An expert and how it is knocked out."""

    layer: int
    expert: int
    meaning: Meaning


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """Sums of nats by record, of the answer's and the prompt's tokens.

    Attributes:
      change_CR2: increase of the NLL in each cell. nll_R2: the NLL of the model itself. tokens_R2: numbers of tokens.
    """

    cells: tuple[Cell, ...]
    change_CR2: np.ndarray
    nll_R2: np.ndarray
    tokens_R2: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LeftOut:
    """What was not measured, and why. `gradient_LE`: by language, of the mean NLL in the gains of the experts."""

    cells: tuple[tuple[int, int], ...] = ()
    meanings: tuple[tuple[Meaning, str], ...] = ()
    gradient_LE: dict[str, np.ndarray] | None = None


def possible(meanings: Sequence[Meaning], config: MixtralConfig) -> tuple[list[Meaning], list[tuple[Meaning, str]]]:
    """The meanings that a model has, and those that it lacks with the reason."""
    experts, top_k = config.router.num_experts, config.router.top_k
    if experts > top_k:
        return list(meanings), []
    why = f"each token uses all {experts} experts, so none is left to take its place"
    return [x for x in meanings if x == "silence"], [(x, why) for x in meanings if x != "silence"]


def knock_out(model: Mixtral, sequences: Sequences, cells: Sequence[Cell], batch_tokens: int = 4096) -> Measured:
    """Runs every cell on every record.

    Raises:
      BimedixError: the model computes NaN or infinity.
    """
    graph, weights = nnx.split(model)
    rows = sorted(range(len(cells)), key=lambda row: cells[row].layer)
    scored = [answer | prompt for answer, prompt in zip(sequences.answer, sequences.prompt(), strict=True)]
    roles = list(zip(sequences.answer, sequences.prompt(), strict=True))
    totals_XR2 = np.zeros((1 + len(cells), len(roles), 2))
    total = len(list(batches(sequences, scored, model.config, batch_tokens)))
    with tqdm(total=total * len(cells), desc="knock-outs", unit="run", delay=2, disable=None) as bar:
        for batch in batches(sequences, scored, model.config, batch_tokens):
            plans = CellPlans(model.config, batch)
            before_LBTD, chosen_LBTK = by_layer(graph, weights, batch.tokens_BT, batch.ids_BT, plans.neutral)
            chosen_LBTK = np.asarray(chosen_LBTK)

            def nll(plan: RoutingPlan, layer: int, batch: Batch = batch, before: jax.Array = before_LBTD) -> np.ndarray:
                arrays = (batch.tokens_BT, batch.ids_BT, batch.scored_BT)
                return -target_logprobs(graph, weights, *arrays, plan, start=Start(jnp.int32(layer), before[layer]))[0]

            add(totals_XR2[0], batch, nll(plans.neutral, 0), roles)
            for layer, group in itertools.groupby(rows, lambda row: cells[row].layer):
                own_BT = nll(plans.neutral, layer)  # from the same layer: no rounding is taken for an effect
                for row in group:
                    if plans.matters(cells[row], chosen_LBTK):
                        change_BT = nll(plans.plan(cells[row], chosen_LBTK), layer) - own_BT
                        add(totals_XR2[1 + row], batch, change_BT, roles)
                    bar.update()
    if not np.isfinite(totals_XR2).all():
        raise BimedixError("the model computes NaN or infinity; check its weights, or load it with base float32")
    tokens_R2 = np.array([[chosen.sum() for chosen in both] for both in roles], np.float64)
    return Measured(cells=tuple(cells), change_CR2=totals_XR2[1:], nll_R2=totals_XR2[0], tokens_R2=tokens_R2)


@functools.partial(jax.jit, static_argnames="graph")
def by_layer(
    graph: nnx.GraphDef, weights: nnx.State, tokens_BT: jax.Array, ids_BT: jax.Array, plan: RoutingPlan
) -> tuple[jax.Array, jax.Array]:
    """The states before each layer [L, B, T, D], and the experts that it chooses [L, B, T, K]."""
    out = nnx.merge(graph, weights).hidden(tokens_BT, ids_BT, plan, record="choices", observe=Watch(before=True))
    return out.observed["before"], out.routing.experts_LBTK


def add(totals_R2: np.ndarray, batch: Batch, values_BT: np.ndarray, roles: Sequence[Sequence[np.ndarray]]) -> None:
    """Adds the sums of a batch's values by record and role, in place."""
    for index, values_T in batch.by_sequence(values_BT):
        for place, chosen in enumerate(roles[index]):
            totals_R2[index, place] += values_T[chosen].sum()


class CellPlans:
    """Makes the plans of cells for one batch. All set the same fields in the same shapes."""

    def __init__(self, config: MixtralConfig, batch: Batch):
        self.layers, self.experts = config.num_layers, config.router.num_experts
        lead = (self.layers, 1, 1, self.experts)
        self.zeros_LBTE, self.ones_LBTE = np.zeros(lead, np.float32), np.ones(lead, np.float32)
        shape = (self.layers, *batch.tokens_BT.shape, self.experts)
        self.identity_LBTE = jnp.broadcast_to(jnp.arange(self.experts, dtype=jnp.int32), shape)

    @property
    def neutral(self) -> RoutingPlan:
        """The plan of no knock-out."""
        return self.of(self.zeros_LBTE, self.identity_LBTE, self.ones_LBTE)

    def of(self, bias_LBTE: np.ndarray, map_LBTE: jax.Array, gain_LBTE: np.ndarray) -> RoutingPlan:
        return RoutingPlan(bias_LBTE=jnp.asarray(bias_LBTE), map_LBTE=map_LBTE, gain_LBTE=jnp.asarray(gain_LBTE))

    def matters(self, cell: Cell, chosen_LBTK: np.ndarray) -> bool:
        """Whether the cell can change the batch. A ban can change the weights of other experts, in some variants."""
        return cell.meaning == "ban" or bool((chosen_LBTK[cell.layer] == cell.expert).any())

    def plan(self, cell: Cell, chosen_LBTK: np.ndarray) -> RoutingPlan:
        """The plan of a cell, given the experts that the model chooses by itself."""
        bias_LBTE, gain_LBTE, map_LBTE = self.zeros_LBTE.copy(), self.ones_LBTE.copy(), self.identity_LBTE
        match cell.meaning:
            case "silence":
                gain_LBTE[cell.layer, 0, 0, cell.expert] = 0
            case "ban":
                bias_LBTE[cell.layer, 0, 0, cell.expert] = BAN
            case "swap":
                swapped_BTE = swapped(chosen_LBTK[cell.layer], cell.expert, self.experts)
                map_LBTE = map_LBTE.at[cell.layer].set(jnp.asarray(swapped_BTE))
        return self.of(bias_LBTE, map_LBTE, gain_LBTE)


def swapped(chosen_BTK: np.ndarray, expert: int, experts: int) -> np.ndarray:
    """[B, T, E] int32: permutations that exchange an expert with the next one that the token did not choose.

    Tokens that did not choose the expert keep the identity.
    """
    shape = (*chosen_BTK.shape[:2], experts)
    to_BTE = np.broadcast_to(np.arange(experts, dtype=np.int32), shape).copy()
    own_BT = (chosen_BTK == expert).any(-1)
    next_X = (expert + np.arange(1, experts)) % experts
    free_BTX = (chosen_BTK[..., None] != next_X).all(-2)
    partner_BT = next_X[free_BTX.argmax(-1)]
    b_N, t_N = np.nonzero(own_BT)
    to_BTE[b_N, t_N, expert], to_BTE[b_N, t_N, partner_BT[b_N, t_N]] = partner_BT[b_N, t_N], expert
    return to_BTE


def gain_gradients(model: Mixtral, sequences: Sequences, batch_tokens: int = 4096) -> np.ndarray:
    """[R, L, E]: gradient of each record's summed NLL of the answer, in the gain of each expert at 1.

    Silencing an expert changes the NLL by about the negative of its gradient.
    """
    graph, weights = nnx.split(model)
    shape = (model.config.num_layers, model.config.router.num_experts)
    found_RLE = np.zeros((len(sequences.ids), *shape))
    for batch in batches(sequences, sequences.answer, model.config, batch_tokens):
        gain_LBTE = jnp.ones((shape[0], *batch.tokens_BT.shape, shape[1]), jnp.float32)
        gradient_LBTE = np.asarray(_gradient(graph, weights, batch.tokens_BT, batch.ids_BT, batch.scored_BT, gain_LBTE))
        for index, line, start in batch.places:
            span = slice(start, start + batch.lengths[index])
            found_RLE[index] = gradient_LBTE[:, line, span].sum(1, dtype=np.float64)
    return found_RLE


@functools.partial(jax.jit, static_argnames="graph")
def _gradient(
    graph: nnx.GraphDef,
    weights: nnx.State,
    tokens_BT: jax.Array,
    ids_BT: jax.Array,
    scored_BT: jax.Array,
    gain_LBTE: jax.Array,
) -> jax.Array:
    model = nnx.merge(graph, weights)

    def loss(gain_LBTE: jax.Array) -> jax.Array:
        out = model.hidden(tokens_BT, ids_BT, RoutingPlan(gain_LBTE=gain_LBTE), remat="layer")
        hidden_ND = out.hidden_BTD.reshape(-1, out.hidden_BTD.shape[-1])
        # the hidden state at t - 1 predicts token t, also in the flat array, since the first token is never scored
        logprobs_N = chosen_logprobs(model, jnp.roll(hidden_ND, 1, axis=0), tokens_BT.reshape(-1))
        return -jnp.sum(jnp.where(scored_BT.reshape(-1), logprobs_N, 0.0))

    return jax.grad(loss)(gain_LBTE)


def screen(
    model: Mixtral, sequences: Sequences, count: int | None, batch_tokens: int = 4096
) -> tuple[list[tuple[int, int]], LeftOut]:
    """The (layer, expert) with the largest gradient of the mean NLL of a language, and those that were left out.

    Args:
      count: how many to keep; None keeps all and computes no gradient.
    """
    layers, experts = model.config.num_layers, model.config.router.num_experts
    every = [(layer, expert) for layer in range(layers) for expert in range(experts)]
    if count is None or count >= len(every):
        return every, LeftOut()
    gradient_RLE = gain_gradients(model, sequences, batch_tokens)
    tokens_R = np.array([answer.sum() for answer in sequences.answer], np.float64)
    language_R = sequences.labels("language")
    gradient_LE = {
        str(name): gradient_RLE[language_R == name].sum(0) / tokens_R[language_R == name].sum()
        for name in np.unique(language_R)
    }
    largest_LE = np.max([np.abs(x_LE) for x_LE in gradient_LE.values()], axis=0)
    order = np.argsort(-largest_LE.ravel(), kind="stable")
    kept = sorted(every[place] for place in order[:count])
    left = tuple(sorted(every[place] for place in order[count:]))
    return kept, LeftOut(cells=left, gradient_LE=gradient_LE)


def cells_of(places: Sequence[tuple[int, int]], meanings: Sequence[Meaning]) -> Iterator[Cell]:
    """The cells of these experts in all meanings."""
    for layer, expert in places:
        for meaning in meanings:
            yield Cell(layer, expert, meaning)
