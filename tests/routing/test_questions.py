"""The ladder of claims, on tables with planted dependences: each is found for what it is and no further."""

import dataclasses
import json

import numpy as np
import planted_routes
import pytest

from bimedix_jax.errors import BimedixError
from bimedix_jax.routing.claims import LEVELS, Analysis, highest
from bimedix_jax.routing.questions import analyse as analyse_fully
from bimedix_jax.routing.tables import Interaction, Tables, TokenRoutes, count_routes

CELLS = [(layer, expert) for layer in range(2) for expert in range(4)]


def planted(seed: int = 5, extra: dict | None = None, **kind) -> Tables:
    return Tables(**planted_routes.recording(np.random.default_rng(seed), **kind), **(extra or {}))


def analyse(tables: Tables, **options) -> Analysis:
    """Without exploration, which takes most of the time."""
    return analyse_fully(tables, explore=False, **options)


def level(analysis: Analysis) -> str:
    assert analysis.questions[0].level == highest([claim.level for claim in analysis.claims])
    return highest([claim.level for claim in analysis.claims])


def why(analysis: Analysis, claim: str) -> str:
    return next(refusal.why for refusal in analysis.refused if claim in refusal.claim)


def test_no_dependence_is_no_claim():
    found = [level(analyse(planted(seed))) for seed in range(6)]
    assert found.count("none") >= 5
    assert set(found) <= {"none", "association", "token"}


def test_routes_of_token_ids_alone_end_at_association():
    """Languages with other words: loads differ, but the same id goes to the same experts."""
    analysis = analyse(planted(by_token=3.0, mixed=0.3, by_record=0.1))
    assert level(analysis) == "association"
    question = analysis.questions[0]
    assert abs(question.within_token or 1) < 0.2 * (question.distance or 0)
    assert "not tested" in why(analysis, "beyond geometry")


def routed(recorded: dict, first_N: np.ndarray) -> Tables:
    """The recording with other routes: this expert of four and the next one, in both layers."""
    experts_NK = np.stack([first_N % 4, (first_N + 1) % 4], axis=1)
    routes = dataclasses.replace(recorded["routes"], experts_LNK=np.stack([experts_NK, experts_NK[:, ::-1]]))
    counts_RLE, _ = count_routes(routes, len(recorded["tokens_R"]), 2, 4)
    return Tables(**{**recorded, "counts_RLE": counts_RLE, "routes": routes})


