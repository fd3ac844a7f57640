import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bimedix_jax import files
from bimedix_jax.cli import main
from bimedix_jax.data import pack, records
from bimedix_jax.data.pack import Example, PackReport, Row
from bimedix_jax.data.records import Record, conversation
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.errors import BimedixError
from bimedix_jax.process.folders import WRITTEN

PAD = 999


def example(index: int, length: int, learned_from: int = 1) -> Example:
    tokens = np.arange(length, dtype=np.int32) + 1000 * index
    return Example(f"r{index}", "en" if index % 2 else "ar", "qa", "test", tokens, np.arange(length) >= learned_from)


lengths = st.lists(st.integers(2, 40), min_size=1, max_size=60)


@settings(deadline=None)
@given(lengths=lengths, window=st.integers(1, 8), packing=st.sampled_from(["best_fit", "none"]))
def test_every_token_is_in_exactly_one_row(lengths: list[int], window: int, packing: pack.Packing) -> None:
    examples = {f"r{i}": example(i, length) for i, length in enumerate(lengths)}
    report = PackReport()
    rows = list(pack.pack(examples.values(), 40, PAD, packing, window=window, report=report))
    found = set()
    for row in rows:
        assert [segment.segment for segment in row.segments] == list(range(1, len(row.segments) + 1))
        for segment in row.segments:
            mine = row.segment_ids == segment.segment
            np.testing.assert_array_equal(row.tokens[mine], examples[segment.id].tokens)
            np.testing.assert_array_equal(row.loss_mask[mine], examples[segment.id].learned)
            assert np.ptp(np.flatnonzero(mine)) == mine.sum() - 1
            found.add(segment.id)
        empty = row.segment_ids == 0
        assert (row.tokens[empty] == PAD).all()
        assert not row.loss_mask[empty].any()
        assert not np.diff(empty.astype(int)).clip(max=0).any(), "padding stands at the end"
    assert found == set(examples)
    assert report.tokens == sum(lengths)
    assert (report.rows, report.examples) == (len(rows), len(lengths))
    if packing == "none":
        assert [row.segments[0].id for row in rows] == list(examples)


@settings(deadline=None)
@given(lengths=lengths)
def test_packing_is_deterministic_and_rows_round_trip(lengths: list[int]) -> None:
    examples = [example(i, length) for i, length in enumerate(lengths)]
    first, second = (list(pack.pack(examples, 40, PAD)) for _ in range(2))
    assert [row.to_bytes() for row in first] == [row.to_bytes() for row in second]
    for row in first:
        again = Row.from_bytes(row.to_bytes())
        assert again.segments == row.segments
        for name in ("tokens", "segment_ids", "loss_mask"):
            np.testing.assert_array_equal(getattr(again, name), getattr(row, name))
            assert getattr(again, name).dtype == getattr(row, name).dtype


@pytest.mark.parametrize("languages", [("en", "ar"), ("en",), ("ar",)])
def test_rows_are_nearly_full(languages: tuple[str, ...]) -> None:
    """Lengths as in the paper's three sets: mean tokens of each kind and its samples in thousands (Tables 7 and 8)."""
    paper = {"en": {192: 268, 394: 414, 398: 185}, "ar": {516: 156, 800: 224, 1301: 65}}
    random, spread = np.random.default_rng(0), 0.6
    means = [mean for language in languages for mean, samples in paper[language].items() for _ in range(samples * 6)]
    drawn = random.permutation(random.lognormal(np.log(means) - spread**2 / 2, spread))
    sizes = np.clip(drawn, 8, 4096).astype(int).tolist()
    report = PackReport()
    for _ in pack.pack((example(i, n) for i, n in enumerate(sizes)), 4096, report=report):
        pass
    assert report.to_dict(4096)["efficiency"] > 0.98


def test_long_examples_are_truncated_or_dropped_and_counted() -> None:
    examples = [example(0, 50), example(1, 8), example(2, 50, learned_from=45)]
    report = PackReport()
    rows = list(pack.pack(examples, 40, report=report))
    assert len(rows) == 2
    assert (report.truncated, report.truncated_tokens, report.dropped_nothing_learned) == (1, 10, 1)
    assert report.groups == {("ar", "qa", "test"): [1, 40, 39], ("en", "qa", "test"): [1, 8, 7]}
    report = PackReport()
    rows = list(pack.pack(examples, 40, too_long="drop", report=report))
    assert [segment.id for row in rows for segment in row.segments] == ["r1"]
    assert report.dropped_too_long == 2


