"""Routes of other programs: what they recorded is imported and exported unchanged, and what cannot be is refused."""

import base64
import gzip
import json
from typing import Any

import numpy as np
import pytest

from bimedix_jax import cli
from bimedix_jax.errors import BimedixError
from bimedix_jax.routing.formats.exports import export_routes
from bimedix_jax.routing.formats.imports import ImportOptions, import_routes
from bimedix_jax.routing.parts import token_hash
from bimedix_jax.routing.recording import Recording

RECORDS, LAYERS, EXPERTS, TOP_K = 6, 3, 4, 2


def chosen(rng: np.random.Generator, tokens: int, experts: int = EXPERTS, top_k: int = TOP_K) -> np.ndarray:
    return np.argsort(rng.random((LAYERS, tokens, experts)), axis=-1)[..., :top_k]


def records(top_k: int = TOP_K, experts: int = EXPERTS, **changes) -> list[dict]:
    rng, found = np.random.default_rng(1), []
    for number in range(RECORDS):
        tokens = 5 + number
        found.append(
            {
                "id": f"r{number}",
                "language": ("en", "ar")[number % 2],
                "kind": "qa",
                "cluster": f"c{number // 2}",
                "pair": f"p{number // 2}",
                "labels": {"site": "ward"},
                "input_ids": rng.integers(0, 300, tokens).tolist(),
                "experts": chosen(rng, tokens, experts, top_k).tolist(),
                "weights": np.full((LAYERS, tokens, top_k), 0.5).tolist(),
                "nll": [None, *np.linspace(0, 1, tokens - 1).tolist()],
            }
            | changes
        )
    return found


def lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def imported(tmp_path, values, form: Any = "jsonl", **options) -> Recording:
    path = lines(tmp_path / "in.jsonl", values)
    import_routes([path], form, tmp_path / "R", ImportOptions(**options), overwrite=True)
    return Recording.open(tmp_path / "R", verify=True)


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (5, 1), (300, 8)])
def test_jsonl_is_imported_and_exported_unchanged(tmp_path, experts, top_k):
    given = records(top_k, experts)
    recording = imported(tmp_path, given)
    columns = recording.tokens("record", "id", "experts", "weights", "nll")
    for number, record in enumerate(given):
        own = columns["record"] == number
        assert columns["id"][own].tolist() == record["input_ids"]
        assert columns["experts"][own].swapaxes(0, 1).tolist() == record["experts"]
        assert columns["nll"][own][1:] == pytest.approx(record["nll"][1:])
    assert recording.records["pair"][:2] == ["p0", "p0"]
    assert recording.groups()["site"].tolist() == ["ward"] * RECORDS
    export_routes(recording, "jsonl", tmp_path / "out.jsonl")
    import_routes([tmp_path / "out.jsonl"], "jsonl", tmp_path / "R2", ImportOptions())
    again = Recording.open(tmp_path / "R2")
    shas = [{part.name: part.sha256 for part in found.manifest.parts} for found in (recording, again)]
    assert shas[0] == shas[1]


def test_logits_give_experts_margins_and_entropy(tmp_path):
    logits = np.random.default_rng(0).normal(size=(LAYERS, 9, EXPERTS))
    logits[..., -1] -= 9  # never chosen, but there
    order = np.argsort(-logits, -1)
    given = {"id": 1, "input_ids": list(range(9)), "experts": order[..., :2].tolist(), "logits": logits.tolist()}
    recording = imported(tmp_path, [given])
    assert recording.manifest.experts == EXPERTS
    with pytest.raises(BimedixError, match="logits of 4 experts, but there are 5"):
        imported(tmp_path, [given], experts=5)
    columns = recording.tokens("margin", "entropy")
    best = np.take_along_axis(logits, order, -1)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(columns["margin"].T, best[..., 1] - best[..., 2], atol=2e-3)
    np.testing.assert_allclose(columns["entropy"].T, -(p * np.log(p)).sum(-1), atol=2e-3)


