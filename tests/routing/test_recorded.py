"""The tables of a recording agree with sums over its tokens, and refuse what does not belong together."""

import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from bimedix_jax.data.roles import ROLES
from bimedix_jax.errors import BimedixError
from bimedix_jax.routing.formats.imports import ImportOptions, import_routes
from bimedix_jax.routing.parts import UNKNOWN_ROLE, PartLayout, Routes
from bimedix_jax.routing.questions import analyse
from bimedix_jax.routing.recorded import clusters, tables_of, unit_of
from bimedix_jax.routing.recording import LayerName, Recording
from bimedix_jax.routing.recording_writer import finish, write_parts
from bimedix_jax.routing.tables import count_routes

RECORDS, LAYERS, EXPERTS, TOP_K, ROUTERS = 30, 2, 4, 2, 3
COLUMNS = ("nll", "shuffled_nll", "experts", "weights")


def made(seed: int = 0, gaps: bool = False) -> list[Any]:
    rng, found = np.random.default_rng(seed), []
    ids = np.random.default_rng(7)
    for number in range(RECORDS):
        tokens = 6 + number % 5
        experts = np.argsort(rng.random((tokens, LAYERS, EXPERTS)))[..., :TOP_K]
        if gaps:
            experts[5, 1, 1] = -1
        nll = np.where(np.arange(tokens) == 0, np.nan, rng.random(tokens))
        columns = {"nll": nll, "shuffled_nll": nll + 0.25, "experts": experts, "weights": rng.random(experts.shape)}
        about = {"language": ("en", "ar")[number % 2], "cluster": f"c{number // 2}" if number > 3 else None}
        about["pair"] = f"p{number // 2}"
        routers = rng.integers(1, 9, (ROUTERS, LAYERS, EXPERTS))
        roles = np.arange(tokens) % 4
        ids_N = ids.integers(0, 9, tokens)
        routes = Routes(id=f"r{number}", ids_N=ids_N, columns=columns, about=about, roles_N=roles, random_RLE=routers)
        found.append(routes)
    return found


def tables_with(*given: Any, **options: Any) -> Any:
    """Tables whose optional arrays are there."""
    return tables_of(*given, **options)


def write(folder, found) -> Recording:
    folder.mkdir()
    layout = PartLayout(layers=LAYERS, top_k=TOP_K, columns=COLUMNS, wide=False, gaps=True, routers=ROUTERS)
    write_parts(folder, layout, found)
    layers = [LayerName(number=number) for number in (3, 5)]
    finish(folder, layers=layers, experts=EXPERTS, layout=layout, hashes={}, options={})
    return Recording.open(folder)


def oracle(found, name=None, roles=("prompt", "answer")) -> np.ndarray:
    sums = np.zeros((RECORDS, LAYERS, EXPERTS))
    for number, own in enumerate(found):
        for token, role in enumerate(own.roles_N):
            for layer in range(LAYERS):
                for slot in range(TOP_K):
                    expert = own.columns["experts"][token, layer, slot]
                    if role == UNKNOWN_ROLE or (ROLES[role] in roles and expert >= 0):
                        value = 1 if name is None else np.float16(own.columns[name][token, layer, slot])
                        sums[number, layer, expert] += value
    return sums


@pytest.mark.parametrize("gaps", [False, True])
def test_sums_are_those_over_the_tokens_that_count(tmp_path, monkeypatch, gaps):
    monkeypatch.setattr("bimedix_jax.routing.recording_writer.PART_ROWS", 100)  # several parts
    found = made(gaps=gaps)
    tables = tables_with(write(tmp_path / "R", found))
    assert np.array_equal(tables.counts_RLE, oracle(found))
    np.testing.assert_allclose(tables.weights_RLE, oracle(found, "weights"), rtol=1e-6)
    assert tables.tokens_R.tolist() == [int((own.roles_N >= 2).sum()) for own in found]
    counts_RLE, tokens_R = count_routes(tables.routes, RECORDS, LAYERS, EXPERTS)
    assert np.array_equal(counts_RLE, tables.counts_RLE)
    assert np.array_equal(tokens_R, tables.tokens_R)
    np.testing.assert_allclose(tables.shuffled_nll_R - tables.nll_R, 0.25, rtol=1e-5)
    assert tables.nll_R[0] == pytest.approx(found[0].columns["nll"][2:4].mean())
    assert np.array_equal(tables.random_RMLE, np.stack([own.random_RLE for own in found]))
    assert tables.layers == [3, 5]
    assert tables.pair_R.tolist()[:3] == ["p0", "p0", "p1"]
    assert "pair" not in tables.groups


