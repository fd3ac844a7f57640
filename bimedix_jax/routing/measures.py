"""Measures of routes that describe and do not test: dead experts, persistence, saturation, flips, margins.

Letters: R records, N tokens, L layers, E experts, K experts of a token, S steps of training.
"""

import dataclasses

import numpy as np

from bimedix_jax.routing.coactivation import sets
from bimedix_jax.routing.intervals import never_chosen_bound


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeadExpert:
    """An expert that no token chose. `bound`: 95 % upper bound of the share of clusters with a token that does."""

    layer: int
    expert: int
    bound: float


def load(counts_RLE: np.ndarray) -> np.ndarray:
    """[L, E]: shares of the choices, the mean over records; each record counts once, and rows sum to 1."""
    return (counts_RLE / counts_RLE.sum(-1, keepdims=True)).mean(0)


def dead_experts(counts_CLE: np.ndarray) -> list[DeadExpert]:
    """Experts without a choice. Another sample may use them, hence the bound.

    Args:
      counts_CLE: counts by cluster.
    """
    bound = never_chosen_bound(len(counts_CLE))
    places = np.argwhere(counts_CLE.sum(0) == 0)
    return [DeadExpert(layer=int(layer), expert=int(expert), bound=bound) for layer, expert in places]


def overlap(first_LNK: np.ndarray, second_LNK: np.ndarray, experts: int) -> np.ndarray:
    """[L, N]: the share of a token's experts that two recordings have in common, 1 if the sets are equal.

    Of sets of unequal size, which slots without an expert make, it is the share of the larger one.
    """
    found = []
    for own_NK, their_NK in zip(first_LNK, second_LNK, strict=True):
        own_NE, their_NE = sets(own_NK, experts), sets(their_NK, experts)
        size_N = np.maximum(own_NE.sum(1), their_NE.sum(1))
        found.append(np.where(size_N > 0, (own_NE & their_NE).sum(1) / np.maximum(size_N, 1), 1.0))
    return np.array(found)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Flips:
    """Change between two models by record: changed_RL, share of tokens with another set; overlap_RL, mean overlap / k.

    One value a record, so that an interval over clusters can follow. NaN for a record without tokens.
    """

    changed_RL: np.ndarray
    overlap_RL: np.ndarray


def flips(first_LNK: np.ndarray, second_LNK: np.ndarray, record_N: np.ndarray, records: int, experts: int) -> Flips:
    """How the sets of the same tokens differ between two models. The order of the experts of a set does not matter.

    Raises:
      ValueError: the recordings differ in layers, tokens or experts of a token.
    """
    if first_LNK.shape != second_LNK.shape:
        raise ValueError(f"routes of the shapes {first_LNK.shape} and {second_LNK.shape} are not of the same tokens")
    kept_LN = overlap(first_LNK, second_LNK, experts)
    return Flips(
        changed_RL=_by_record(kept_LN < 1 - 1e-9, record_N, records), overlap_RL=_by_record(kept_LN, record_N, records)
    )


def saturation(steps_SLNK: np.ndarray, record_N: np.ndarray, records: int, experts: int) -> np.ndarray:
    """[S, R, L]: overlap of each step's sets with those of the last step (the measure of OLMoE, arXiv 2409.02060)."""
    return np.array(
        [_by_record(overlap(step_LNK, steps_SLNK[-1], experts), record_N, records) for step_LNK in steps_SLNK]
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Persistence:
    """By record and layer: the overlap of a token's set with that of the next token, and of a random other one.

    Neighbours share a topic, and so does the record: only the excess over a random token of the same record is
    persistence. NaN for a record of fewer than two tokens.
    """

    next_RL: np.ndarray
    random_RL: np.ndarray


def persistence(experts_LNK: np.ndarray, record_N: np.ndarray, records: int, experts: int) -> Persistence:
    """Overlap / k of neighbours, and its exact mean over all pairs of different tokens of the record.

    Args:
      record_N: tokens of a record are consecutive and in order.
    """
    layers, _, k = experts_LNK.shape
    together_N = record_N[1:] == record_N[:-1]
    tokens_R = np.bincount(record_N, minlength=records).astype(np.float64)
    next_RL, random_RL = np.full((2, records, layers), np.nan)
    some_R = tokens_R > 1
    for layer in range(layers):
        chosen_NE = sets(experts_LNK[layer], experts)
        shared_N = (chosen_NE[1:] & chosen_NE[:-1]).sum(1)[together_N]
        sums_R = np.bincount(record_N[1:][together_N], shared_N, records)
        next_RL[some_R, layer] = sums_R[some_R] / (tokens_R[some_R] - 1) / k
        counts_RE = np.stack([np.bincount(record_N, chosen_NE[:, e], records) for e in range(experts)], axis=1)
        pairs_R = (counts_RE * (counts_RE - 1)).sum(1)
        random_RL[some_R, layer] = pairs_R[some_R] / (tokens_R[some_R] * (tokens_R[some_R] - 1)) / k
    return Persistence(next_RL=next_RL, random_RL=random_RL)


def margins(margin_LN: np.ndarray, record_N: np.ndarray, records: int, least: float = 1e-4) -> np.ndarray:
    """[R, L]: share of tokens whose k-th chosen score exceeds the best refused one by less than `least`.

    Such a choice is decided by rounding: another device or batch may make it differently.
    """
    return _by_record(np.asarray(margin_LN) < least, record_N, records)


def weight_change(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """[L, E]: Frobenius norm of the change of each expert's weights over that of the weights; NaN where those are 0.

    Args:
      before, after: [L, E, ...].
    """
    axes = tuple(range(2, before.ndim))
    norm_LE = np.sqrt((np.asarray(before, np.float64) ** 2).sum(axes))
    change_LE = np.sqrt(((np.asarray(after, np.float64) - before) ** 2).sum(axes))
    return np.where(norm_LE > 0, change_LE / np.where(norm_LE > 0, norm_LE, 1), np.nan)


def vocabulary_specialisation(counts_TE: np.ndarray) -> tuple[float, float]:
    """The usual index, and its mean for a router that ignores tokens.

    The index is the mean over ids of the largest share of an expert, as in OLMoE. It is far above 1 / E without any
    dependence, because the largest of several random shares is large for a rare id: never report it alone. The second
    number draws each id's choices from the loads. `information.held_out_nats` has no such bias.

    Args:
      counts_TE: choices by token id; ids without any are left out.
    """
    counts_TE = np.asarray(counts_TE, np.int64)
    counts_TE = counts_TE[counts_TE.sum(1) > 0]
    total_T = counts_TE.sum(1)
    load_E = counts_TE.sum(0) / counts_TE.sum()
    drawn_TE = np.random.default_rng(0).multinomial(total_T, load_E)
    index, null = (float((table.max(1) / total_T).mean()) for table in (counts_TE, drawn_TE))
    return index, null


def _by_record(values_LN: np.ndarray, record_N: np.ndarray, records: int) -> np.ndarray:
    tokens_R = np.bincount(record_N, minlength=records).astype(np.float64)
    sums_LR = np.array([np.bincount(record_N, values_N, records) for values_N in values_LN])
    return (sums_LR / np.where(tokens_R > 0, tokens_R, np.nan)).T
