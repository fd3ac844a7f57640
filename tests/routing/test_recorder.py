"""The recorder against the model's own record, one record at a time; kills, meshes, gates and random routers."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import tiny

from bimedix_jax import cli
from bimedix_jax.checkpoint import store
from bimedix_jax.data import pack
from bimedix_jax.data.encoding import encode_chat, roles_of_chat
from bimedix_jax.data.records import Record, conversation, write_jsonl
from bimedix_jax.data.roles import ROLES
from bimedix_jax.data.tokenizer import byte_tokenizer
from bimedix_jax.errors import BimedixError
from bimedix_jax.inference.generate import generate
from bimedix_jax.inference.planning import Source, Tokens
from bimedix_jax.kernels import backends
from bimedix_jax.models.init import init_random
from bimedix_jax.routing import recorder as recorders
from bimedix_jax.routing.interventions import Interventions
from bimedix_jax.routing.random_routers import fitted_biases, oriented, router_weights
from bimedix_jax.routing.recorded import tables_of
from bimedix_jax.routing.recorded_data import Data
from bimedix_jax.routing.recorder import RecordSettings, record_routes
from bimedix_jax.routing.recording import Recording
from bimedix_jax.sharding.placement import place
from bimedix_jax.sharding.rules import make_mesh

CONFIG = tiny(max_position_embeddings=128)
LAYERS, EXPERTS, TOP_K = CONFIG.num_layers, CONFIG.router.num_experts, CONFIG.router.top_k
TEXTS = [
    ("en", "What is asthma?", "A chronic disease of the airways."),
    ("ar", "ما الربو؟", "مرض مزمن في الصدر."),
    ("en", "Why do I cough so much?", "Nobody can tell from here."),
    ("ar", "لماذا أسعل كثيرا؟", "لا أحد يعلم."),
    ("en", "Long. " * 40, "Too long."),
    ("en", "Is it a virus?", "Perhaps."),
]

EVERYTHING = RecordSettings(exact=True, norms=True, gate=True, random_routers=120, batch_tokens=256)


@pytest.fixture(autouse=True, scope="module")
def quick_kernels():
    with backends.use(expert_mlp="composed", grouped_matmul="ragged_dot"):
        yield


@pytest.fixture(scope="module")
def model():
    return init_random(CONFIG, seed=4, std=0.3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("bytes"))


def made(number, language, *turns):
    known = {"id": f"r{number}", "language": language, "kind": "qa", "source": "test", "licence": "Apache-2.0"}
    known |= {
        "split": "heldout",
        "specialty": "lungs",
        "provenance": {"pair": number // 2, "document": f"d{number // 2}"},
    }
    return Record.model_validate(known | {"conversations": conversation(*turns)})


@pytest.fixture(scope="module")
def records():
    return [made(number, *text) for number, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def data(records, tokenizer):
    return Data(records, None, tokenizer, "digest", None)


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """Everything that can be recorded, in float32."""
    out = tmp_path_factory.mktemp("whole") / "R"
    record_routes(model, data, out, EVERYTHING, {"model": "m"}, {"model": "tiny"})
    return Recording.open(out, verify=True)


def own_tokens(records, tokenizer):
    for number, record in enumerate(records):
        if number != 4:
            yield record, np.array(encode_chat(tokenizer, record.conversations)[0])


def alone(model, ids):
    """What the model does with one record, padded to one length so that it compiles once."""
    tokens, segments = np.zeros((2, 1, 128), np.int32)
    tokens[0, : len(ids)], segments[0, : len(ids)] = ids, 1
    return model(tokens, segments)


def test_rows_are_the_models_own_record(model, tokenizer, records, whole):
    names = ("record", "position", "id", "role", "nll", "experts", "weights", "margin", "entropy", "norms")
    columns = whole.tokens(*names)
    assert whole.manifest.too_long == ("r4",)
    assert whole.records["id"] == ["r0", "r1", "r2", "r3", "r5"]
    assert whole.records["pair"][:3] == ["0", "0", "1"]
    w1, w2, w3 = (np.asarray(getattr(model.layers.moe, name).w[...]) for name in ("w1", "w2", "w3"))
    assert w1.shape[:2] == (LAYERS, EXPERTS) == w2.shape[:2] == w3.shape[:2]
    for number, (record, ids) in enumerate(own_tokens(records, tokenizer)):
        own = columns["record"] == number
        out, n = alone(model, ids), len(ids)
        assert columns["id"][own].tolist() == ids.tolist()
        assert columns["position"][own].tolist() == list(range(n))
        assert columns["role"][own].tolist() == roles_of_chat(tokenizer, record.conversations).tolist()
        experts_NLK = np.asarray(out.routing.experts_LBTK[:, 0, :n]).swapaxes(0, 1)
        assert np.array_equal(columns["experts"][own], experts_NLK)
        weights_NLK = np.asarray(out.routing.weights_LBTK[:, 0, :n]).swapaxes(0, 1)
        np.testing.assert_allclose(columns["weights"][own], weights_NLK, rtol=1e-4)
        logits_NLE = np.asarray(out.routing.logits_LBTE[:, 0, :n]).swapaxes(0, 1)
        ordered = np.sort(logits_NLE, -1)[..., ::-1]
        np.testing.assert_allclose(columns["margin"][own], ordered[..., TOP_K - 1] - ordered[..., TOP_K], atol=1e-4)
        p = np.asarray(jax.nn.softmax(logits_NLE))
        np.testing.assert_allclose(columns["entropy"][own], -(p * np.log(p)).sum(-1), atol=1e-4)
        logp = np.asarray(jax.nn.log_softmax(out.logits_BTV[0, :n]))
        np.testing.assert_allclose(columns["nll"][own][1:], -logp[np.arange(n - 1), ids[1:]], atol=1e-4)
        assert np.isnan(columns["nll"][own][0])


def test_norms_are_those_of_the_experts_outputs(model, tokenizer, records, whole):
    """Against a forward pass in NumPy of the first layer's experts."""
    columns = whole.tokens("norms", "experts")
    _, ids = next(own_tokens(records, tokenizer))
    tokens_BT = jnp.zeros((1, 128), jnp.int32).at[0, : len(ids)].set(ids)
    states_LBTD, _ = recorders.states_step(*nnx.split(model), tokens_BT, (jnp.arange(128) < len(ids))[None].astype(int))
    x_ND = np.asarray(states_LBTD[0, 0, : len(ids)], np.float64)
    w1, w2, w3 = (np.asarray(getattr(model.layers.moe, name).w[...][0], np.float64) for name in ("w1", "w2", "w3"))
    for token, x_D in enumerate(x_ND):
        for slot, expert in enumerate(columns["experts"][token, 0]):
            gate = x_D @ w1[expert]
            y_D = (gate / (1 + np.exp(-gate)) * (x_D @ w3[expert])) @ w2[expert]
            assert columns["norms"][token, 0, slot] == pytest.approx(np.linalg.norm(y_D), rel=1e-3)