def test_other_formats_hold_the_same_routes(tmp_path):
    recording = imported(tmp_path, records())
    whole = recording.tokens("id", "experts")
    for form in ("olmoe", "vllm"):
        export_routes(recording, form, tmp_path / f"x.{form}")
        import_routes([tmp_path / f"x.{form}"], form, tmp_path / form, ImportOptions())
        found = Recording.open(tmp_path / form).tokens("id", "experts")
        assert np.array_equal(found["id"], whole["id"]), form
        assert np.array_equal(found["experts"], whole["experts"]), form
    line = json.loads((tmp_path / "x.olmoe").read_text().splitlines()[0])
    assert np.shape(line["exp_ids"]) == (5, TOP_K, LAYERS)


def test_a_response_has_roles_and_no_routes_of_its_last_token(tmp_path):
    experts = chosen(np.random.default_rng(0), 9).swapaxes(0, 1)
    choice = {"token_ids": [7, 8, 9], "routed_experts": experts.tolist()}
    recording = imported(tmp_path, [{"id": "x", "prompt_token_ids": list(range(7)), "choices": [choice]}], "vllm")
    columns = recording.tokens("id", "role", "experts")
    assert columns["id"].tolist() == [*range(7), 7, 8]
    assert [recording.manifest.roles[role] for role in columns["role"]] == ["first"] * 4 + ["prompt"] * 3 + [
        "answer"
    ] * 2
    assert np.array_equal(columns["experts"], experts)


def test_envelopes_are_decoded_and_tokens_that_were_not_run_left_out(tmp_path, caplog):
    experts = chosen(np.random.default_rng(0), 10).swapaxes(0, 1).astype("<i2")
    experts[-1] = -1
    envelope = f"nrlre1:int16:10x{LAYERS}x{TOP_K}:" + base64.b64encode(experts.tobytes()).decode()
    sample = {"prompt_token_ids": [1] * 6, "generation_token_ids": [2] * 4, "routed_experts": envelope}
    recording = imported(tmp_path, [sample], "nemo")
    assert np.array_equal(recording.tokens("experts")["experts"], experts[:-1])
    assert "1 of 10 tokens have no routes" in caplog.text
    (tmp_path / "alone.txt").write_text(envelope + "\n")
    import_routes([tmp_path / "alone.txt"], "nemo", tmp_path / "alone", ImportOptions())
    assert Recording.open(tmp_path / "alone").tokens("id")["id"].tolist() == [-1] * 9
    with pytest.raises(BimedixError, match="token ids of record"):
        export_routes(Recording.open(tmp_path / "alone"), "jsonl", tmp_path / "x")
    with pytest.raises(BimedixError, match="cut off"):
        imported(tmp_path, [sample | {"routed_experts": envelope[:-8]}], "nemo")


def trace(**changes) -> list[dict]:
    rng, found = np.random.default_rng(0), []
    for step in range(2):
        for layer in (3, 1):
            top = np.argsort(rng.random((10, EXPERTS)), -1)[:, :TOP_K].tolist()
            line = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0}
            found.append(line | {"num_tokens": 10, "topk": TOP_K, "top_indices": top} | changes)
    return found


def test_traces_bind_layers_by_their_numbers(tmp_path):
    given = trace()
    mtp = given[0] | {"block": "mtp", "mtp_idx": 0}
    recording = imported(tmp_path, [*given[:2], mtp, *given[2:]], "megatron")
    assert recording.layer_numbers == [1, 3]
    assert recording.manifest.layers[1].path == "decoder.layers.3.mlp.router"
    assert recording.tokens("experts")["experts"][:10, 1].tolist() == given[0]["top_indices"]
    for change, message in [
        ({"block": None}, "by position instead of path"),
        ({"layer": 1}, "duplicate: layer 1 of step 0"),
        ({"num_tokens": 11}, "top_indices"),
        ({"step": [0]}, r"has the step \[0\]; give its number"),
    ]:
        with pytest.raises(BimedixError, match=message):
            imported(tmp_path, trace(**change), "megatron")


