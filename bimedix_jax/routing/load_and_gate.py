"""Expert load and the divergence gate of a model on records, from one recording that is kept in memory.

    load, gate = load_and_gate(model, tokenizer, records)

The gate says whether it matters which experts a token gets. Without it, a difference in load says nothing about what
experts do.
"""

from collections.abc import Sequence

import numpy as np

from bimedix_jax.data.records import Record
from bimedix_jax.data.roles import ROLES
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.routing.claims import Gate
from bimedix_jax.routing.ladder import gate_of
from bimedix_jax.routing.load import ExpertLoad, by_group
from bimedix_jax.routing.parts import Routes
from bimedix_jax.routing.recorded import APART, LEAST_FLOOR, UNITS, clusters
from bimedix_jax.routing.recorded_data import Data
from bimedix_jax.routing.recorder import Recorder, RecordSettings
from bimedix_jax.routing.recording import MISSING


def load_and_gate(
    model: Mixtral, tokenizer: Tokenizer, records: Sequence[Record], identical: bool = False, seed: int = 0
) -> tuple[ExpertLoad, Gate]:
    """`expert_load` of records, and the cost of shuffled routes on them as `bimedix routes record --gate` measures it.

    Args:
      identical: all experts of a layer are equal and a token's weights add up to 1. Then shuffled routes cost exactly
        0, and nothing is run for the gate.

    Raises:
      BimedixError: there is no record, none fits, or one has a token id that the model lacks.
    """
    recorder = Recorder(model, Data.of(records, tokenizer), RecordSettings(gate=True, exact=True, seed=seed))
    found = recorder.in_memory(shuffled=not identical)
    load = _load(found, model.config.router.num_experts, len(recorder.too_long))
    floor = max(LEAST_FLOOR, recorder.floor or 0.0)
    if identical:
        return load, Gate(delta_nll=0.0, low=0.0, high=0.0, floor=floor, diverged=False)
    return load, _gate(found, floor, seed)


def _load(found: Sequence[Routes], experts: int, too_long: int) -> ExpertLoad:
    names = sorted({_kind(routes) for routes in found})
    layers = found[0].columns["experts"].shape[1]
    chosen_LXE = np.zeros((layers, len(names), experts))
    entropy_LX, top_weight_LX, tokens_LX = (np.zeros((layers, len(names))) for _ in range(3))
    for routes in found:
        group = names.index(_kind(routes))
        for layer, chosen_NK in enumerate(routes.columns["experts"].swapaxes(0, 1)):
            chosen_LXE[layer, group] += np.bincount(chosen_NK.ravel(), minlength=experts)
        entropy_LX[:, group] += routes.columns["entropy"].sum(0, np.float64)
        top_weight_LX[:, group] += routes.columns["weights"].max(-1).sum(0, np.float64)
        tokens_LX[:, group] += len(routes.ids_N)
    return by_group(names, chosen_LXE, entropy_LX, top_weight_LX, tokens_LX, too_long)


def _kind(routes: Routes) -> str:
    return f"{routes.about['language']}/{routes.about['kind']}"


def _gate(found: Sequence[Routes], floor: float, seed: int) -> Gate:
    apart, costs, tokens, kept = [ROLES.index(name) for name in APART], [], [], []
    for routes in found:
        assert routes.roles_N is not None  # records have roles
        counts_N = ~np.isin(routes.roles_N, apart) & np.isfinite(routes.columns["nll"])
        if counts_N.any():
            cost_N = routes.columns["shuffled_nll"].astype(np.float64) - routes.columns["nll"]
            costs.append(cost_N[counts_N].mean())
            tokens.append(counts_N.sum())
            kept.append(routes)
    labels = {name: np.array([x.about.get(name) or MISSING for x in kept], object) for name in (*UNITS, "pair")}
    unit = next((name for name in UNITS if (labels[name] != MISSING).any()), None)
    cluster_R = None if unit is None else clusters(labels[unit])
    return gate_of(np.array(costs), np.array(tokens), cluster_R, labels["pair"], floor, seed)