def test_the_gate_takes_routes_from_other_tokens_of_the_record(model, whole):
    nll, shuffled = whole.tokens("nll", "shuffled_nll").values()
    assert np.array_equal(np.isnan(nll), np.isnan(shuffled))
    assert np.nanmax(np.abs(nll - shuffled)) > 1e-2
    assert whole.manifest.nll_floor is not None
    assert whole.manifest.nll_floor < 1e-5
    assert tables_of(whole).nll_floor == pytest.approx(1e-4)


def test_equal_experts_cost_nothing_when_routes_are_shuffled(model, data, tmp_path):
    equal = nnx.clone(model)
    for linear in (equal.layers.moe.w1, equal.layers.moe.w2, equal.layers.moe.w3):
        w = linear.w[...]
        linear.w.set_value(jnp.broadcast_to(w[:, :1], w.shape))
    record_routes(equal, data, tmp_path / "R", EVERYTHING)
    columns = Recording.open(tmp_path / "R").tokens("nll", "shuffled_nll")
    assert np.nanmax(np.abs(columns["nll"] - columns["shuffled_nll"])) < 1e-5


def test_shuffled_places_are_permutations_within_records(data):
    part = [item for item in data.items() if item.source.id != "r4"]
    lengths = [len(item.ids) for item in part]
    [(places, tokens_BT, ids_BT)] = recorders.packed([item.ids for item in part], 512, 128)
    items_BT, positions_BT = recorders.packed_places(tokens_BT.shape, places, lengths)
    tokens = recorders.Tokens(tokens_BT, items_BT, np.where(ids_BT != 0, positions_BT, -1))
    from_BT = recorders.shuffled_places(tokens, ids_BT, [item.source for item in part], 0)
    valid = ids_BT != 0
    assert np.array_equal(items_BT.ravel()[from_BT][valid], items_BT[valid])
    assert len(set(from_BT[valid].tolist())) == valid.sum()
    assert (from_BT != np.arange(valid.size).reshape(valid.shape))[valid].all()


