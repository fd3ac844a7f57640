"""How much two models differ on the same text: in their logits, and in the experts that their routers choose."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from bimedix_jax.data.vocabulary import require_ids
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.mixtral import Mixtral


@dataclasses.dataclass(frozen=True)
class Observed:
    """The output of a model for each token.

    Attributes:
      logits_NV: float32, for the N tokens of all texts, in order.
      experts_LNK: the chosen experts, sorted so that equal sets compare equal.
      labels_N: the group of each token, such as its language.
    """

    logits_NV: np.ndarray
    experts_LNK: np.ndarray
    labels_N: np.ndarray


def observe(model: Mixtral, texts: Iterable[tuple[str, Sequence[int]]]) -> Observed:
    """Runs the model on each (label, token ids) separately, padded to a common length.

    Raises:
      BimedixError: there is no text, one is longer than the model's context, or a token id is outside its vocabulary.
    """
    examples = [(label, list(ids)) for label, ids in texts if len(ids)]
    longest = max((len(ids) for _, ids in examples), default=0)
    if not 0 < longest <= model.config.max_position_embeddings:
        raise BimedixError(
            f"The longest text has {longest} tokens, but the model takes 1 to "
            f"{model.config.max_position_embeddings}; shorten or remove texts."
        )
    require_ids((ids for _, ids in examples), model.config.vocab_size)
    logits, experts, labels = [], [], []
    for label, ids in examples:
        tokens_BT, segment_ids_BT = np.zeros((2, 1, longest), np.int32)
        tokens_BT[0, : len(ids)], segment_ids_BT[0, : len(ids)] = ids, 1
        out = model(tokens_BT, segment_ids_BT)
        logits.append(np.asarray(out.logits_BTV[0, : len(ids)]))
        experts.append(np.sort(np.asarray(out.routing.experts_LBTK[:, 0, : len(ids)]), axis=-1))
        labels += [label] * len(ids)
    return Observed(np.concatenate(logits), np.concatenate(experts, axis=1), np.array(labels))


def drift(ours: Observed, theirs: Observed) -> dict[str, Any]:
    """Differences between two models on the same texts, over all tokens and by label.

    `max_logit_diff` is relative to the largest magnitude of `ours`; `kl` is the mean KL divergence in nats from ours to
    theirs; `top1_changed` the share of tokens whose most likely next token changes; `routes_changed` the share of
    (layer, token) pairs whose set of experts changes; `tokens_rerouted` the share of tokens with any such layer.
    """
    if ours.logits_NV.shape != theirs.logits_NV.shape or not np.array_equal(ours.labels_N, theirs.labels_N):
        raise ValueError("The two models did not observe the same texts.")
    rerouted_LN = np.any(ours.experts_LNK != theirs.experts_LNK, axis=-1)
    log_p, log_q = (np.asarray(jax.nn.log_softmax(x.logits_NV, axis=-1)) for x in (ours, theirs))
    kl_N = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    changed_N = ours.logits_NV.argmax(-1) != theirs.logits_NV.argmax(-1)
    difference_N = np.abs(ours.logits_NV - theirs.logits_NV).max(-1) / np.abs(ours.logits_NV).max()

    def measured(chosen_N: np.ndarray) -> dict[str, Any]:
        return {
            "tokens": int(chosen_N.sum()),
            "max_logit_diff": float(difference_N[chosen_N].max()),
            "kl": float(kl_N[chosen_N].mean()),
            "top1_changed": float(changed_N[chosen_N].mean()),
            "routes_changed": float(rerouted_LN[:, chosen_N].mean()),
            "tokens_rerouted": float(rerouted_LN[:, chosen_N].any(0).mean()),
        }

    labels = sorted(set(ours.labels_N.tolist()))
    return {
        **measured(np.ones(len(changed_N), bool)),
        "routes_changed_by_layer": rerouted_LN.mean(1).tolist(),
        "by_label": {label: measured(ours.labels_N == label) for label in labels},
    }
