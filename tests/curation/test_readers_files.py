"""Files of every format yield rows one at a time. A broken row is rejected with its file and line; the rest is read."""

import gzip
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bimedix_jax.curation.quarantine import OTHER_REASONS, LimitReached, Quarantine, Rejected
from bimedix_jax.curation.readers import json_stream, markup, rows
from bimedix_jax.data.records import Record, conversation
from bimedix_jax.errors import BimedixError


def fields(path: Path, keyed: bool = False) -> list[Any]:
    return [row.fields() for row in rows.rows(path, keyed)]


def test_every_text_format_gives_the_same_rows_compressed_or_not(tmp_path: Path) -> None:
    wanted = [{"q": "ما هو \u2028 x?", "a": 'a, "b"\nc'}, {"q": "two", "a": ""}]
    texts = {
        "r.jsonl": "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in wanted),
        "r.json": json.dumps(wanted, indent=2),
        "lines.json": "".join(json.dumps(row) + "\n" for row in wanted),
        "pretty.json": "\n".join(json.dumps(row, indent=2) for row in wanted),
        "r.csv": '\ufeffq,a\r\n"ما هو \u2028 x?","a, ""b""\nc"\r\ntwo,\r\n',
        "r.tsv": 'q\ta\nما هو \u2028 x?\t"a, ""b""\nc"\ntwo\t\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        assert fields(tmp_path / name) == fields(tmp_path / f"{name}.gz") == wanted, name


def test_parquet_is_read_in_batches(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"q": [str(i) for i in range(600)], "o": [["a", None]] * 600})
    parquet.write_table(table, tmp_path / "r.parquet", row_group_size=100)
    found = list(rows.rows(tmp_path / "r.parquet"))
    assert [(row.line, row.content["q"]) for row in found] == [(i + 1, str(i)) for i in range(600)]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(BimedixError, match="not a Parquet file"):
        fields(tmp_path / "bad.parquet")


