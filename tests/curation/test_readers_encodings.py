"""Text in other encodings is read with encoding=, and ids carry the path of the source."""

import gzip
import json
from pathlib import Path

import pytest

from bimedix_jax.curation.assembly.assemble import assemble
from bimedix_jax.curation.assembly.recipe import resolve_sources
from bimedix_jax.curation.quarantine import Quarantine
from bimedix_jax.curation.readers import read
from bimedix_jax.curation.readers.encodings import BLOCK
from bimedix_jax.data.records import Record
from bimedix_jax.errors import BimedixError

TABLE = "السؤال,الجواب\nما هي الحمى؟,ارتفاع الحرارة\nما هو الربو؟,ضيق في الشعب\n"
OPTIONS = "?question=السؤال&answer=الجواب&licence=MIT"


def run(source: str) -> list[Record]:
    return list(read(source, Quarantine()))


def written(path: Path, text: str, encoding: str) -> Path:
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["qa.csv", "qa.csv.gz"])
@pytest.mark.parametrize("encoding", ["windows-1256", "utf-16", "utf-16-le", "utf-16-be", "iso-8859-6"])
def test_tables_in_other_encodings_are_read(tmp_path, encoding, name):
    text = TABLE.replace("؟", "?") if encoding == "iso-8859-6" else TABLE
    path = written(tmp_path / name, text, encoding)
    found = run(f"table={path}{OPTIONS}&encoding={encoding}")
    assert [record.conversations[1].value for record in found] == ["ارتفاع الحرارة", "ضيق في الشعب"]
    assert {record.language for record in found} == {"ar"}


@pytest.mark.parametrize("name", ["qa.jsonl", "qa.json"])
@pytest.mark.parametrize("encoding", ["windows-1256", "utf-16"])
def test_json_in_other_encodings_is_read(tmp_path, encoding, name):
    rows = [{"instruction": "", "input": f"سؤال {number}", "output": "جواب طويل"} for number in range(2000)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\n".join(lines) if name == "qa.jsonl" else f"[{','.join(lines)}]"
    path = written(tmp_path / name, text, encoding)
    assert len(run(f"chatdoctor={path}?encoding={encoding}")) == 2000


@pytest.mark.parametrize(
    ("encoding", "option"),
    [("windows-1256", "encoding=windows-1256"), ("utf-16", "encoding=utf-16"), ("utf-16-be", "encoding=utf-16-be"),
     ("utf-16-le", "encoding=utf-16-le")],
)  # fmt: skip
def test_without_the_option_one_sentence_names_it(tmp_path, encoding, option):
    text = TABLE if encoding == "windows-1256" else "question,answer\n" + "What is fever?,High temperature\n" * 3
    path = written(tmp_path / "qa.csv", text, encoding)
    with pytest.raises(BimedixError, match=f"text; pass (its encoding, such as )?{option}$"):
        run(f"table={path}{OPTIONS}")


def test_wrong_encodings_are_explained(tmp_path):
    path = written(tmp_path / "qa.csv", TABLE, "utf-8")
    with pytest.raises(BimedixError, match="encoding=klingon is unknown"):
        run(f"table={path}{OPTIONS}&encoding=klingon")
    with pytest.raises(BimedixError, match=r"is not ascii text .* pass another encoding="):
        run(f"table={path}{OPTIONS}&encoding=ascii")


def test_a_long_file_whose_block_ends_inside_a_letter_is_utf8(tmp_path):
    path = tmp_path / "qa.csv"
    path.write_bytes(("q,a\n" + "س" * (BLOCK // 2) + "س,جواب\n" + "سؤال,جواب\n" * 3).encode())
    assert len(run(f"table={path}?question=q&answer=a&licence=MIT")) == 4


SETS = {"one": ["I have a cough.", "My knee hurts."], "other": ["I have a rash.", "I feel dizzy."]}


@pytest.fixture
def two_sets(tmp_path: Path) -> list[Path]:
    """Two sets with one file name, one name of the folder, and ids of their own that are the same."""
    paths = []
    for name, texts in SETS.items():
        path = tmp_path / name / "data" / "train.json"
        path.parent.mkdir(parents=True)
        rows = [
            {"id": str(number), "instruction": "", "input": text, "output": "Rest.",
             "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "Rest."}]}
            for number, text in enumerate(texts)
        ]  # fmt: skip
        path.write_text(json.dumps(rows))
        paths.append(path)
    return paths


@pytest.mark.parametrize("reader", ["chatdoctor", "sharegpt", "table"])
def test_sets_with_one_file_name_keep_all_records(tmp_path, two_sets, reader):
    options = {"sharegpt": "?licence=MIT", "table": "?question=input&answer=output&id=id&licence=MIT"}.get(reader, "")
    sources = [f"{reader}={path}{options}" for path in two_sets]
    (tmp_path / "out").mkdir()
    report = assemble(resolve_sources(sources, heldout_fraction=0), tmp_path / "out")
    assert (report["train"], report["quarantined"]) == (4, 0)
    (tmp_path / "second").mkdir()
    report = assemble(resolve_sources(sources[:1], sources[1:], heldout_fraction=0), tmp_path / "second")
    assert (report["train"], report["quarantined"]) == (2, 0)


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_ids_do_not_depend_on_the_folder_or_on_other_rows(tmp_path, ending):
    """The same bytes in two folders; a file with a row more; and another file of the same name."""
    row = {"jsonl": '{{"q": "{}", "a": "Rest."}}\n', "csv": "{},Rest.\n"}[ending]
    head = "q,a\n" if ending == "csv" else ""
    found = []
    for name, words in {"one": "ab", "a/b/two": "ab", "more": "abc", "other": "xy"}.items():
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / f"exam.{ending}").write_text(head + "".join(row.format(word) for word in words))
        records = run(f"table={folder}/exam.{ending}?question=q&answer=a&licence=MIT&language=en")
        found.append([record.id for record in records])
    assert found[0] == found[1] == found[2][:2]
    assert all(name.startswith("table/exam/") for name in found[0])
    assert not set(found[0]) & set(found[3])


def test_ids_do_not_depend_on_how_the_path_is_written(two_sets, monkeypatch):
    monkeypatch.chdir(two_sets[0].parent)
    relative = [record.id for record in run("chatdoctor=train.json")]
    assert relative == [record.id for record in run(f"chatdoctor={two_sets[0]}")]
    assert relative == [record.id for record in run(f"chatdoctor={two_sets[0].parent}")]
    assert relative[0].startswith("chatdoctor/train/1-")