def test_random_routers_have_the_gram_matrix_and_the_loads(model, data, whole):
    weights_LDE = router_weights(model)
    drawn = oriented(weights_LDE[0], 5, np.random.default_rng(0)).reshape(-1, 5, EXPERTS)
    for router in range(5):
        np.testing.assert_allclose(drawn[:, router].T @ drawn[:, router], weights_LDE[0].T @ weights_LDE[0], atol=1e-4)
    states = np.random.default_rng(0).normal(size=(2048, CONFIG.hidden_size)).astype(np.float32)
    load_E = np.array([1.0, 0.5, 0.3, 0.2], np.float32)
    bias = fitted_biases(states, drawn.reshape(len(drawn), -1), load_E, TOP_K)
    scores = (states @ drawn.reshape(len(drawn), -1)).reshape(-1, 5, EXPERTS) + np.asarray(bias)
    chosen = np.argsort(-scores, -1)[..., :TOP_K]
    loads = np.stack([(chosen == expert).any(-1).mean(0) for expert in range(EXPERTS)], -1)
    np.testing.assert_allclose(loads, np.broadcast_to(load_E, loads.shape), atol=0.03)
    counts = whole.random_counts()
    assert counts.shape == (5, 120, LAYERS, EXPERTS)
    tables = tables_of(whole)
    assert np.array_equal(counts.sum(-1), np.broadcast_to(TOP_K * tables.tokens_R[:, None, None], counts.shape[:3]))
    shares = [x.sum(0) / x.sum((0, -1), keepdims=True)[0] for x in (counts, tables.counts_RLE[:, None])]
    assert np.abs(shares[0].mean(0) - shares[1][0]).max() < 0.05


def test_rules_act_and_their_bits_are_recorded(model, data, tmp_path):
    rules = Interventions.of(
        {"op": "ban", "experts": [1], "where": {"language": "ar"}}, {"op": "top_k", "k": 1, "where": {"role": "answer"}}
    )
    settings = RecordSettings(rules=rules, batch_tokens=256)
    record_routes(model, data, tmp_path / "R", settings)
    recording = Recording.open(tmp_path / "R")
    columns = recording.tokens("record", "role", "experts", "weights", "done")
    arabic = np.array(recording.records["language"])[columns["record"]] == "ar"
    answer = columns["role"] == ROLES.index("answer")
    assert not (columns["experts"][arabic] == 1).any()
    assert (columns["experts"][~arabic] == 1).any()
    assert (columns["experts"][answer][..., 1] == -1).all()
    assert (columns["weights"][answer][..., 1] == 0).all()
    assert np.array_equal(columns["done"], arabic.astype(int) + 2 * answer.astype(int))
    assert list(recording.manifest.interventions) == rules.names
    assert recording.manifest.hashes["interventions"] == rules.digest()
    assert tables_of(recording).counts_RLE.shape == (5, LAYERS, EXPERTS)
    with pytest.raises(BimedixError, match="without interventions"):
        RecordSettings(rules=rules, gate=True)