def test_a_folder_is_read_in_order_of_names_with_its_links(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "b").mkdir(parents=True)
    for name in ("b/two.jsonl", "a.jsonl", ".hidden.jsonl", "README.md"):
        (folder / name).write_text('{"x": 1}\n')
    assert [row.file for row in rows.rows(folder)] == ["a.jsonl", "b/two.jsonl"]
    (tmp_path / "elsewhere.jsonl").write_text("{}\n")
    (folder / "c.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    assert [row.file for row in rows.rows(folder)] == ["a.jsonl", "b/two.jsonl", "c.jsonl"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(BimedixError, match="has no file ending in"):
        list(rows.rows(tmp_path / "empty"))
    (tmp_path / "x.pkl").write_bytes(b"")
    with pytest.raises(BimedixError, match="has none of the endings"):
        list(rows.rows(tmp_path / "x.pkl"))


def build(quarantine: Quarantine, path: Path) -> list[Any]:
    def make(row: rows.Row, values: dict[str, Any]) -> Record:
        text = rows.tidy(values["x"])
        return Record(
            id=rows.row_id("s", row),
            language="en",
            kind="qa",
            source="s",
            licence="l",
            conversations=conversation(text, text),
        )

    return [record.id.rpartition("-")[0] for record in rows.build_all("s", rows.rows(path), quarantine, make)]


def test_a_broken_row_is_rejected_and_the_others_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_LINE", 64)
    lines = ['{"x": "a"}', "{", '{"x": "' + "y" * 200 + '"}', "[1]", '{"x": "\\ud800"}', '{"x": "\xe9"}', '{"x": "b"}']
    (tmp_path / "r.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    quarantine = Quarantine()
    assert build(quarantine, tmp_path / "r.jsonl") == ["s/r/1", "s/r/7"]
    assert [row.line for row in quarantine.rejected] == [2, 3, 4, 5, 6]
    reasons = [row.reason for row in quarantine.rejected]
    assert "longer than" in reasons[1]
    assert reasons[2] == "the row is a list, not an object"
    (tmp_path / "r.csv").write_text('x,y\na,1\nb\n"' + "z" * 300 + '",2\nc,3\n')
    quarantine = Quarantine()
    assert build(quarantine, tmp_path / "r.csv") == ["s/r/2", "s/r/5"]
    assert [(row.line, row.reason) for row in quarantine.rejected] == [
        (3, "1 columns, the header has 2"),
        (4, "field larger than field limit (64)"),
    ]


def test_a_damaged_file_raises_after_its_readable_rows(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(b'{"x": "%d"}\n' % i for i in range(20000)))
    (tmp_path / "r.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(BimedixError, match="damaged"):
        fields(tmp_path / "r.jsonl.gz")
    (tmp_path / "same.csv").write_text("a,a\n1,2\n")
    with pytest.raises(BimedixError, match="two columns with the same name"):
        fields(tmp_path / "same.csv")
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(BimedixError, match="was saved by the `datasets` package"):
        list(rows.rows(tmp_path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=40)
@given(
    values=st.lists(JSON, max_size=6), chunk=st.integers(1, 30), indent=st.sampled_from([None, 1]), plain=st.booleans()
)
def test_streamed_arrays_and_objects_equal_json_loads(
    values: list[Any], chunk: int, indent: int | None, plain: bool
) -> None:
    before = json_stream.CHUNK
    json_stream.CHUNK = chunk
    try:
        text = json.dumps(values, indent=indent, ensure_ascii=plain).encode()
        assert [value for _, value in json_stream.entries(io.BytesIO(text), Path("x"))] == values
        keyed = {f"k{i}": value for i, value in enumerate(values)}
        text = json.dumps(keyed, indent=indent, ensure_ascii=plain).encode() + b" \n"
        assert dict(json_stream.keyed_entries(io.BytesIO(text), Path("x"))) == keyed
    finally:
        json_stream.CHUNK = before


@pytest.mark.parametrize("text", ["[1", "[1,]", "[1] 2", "[1 2]", '["\\x"]', "[1,,2]", "{", "[" * 100000, "[nul]"])
def test_broken_json_raises_with_the_position(text: str) -> None:
    with pytest.raises(BimedixError, match=r"x\.json is not valid JSON near character"):
        list(json_stream.entries(io.BytesIO(text.encode()), Path("x.json")))


@pytest.mark.parametrize("text", ["[1]", '{"a" 1}', '{"a": 1', '{"a": 1,}', '{"a": 1} x', "{1: 2}", '{"a": "\xff"}'])
def test_broken_objects_raise_with_the_position(text: str) -> None:
    with pytest.raises(BimedixError, match=r"x\.json is not valid JSON near character"):
        list(json_stream.keyed_entries(io.BytesIO(text.encode("latin-1")), Path("x.json")))


def test_xml_elements_are_yielded_one_at_a_time_and_freed() -> None:
    text = b"<a xmlns='u'><skip><b>1</b></skip>" + b"<b>x<b>inner</b></b>" * 3000 + b"</a>"
    found = markup.elements(io.BytesIO(text), Path("x"), {"b"})
    first = next(found)
    assert markup.text_of(first) == "1"
    next(found)
    assert markup.text_of(first) == "", "cleared"
    assert sum(1 for _ in found) == 2999


@pytest.mark.parametrize(
    "text",
    [
        b"<a><b></a>",
        b'<!DOCTYPE a [<!ENTITY x "y">]><a><b>&x;</b></a>',
        b"<!--" + b" " * markup.CHUNK + b'--><!DOCTYPE a [<!ENTITY x "y">]><a><b>&x;</b></a>',
        '<?xml version="1.0" encoding="UTF-16"?><!DOCTYPE a><a><b/></a>'.encode("utf-16"),
    ],
)
def test_broken_xml_and_xml_with_entities_raise(text: bytes) -> None:
    with pytest.raises(BimedixError):
        list(markup.elements(io.BytesIO(text), Path("x.xml"), {"b"}))


def test_a_file_that_is_not_a_workbook_raises(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"no zip")
    with zipfile.ZipFile(tmp_path / "b.xlsx", "w") as book:
        book.writestr("x", "y")
    for name in ("a.xlsx", "b.xlsx"):
        with pytest.raises(BimedixError, match="save it as CSV"):
            fields(tmp_path / name)


def test_a_limit_stops_reading_and_rejected_rows_count(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("".join(f'{{"x": "{i}"}}\n' if i % 5 else "{\n" for i in range(20)))
    whole, limited = Quarantine(), Quarantine(limit=7)
    assert len(build(whole, tmp_path / "r.jsonl")) == 16
    assert (whole.count, whole.read["s"]) == (4, 20)
    with pytest.raises(LimitReached):
        build(limited, tmp_path / "r.jsonl")
    assert (limited.count, limited.read["s"]) == (2, 7), "rows 0 and 5 are broken"


def test_the_quarantine_bounds_its_memory() -> None:
    taken: list[Rejected] = []
    quarantine = Quarantine(sink=taken.append)
    for number in range(1200):
        quarantine.add("s", "f", number, f"{number} " + "x" * 1000)
    assert (len(taken), quarantine.rejected, quarantine.count) == (1200, [], 1200)
    assert quarantine.reasons()["s", OTHER_REASONS] == 200
    assert max(len(row.reason) for row in taken) == 300


def test_a_large_array_is_read_in_the_memory_of_one_entry(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    with path.open("w") as file:
        file.write("[")
        for number in range(20000):
            file.write(
                ("," if number else "")
                + json.dumps({"instruction": "", "input": f"{number} " + "q" * 1000, "output": "a" * 500})
            )
        file.write("]")
    assert path.stat().st_size > 30e6
    code = f"""
import resource
from bimedix_jax.curation.quarantine import Quarantine
from bimedix_jax.curation.readers import read
found = read("chatdoctor={path}", Quarantine())
next(found)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(sum(1 for _ in found), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, grown_mib = map(int, done.stdout.split())
    assert count == 19999
    assert grown_mib < 16