def test_layers_are_named_or_left_out(tmp_path):
    given = records()
    names = ("model.layers.1.mlp", "-", "model.layers.7.mlp")
    recording = imported(tmp_path, given, layers=names)
    assert recording.layer_numbers == [1, 7]
    first = recording.tokens("experts", "weights")["experts"][:5]
    assert first.swapaxes(0, 1).tolist() == [given[0]["experts"][0], given[0]["experts"][2]]
    with pytest.raises(BimedixError, match="by position instead of path: '1'"):
        imported(tmp_path, given, layers=("1", "2", "3"))
    with pytest.raises(BimedixError, match="by position instead of path: 0"):
        imported(tmp_path, records(layers=[0, 1, 2]))
    with pytest.raises(BimedixError, match="duplicate layers"):
        imported(tmp_path, records(layers=["layers.1.a", "layers.1.b", "layers.2.a"]))


def changed(place: int, **changes) -> list[dict]:
    found = records()
    found[place] |= changes
    return found


def zeros(layer: int) -> list[dict]:
    found = records()
    for record in found:
        record["experts"][layer] = [[0] * TOP_K for _ in record["input_ids"]]
    return found


def same(layer: int) -> list[dict]:
    found = records()
    for record in found:
        record["experts"][layer] = [[0, 3] for _ in record["input_ids"]]
    return found


def expert(value: int) -> list[dict]:
    found = records()
    found[2]["experts"][1][0][0] = value
    return found


def logits(place: int = 0, **more) -> list[dict]:
    """Records with logits, of which one token's in layer 2 prefer other experts than it has."""
    found = records(**more)
    for record in found:
        chosen_LTK = np.array(record["experts"])
        logits_LTE = np.zeros((*chosen_LTK.shape[:2], EXPERTS))
        np.put_along_axis(logits_LTE, chosen_LTK, 1.0, axis=-1)
        record["logits"] = logits_LTE.tolist()
    found[place]["logits"][2][4] = (-np.array(found[place]["logits"][2][4])).tolist()
    return found


def weight(*values: float | bool | None) -> list[dict]:
    found = records()
    found[1]["weights"][0][3] = list(values)
    return found