def test_freeze_takes_the_routes_of_a_recording(data, tokenizer, whole, tmp_path):
    """By record and position; what the recording does not have raises."""
    rules = Interventions.of({"op": "freeze", "recording": str(whole.folder)})
    assert not rules.needs_base
    other = init_random(CONFIG, seed=5, std=0.3)
    record_routes(other, data, tmp_path / "R", RecordSettings(rules=rules, batch_tokens=256))
    ours, theirs = (x.tokens("id", "experts", "weights", "nll") for x in (Recording.open(tmp_path / "R"), whole))
    assert np.array_equal(ours["id"], theirs["id"])
    assert np.array_equal(ours["experts"], theirs["experts"])
    np.testing.assert_allclose(ours["weights"], theirs["weights"], atol=1e-3)
    assert np.nanmax(np.abs(ours["nll"] - theirs["nll"])) > 0.1
    assert rules.applied.tolist() == [whole.manifest.tokens]
    again = Interventions.of({"op": "freeze", "recording": str(tmp_path / "R")})
    assert again.digest() != dataclasses.replace(rules).digest()
    source, ids = next((item.source, item.ids) for item in data.items())
    where = np.zeros((1, 1), np.int32), np.arange(len(ids))[None]
    with pytest.raises(BimedixError, match="another token at position 5 than in"):
        wrong = ids.copy()
        wrong[5] += 1
        rules.planner(CONFIG, [source]).plan(Tokens(wrong[None], *where), {})
    with pytest.raises(BimedixError, match="has no record 'prompt 0'; record the same data"):
        rules.planner(CONFIG, [Source("prompt 0")]).plan(Tokens(ids[None], *where), {})
    with pytest.raises(BimedixError, match=f"{LAYERS} layers, {EXPERTS} experts and k = {TOP_K}, but this model has"):
        rules.check(tiny(num_layers=LAYERS + 1))
    with pytest.raises(BimedixError, match="bimedix routes record"):
        Interventions.of({"op": "freeze", "recording": str(tmp_path)}).check(CONFIG)


@pytest.fixture
def alike(tokenizer):
    """Records of the same length, so that all parts run the same programs."""
    return Data(
        [made(number, "en", "abcdef" * 6, f"answer {number:02}") for number in range(12)], None, tokenizer, "d", None
    )


def test_a_killed_recording_goes_on_and_gives_the_same_bytes(model, alike, tmp_path, monkeypatch):
    monkeypatch.setattr("bimedix_jax.routing.recording_writer.PART_ROWS", 300)
    settings = RecordSettings(batch_tokens=256)
    record_routes(model, alike, tmp_path / "whole", settings)
    write, written = recorders.write_part, []

    def killed_after_two(folder, number, *rest):
        if number == 2:
            (folder / ".tokens-00002.parquet.partial").write_bytes(b"half a file")
            raise KeyboardInterrupt
        written.append(number)
        write(folder, number, *rest)

    monkeypatch.setattr(recorders, "write_part", killed_after_two)
    with pytest.raises(KeyboardInterrupt):
        record_routes(model, alike, tmp_path / "R", settings)
    assert not (tmp_path / "R").exists()

    def counted(folder, number, *rest):
        written.append(number)
        write(folder, number, *rest)

    monkeypatch.setattr(recorders, "write_part", counted)
    record_routes(model, alike, tmp_path / "R", settings)
    assert written == list(range(max(written) + 1))
    assert max(written) > 2
    one, other = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "R"))
    assert one == other
    with pytest.raises(BimedixError, match="not empty"):
        record_routes(model, alike, tmp_path / "R", settings)


