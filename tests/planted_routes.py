"""Recordings with planted dependences, as the tests of statistics need them."""

import numpy as np

from bimedix_jax.routing.tables import Tables, TokenRoutes, count_routes

VOCABULARY = 60


def choose(probability_NE: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """[N, k]: different experts, drawn with Gumbel noise."""
    noise_NE = rng.gumbel(size=probability_NE.shape)
    return np.argsort(-(np.log(probability_NE + 1e-12) + noise_NE), axis=1)[:, :k]


def recording(
    rng: np.random.Generator,
    *,
    records: int = 80,
    tokens: int = 60,
    layers: int = 2,
    experts: int = 4,
    k: int = 2,
    by_token: float = 0.0,
    by_language: float = 0.0,
    by_record: float = 0.4,
    mixed: float = 0.7,
    cancelling: bool = False,
) -> dict:
    """A recording of half Arabic, half English records, as keyword arguments of Tables.

    Args:
      by_token: how much a token id's own preferences weigh in the logits. by_language: how much those of the language.
      by_record: standard deviation of a record's own preferences.
      mixed: share of tokens from ids that both languages use, with different frequencies.
      cancelling: the language's preferences have opposite signs for even and odd ids, so that loads stay alike.
    """
    language_R = np.array(["ar", "en"])[np.arange(records) % 2]
    length_R = rng.integers(tokens // 2, 2 * tokens, records)
    record_N = np.repeat(np.arange(records), length_R)
    arabic_N = language_R[record_N] == "ar"
    third = VOCABULARY // 3
    weight_G = [np.linspace(1, 3, third), np.linspace(3, 1, third)]
    shared_N = np.where(
        arabic_N, *(third + rng.choice(third, len(record_N), p=weight / weight.sum()) for weight in weight_G)
    )
    own_N = np.where(arabic_N, 0, 2 * third) + rng.integers(0, third, len(record_N))
    id_N = np.where(rng.random(len(record_N)) < mixed, shared_N, own_N)
    experts_LNK = np.empty((layers, len(record_N), k), np.uint8)
    for layer in range(layers):
        token_TE = by_token * rng.standard_normal((VOCABULARY, experts))
        record_RE = by_record * rng.standard_normal((records, experts))
        language_E = by_language * np.linspace(-1, 1, experts)
        sign_N = np.where(arabic_N, 1, -1) * (np.where(id_N % 2, 1, -1) if cancelling else 1)
        logits_NE = token_TE[id_N] + record_RE[record_N] + sign_N[:, None] * language_E
        probability_NE = np.exp(logits_NE)
        experts_LNK[layer] = choose(probability_NE / probability_NE.sum(1, keepdims=True), k, rng)
    routes = TokenRoutes(record_N=record_N, id_N=id_N, experts_LNK=experts_LNK, experts=experts)
    counts_RLE, tokens_R = count_routes(routes, records, layers, experts)
    return {"counts_RLE": counts_RLE, "tokens_R": tokens_R, "groups": {"language": language_R}, "routes": routes}


def tables(rng: np.random.Generator, **planted) -> Tables:
    return Tables(**recording(rng, **planted))