REFUSED = {
    "logits": (logits(4), r"in.jsonl:5 has logits that contradict the experts: token 4 of layer 2"),
    "infinite logits": (changed(0, logits=np.full((LAYERS, 5, EXPERTS), None).tolist()), "logits that are not finite"),
    "negative weight": (weight(-0.5, 1.5), "a negative weight: -0.5"),
    "large weight": (weight(1e6, 0.5), r"weights up to 1e\+06, but .* float16"),
    "NaN weight": (weight(float("nan"), 0.5), "NaN is not a number of JSON"),
    "no weight": (weight(None, 0.5), "weights that are not finite"),
    "boolean weight": (weight(True, 0.5), "weights with true or false"),
    "boolean experts": (changed(0, experts=[[[False, True]] * 5] * LAYERS), "experts with true or false"),
    "a boolean expert": (expert(True), "experts with true or false"),
    "boolean token": (changed(0, input_ids=[1, 2, True, 4, 5]), "token ids with true or false"),
    "negative nll": (changed(0, nll=[None, 1.0, -1.0, 1.0, 1.0]), "negative nll: -1"),
    "negative mean": (changed(0, nll=-1.0), "negative nll: -1"),
    "NaN nll": (changed(0, nll=[None, 1.0, float("nan"), 1.0, 1.0]), "NaN is not a number of JSON.*write null"),
    "boolean nll": (changed(0, nll=[None, 1.0, False, 1.0, 1.0]), "nll with true or false"),
    "shuffled": ([r | {"shuffled_nll": -2} for r in records()], "negative shuffled_nll: -2"),
    "no experts a token": (changed(0, experts=[[[]] * 5] * LAYERS, weights=None), "3 layers of 0 experts"),
    "zeros": (zeros(1), "layer 1 is constant"),
    "constant": (same(2), r"layer 2 is constant, all 45 tokens have the experts \[0, 3\]"),
    "duplicate id": (changed(3, id="r1"), "duplicate"),
    "duplicate expert": (expert(records()[2]["experts"][1][0][1]), "duplicate experts"),
    "negative expert": (expert(-1), "out of range: -1"),
    "large expert": (expert(99), "out of range: 99"),
    "token": (changed(0, input_ids=[-3, 1, 2, 3, 4]), "token id out of range: -3"),
    "hash": (changed(1, token_hash=token_hash(np.array([1]))), "another token hash"),
    "unknown key": (changed(1, lang="en"), "unknown key.*lang"),
    "no experts": ([{"id": 1, "input_ids": [1]}], "lacks the key experts"),
    "transposed": (changed(0, experts=np.zeros((5, LAYERS, TOP_K), int).tolist()), "the shape 5 x 3 x 2"),
    "ragged": (changed(0, experts=[[[0, 1]], [[0]]]), "unequal lengths"),
    "reals": (changed(0, experts=np.full((LAYERS, 5, TOP_K), 0.5).tolist()), "not whole numbers"),
    "weights": (changed(0, weights=[[1.0]]), r"weights \[L\]\[T\]\[k\]"),
    "columns": (changed(0, weights=None), "the same columns"),
    "no tokens": (changed(0, input_ids=[], experts=[[], [], []], weights=None, nll=None), "has experts"),
    "empty": ([], "no record"),
    **{
        f"correct {answer!r}": (changed(2, labels={"correct": answer}), f"in.jsonl:3 has the label correct {answer!r}")
        for answer in ("yes", 2, True, 0.5)
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_recordings_are_refused_by_name(tmp_path, name):
    values, message = REFUSED[name]
    with pytest.raises(BimedixError, match=message):
        imported(tmp_path, values)
    assert not (tmp_path / "R").exists()


def test_what_rounding_or_another_router_explains_is_accepted(tmp_path):
    given = weight(3.0, 9.0)
    given[0]["nll"][2] = -1e-6
    imported(tmp_path, given)
    given = [record for place, record in enumerate(logits(0)) if place]
    given[0]["logits"][0][0] = [30.0 + 0.1 * (e not in given[0]["experts"][0][0]) for e in range(EXPERTS)]
    assert imported(tmp_path, given).tokens("margin")["margin"][0, 0] == 0  # equal in bfloat16
    given[0]["logits"][0][0] = [30.0 + 0.5 * (e not in given[0]["experts"][0][0]) for e in range(EXPERTS)]
    with pytest.raises(BimedixError, match="contradict"):
        imported(tmp_path, given)


def lines_of_format(form: str, experts_TLK: np.ndarray) -> list[dict]:
    """A file of another program with these routes."""
    ids = list(range(len(experts_TLK)))
    if form == "megatron":
        return [
            {"step": 0, "block": "decoder", "layer": layer, "top_indices": experts_TLK[:, layer].tolist()}
            for layer in range(experts_TLK.shape[1])
        ]
    if form == "olmoe":
        return [{"input_ids": ids, "exp_ids": experts_TLK.swapaxes(1, 2).tolist()}]
    if form == "vllm":
        return [{"prompt_token_ids": ids, "routed_experts": experts_TLK.tolist()}]
    shape = "x".join(map(str, experts_TLK.shape))
    data = base64.b64encode(experts_TLK.astype("<i4").tobytes()).decode()
    return [{"input_ids": ids, "routed_experts": f"nrlre1:int32:{shape}:{data}"}]


@pytest.mark.parametrize("form", ["olmoe", "vllm", "nemo", "megatron"])
def test_every_format_refuses_by_name(tmp_path, form):
    good = chosen(np.random.default_rng(0), 40).swapaxes(0, 1)
    imported(tmp_path, lines_of_format(form, good), form)
    for changed_experts, message in [
        ([0, 3], r"layer 1 is constant, all 40 tokens have the experts \[0, 3\].*--keep-constant"),
        ([0, 0], r"layer 1 is constant, all 40 tokens have the experts \[0, 0\].*with --layers$"),
    ]:
        wrong = good.copy()
        wrong[:, 1] = changed_experts
        with pytest.raises(BimedixError, match=message):
            imported(tmp_path, lines_of_format(form, wrong), form)
    for value, message in [(good[7, 2, 1], "duplicate experts"), (-1, "out of range: -1"), (99, "out of range: 99")]:
        wrong = good.copy()
        wrong[7, 2, 0] = value
        with pytest.raises(BimedixError, match=message):
            imported(tmp_path, lines_of_format(form, wrong), form)
    with pytest.raises(BimedixError, match=r"by position instead of path|names its layers itself"):
        imported(tmp_path, lines_of_format(form, good), form, layers=("0", "1", "2"))
    if form != "megatron":
        [line] = lines_of_format(form, good)
        line["input_ids" if "input_ids" in line else "prompt_token_ids"][3] = -3
        with pytest.raises(BimedixError, match="token id out of range: -3"):
            imported(tmp_path, [line], form)


@pytest.mark.parametrize("option", ["experts", "top_k", "first"])
def test_numbers_of_options_are_checked(tmp_path, option):
    with pytest.raises(BimedixError, match=f"--{option.replace('_', '-')} is -1; give at least"):
        imported(tmp_path, records(), **{option: -1})


def test_what_a_file_cannot_say_is_told(tmp_path):
    recording = imported(tmp_path, expert(99), experts=100)
    assert recording.manifest.experts == 100
    assert imported(tmp_path, same(2), keep_constant=True).manifest.experts == EXPERTS
    with pytest.raises(BimedixError, match="0 to 2"):
        imported(tmp_path, records(), experts=3)
    with pytest.raises(BimedixError, match="belongs to counts"):
        imported(tmp_path, records(), top_k=2)
    roles = imported(tmp_path, records(), first=2).tokens("role", "position")
    assert (roles["role"] == 0).tolist() == (roles["position"] < 2).tolist()


def test_another_recording_of_the_same_records_has_their_hashes(tmp_path):
    import_routes([lines(tmp_path / "a", records())], "jsonl", tmp_path / "A", ImportOptions())
    imported(tmp_path, records(), tokens_of=tmp_path / "A")
    with pytest.raises(BimedixError, match=r"another token hash than .*A says"):
        imported(tmp_path, changed(1, input_ids=[1, 2, 3, 4, 5, 6]), tokens_of=tmp_path / "A")
    with pytest.raises(BimedixError, match="has no record 'other'"):
        imported(tmp_path, changed(1, id="other"), tokens_of=tmp_path / "A")


HEADER = "model,domain,layer,expert,token_id,count\n"


def table(tmp_path, rows):
    path = tmp_path / "counts.csv.gz"
    path.write_bytes(gzip.compress((HEADER + "".join(",".join(map(str, row)) + "\n" for row in rows)).encode()))
    return path


def counted(tmp_path, rows, **options) -> Recording:
    import_routes([table(tmp_path, rows)], "counts", tmp_path / "C", ImportOptions(**options), overwrite=True)
    return Recording.open(tmp_path / "C", verify=True)


def count_rows() -> list[tuple]:
    """Layers 0, 7 and 15, as in OLMoE's table of Mixtral-8x7B: 2 domains, 3 ids of 4 tokens each, top-2 of 4."""
    found = []
    for domain in ("c4", "github"):
        for layer in (0, 7, 15):
            for token in (5, 9, 11):
                found += [
                    ("m", domain, layer, e, token, n) for e, n in ((0, 4), (token % 3 + 1, 3), (token % 2 + 2, 1))
                ]
    merged: dict[tuple, int] = {}
    for row in found:
        merged[row[:-1]] = merged.get(row[:-1], 0) + row[-1]
    return [(*key, count) for key, count in merged.items()]


def test_counts_keep_layers_domains_and_tokens(tmp_path):
    recording = counted(tmp_path, count_rows(), top_k=2)
    assert recording.layer_numbers == [0, 7, 15]
    assert (recording.manifest.top_k, recording.manifest.experts) == (2, 4)
    assert recording.records["tokens"] == [12, 12]
    assert recording.groups()["domain"].tolist() == ["c4", "github"]
    export_routes(recording, "counts", tmp_path / "out.csv")
    written = (tmp_path / "out.csv").read_text().splitlines()
    assert sorted(written[1:]) == sorted(",".join(map(str, row)) for row in count_rows())
    with pytest.raises(BimedixError, match="counts only"):
        export_routes(recording, "jsonl", tmp_path / "x")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (count_rows() + count_rows()[:1], "duplicates"),
        ([("m", "a", 0, -1, 1, 2)], "expert out of range: -1"),
        ([("m", "a", 0, 1, -1, 2)], "token id out of range: -1"),
        ([("m", "a", 0, 1, 1, 0)], "the count 0"),
        (
            [row if row[2] != 7 else (*row[:3], 0, *row[4:]) for row in count_rows() if row[3] == 0 or row[2] != 7],
            "layer 7 is constant",
        ),
        (count_rows()[1:], "different numbers of tokens|how many experts"),
    ],
)
def test_wrong_counts_are_refused_by_name(tmp_path, rows, message):
    with pytest.raises(BimedixError, match=message):
        counted(tmp_path, rows)


