"""Divergence of two groups' loads, and what token ids and groups say about routes, free of the plug-in bias.

Entropies, divergences and mutual information are biased upwards: two samples of the same routes differ. A divergence is
reported less its bias in resamples of the clusters. Information about single tokens is the gain on clusters that the
predictor was not fitted on. Both are in nats.

Letters: C clusters, L layers, E experts, T token ids, P rows of (cluster, group, token id).
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from bimedix_jax.routing.clusters import blocks, resampled_weights
from bimedix_jax.routing.stats import PERMUTATIONS
from bimedix_jax.routing.sums import SparseMatrix

FOLDS = 5
PRIORS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
"""Weights of the prior, in choices, among which the predictor selects on clusters that it is not scored on."""


def jensen_shannon(p_LE: np.ndarray, q_LE: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence over the last axis, in nats: 0 to log 2."""
    middle = (p_LE + q_LE) / 2
    return (_against(p_LE, middle) + _against(q_LE, middle)).sum(-1) / 2


def _against(p: np.ndarray, middle: np.ndarray) -> np.ndarray:
    return p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, middle, 1))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Divergence:
    """By layer: the divergence of the groups' mean loads, less its bias, and the 95 % interval of the same quantity."""

    plugin_L: np.ndarray
    jsd_L: np.ndarray
    low_L: np.ndarray
    high_L: np.ndarray


def divergence(
    lead_CLE: np.ndarray, trail_CLE: np.ndarray, paired: bool, rng: np.random.Generator, resamples: int = PERMUTATIONS
) -> Divergence:
    """The divergence of two groups of clusters, whose loads [E] sum to 1.

    The bias is the mean divergence of resamples less that of the sample. Permuted labels would give another one: the
    difference of the groups adds to their variance, so that it is too large where the groups differ. On both sides of
    the estimate, the interval is as wide as the upper tail of the resamples, since the lower tail ends at their bias.

    A group of n is resampled with n - 1 draws, so that the variance of its mean is the unbiased one (McCarthy and
    Snowden 1985). Where the groups are alike, the estimate and the lower end are below 0 as often as above.

    Args:
      paired: the arrays hold the same clusters in both groups, which are resampled together.
    """
    layers, experts = lead_CLE.shape[1:]
    lead_CX, trail_CX = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (lead_CLE, trail_CLE))
    shape = (-1, layers, experts)

    def plugin(lead_BX: np.ndarray, trail_BX: np.ndarray) -> np.ndarray:
        # means of resamples are products of matrices, which can round a 0 to less
        return jensen_shannon(*(np.maximum(x, 0).reshape(shape) for x in (lead_BX, trail_BX)))

    found_L = plugin(lead_CX.mean(0)[None], trail_CX.mean(0)[None])[0]
    drawn_BL = np.concatenate([plugin(*m) for m in _resampled_means(lead_CX, trail_CX, paired, rng, resamples)])
    mean_L = drawn_BL.mean(0)
    jsd_L = found_L - (mean_L - found_L)
    tail_L = np.maximum(np.quantile(drawn_BL, 0.975, axis=0) - mean_L, 0)
    ends = (np.minimum(x_L, np.log(2)) for x_L in (jsd_L, jsd_L - tail_L, jsd_L + tail_L))
    return Divergence(plugin_L=found_L, **dict(zip(("jsd_L", "low_L", "high_L"), ends, strict=True)))