def test_a_first_token_cannot_be_a_target() -> None:
    with pytest.raises(ValueError, match="no token comes before it"):
        list(pack.pack([example(0, 5, learned_from=0)], 40))


def make_records(path: Path, count: int) -> list[Record]:
    made = [
        Record(
            id=f"r{i}",
            language="ar" if i % 3 == 0 else "en",
            kind="qa",
            source="test",
            licence="l",
            conversations=conversation(f"سؤال {i}؟" if i % 3 == 0 else f"Question {i}?", "answer " * (i + 1)),
        )
        for i in range(count)
    ]
    records.write_jsonl(path, made)
    return made


def test_the_shuffle_is_a_permutation_fixed_by_the_seed(tmp_path: Path) -> None:
    made = make_records(tmp_path / "r.jsonl", 20)
    orders = [[json.loads(line)["id"] for _, line in pack.shuffled_lines(tmp_path / "r.jsonl", s)] for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(record.id for record in made) != orders[0]
    with pytest.raises(BimedixError, match="there is no file"):
        list(pack.shuffled_lines(tmp_path / "none.jsonl", 0))


def test_the_index_describes_the_rows(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    made = make_records(tmp_path / "r.jsonl", 9)
    report = PackReport()
    encoded = [pack.encode_record(bytes_tokenizer, record) for record in made]
    index = pack.write(tmp_path, pack.pack(encoded, 128, report=report), report, 128, {"seed": 3})
    assert json.loads((tmp_path / "index.json").read_text()) == index
    assert index["seed"] == 3
    assert [(group["language"], group["examples"]) for group in index["groups"]] == [("ar", 3), ("en", 6)]
    assert index["tokens"] == sum(len(one.tokens) for one in encoded)
    assert index["learned_tokens"] == sum(int(one.learned.sum()) for one in encoded)
    manifest = json.loads((tmp_path / "manifest.json").read_text())["files"]
    assert {name: entry["sha256"] for name, entry in manifest.items()} == {
        name: files.sha256(tmp_path / name) for name in ("rows.array_record", "index.json")
    }
    with pytest.raises(BimedixError, match="no record is left"):
        pack.write(tmp_path, [], PackReport(), 128, {})


def test_the_rows_do_not_depend_on_the_workers(tmp_path: Path, bytes_tokenizer: Tokenizer, capsys) -> None:
    make_records(tmp_path / "r.jsonl", 400)
    found = []
    for workers in (0, 2):
        out = tmp_path / f"packed{workers}"
        where = ["--records", str(tmp_path / "r.jsonl"), "--tokenizer", str(bytes_tokenizer.folder)]
        how = ["--sequence-length", "4096", "--workers", str(workers), "--seed", "3"]
        assert main(["data", "pack", *where, *how, "--out", str(out), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["tokens_per_s"] > 0
        found.append({path.name: path.read_bytes() for path in out.iterdir() if path.name != WRITTEN})
    assert found[0] == found[1]
    assert set(found[0]) == {"rows.array_record", "index.json", "manifest.json"}


def test_packing_takes_a_split_and_a_limit_and_names_wrong_options(
    tmp_path: Path, bytes_tokenizer: Tokenizer, capsys
) -> None:
    def pack_with(*options: str) -> int:
        out = str(tmp_path / "packed")
        common = [
            "--tokenizer",
            str(bytes_tokenizer.folder),
            "--out",
            out,
            "--overwrite",
            "--workers",
            "0",
            "--json",
        ]
        return main(["data", "pack", *options, *common])

    assert pack_with("--records", "sample", "--split", "heldout", "--limit", "7") == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 7
    (tmp_path / "bad.jsonl").write_text("\n{}\n")
    assert pack_with("--records", str(tmp_path / "bad.jsonl")) == 1
    assert "bad.jsonl at byte 1: id: Field required" in capsys.readouterr().err
    assert pack_with("--records", str(tmp_path / "none.jsonl")) == 1
    assert "there is no file" in capsys.readouterr().err


def test_memory_of_packing_does_not_grow_with_the_records() -> None:
    """Only examples of open rows are in memory; those of closed rows were freed."""
    alive: list[weakref.ref[np.ndarray]] = []

    def examples() -> Iterator[Example]:
        for i, size in enumerate(np.random.default_rng(0).integers(20, 400, 5000)):
            one = example(i, int(size))
            alive.append(weakref.ref(one.tokens))
            yield one

    most = 0
    for count, _ in enumerate(pack.pack(examples(), 1024, window=16)):
        if count % 50 == 0:
            most = max(most, sum(ref() is not None for ref in alive))
    assert most < 16 * 20
