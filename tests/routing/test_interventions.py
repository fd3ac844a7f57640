"""Rules against a model in NumPy that applies each of them in the plainest way, token by token."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import tiny

from bimedix_jax.data.encoding import ROLES
from bimedix_jax.errors import BimedixError
from bimedix_jax.inference import scoring
from bimedix_jax.inference.chat import Chat, ChatOptions
from bimedix_jax.inference.generate import generate
from bimedix_jax.inference.planning import Source, Tokens, language_of
from bimedix_jax.inference.scoring import score
from bimedix_jax.kernels import backends
from bimedix_jax.models.init import init_random
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.routing.chance import draws, number_of
from bimedix_jax.routing.draft import FIELDS
from bimedix_jax.routing.interventions import Interventions
from bimedix_jax.routing.rules import MOST_BIAS, MOST_RULES

L, E, K = 2, 6, 3
CONFIG = tiny(num_layers=L, experts=E, top_k=K)
FIRST, TEMPLATE, PROMPT, ANSWER = range(len(ROLES))


@pytest.fixture(autouse=True)
def quick_kernels():
    """Kernels that compile fast; what they compute is tested elsewhere."""
    with backends.use(expert_mlp="composed", grouped_matmul="ragged_dot"):
        yield


@pytest.fixture(scope="module")
def model() -> Mixtral:
    return init_random(CONFIG, seed=3, std=0.3)


@pytest.fixture(scope="module")
def base() -> Mixtral:
    return init_random(CONFIG, seed=4, std=0.3)


def sequence(name: str, language: str, kind: str, length: int) -> tuple[list[int], Source]:
    ids = np.random.default_rng(number_of(name)).integers(1, 30, length).tolist()
    roles = np.array([FIRST] * 4 + [TEMPLATE] * 2 + [PROMPT] * (length // 3), np.uint8)  # the rest is the answer
    return ids, Source(name, language, kind, roles, {"specialty": "cardiology" if kind == "qa" else None})


SEQUENCES = [sequence("r1", "en", "qa", 17), sequence("r2", "ar", "qa", 12), sequence("r3", "ar", "chat", 9)]
IDS, SOURCES = [ids for ids, _ in SEQUENCES], [source for _, source in SEQUENCES]

INTERVENTIONS: list[list[dict[str, Any]]] = [
    [{"op": "ban", "experts": [1, 4]}],
    [{"op": "ban", "experts": [2], "layers": [1], "where": {"language": "ar"}}],
    [{"op": "force", "experts": [5, 0, 2]}],
    [{"op": "force", "experts": [5, 0, 2], "weights": [0.5, 0.25, 0.0], "where": {"role": ["prompt", "answer"]}}],
    [{"op": "include", "experts": [3]}, {"op": "include", "experts": [3, 1], "where": {"positions": ["2:6", 8]}}],
    [{"op": "swap", "experts": [0, 5]}, {"op": "gain", "experts": [5], "value": 0.5}],
    [{"op": "permute", "to": [1, 2, 3, 4, 5, 0]}, {"op": "swap", "experts": [0, 5], "where": {"kind": "chat"}}],
    [{"op": "gain", "experts": [0, 1], "value": 0}],
    [{"op": "gain", "experts": [2], "value": 2.0, "where": {"records": ["r1", "r3"]}}],
    [{"op": "bias", "experts": [4], "value": 0.7}, {"op": "temperature", "value": 2.0}],
    [{"op": "bias", "experts": [4, 2], "value": -1.5, "unit": "deviations", "where": {"role": "answer"}}],
    [{"op": "temperature", "value": 0.25, "where": {"specialty": "cardiology"}}],
    [{"op": "top_k", "k": 1}],
    [{"op": "top_k", "k": 2, "where": {"token_ids": [3, 4, 5, 6, 7, 8]}}, {"op": "uniform"}],
    [{"op": "noise", "std": 1.5, "seed": 7, "layers": ["1:"]}],
    [{"op": "shuffle", "where": {"role": ["template", "prompt", "answer"]}}],
    [{"op": "freeze", "layers": [0]}],
    [{"op": "uniform", "where": {"language": "en"}}],
    [{"op": "hash", "seed": 1}, {"op": "uniform"}],
    [{"op": "random", "seed": 2}, {"op": "gain", "experts": [1], "value": 3.0}],
    [{"op": "by_language", "experts": {"en": [0, 1, 2], "ar": [2, 3, 4, 5]}}],
    [{"op": "noise", "std": 0.5}, {"op": "ban", "experts": [0]}, {"op": "include", "experts": [0]}, {"op": "shuffle"}],
]


def applies(rule: dict[str, Any], source: Source, ids: list[int], position: int) -> bool:
    where = rule.get("where", {})
    roles = source.roles
    assert roles is not None
    role = ROLES[roles[position]] if position < len(roles) else "answer"
    spans = {2, 3, 4, 5, 8}  # the only positions above
    known = {"language": source.language, "kind": source.kind, "role": role, "records": source.id}
    known |= {"token_ids": ids[position], **source.fields}
    if rule["op"] == "by_language" and source.language not in rule["experts"]:
        return False
    return all(
        position in spans if name == "positions" else known[name] in (values if isinstance(values, list) else [values])
        for name, values in where.items()
    )


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


class NumpyModel:
    """A Mixtral in float64 for one sequence at a time."""

    def __init__(self, model: Mixtral):
        flat = nnx.to_flat_state(nnx.state(model))
        self.w = {".".join(map(str, path)): np.asarray(v.get_value(), np.float64) for path, v in flat}

    def norm(self, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.rms_norm_eps) * scale

    def attention(self, x: np.ndarray, layer: int) -> np.ndarray:
        T, H = len(x), CONFIG.head_dim
        angles = np.arange(T)[:, None] * CONFIG.rope_theta ** (-np.arange(H // 2) / (H // 2))

        def heads(name: str, turned: bool) -> np.ndarray:
            y = (x @ self.w[f"layers.attention.{name}.w"][layer]).reshape(T, -1, H)
            low, high, cos, sin = y[..., : H // 2], y[..., H // 2 :], np.cos(angles)[:, None], np.sin(angles)[:, None]
            return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1) if turned else y

        q, k, v = heads("q", True), heads("k", True), heads("v", False)
        mixed = []
        for head in range(CONFIG.num_heads):
            own = head * CONFIG.num_kv_heads // CONFIG.num_heads
            scores = q[:, head] @ k[:, own].T / np.sqrt(H)
            mixed.append(softmax(np.where(np.tri(T, dtype=bool), scores, -np.inf)) @ v[:, own])
        return np.concatenate(mixed, -1) @ self.w["layers.attention.o.w"][layer]

    def expert(self, x: np.ndarray, layer: int, number: int) -> np.ndarray:
        w1, w2, w3 = (self.w[f"layers.moe.{name}.w"][layer, number] for name in ("w1", "w2", "w3"))
        gate = x @ w1
        return (gate / (1 + np.exp(-gate)) * (x @ w3)) @ w2

    def run(self, ids: list[int], decide: Any) -> tuple[np.ndarray, list[list[tuple[list[int], list[float]]]]]:
        """(log p of each token, the experts and weights of each token in each layer)."""
        x, routes = self.w["embed.table"][ids], []
        for layer in range(L):
            x = x + self.attention(self.norm(x, self.w["layers.attention_norm.scale"][layer]), layer)
            states = self.norm(x, self.w["layers.moe_norm.scale"][layer])
            logits = states @ self.w["layers.moe.router.w"][layer]
            routes.append([decide(logits[t], layer, t) for t in range(len(ids))])
            x = x + np.stack(
                [
                    sum((w * self.expert(states[t], layer, e) for e, w in zip(*routes[-1][t], strict=True)), 0 * x[t])
                    for t in range(len(ids))
                ]
            )
        logp = np.log(softmax(self.norm(x, self.w["norm.scale"]) @ self.w["lm_head.w"]))
        return np.append(0.0, logp[np.arange(len(ids) - 1), ids[1:]]), routes


def free(logits: np.ndarray, layer: int, position: int) -> tuple[list[int], list[float]]:
    chosen = np.argsort(-logits)[:K].tolist()
    return chosen, softmax(logits[chosen]).tolist()


def partners(rule: dict[str, Any], source: Source, ids: list[int]) -> dict[int, int]:
    """The token from which each token of a shuffle takes its routes."""
    own = [t for t in range(len(ids)) if applies(rule, source, ids, t)]
    own.sort(key=lambda t: int(draws("shuffle", rule.get("seed", 0), number_of(source.id), t)[0]))
    return dict(zip(own, own[1:] + own[:1], strict=True))


def decider(rules: list[dict[str, Any]], ids: list[int], source: Source, own: Any, frozen: Any) -> Any:
    """The documented order, for one token: noise, bias, temperature, slots, choice, k, weights, permutation, gain."""

    def decide(logits: np.ndarray, layer: int, t: int) -> tuple[list[int], list[float]]:
        def drawn(op: str, seed: int, *parts: int) -> list[int]:
            return sorted(range(E), key=lambda e: int(draws(op, seed, layer, *parts, e)[0]))[:K]

        record = number_of(source.id)
        steered, temperature, banned, deviation = logits.copy(), 1.0, set(), logits.std()
        bias, noise, slots, weights = np.zeros(E), np.zeros(E), [], None
        k, uniform, order, gain = K, False, list(range(E)), np.ones(E)
        for rule in rules:
            spans = rule.get("layers", [0, 1])
            if layer not in ([1] if spans == ["1:"] else spans) or not applies(rule, source, ids, t):
                continue
            match rule["op"]:
                case "ban":
                    banned |= set(rule["experts"])
                case "by_language":
                    banned |= set(range(E)) - set(rule["experts"][source.language])
                case "bias":
                    unit = deviation if rule.get("unit") == "deviations" else 1.0
                    bias[rule["experts"]] += rule["value"] * unit
                case "temperature":
                    temperature *= rule["value"]
                case "noise":
                    words = draws("noise", rule.get("seed", 0), layer, record, t, np.arange(2)).astype(np.uint32)
                    key = jax.random.wrap_key_data(jnp.asarray(words))
                    noise = rule["std"] * np.asarray(jax.random.normal(key, (E,)), np.float64)
                case "force":
                    slots, weights = list(rule["experts"]), rule.get("weights")
                case "include":
                    slots += [e for e in rule["experts"] if e not in slots]
                case "hash":
                    slots, weights = drawn("hash", rule.get("seed", 0), ids[t]), None
                case "random":
                    slots, weights = drawn("random", rule.get("seed", 0), record, t), None
                case "shuffle":
                    slots, weights = own[layer][partners(rule, source, ids)[t]]
                case "freeze":
                    slots, weights = frozen[layer][t]
                case "uniform":
                    uniform = True
                case "top_k":
                    k = rule["k"]
                case "swap":
                    a, b = rule["experts"]
                    order = [{a: b, b: a}.get(e, e) for e in order]
                case "permute":
                    order = [rule["to"][e] for e in order]
                case "gain":
                    gain[rule["experts"]] *= rule["value"]
        steered = (steered + noise + bias) / temperature
        best = [e for e in np.argsort(-steered).tolist() if e not in banned and e not in slots]
        chosen = (list(slots) + best)[:k]
        found = softmax(steered[chosen]) if weights is None else np.asarray(weights[:k])
        if uniform:
            found = np.full(k, 1 / k)
        ran = [order[e] for e in chosen]
        return ran, [float(w * gain[e]) for e, w in zip(ran, found, strict=True)]

    return decide


def test_every_op_agrees_with_a_numpy_model_in_two_programs(model: Mixtral, base: Mixtral) -> None:
    """Log-probabilities, experts, weights and the bits of what was done, over 22 interventions."""
    ours, theirs = NumpyModel(model), NumpyModel(base)
    own, frozen = ([numpy.run(ids, free)[1] for ids in IDS] for numpy in (ours, theirs))
    compiled: Any = scoring._logprobs_at
    programs = compiled._cache_size()
    for rules in INTERVENTIONS:
        interventions = dataclasses.replace(Interventions.of(*rules), base=base)
        planner = interventions.planner(CONFIG, SOURCES)
        for index, logprobs, routing in score(model, IDS, plan=planner, record="choices"):
            decide = decider(rules, IDS[index], SOURCES[index], own[index], frozen[index])
            expected, routes = ours.run(IDS[index], decide)
            np.testing.assert_allclose(logprobs, expected, rtol=1e-3, atol=1e-4, err_msg=str(rules))
            assert routing is not None
            for layer, t in np.ndindex(L, len(IDS[index])):
                experts, weights = routes[layer][t]
                assert routing.experts_LBTK[layer, 0, t, : len(experts)].tolist() == experts, (rules, layer, t)
                assert (routing.experts_LBTK[layer, 0, t, len(experts) :] == -1).all()
                np.testing.assert_allclose(routing.weights_LBTK[layer, 0, t, : len(experts)], weights, atol=1e-4)
        places = [(source, ids, t) for ids, source in SEQUENCES for t in range(len(ids))]
        assert interventions.applied.tolist() == [sum(applies(rule, *place) for place in places) for rule in rules]
    assert compiled._cache_size() - programs <= 2


def tokens_of(*numbers: int) -> Tokens:
    """A batch whose rows are these sequences, padded on the right."""
    rows = [(IDS[number], number) for number in numbers]
    length = max(len(ids) for ids, _ in rows) + 2
    found = np.zeros((2, len(rows), length), np.int32)
    for row, (ids, _) in enumerate(rows):
        found[0, row, : len(ids)] = ids
        found[1, row, : len(ids)] = np.arange(len(ids))
        found[1, row, len(ids) :] = -1
    return Tokens(found[0], np.array([number for _, number in rows])[:, None], found[1])


def test_a_record_says_what_was_done_to_which_token() -> None:
    rules = [{"op": "top_k", "k": 1}, {"op": "gain", "experts": [1], "value": 0, "where": {"language": "ar"}}]
    rules.append({"op": "hash", "where": {"role": "answer", "positions": "9:"}})
    interventions = Interventions.of(*rules)
    assert [json.loads(name) for name in interventions.names] == [
        rules[0],
        {**rules[1], "value": 0.0, "where": {"language": ["ar"]}},
        {**rules[2], "where": {"role": ["answer"], "positions": ["9:"]}},
    ]
    tokens = tokens_of(0, 1)
    done_BT = interventions.planner(CONFIG, SOURCES).plan(tokens, {}).done_BT
    for row, t in np.ndindex(done_BT.shape):
        expected = sum(applies_bit(rule, bit, row, t) for bit, rule in enumerate(rules)) if t < len(IDS[row]) else 0
        assert done_BT[row, t] == expected
    assert [part["tokens"] for part in interventions.to_dict()["rules"]] == [29, 12, 8]


def applies_bit(rule: dict[str, Any], bit: int, row: int, t: int) -> int:
    where = {name: value for name, value in rule.get("where", {}).items() if name != "positions"}
    return ((t >= 9 or bit < 2) and applies({**rule, "where": where}, SOURCES[row], IDS[row], t)) << bit


@pytest.mark.parametrize("rule", [{"op": "noise", "std": 1.0}, {"op": "random"}, {"op": "hash"}])
def test_chance_does_not_depend_on_the_batch(rule: dict[str, Any]) -> None:
    planner = Interventions.of(rule).planner(CONFIG, SOURCES)
    fields = [planner.plan(tokens_of(*rows), {}).plan.to_numpy() for rows in ((0, 1, 2), (2, 1))]
    other = Interventions.of({**rule, "seed": 5}).planner(CONFIG, SOURCES).plan(tokens_of(2, 1), {}).plan.to_numpy()
    for name in ("keys_LBT", "experts_LBTK"):
        whole, part = (found[name] for found in fields)
        np.testing.assert_array_equal(whole[:, 2, :9], part[:, 0, :9])
        np.testing.assert_array_equal(whole[:, 1, :12], part[:, 1, :12])
        drawn = name == ("keys_LBT" if rule["op"] == "noise" else "experts_LBTK")
        assert (other[name] != part).any() == drawn


def test_a_shuffle_takes_every_token_of_a_record_once() -> None:
    planner = Interventions.of({"op": "shuffle", "where": {"role": "answer"}}).planner(CONFIG, SOURCES)
    tokens = tokens_of(0, 1)
    shape = (L, *tokens.tokens_BT.shape, K)
    number_LBTK = np.broadcast_to(np.arange(np.prod(shape[1:3])).reshape(1, *shape[1:3], 1), shape).astype(np.float32)
    experts_LBTK = np.broadcast_to(np.arange(K), shape)
    routes: Any = dataclasses.make_dataclass("Routes", ["experts_LBTK", "weights_LBTK"])(experts_LBTK, number_LBTK)
    taken = planner.plan(tokens, {"model": routes}).plan.to_numpy()["weights_LBTK"][0, ..., 0]
    answers = [range(4 + 2 + len(ids) // 3, len(ids)) for ids in IDS[:2]]
    for row, own in enumerate(answers):
        before, after = number_LBTK[0, row, list(own), 0], taken[row, list(own)]
        assert sorted(after) == sorted(before)
        assert len(own) == 1 or (after != before).all()
        assert (np.delete(taken[row], list(own)) == -1).all()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [{"op": "ban", "experts": [0, 1]}, {"op": "ban", "experts": [2, 3]}],
            "leave a token of layer 0 only 2 of its experts",
        ),
        ([{"op": "ban", "experts": [6]}], "rule 0 \\(ban\\) names expert 6, but this model has experts 0 .. 5"),
        (
            [{"op": "gain", "experts": [0], "value": 0, "layers": [2]}],
            "names layer 2, but .* has layers 0 .. 1",
        ),
        ([{"op": "uniform", "layers": ["5:"]}], "names no layer of this model with '5:'; give some of 0 .. 1"),
        ([{"op": "uniform", "layers": [0, "2:"]}], "names no layer of this model with '2:'"),
        ([{"op": "uniform", "layers": ["0:999"]}], "names layers '0:999', but this model has layers 0 .. 1"),
        ([{"op": "uniform", "layers": [0, ":3"]}], "names layers ':3', but this model has layers 0 .. 1"),
        ([{"op": "force", "experts": [0, 1]}], "forces 2 experts, but this model's k is 3; name 3, or use include"),
        ([{"op": "include", "experts": [0, 1, 2, 3]}], "includes 4 experts, more than this model's k of 3"),
        ([{"op": "permute", "to": [3, 1, 2, 0]}], "which is no permutation of the 6 experts"),
        ([{"op": "top_k", "k": 4}], "asks for 4 experts a token, but this model's k is 3; ask for fewer"),
        ([{"op": "by_language", "experts": {"ar": [1]}}], "has 1 experts for ar, but this model's k is 3"),
        ([{"op": "ban", "experts": [0], "where": {"pair": "p"}}], "asks for pair, which is not available.*`records`"),
        ([{"op": "uniform", "where": {"document": "d"}}], "asks for document, which is not available"),
    ],
)
def test_rules_that_do_not_fit_raise(rules: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(BimedixError, match=message):
        Interventions.of(*rules).planner(CONFIG, SOURCES)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"op": "banish"}, "has 0.op = 'banish', but it should be one of 'ban', 'force', "),
        ({"experts": [0]}, "lacks the key 0.op;"),
        ({"op": "uniform", "where": "ar"}, "has 0.where = 'ar', but it should be an object;"),
        ({"op": "ban", "experts": [0], "layer": [1]}, "unknown key"),
        ({"op": "ban", "experts": [0], "where": {"langauge": "ar"}}, "unknown key.*langauge"),
        ({"op": "ban"}, "lacks the key 0.experts"),
        ({"op": "ban", "experts": [0, 0]}, "names an expert twice"),
        ({"op": "ban", "experts": ["0"]}, "0.experts.0 = '0'"),
        ({"op": "gain", "experts": [0], "value": -1}, "greater than or equal to 0"),
        ({"op": "temperature", "value": 0}, "greater than 0"),
        ({"op": "top_k", "k": 0}, "greater than or equal to 1"),
        ({"op": "uniform", "layers": ["4"]}, "'4' is not a range"),
        ({"op": "uniform", "layers": ["4:4"]}, "'4:4' is an empty range"),
        ({"op": "uniform", "where": {"positions": [":0"]}}, "':0' is an empty range"),
        ({"op": "uniform", "where": {"role": "question"}}, "question"),
        (
            {"op": "uniform", "where": {"language": "arabic"}},
            "where.language = 'arabic', but it should be 'en' or 'ar'",
        ),
        (
            {"op": "uniform", "where": {"kind": ["qa", "mcq"]}},
            "kind.1 = 'mcq', but it should be 'qa', 'mcqa' or 'chat'",
        ),
        ({"op": "by_language", "experts": {"arabic": [0]}}, "'arabic', but it should be 'en' or 'ar'"),
        ({"op": "bias", "experts": [0], "value": 2e6}, "less than or equal to 1000000"),
        ({"op": "force", "experts": [0, 1], "weights": [1.0]}, "1 weights for 2 experts"),
        ({"op": "swap", "experts": [1]}, "has 1 value in 0.experts, but it should have at least 2;"),
        ({"op": "swap", "experts": [1, 2, 3]}, "has 3 values in 0.experts, but it should have at most 2;"),
        ({"op": "ban", "experts": []}, "has 0 values in 0.experts, but it should have at least 1;"),
        ({"op": "ban", "experts": 3}, "has 0.experts = 3, but it should be a list;"),
        (
            {"op": "permute", "to": [1, 1, 2, 3]},
            r"to is \[1, 1, 2, 3\], which is no permutation; name each expert from",
        ),
    ],
)
def test_wrong_rules_are_refused_when_the_file_is_read(tmp_path, rule: dict[str, Any], message: str) -> None:
    (tmp_path / "rules.json").write_text(json.dumps([rule]))
    with pytest.raises(BimedixError, match=message) as found:
        Interventions.read(tmp_path / "rules.json")
    assert str(found.value).endswith("correct it; docs/routing.md lists the rules.")
    for text, problem in {
        "[]": "is not a list of 1 to 32 rules",
        '"ban"': "is not a list of 1 to 32 rules",
        json.dumps(rule): "is a JSON object, but rules are a list: put [ ] around it",
        json.dumps([{"op": "uniform"}] * 33): "is not a list of 1 to 32 rules",
    }.items():
        (tmp_path / "rules.json").write_text(text)
        with pytest.raises(BimedixError, match=re.escape(problem)):
            Interventions.read(tmp_path / "rules.json")


def test_rules_that_cannot_apply_to_a_token_raise() -> None:
    late = Interventions.of({"op": "force", "experts": [0, 1, 2]}, {"op": "include", "experts": [3]})
    with pytest.raises(BimedixError, match=r"rule 1 .include. finds a token whose slots earlier rules force already"):
        late.planner(CONFIG, SOURCES).plan(tokens_of(0), {})
    bans = [{"op": "ban", "experts": [0, 1], "where": {"language": x}} for x in ("ar", ["ar", "en"])]
    Interventions.of(*bans).planner(CONFIG, SOURCES).plan(tokens_of(0, 1), {})
    bans.append({"op": "ban", "experts": [2, 3], "where": {"role": "answer"}})
    with pytest.raises(
        BimedixError, match="leave a token of layer 0 only 2 of its experts, but the router needs 3; ban fewer"
    ):
        Interventions.of(*bans).planner(CONFIG, SOURCES).plan(tokens_of(0, 1), {})
    packed = [dataclasses.replace(SOURCES[0], roles=np.where(np.arange(17) < 12, 255, ANSWER), where="packed rows")]
    planner = Interventions.of({"op": "uniform", "where": {"role": "answer"}}).planner(CONFIG, packed)
    assert planner.plan(tokens_of(0), {}).done_BT.sum() == 5
    planner = Interventions.of({"op": "uniform", "where": {"role": "prompt"}}).planner(CONFIG, packed)
    with pytest.raises(BimedixError, match="asks for role, which is not available: packed rows lack it; records have"):
        planner.plan(tokens_of(0), {})


def test_the_examples_of_the_page_are_rules_for_a_model_of_eight_experts() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/routing.md").read_text("utf-8")
    examples = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
    blocks = [example for example in examples if isinstance(example, list)]  # the other one is a file of knock-outs
    rows = [[json.loads(rule)] for rule in re.findall(r"^\|.*`(\{.*\})` \|$", text, re.MULTILINE)]
    mixtral = tiny(num_layers=32, experts=8)
    for rules in (*blocks, *(row for row in rows if row[0]["op"] != "permute")):
        parsed = Interventions.of(*rules)
        if "recording" not in rules[0]:  # which must exist
            parsed.check(mixtral)
    named = {row[0]["op"] for row in rows}
    assert named == FIELDS.keys()
    assert len(blocks) == 1
    prose = " ".join(text.split())
    assert f"at most {MOST_RULES} rules" in prose
    assert f"from -{MOST_BIAS:,.0f} to {MOST_BIAS:,.0f}" in prose


def test_rules_follow_generated_tokens(model: Mixtral, bytes_tokenizer) -> None:
    """Each token gets the plan of its id and position, as in one pass over prompt and answer."""
    rules = Interventions.of(
        {"op": "hash", "where": {"positions": ["3:"]}}, {"op": "noise", "std": 0.5}, {"op": "top_k", "k": 2}
    )
    prompts = [[5, 17, 3, 60, 2], [9]]
    answers, routing = generate(model, prompts, 6, plan=rules, record="choices")
    assert answers != generate(model, prompts, 6)
    whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    planner = rules.planner(CONFIG, [Source("prompt 0"), Source("prompt 1")])
    for index, _, alone in score(model, whole, plan=planner, record="choices"):
        assert alone is not None
        np.testing.assert_array_equal(routing.experts_LBTK[:, index, : len(whole[index])], alone.experts_LBTK[:, 0])
    for op in ("shuffle", "freeze"):
        with pytest.raises(BimedixError, match="generated tokens have none"):
            generate(model, prompts, 6, plan=dataclasses.replace(Interventions.of({"op": op}), base=model))
    with pytest.raises(BimedixError, match="rule 0 asks for language, which is not available: the prompts lack it"):
        generate(model, prompts, 6, plan=Interventions.of({"op": "uniform", "where": {"language": "ar"}}))
    options = ChatOptions(max_new_tokens=3, temperature=0.0, top_p=None)
    fixed = Interventions.of({"op": "by_language", "experts": {"ar": [0, 1, 2], "en": [3, 4, 5]}})
    for question, experts in (("I cough.", {3, 4, 5}), ("عندي سعال.", {0, 1, 2})):
        reply = Chat(model, bytes_tokenizer, options=options, plan=fixed, record="choices").ask(question)
        assert reply.routing is not None
        assert set(np.unique(reply.routing.experts_LBTK).tolist()) == experts


def test_the_language_of_a_question_is_that_of_its_letters() -> None:
    texts = ("ما الربو؟", "What is الربو?", "12", "علاج asthma المزمن")
    assert [language_of(text) for text in texts] == ["ar", "en", "en", "ar"]