def test_roles_may_be_chosen(tmp_path):
    found = made()
    recording = write(tmp_path / "R", found)
    assert np.array_equal(tables_with(recording, roles=("template",)).counts_RLE, oracle(found, roles=("template",)))
    with pytest.raises(BimedixError, match="no role system"):
        tables_with(recording, roles=("system",))


def test_records_without_tokens_that_count_are_left_out(tmp_path):
    found = made()
    found[4] = dataclasses.replace(found[4], roles_N=np.zeros(len(found[4].ids_N), int))
    tables = tables_with(write(tmp_path / "R", found))
    kept = np.arange(RECORDS) != 4
    assert np.array_equal(tables.counts_RLE, oracle(found)[kept])
    assert tables.random_RMLE.shape[0] == len(tables.nll_R) == len(tables.cluster_R) == RECORDS - 1
    assert np.array_equal(count_routes(tables.routes, RECORDS - 1, LAYERS, EXPERTS)[0], tables.counts_RLE)


def test_the_unit_is_the_cluster_or_the_record(tmp_path):
    recording = write(tmp_path / "R", made())
    assert unit_of(recording, None) == "cluster"
    cluster_R = tables_with(recording).cluster_R
    assert len(set(cluster_R)) == 4 + (RECORDS - 4) // 2
    assert tables_with(recording, unit="record").cluster_R is None
    with pytest.raises(BimedixError, match=r"document of records is not available: .* the reader `tico19` supplies it"):
        tables_with(recording, unit="document")
    assert len(set(clusters(np.array(["", "", "0", "1"])))) == 4


def test_the_baseline_has_the_same_records_in_any_order(tmp_path):
    found, base = made(), made(seed=1)
    recording = write(tmp_path / "R", found)
    tables = tables_with(recording, baseline=write(tmp_path / "B", base[::-1]))
    assert np.array_equal(tables.baseline_RLE, oracle(base))
    with pytest.raises(BimedixError, match="lacks 1 records: r7"):
        tables_with(recording, baseline=write(tmp_path / "C", [own for own in base if own.id != "r7"]))
    with pytest.raises(BimedixError, match=r"B is the recording .*B itself"):
        tables_with(Recording.open(tmp_path / "B"), baseline=Recording.open(tmp_path / "B"))
    other = [dataclasses.replace(base[2], about=base[2].about | {"language": "ar"}), *base[:2], *base[3:]]
    with pytest.raises(BimedixError, match=r"'r2' has the language 'ar' in .*E, but 'en' in .*R; correct the labels"):
        tables_with(recording, baseline=write(tmp_path / "E", other))
    base[3] = dataclasses.replace(base[3], ids_N=base[3].ids_N + 1)
    with pytest.raises(BimedixError, match="'r3' has another token hash"):
        tables_with(recording, baseline=write(tmp_path / "D", base))


def test_counts_become_tables(tmp_path):
    rows = "model,domain,layer,expert,token_id,count\n"
    for domain, n in (("c4", 3), ("github", 5)):
        for layer in (0, 7):
            rows += f"m,{domain},{layer},{layer % 3},11,{n}\nm,{domain},{layer},3,11,{n}\nm,{domain},{layer},0,12,2\n"
            rows += f"m,{domain},{layer},1,12,1\nm,{domain},{layer},2,12,1\n"
    (tmp_path / "x.csv").write_text(rows)
    import_routes([tmp_path / "x.csv"], "counts", tmp_path / "R", ImportOptions(top_k=2))
    tables = tables_with(Recording.open(tmp_path / "R"))
    assert tables.counts_RLE.tolist() == [[[5, 1, 1, 3], [2, 4, 1, 3]], [[7, 1, 1, 5], [2, 6, 1, 5]]]
    assert tables.tokens_R.tolist() == [5, 7]
    counts_RLE, tokens_R = count_routes(tables.routes, 2, 2, 4)
    assert np.array_equal(counts_RLE, tables.counts_RLE)
    assert np.array_equal(tokens_R, tables.tokens_R)
    analysis = analyse(tables, fields=("domain",), explore=False)
    assert not analysis.claims
    why = "only 1 cluster of c4 and 1 cluster of github can be compared"
    assert any(why in refusal.why for refusal in analysis.refused)


def test_reading_needs_no_jax():
    modules = ["recording", "recorded", "formats.imports", "formats.exports", "questions"]
    code = "import sys\n" + "".join(f"import bimedix_jax.routing.{name}\n" for name in modules)
    code += "print([name for name in ('jax', 'flax', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