def random_rows(ids: int, top_k: int, models=("m",)) -> list[tuple]:
    """Counts of 1 to 4 tokens of each id in 2 layers, each with `top_k` of 4 experts."""
    rng, found = np.random.default_rng(0), []
    for model in models:
        for token in range(ids):
            tokens = rng.integers(1, 5)
            for layer in range(2):
                chosen = np.argsort(rng.random((tokens, 4)), axis=-1)[:, :top_k]
                numbers = np.bincount(chosen.ravel(), minlength=4)
                found += [(model, "d", layer, e, token, n) for e, n in enumerate(numbers.tolist()) if n]
    return found


def test_the_number_of_experts_of_a_token_is_told_where_the_counts_do_not_determine_it(tmp_path):
    equal = [("m", "d", layer, e, token, 2) for layer in (0, 1) for e in range(3) for token in range(99)]
    with pytest.raises(BimedixError, match=r"does not say how many experts a token has: its counts fit 1, 2, 3.*top-k"):
        counted(tmp_path, equal, experts=4)
    for top_k, tokens in ((1, 3), (3, 1)):
        recording = counted(tmp_path, equal, top_k=top_k, experts=4, keep_constant=True)
        assert recording.records["tokens"] == [tokens * 2 * 99]
    with pytest.raises(BimedixError, match=r"does not fit --top-k 4: .* common divisor 6, .* at most 3"):
        counted(tmp_path, equal, top_k=4)
    for top_k in (1, 2, 3):
        assert counted(tmp_path, random_rows(99, top_k)).manifest.top_k == top_k
    with pytest.raises(BimedixError, match="its counts fit 1, 2; give --top-k"):
        counted(tmp_path, random_rows(20, 2))
    with pytest.raises(BimedixError, match="has 2 models: a, b; import those of each model alone"):
        counted(tmp_path, random_rows(99, 2, ("b", "a")), top_k=2)


