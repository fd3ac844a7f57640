"""Knock-outs and replay on models whose causes are known, because they were built by hand.

    python scripts/measure_planted_causes.py --json        # some minutes on two cores
    python scripts/measure_planted_causes.py --records 150

Knock-outs: a model in which one expert, (1, 3), alone computes what Arabic text needs, although both languages send it
the same load, and another, (0, 1), computes what both need. `truth` is the change of the NLL in the process that draws
the text, by enumeration in NumPy. `found` are the cells with a significant interaction.

Replay: adapters that change the experts only, the router only, or relabel experts and router alike, and a random change
of everything. `found` are the parts with a value, `truth` is the gain of the models themselves. For the random change,
`estimate` is the largest difference between a coalition and a model that was built for it alone.
"""

import argparse
import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bimedix_jax import startup
from bimedix_jax.adapters import add_lora, linears
from bimedix_jax.errors import natural, positive, run_script
from bimedix_jax.inference.planning import Source
from bimedix_jax.inference.scoring import score
from bimedix_jax.models.config import LoraConfig, MixtralConfig, RouterConfig
from bimedix_jax.models.init import init_random
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import RoutingPlan
from bimedix_jax.routing.attribution import attribution, report
from bimedix_jax.routing.coalitions import ATTENTION, EXPERTS, ROUTER, ROUTES, Pair, factor_of
from bimedix_jax.routing.knockout import MEANINGS, cells_of, knock_out, screen
from bimedix_jax.routing.knockout_effects import report as knockout_report
from bimedix_jax.routing.replay import replay
from bimedix_jax.routing.sequences import Sequences

ALPHA = 0.05
WORDS = 12
"""Token ids of a language: 1 to WORDS are English, the next WORDS Arabic."""
PREDICTABLE = 0.6
"""Probability that a token is followed by its successor; otherwise any word of the language follows."""
NEEDED, SHARED = (1, 3), (0, 1)
"""(layer, expert) that Arabic needs alone, and that both languages need."""
VOCABULARY = 2 * WORDS + 1
CONSTANT = 2 * VOCABULARY
PLANTED = MixtralConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,  # the token itself, what comes next, and a constant
    intermediate_size=VOCABULARY,
    num_layers=2,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    router=RouterConfig(num_experts=4, top_k=2),
    rope_theta=10_000.0,
    rms_norm_eps=1e-5,
    sliding_window=None,
    tie_embeddings=False,
    max_position_embeddings=512,
)
SMALL = dataclasses.replace(PLANTED, vocab_size=60, hidden_size=16, intermediate_size=24, num_heads=2)


def successor(token: int) -> int:
    """The token that follows most often, in the same language."""
    start = 1 + (token - 1) // WORDS * WORDS
    return start + (token - start + 3) % WORDS


def is_shared(token: int) -> bool:
    """Whether expert SHARED predicts what follows; NEEDED does so for the others in Arabic, and nobody in English."""
    return token % 2 == 0


def is_arabic(token: int) -> bool:
    return token > WORDS


def transitions() -> np.ndarray:
    """[V, V]: probabilities of the next token."""
    following_VV = np.zeros((VOCABULARY, VOCABULARY))
    for token in range(1, VOCABULARY):
        start = 1 + (token - 1) // WORDS * WORDS
        following_VV[token, start : start + WORDS] = (1 - PREDICTABLE) / WORDS
        following_VV[token, successor(token)] += PREDICTABLE
    return following_VV


def planted_weights() -> dict[str, np.ndarray]:
    """The parameters that are not zero or one."""
    layers, experts, width = 2, PLANTED.router.num_experts, PLANTED.hidden_size
    w = {
        "embed.table": np.zeros((VOCABULARY, width)),
        "lm_head.w": np.zeros((width, VOCABULARY)),
        "layers.moe.router.w": np.zeros((layers, width, experts)),
        **{f"layers.moe.{name}.w": np.zeros((layers, experts, width, VOCABULARY)) for name in ("w1", "w3")},
        "layers.moe.w2.w": np.zeros((layers, experts, VOCABULARY, width)),
    }
    for token in range(1, VOCABULARY):
        w["embed.table"][token, [token, CONSTANT]] = 1.0
        w["lm_head.w"][VOCABULARY + token, token] = 0.6
        same = [other for other in range(1, VOCABULARY) if is_arabic(other) == is_arabic(token)]
        w["lm_head.w"][token, same] = 1.0
        layer, expert = SHARED if is_shared(token) else NEEDED
        if is_shared(token) or is_arabic(token):
            w["layers.moe.w1.w"][layer, expert, token, token] = 1.0
            w["layers.moe.w3.w"][layer, expert, token, token] = 1.0
            w["layers.moe.w2.w"][layer, expert, token, VOCABULARY + successor(token)] = 1 / 24
    for layer, expert in (SHARED, NEEDED):
        w["layers.moe.router.w"][layer, CONSTANT, expert] = 0.2  # all tokens choose it, whatever their language
    return w