def _resampled_means(
    lead_CX: np.ndarray, trail_CX: np.ndarray, paired: bool, rng: np.random.Generator, total: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for size in blocks(total, max(len(lead_CX), len(trail_CX), lead_CX.shape[1])):
        draws = {n: max(n - 1, 1) for n in (len(lead_CX), len(trail_CX))}
        weights = [resampled_weights(len(x), size, rng, draws[len(x)]) / draws[len(x)] for x in (lead_CX, trail_CX)]
        yield weights[0] @ lead_CX, weights[0 if paired else 1] @ trail_CX


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenRows:
    """The distinct (cluster, group, token id) of a question.

    Attributes:
      cluster_P: index of the cluster, 0 to `clusters`-1. id_P: index of the id, 0 to `ids`-1. first_P: its group.
      tokens_P: number of tokens.
    """

    cluster_P: np.ndarray
    id_P: np.ndarray
    first_P: np.ndarray
    tokens_P: np.ndarray
    clusters: int
    ids: int


def held_out_nats(rows: TokenRows, choices_PE: SparseMatrix, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Nats a choice, [C] each, by which predictors that are fitted on other clusters improve.

    The first is the gain of predicting an expert by the token id over the marginal load; the second that of predicting
    by id and group over the id. Each predictor is a Dirichlet posterior mean around the coarser one, and the weight of
    that prior is what serves the other folds best. The expectation of the second is at most I(group; expert | token),
    and 0 or less if that is 0. NaN for a cluster without tokens.
    """
    entries = choices_PE.tocoo()
    fold_C = rng.permutation(rows.clusters) % FOLDS
    scorer = _Scorer(rows.cluster_P[entries.row], entries.col, entries.data, fold_C, choices_PE.shape[1])
    by_id_Z, vocabulary_C = scorer.refined(rows.id_P[entries.row], scorer.marginal())
    _, group_C = scorer.refined((2 * rows.id_P + rows.first_P)[entries.row], by_id_Z)
    return vocabulary_C, group_C


class _Scorer:
    """Predictors of the experts of entries Z (cluster, key, expert, count), scored on folds not used to fit them."""

    def __init__(
        self, cluster_Z: np.ndarray, expert_Z: np.ndarray, count_Z: np.ndarray, fold_C: np.ndarray, experts: int
    ):
        self.cluster_Z, self.expert_Z, self.count_Z, self.fold_C = cluster_Z, expert_Z, count_Z, fold_C
        self.fold_Z, self.experts, self.clusters = fold_C[cluster_Z], experts, len(fold_C)
        self.choices_C = np.bincount(cluster_Z, count_Z, self.clusters)

    def marginal(self) -> np.ndarray:
        """[Z]: the expert's load in the other folds, with half a choice for each expert that makes 0 impossible."""
        probability_Z = np.empty(len(self.expert_Z))
        for fold in range(FOLDS):
            fitted, scored = self.fold_Z != fold, self.fold_Z == fold
            load_E = np.bincount(self.expert_Z[fitted], self.count_Z[fitted], self.experts) + 0.5
            probability_Z[scored] = (load_E / load_E.sum())[self.expert_Z[scored]]
        return probability_Z

    def refined(self, key_Z: np.ndarray, coarse_Z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities [Z] by key, around the coarse ones, and the gain [C] over those in nats a choice."""
        keys, key_Z = np.unique(key_Z, return_inverse=True)
        cell_Z, cells = key_Z * self.experts + self.expert_Z, len(keys) * self.experts
        names, place_Z = np.unique(cell_Z, return_inverse=True) if cells > len(cell_Z) else (range(cells), cell_Z)
        seen_Z, total_Z = np.empty((2, len(key_Z)))
        for fold in range(FOLDS):
            fitted, scored = self.fold_Z != fold, self.fold_Z == fold
            seen_Z[scored] = np.bincount(place_Z[fitted], self.count_Z[fitted], len(names))[place_Z[scored]]
            total_Z[scored] = np.bincount(key_Z[fitted], self.count_Z[fitted], len(keys))[key_Z[scored]]
        gain_FC = np.array([self._gain(self._posterior(seen_Z, total_Z, coarse_Z, p), coarse_Z) for p in PRIORS])
        prior_C = np.zeros(self.clusters, np.int64)
        for fold in range(FOLDS):
            others_C = (self.fold_C != fold) & (self.choices_C > 0)
            prior_C[self.fold_C == fold] = int(gain_FC[:, others_C].mean(1).argmax()) if others_C.any() else 0
        prior_Z = np.array(PRIORS)[prior_C][self.cluster_Z]
        return self._posterior(seen_Z, total_Z, coarse_Z, prior_Z), gain_FC[prior_C, np.arange(self.clusters)]

    def _posterior(
        self, seen_Z: np.ndarray, total_Z: np.ndarray, coarse_Z: np.ndarray, prior: np.ndarray | float
    ) -> np.ndarray:
        return (seen_Z + prior * coarse_Z) / (total_Z + prior)

    def _gain(self, fine_Z: np.ndarray, coarse_Z: np.ndarray) -> np.ndarray:
        sum_C = np.bincount(self.cluster_Z, self.count_Z * np.log(fine_Z / coarse_Z), self.clusters)
        return sum_C / np.where(self.choices_C > 0, self.choices_C, np.nan)