def test_a_recording_with_other_settings_begins_anew(model, alike, tmp_path, monkeypatch):
    monkeypatch.setattr(recorders, "finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        record_routes(model, alike, tmp_path / "R", RecordSettings(batch_tokens=256))
    monkeypatch.undo()
    record_routes(model, alike, tmp_path / "R", RecordSettings(batch_tokens=256, record="choices"))
    assert Recording.open(tmp_path / "R", verify=True).manifest.columns == ("nll", "experts", "weights")


def test_a_mesh_gives_the_same_rows(model, data, whole, tmp_path):
    mesh = make_mesh(data=2, fsdp=2, expert=2, devices=jax.devices()[:8])
    settings = RecordSettings(exact=True, norms=True, random_routers=120, batch_tokens=256)
    record_routes(place(model, mesh), data, tmp_path / "R", settings)
    found = Recording.open(tmp_path / "R")
    ours, theirs = (x.tokens("experts", "margin", "nll", "norms", "weights") for x in (whole, found))
    differs = (ours["experts"] != theirs["experts"]).any(-1)
    assert ours["margin"][differs].max(initial=0) < 1e-4
    assert differs.sum() <= 1
    same = ~differs.any(-1)
    for name in ("nll", "norms", "weights"):
        np.testing.assert_allclose(ours[name][same], theirs[name][same], atol=2e-4, equal_nan=True)


def test_generated_answers_are_recorded(model, data, tokenizer, tmp_path):
    few = dataclasses.replace(data, records=data.records[:2])
    record_routes(model, few, tmp_path / "R", RecordSettings(new_tokens=4, batch_tokens=256))
    columns = Recording.open(tmp_path / "R").tokens("record", "id", "role")
    for number, record in enumerate(few.records):
        prompt, _ = encode_chat(tokenizer, record.conversations[:-1], add_generation_prompt=True)
        answer = generate(model, prompt, 4, stop_tokens=tokenizer.stop_ids)
        own = columns["record"] == number
        assert columns["id"][own].tolist() == [*prompt, *answer]
        roles = [ROLES[role] for role in columns["role"][own]]
        assert roles == [
            *[ROLES[x] for x in roles_of_chat(tokenizer, record.conversations)[: len(prompt)]],
            *["answer"] * len(answer),
        ]


def test_packed_rows_are_recorded_by_their_segments(model, data, tokenizer, records, whole, tmp_path):
    examples = [pack.encode_record(tokenizer, record) for number, record in enumerate(records) if number != 4]
    report = pack.PackReport()
    with_rows = pack.pack(iter(examples), 128, tokenizer.pad_id, "best_fit", "truncate", 8, report)
    (tmp_path / "rows").mkdir()
    facts = {"tokenizer": tokenizer.fingerprint, "template": "chatml", "vocab_size": tokenizer.vocab_size}
    pack.write(tmp_path / "rows", with_rows, report, 128, facts | {"pad_id": tokenizer.pad_id, "packing": "best_fit"})
    packed = Data.open(str(tmp_path / "rows"), tokenizer, None)
    record_routes(model, packed, tmp_path / "R", RecordSettings(exact=True, batch_tokens=256))
    recording = Recording.open(tmp_path / "R")
    place_of = {name: number for number, name in enumerate(recording.records["id"])}
    ours, theirs = (x.tokens("record", "id", "experts") for x in (recording, whole))
    for number, name in enumerate(whole.records["id"]):
        own, there = ours["record"] == place_of[name], theirs["record"] == number
        assert np.array_equal(ours["id"][own], theirs["id"][there])
        assert (ours["experts"][own] == theirs["experts"][there]).mean() > 0.99
    with pytest.raises(BimedixError, match="packed rows do not tell prompts"):
        list(packed.items(with_prompts=True))


def test_data_are_spread_and_ids_are_distinct(records, tokenizer, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [*records, records[0]])
    assert [item.source.id for item in Data.open(str(tmp_path / "x.jsonl"), tokenizer, None).items()][-1] == "r0#2"
    assert [item.source.id for item in Data.open(str(tmp_path / "x.jsonl"), tokenizer, 3).items()] == ["r0", "r2", "r4"]
    with pytest.raises(BimedixError, match="--limit is 0"):
        Data.open("sample", tokenizer, 0)


def test_the_command_records_and_refuses(model, tokenizer, records, tmp_path, capsys):
    folder = tmp_path / "model"
    store.save(model, folder)
    write_jsonl(tmp_path / "x.jsonl", records)
    words = [
        "routes",
        "record",
        "--model",
        str(folder),
        "--data",
        str(tmp_path / "x.jsonl"),
        "--out",
        str(tmp_path / "R"),
        "--tokenizer",
        str(tokenizer.folder),
    ]
    assert cli.main([*words, "--batch-tokens", "256", "--exact", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["too_long"] == 1
    assert result["rows"] == result["tokens"] * LAYERS
    assert len(result["hashes"]["model"]) == 64
    assert math.isfinite(result["bytes_per_row"])
    assert cli.main(words) == 1
    assert "not empty" in capsys.readouterr().err
    assert cli.main([*words[:4], "--data", "nowhere.jsonl", "--out", str(tmp_path / "S"), *words[-2:]]) == 1
    assert "nowhere.jsonl" in capsys.readouterr().err