def planted_model() -> Mixtral:
    """The model of `planted_weights`; its attention does nothing."""
    model, weights = init_random(PLANTED), planted_weights()
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name, value = ".".join(map(str, path)), variable.get_value()
        if name in weights:
            variable.set_value(jnp.asarray(weights[name], jnp.float32))
        elif path[-1] != "scale":
            variable.set_value(jnp.zeros_like(value))
    return model


def expected_nll(without: tuple[int, int] | None) -> np.ndarray:
    """[V]: expected NLL of what follows each token, in the process itself; `without` an expert's output."""
    w = planted_weights()
    x_VD = w["embed.table"].copy()

    def norm(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + PLANTED.rms_norm_eps)

    for layer in range(2):
        states_VD = norm(x_VD)
        logits_VE = states_VD @ w["layers.moe.router.w"][layer]
        chosen_VK = np.argsort(-logits_VE, axis=1, kind="stable")[:, : PLANTED.router.top_k]
        share_VK = np.exp(np.take_along_axis(logits_VE, chosen_VK, 1))
        share_VK /= share_VK.sum(1, keepdims=True)
        for token, slot in np.ndindex(chosen_VK.shape):
            expert = int(chosen_VK[token, slot])
            if (layer, expert) != without:
                w1, w2, w3 = (w[f"layers.moe.{name}.w"][layer, expert] for name in ("w1", "w2", "w3"))
                gate = states_VD[token] @ w1
                x_VD[token] += share_VK[token, slot] * (gate / (1 + np.exp(-gate)) * (states_VD[token] @ w3)) @ w2
    logits_VV = norm(x_VD) @ w["lm_head.w"]
    logp_VV = logits_VV - np.log(np.exp(logits_VV).sum(1, keepdims=True))
    return -(transitions() * logp_VV).sum(1)