def test_tokens_that_decide_their_experts_exactly_end_at_association():
    """No noise at all: within an id nothing varies, and rounding must not become a statistic."""
    recorded = planted_routes.recording(np.random.default_rng(0), mixed=0.5)
    analysis = analyse(routed(recorded, recorded["routes"].id_N // 20))
    assert level(analysis) == "association"
    assert min(cell.p_within or 0 for cell in analysis.questions[0].cells) == 1


def test_experts_that_id_and_language_decide_exactly_are_beyond_token_identity():
    recorded = planted_routes.recording(np.random.default_rng(0), mixed=1.0)
    english_N = recorded["groups"]["language"][recorded["routes"].record_N] == "en"
    analysis = analyse(routed(recorded, recorded["routes"].id_N + english_N))
    assert level(analysis) == "token"
    assert (analysis.questions[0].layers[0].language_nats or 0) > 0.3


def test_language_in_shared_tokens_is_found_beyond_token_identity():
    analysis = analyse(planted(by_language=0.5, by_token=1.0))
    assert level(analysis) == "token"
    question = analysis.questions[0]
    assert (question.within_token or 0) > 0.05
    assert sum(part or 0 for part in (question.token_mix, question.within_token, question.unshared)) == pytest.approx(
        question.distance
    )
    for cell in question.cells:
        parts = [part or 0.0 for part in (cell.token_mix, cell.within_token, cell.unshared)]
        assert sum(parts) == pytest.approx(cell.estimate)


def test_balanced_loads_do_not_hide_a_dependence():
    """Half of the ids prefer the first expert in Arabic, the others the last: loads are alike, routes are not."""
    analysis = analyse(planted(by_language=0.8, cancelling=True, by_record=0.2))
    assert level(analysis) == "token"
    assert max(abs(cell.estimate) for cell in analysis.questions[0].cells) < 0.03


def test_without_shared_ids_the_token_level_is_not_identified():
    analysis = analyse(planted(by_language=0.5, mixed=0.0))
    assert level(analysis) == "association"
    assert "not identified" in why(analysis, "beyond token identity")


def test_without_tokens_only_association_is_tested():
    recorded = planted_routes.recording(np.random.default_rng(5), by_language=0.5)
    analysis = analyse(Tables(**{**recorded, "routes": None}))
    assert level(analysis) == "association"
    assert "no token ids" in why(analysis, "beyond token identity")


def hidden_states(seed: int, routers: int, aligned: float) -> Tables:
    """Routes over hidden states that differ by language, by `aligned` more along the router than for random ones."""
    rng = np.random.default_rng(seed)
    recorded = planted_routes.recording(rng, records=60, tokens=20)
    routes, width = recorded["routes"], 16
    arabic_N = recorded["groups"]["language"][routes.record_N] == "ar"
    direction = rng.standard_normal(width) / 4
    state_ND = rng.standard_normal((60, width))[routes.id_N] + np.where(arabic_N, 1, -1)[:, None] * direction
    state_ND += 0.3 * rng.standard_normal((60, width))[routes.record_N]

    def route(weight_LDE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        score_LNE = np.einsum("nd,lde->lne", state_ND, weight_LDE)
        score_LNE -= np.median(score_LNE, axis=1, keepdims=True)  # alike loads
        experts_LNK = np.argsort(-score_LNE, axis=2)[:, :, :2]
        return count_routes(dataclasses.replace(routes, experts_LNK=experts_LNK), 60, 2, 4)[0], experts_LNK

    own_LDE = rng.standard_normal((2, width, 4))
    own_LDE += aligned * direction[:, None] * np.array([1.0, -1, 1, -1])
    counts_RLE, experts_LNK = route(own_LDE)
    random = [route(rng.standard_normal((2, width, 4)))[0] for _ in range(routers)]
    return Tables(
        counts_RLE=counts_RLE,
        tokens_R=recorded["tokens_R"],
        groups=recorded["groups"],
        routes=dataclasses.replace(routes, experts_LNK=experts_LNK),
        random_RMLE=np.stack(random, axis=1),
    )


def test_a_random_router_does_not_reach_geometry():
    """It associates with the language, also within ids, because hidden states do."""
    found = [analyse(hidden_states(seed, 100, 0.0)) for seed in range(3)]
    assert {level(analysis) for analysis in found} == {"token"}
    percentiles = [layer.geometry_percentile for analysis in found for layer in analysis.questions[0].layers]
    assert 5 < np.mean([p for p in percentiles if p is not None]) < 95


def test_a_router_along_the_languages_is_beyond_geometry():
    analysis = analyse(hidden_states(0, 100, 6.0))
    assert level(analysis) == "geometry"
    assert analysis.questions[0].layers[0].geometry_percentile == 100
    few = analyse(hidden_states(0, 99, 6.0))
    assert level(few) == "token"
    assert "99 random routers" in why(few, "beyond geometry")


def full_evidence(seed: int = 0, shuffled: float = 0.3, **changes) -> Analysis:
    """Everything that a claim of function needs, less what `changes` takes away."""
    base = hidden_states(seed, 100, 6.0)
    rng = np.random.default_rng(seed)
    records = len(base.tokens_R)
    loads_RLE = rng.dirichlet(np.full(4, 50.0), (records, 2))
    nll_R = rng.normal(2, 0.5, records)
    whole = {
        "baseline_RLE": rng.multinomial(2 * base.tokens_R[:, None], loads_RLE),
        "nll_R": nll_R,
        "shuffled_nll_R": nll_R + shuffled * rng.uniform(0.5, 1.5, records),
        "interactions": [Interaction(field="language", layer=0, expert=1, estimate=0.2, p_adjusted=0.01)],
    }
    return analyse(dataclasses.replace(base, **{**whole, **changes}))


def test_all_evidence_together_is_functional_for_the_expert_that_was_knocked_out():
    analysis = full_evidence()
    assert analysis.gate is not None
    assert analysis.gate.diverged
    assert [(claim.layer, claim.expert) for claim in analysis.claims if claim.level == "functional"] == [(0, 1)]
    assert [claim.level for claim in analysis.claims if (claim.layer, claim.expert) == (0, 0)] == ["learned"]


def test_equal_experts_end_at_geometry():
    """Shuffled routes cost exactly nothing, so it does not matter to whom a token goes."""
    analysis = full_evidence(shuffled=0.0)
    assert analysis.gate is not None
    assert (analysis.gate.delta_nll, analysis.gate.diverged) == (0, False)
    assert level(analysis) == "geometry"
    assert "divergence gate fails" in why(analysis, "experts differ")


def test_a_gate_that_was_not_measured_ends_at_geometry():
    analysis = full_evidence(nll_R=None, shuffled_nll_R=None)
    assert level(analysis) == "geometry"
    assert "not tested" in why(analysis, "experts differ")


def test_without_baseline_or_change_nothing_is_learned():
    base = hidden_states(0, 100, 6.0)
    assert level(full_evidence(baseline_RLE=None)) == "geometry"
    assert level(full_evidence(baseline_RLE=base.counts_RLE)) == "geometry"  # the base model routes alike


def test_a_knock_out_that_is_not_significant_is_not_functional():
    weak = [Interaction(field="language", layer=0, expert=1, estimate=0.2, p_adjusted=0.2)]
    assert level(full_evidence(interactions=weak)) == "learned"
    assert "no knock-out" in why(full_evidence(interactions=None), "functional")


def test_groups_below_ten_clusters_have_neither_interval_nor_claim():
    analysis = analyse(planted(by_language=2.0, records=19))
    assert analysis.claims == ()
    question = analysis.questions[0]
    assert {cell.low for cell in question.cells} | {cell.p_adjusted for cell in question.cells} == {None}
    assert all(np.isfinite(cell.estimate) for cell in question.cells)
    assert "only 9 clusters of en" in why(analysis, "language")


def test_groups_below_twenty_clusters_are_warned_about():
    analysis = analyse(planted(by_language=2.0, records=30))
    assert len(analysis.warnings) == 2
    assert level(analysis) == "token"


def test_clusters_are_documents_where_they_are_given():
    """Eight documents: 80 records do not become 80 clusters."""
    recorded = planted_routes.recording(np.random.default_rng(5), by_language=2.0)
    documents = np.arange(80) % 8
    analysis = analyse(Tables(**recorded, cluster_R=documents), unit="document")
    assert analysis.claims == ()
    assert analysis.questions[0].clusters == {"ar": 4, "en": 4}


def test_pairs_are_compared_within():
    """A record and its translation share a topic: signs are flipped, and topics cancel."""
    recorded = planted_routes.recording(np.random.default_rng(5), by_language=0.5)
    pairs = np.array([f"pair {record // 2}" for record in range(80)])
    analysis = analyse(Tables(**recorded, pair_R=pairs))
    question = analysis.questions[0]
    assert question.paired
    assert question.clusters == {"ar": 40, "en": 40}
    assert level(analysis) == "token"
    assert question.cells[0].same_id is not None
    lead, trail = recorded["counts_RLE"][0::2], recorded["counts_RLE"][1::2]
    share = [x / x.sum(2, keepdims=True) for x in (lead, trail)]
    np.testing.assert_allclose([c.estimate for c in question.cells], (share[0] - share[1]).mean(0).ravel())


def test_strata_remove_what_they_explain():
    """Arabic comes mostly from one source, which routes differently; within sources there is nothing."""
    recorded = planted_routes.recording(np.random.default_rng(6), by_record=0.1)
    rng = np.random.default_rng(0)
    source = np.where(rng.random(80) < 0.8, np.arange(80) % 2, rng.integers(0, 2, 80))
    counts_RLE = recorded["counts_RLE"] * np.where(source[:, None, None] == np.arange(4) % 2, 3, 1)
    tables = {**recorded, "counts_RLE": counts_RLE, "routes": None}
    assert level(analyse(Tables(**tables))) == "association"
    assert level(analyse(Tables(**tables, stratum_R=source))) == "none"


def test_more_groups_are_compared_with_all_others_and_questions_are_adjusted():
    recorded = planted_routes.recording(np.random.default_rng(5), by_language=0.5)
    recorded["groups"] = {**recorded["groups"], "kind": np.array(["qa", "chat", "mcqa"])[np.arange(80) % 3]}
    both = analyse(Tables(**recorded), fields=("language", "kind", "specialty"))
    assert [question.name for question in both.questions] == ["language", "kind=chat", "kind=mcqa", "kind=qa"]
    alone = analyse(Tables(**recorded))
    first = [np.array([cell.p_adjusted for cell in found.questions[0].cells]) for found in (both, alone)]
    assert (first[0] >= first[1]).all()
    assert "not specialty" in why(both, "specialty")
    assert {claim.level for claim in both.claims if claim.question != "language"} == {"none"}


def test_no_difference_is_said_only_after_a_test_of_equivalence():
    many = planted(records=400, by_record=0.05)
    assert analyse(many).questions[0].equivalent
    few = analyse(planted(by_record=1.0)).questions[0]
    assert not few.equivalent
    assert {str(cell.verdict) for cell in few.cells} == {"not resolved"}
    assert min(cell.mde80 or 0 for cell in few.cells) > 0.02


def test_the_document_has_the_keys_that_readers_expect():
    document = json.loads(json.dumps(full_evidence().to_dict(), allow_nan=False))
    assert {"gate", "questions", "claims", "refused", "exploration"} <= set(document)
    assert set(document["gate"]) == {"delta_nll", "low", "high", "floor", "diverged"}
    question = document["questions"][0]
    assert {"name", "unit", "clusters", "icc", "family", "cells", "layers"} <= set(question)
    assert {"overlap", "token_mix", "within_token"} <= set(question)
    assert {"layer", "expert", "estimate", "low", "high", "p_adjusted", "mde80"} <= set(question["cells"][0])
    assert {"layer", "jsd", "low", "high", "geometry_percentile"} <= set(question["layers"][0])
    assert set(document["claims"][0]) == {"question", "layer", "expert", "level"}
    assert {claim["level"] for claim in document["claims"]} <= set(LEVELS)
    assert set(document["refused"][0]) == {"claim", "why"}
    assert [(claim["layer"], claim["expert"]) for claim in document["claims"]] == CELLS


def test_exploration_lists_tokens_and_pairs_of_experts_without_claims():
    recorded = planted_routes.recording(np.random.default_rng(5), by_language=0.8, cancelling=True)
    found = analyse_fully(Tables(**recorded)).exploration
    assert {item.kind for item in found} == {"token", "pair"} or {item.kind for item in found} == {"token"}
    assert all(20 <= (item.token or 20) < 40 and item.q <= 0.1 for item in found)  # only shared ids can differ


def test_one_expert_and_one_choice_work():
    rng = np.random.default_rng(0)
    record_N = np.repeat(np.arange(24), 10)
    routes = TokenRoutes(
        record_N=record_N,
        id_N=rng.integers(0, 5, 240),
        experts_LNK=rng.integers(0, 300, (1, 240, 1), np.uint16),
        experts=300,
    )
    counts_RLE, tokens_R = count_routes(routes, 24, 1, 300)
    language_R = np.array(["ar", "en"])[np.arange(24) % 2]
    wide = Tables(counts_RLE=counts_RLE, tokens_R=tokens_R, groups={"language": language_R}, routes=routes)
    assert len(analyse(wide).claims) == 300
    single = Tables(counts_RLE=tokens_R[:, None, None], tokens_R=tokens_R, groups={"language": language_R})
    assert level(analyse(single)) == "none"


def test_arrays_that_do_not_fit_are_refused():
    recorded = planted_routes.recording(np.random.default_rng(0), records=20)
    with pytest.raises(BimedixError, match="labels of kind has the shape"):
        Tables(**{**recorded, "groups": {"kind": np.array(["qa"])}})
    with pytest.raises(BimedixError, match="random routers"):
        Tables(**recorded, random_RMLE=np.zeros((20, 3, 2)))
    with pytest.raises(BimedixError, match="give both or none"):
        Tables(**recorded, nll_R=np.zeros(20))
    with pytest.raises(BimedixError, match="without any route"):
        Tables(**{**recorded, "counts_RLE": 0 * recorded["counts_RLE"]})
    with pytest.raises(BimedixError, match="too few"):
        analyse(Tables(**recorded), permutations=999)