def test_counts_of_tokens_are_those_of_a_recording(tmp_path):
    recording = imported(tmp_path, records())
    export_routes(recording, "counts", tmp_path / "x.csv.gz")
    import_routes([tmp_path / "x.csv.gz"], "counts", tmp_path / "C", ImportOptions(top_k=TOP_K))
    found = Recording.open(tmp_path / "C")
    assert sum(found.records["tokens"]) == recording.manifest.tokens
    assert found.counts()["count"].sum() == recording.manifest.rows * TOP_K


def test_the_commands_import_and_export_without_jax(tmp_path, capsys):
    path = lines(tmp_path / "in.jsonl", records())
    assert cli.main(["routes", "import", str(path), "--format", "jsonl", "--out", str(tmp_path / "R"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 45 * LAYERS
    mine = tmp_path / "mine.txt"
    for form, name in (("counts", "x.csv"), ("counts", "x.csv.gz"), ("jsonl", "x"), ("olmoe", "x2"), ("vllm", "x3")):
        export = ["routes", "export", str(tmp_path / "R"), "--format", form, "--out", str(tmp_path / name)]
        assert cli.main(export) == 0
        capsys.readouterr()
        assert cli.main(export) == 1
        assert f"{name} exists; name another file or pass --overwrite" in " ".join(capsys.readouterr().err.split())
        assert cli.main([*export, "--overwrite"]) == 0
        for content in (b"", b'{"id": 1}', b"[1]", b"\x1f\x8b\x08", b"\xff\xfe"):
            mine.write_bytes(content)
            assert cli.main([*export[:-1], str(mine), "--overwrite"]) == 1
            assert "bimedix did not write it" in " ".join(capsys.readouterr().err.split())
            assert mine.read_bytes() == content