def true_change(without: tuple[int, int], arabic: bool) -> float:
    """The change of the mean NLL of a language without an expert."""
    own = [token for token in range(1, VOCABULARY) if is_arabic(token) == arabic]
    following = transitions()[np.ix_(own, own)]
    values, vectors = np.linalg.eig(following.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    return float((expected_nll(without) - expected_nll(None))[own] @ stationary / stationary.sum())


def planted_text(records: int, tokens: int, seed: int) -> Sequences:
    """Texts of the process, half of them Arabic; all tokens but the first of each are scored."""
    rng, following_VV = np.random.default_rng(seed), transitions()
    ids_RT = np.zeros((records, tokens), np.int32)
    ids_RT[:, 0] = rng.integers(1, WORDS + 1, records) + WORDS * (np.arange(records) % 2)
    for place in range(1, tokens):
        reached_RV = following_VV[ids_RT[:, place - 1]].cumsum(1)
        ids_RT[:, place] = (rng.random((records, 1)) >= reached_RV).sum(1)
    return Sequences(
        ids=list(ids_RT),
        answer=[np.arange(tokens) > 0] * records,
        sources=[Source(f"text {row}", ("en", "ar")[row % 2]) for row in range(records)],
    )


def measure_knockouts(records: int, tokens: int, seed: int) -> list[dict[str, Any]]:
    """Rows of the needed expert in each meaning, of the shared one, and of the screen."""
    model, text = planted_model(), planted_text(records, tokens, seed)
    every, _ = screen(model, text, None)
    result = knockout_report(knock_out(model, text, list(cells_of(every, MEANINGS))), screen(model, text, 2)[1], text)
    rows = []
    for meaning in MEANINGS:
        cells = [row for row in result["interaction"] if row["meaning"] == meaning]
        found = [f"({row['layer']}, {row['expert']})" for row in cells if row["p_adjusted"] <= ALPHA]
        for (layer, expert), planted in ((NEEDED, "needed by Arabic alone"), (SHARED, "needed by both languages")):
            row = next(row for row in cells if (row["layer"], row["expert"]) == (layer, expert))
            truth = true_change((layer, expert), arabic=True) - true_change((layer, expert), arabic=False)
            planted = f"expert {expert} of layer {layer} {planted}: {meaning}, interaction"
            rows.append(row_of(planted, ", ".join(found) or "none", truth, row["estimate"], row["low"], row["high"]))
    cell = next(x for x in result["cells"] if (x["layer"], x["expert"], x["meaning"]) == (*NEEDED, "silence"))
    low, high = cell["low"]["ar"], cell["high"]["ar"]
    truth = true_change(NEEDED, arabic=True)
    rows.append(row_of("the same: silence, change in Arabic", "ar", truth, cell["delta"]["ar"], low, high))
    return rows


def row_of(planted: str, found: str, truth: float, estimate: float, low: float, high: float) -> dict[str, Any]:
    return {
        "planted": planted,
        "found": found,
        "truth": float(truth),
        "estimate": float(estimate),
        "low": float(low),
        "high": float(high),
    }


def small_text(records: int, tokens: int, seed: int) -> Sequences:
    """Random tokens; half of the records are called Arabic."""
    rng = np.random.default_rng(seed)
    ids = list(rng.integers(1, SMALL.vocab_size, (records, tokens)).astype(np.int32))
    sources = [Source(f"text {row}", ("en", "ar")[row % 2]) for row in range(records)]
    return Sequences(ids=ids, answer=[np.arange(tokens) > 0] * records, sources=sources)


def small_base() -> Mixtral:
    return init_random(SMALL, seed=3, std=0.3)


TARGETS = ("q", "k", "v", "o", "w1", "w2", "w3", "router", "lm_head")


def with_factors(base: Mixtral, *factors: str, layers: tuple[int, ...] = (0, 1)) -> Mixtral:
    """The base with adapters everywhere, of which those of these factors and layers are random and the others zero."""
    rank = SMALL.hidden_size
    model = add_lora(base, LoraConfig(rank=rank, alpha=float(rank), targets=TARGETS), seed=1)
    kept_L = jnp.isin(jnp.arange(SMALL.num_layers), jnp.array(layers))
    for number, (path, layer) in enumerate(linears(model).items()):
        assert layer.lora is not None
        shape = layer.lora.b.get_value().shape
        if factor_of(path) in factors:
            b = 0.1 * jax.random.normal(jax.random.key(number), shape)
            kept = kept_L.reshape(-1, *[1] * (len(shape) - 1)) if path[0] == "layers" else True
            layer.lora.b.set_value(jnp.where(kept, b, 0.0))
    return model


def relabelled(base: Mixtral) -> Mixtral:
    """The base with adapters that move every expert, and its column of the router, to the next number."""
    model = with_factors(base)
    for path, layer in linears(model).items():
        if factor_of(path) not in (EXPERTS, ROUTER):
            continue
        assert layer.lora is not None
        w = layer.w.get_value()
        delta = jnp.roll(w, 1, axis=-1 if path[-1] == "router" else 1) - w
        identity = jnp.broadcast_to(jnp.eye(SMALL.hidden_size), (*w.shape[:-2], SMALL.hidden_size, SMALL.hidden_size))
        a, b = (delta, identity) if path[-1] == "w2" else (identity, delta)
        layer.lora.a.set_value(a)
        layer.lora.b.set_value(b)
    return model


def mean_nll(model: Mixtral, text: Sequences, plan: RoutingPlan | None = None) -> float:
    """What `bimedix eval run` reports."""
    nats = [-logprobs_T.sum() for _, logprobs_T, _ in score(model, text.ids, text.answer, plan)]
    return float(sum(nats) / sum(int(answer.sum()) for answer in text.answer))


def measure_splits(records: int, tokens: int, seed: int) -> list[dict[str, Any]]:
    """Rows of the adapters with one planted cause, and of the relabelling."""
    base, text = small_base(), small_text(records, tokens, seed)
    last = SMALL.num_layers - 1  # experts of an earlier layer would also change what later routers see
    adapters = {
        "experts only": with_factors(base, EXPERTS, layers=(last,)),
        "router only": with_factors(base, ROUTER),
        "experts and router relabelled": relabelled(base),
    }
    rows = []
    for planted, tuned in adapters.items():
        result = report(replay(Pair.of(base, tuned), text), text)
        truth = mean_nll(base, text) - mean_nll(tuned, text)
        values = {name: nats for name, nats in result["shapley"].items() if abs(nats) > 1e-9}
        relabels = planted.endswith("relabelled")
        name = "gain" if relabels else max(values, key=lambda name: abs(values[name]))
        changed = f"{100 * result['flips']['sets_changed']:.0f} % of sets changed"
        found = changed if relabels else ", ".join(values)
        estimate = result["gain"] if relabels else values[name]
        rows.append(row_of(planted, found, truth, estimate, *result["intervals"][name]))
    return rows


def merged(pair: Pair, members: list[str]) -> Mixtral:
    """A model without adapters whose weights have those of the factors in `members` added."""
    model = nnx.merge(*nnx.split(pair.base), copy=True)
    own = linears(model)
    for path, layer in linears(pair.tuned).items():
        if layer.lora is not None and factor_of(path) in members:
            a, b = layer.lora.a.get_value(), layer.lora.b.get_value()
            own[path].w.set_value(layer.w.get_value() + layer.lora.scale * (a @ b))
    return model


def own_routes(model: Mixtral, text: Sequences) -> RoutingPlan:
    """The model's routes, recorded record by record."""
    shape = (SMALL.num_layers, len(text.ids), max(text.lengths), SMALL.router.top_k)
    experts_LBTK, weights_LBTK = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for row, _, routing in score(model, text.ids, text.answer, record="choices"):
        assert routing is not None
        experts_LBTK[:, row], weights_LBTK[:, row] = routing.experts_LBTK[:, 0], routing.weights_LBTK[:, 0]
    return RoutingPlan(experts_LBTK=jnp.asarray(experts_LBTK), weights_LBTK=jnp.asarray(weights_LBTK))


def measure_coalitions(records: int, tokens: int, seed: int) -> dict[str, Any]:
    """The row of a random change: all coalitions against models with merged weights under a plan."""
    base, text = small_base(), small_text(records, tokens, seed)
    pair = Pair.of(base, with_factors(base, ATTENTION, EXPERTS, ROUTER))
    replayed = replay(pair, text)
    plans = {True: own_routes(pair.tuned, text), False: own_routes(base, text)}
    split = attribution(replayed, text, np.ones(len(text.ids), bool))
    differences = []
    for coalition, nll in zip(replayed.game.coalitions, split.nll_C3[:, 0], strict=True):
        members = replayed.game.members(coalition)
        differences.append(abs(nll - mean_nll(merged(pair, members), text, plans[ROUTES in members])))
    found = f"{sum(difference <= 1e-6 for difference in differences)} of {len(differences)} coalitions within 1e-6"
    return row_of("random change of everything", found, 0.0, max(differences), min(differences), max(differences))


def measure(records: int, tokens: int, seed: int) -> dict[str, Any]:
    """All rows."""
    few = min(records, 40)
    rows = [*measure_knockouts(records, tokens, seed), *measure_splits(few, 16, seed)]
    return {"records": records, "tokens": tokens, "seed": seed, "rows": [*rows, measure_coalitions(few, 16, seed)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=positive, default=1200, help="texts for the knock-outs, half of them Arabic")
    parser.add_argument("--tokens", type=positive, default=48, help="tokens of a text")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if options.records < 240 or options.tokens < 24:
        parser.error("give --records at least 240 and --tokens at least 24")
    startup.prepare()
    found = measure(options.records, options.tokens, options.seed)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for row in found["rows"]:
        print(f"{row['planted']}\n    found {row['found']}; truth {row['truth']:+.6f}, ", end="")
        print(f"estimate {row['estimate']:+.6f} ({row['low']:+.6f} to {row['high']:+.6f})")


if __name__ == "__main__":
    run_script(main)
