import hashlib
import json
import re
from pathlib import Path

import pytest

from bimedix_jax.cli import main
from bimedix_jax.commands.data_assemble import Config
from bimedix_jax.curation.arabic import normalise
from bimedix_jax.curation.assembly import recipe
from bimedix_jax.curation.assembly.assemble import Candidate, assemble
from bimedix_jax.curation.assembly.disjoint import Overlap, assert_disjoint, overlaps
from bimedix_jax.curation.assembly.recipe import resolve_sources
from bimedix_jax.curation.readers import READERS
from bimedix_jax.data import records
from bimedix_jax.data.records import Record, Split, conversation
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.errors import BimedixError


def make(name: str, question: str, split: Split | None = None, **provenance: str) -> Record:
    return Record(
        id=name,
        language="en",
        kind="qa",
        source="test",
        licence="l",
        split=split,
        conversations=conversation(question, f"Answer to {question}"),
        provenance=provenance,
    )


def test_spelling_does_not_distinguish_questions() -> None:
    assert normalise("What  is (are) Asthma ?") == normalise("what is are asthma")
    assert normalise("ما هِيَ أعراضُ الرّبـو؟") == normalise("ما هي اعراض الربو")
    assert normalise("ما هي أعراض الربو") != normalise("ما هي أسباب الربو")


def test_overlaps_are_found_by_id_pubmed_id_and_question() -> None:
    evaluation = [make("e1", "What is asthma?"), make("e2", "Does it help?", pmid="123")]
    train = [make("t1", "what is ASTHMA"), make("e2", "new"), make("t2", "other", pmid="123"), make("t3", "free")]
    found = overlaps(train, evaluation)
    assert found == [Overlap("t1", "e1", "question"), Overlap("e2", "e2", "id"), Overlap("t2", "e2", "id")]
    with pytest.raises(BimedixError, match="3 training records are also in the evaluation set, the first is t1"):
        assert_disjoint(train, evaluation)
    assert_disjoint(train[3:], evaluation)


def test_evaluation_records_are_removed_from_training_and_quarantined(tmp_path: Path) -> None:
    source, evaluation, out = tmp_path / "s.jsonl", tmp_path / "e.jsonl", tmp_path / "out"
    out.mkdir()
    records.write_jsonl(
        source,
        [
            make("a", "Free?", "train"),
            make("b", "Seen in evaluation?", "train"),
            make("c", "Held out here?", "train"),
            make("d", "held out here", "heldout"),
            make("a", "Same id?", "train"),
            make("e", "Free?", "train"),
            make("f", "Trained on there?", "train"),
        ],
    )
    there = [make("x", "Seen in Evaluation", "heldout"), make("y", "Trained on there?", "train")]
    records.write_jsonl(evaluation, there)
    report = assemble(resolve_sources([str(source)], [str(evaluation)]), out)
    assert [record.id for record in records.read_jsonl(out / "train.jsonl")] == ["a", "f"]
    assert [record.id for record in records.read_jsonl(out / "heldout.jsonl")] == ["d"]
    left_out = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["file"], row["detail"]) for row in left_out] == [
        ("a", "a"),
        ("e", "a"),
        ("b", "x, by question"),
        ("c", "d, by question"),
    ]
    assert (report["train"], report["heldout"], report["quarantined"], report["read"]) == (2, 1, 4, {"records": 7})
    (counted,) = report["sources"]
    assert (counted["account"]["records"], counted["account"]["left_out"]) == (3, 4)
    assert "7 lines = 3 records + 4 left out" in counted["notes"]
    assert sorted(path.name for path in out.iterdir()) == [
        "heldout.jsonl",
        "quarantine.jsonl",
        "report.json",
        "train.jsonl",
    ]


def test_a_benchmark_keeps_its_size(tmp_path: Path) -> None:
    held = [make(f"h{number}", "What is the diagnosis?", "heldout") for number in range(3)]
    records.write_jsonl(tmp_path / "s.jsonl", [*held, make("a", "Free?", "train"), make("b", "Free?", "train")])
    (tmp_path / "out").mkdir()
    report = assemble(resolve_sources([str(tmp_path / "s.jsonl")]), tmp_path / "out")
    assert (report["heldout"], report["train"], report["quarantined"]) == (3, 1, 1)


def test_reasons_are_kinds_of_errors_without_text_of_the_rows(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"q": "x", "c": [{"text": f'it\'s "choice" {number}', "label": ["A"]}, "b"], "a": "A"} for number in range(1200)
    ]
    rows += [{"q": "x", "c": ["a", "b"], "a": f"the answer of patient {number}"} for number in range(1200)]
    lines = [json.dumps(row) for row in rows] + ["{" + f"broken {number}" for number in range(1200)]
    lines.append(json.dumps({"q": "x", "c": ["a", "b"], "a": "a"}))
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    source = f"table={tmp_path / 'q.jsonl'}?question=q&choices=c&answer=a&licence=x"
    assert main(["data", "assemble", "--sources", source, "--out", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert [row["rows"] for row in report["reasons"]] == [1200] * 3
    said = "".join(row["reason"] for row in report["reasons"])
    assert "choice 1" not in said
    assert "patient" not in said
    assert "broken" not in said


def test_records_of_one_group_get_the_same_split(tmp_path: Path) -> None:
    made = [make(f"r{i}", f"Question {i}?", group=f"g{i // 5}") for i in range(100)]
    records.write_jsonl(tmp_path / "s.jsonl", made)
    (tmp_path / "out").mkdir()
    assemble(resolve_sources([str(tmp_path / "s.jsonl")], heldout_fraction=0.5), tmp_path / "out")
    sides = [
        {record.provenance["group"] for record in records.read_jsonl(tmp_path / "out" / f"{split}.jsonl")}
        for split in ("train", "heldout")
    ]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 20


def test_assemble_pack_and_stats_run_on_the_sample(
    tmp_path: Path, bytes_tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    out, rows, tokenizer = tmp_path / "records", tmp_path / "rows", str(bytes_tokenizer.folder)
    assert main(["data", "assemble", "--sources", "sample", "--out", str(out), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["train"] + report["heldout"] == len(list(records.sample()))
    packing = ["--records", str(out / "train.jsonl"), "--tokenizer", tokenizer, "--sequence-length", "4096"]
    assert main(["data", "pack", *packing, "--out", str(rows), "--json"]) == 0
    index = json.loads(capfd.readouterr().out)
    assert index["examples"] == report["train"]
    assert index["efficiency"] > 0.9
    assert main(["data", "pack", *packing, "--out", str(rows)]) == 1
    assert "pass --overwrite" in capfd.readouterr().err
    assert main(["data", "stats", "--tokenizer", tokenizer, "--examples", "1"]) == 0
    shown = capfd.readouterr().out
    assert "1.0" in shown
    assert "العربية" in shown, "in logical order, where the output is no terminal"


RECIPE = """
name = "tiny"
about = "For the tests."
heldout_fraction = 0.25

[[sources]]
name = "doctor"
reader = "chatdoctor"
path = "doctor.json"
hub = "owner/name"
revision = "main"
licence = "CC0-1.0"
expect = { rows = 30 }

[[sources]]
name = "exams"
reader = "table"
path = "exams.csv"
licence = "MIT"
options = { question = "q", answer = "key", choices = "a,b", source = "exams" }
expect = { rows = [40, 50], records = 38, exams = 40 }

[[evaluation]]
name = "test"
reader = "records"
path = "test.jsonl"
expect = { rows = 2 }
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two sources with broken rows and duplicates, and an evaluation set that overlaps both."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"instruction": "", "input": f"Question {i % 25}?", "output": f"Answer {i % 25}."} for i in range(30)]
    del rows[7]["output"]
    (folder / "doctor.json").write_text(json.dumps(rows))
    lines = ["q,a,b,key", *(f"Exam {i}?,yes,no,{'AB'[i % 2]}" for i in range(38)), "Exam?,yes,no,C", "short"]
    (folder / "exams.csv").write_text("\n".join(lines) + "\n")
    there = [make("x", "question 3", "heldout"), make("y", "Exam 5?", "heldout")]
    records.write_jsonl(folder / "test.jsonl", there)
    (tmp_path / "tiny.toml").write_text(RECIPE)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_row_is_a_record_or_quarantined_with_its_reason(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = data.parent / "out"
    arguments = ["data", "assemble", str(data.parent / "tiny.toml"), "--data", str(data), "--json"]
    assert main([*arguments, "--out", str(out)]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["train"] + report["heldout"] + report["quarantined"] == 30 + 40
    assert {row["reason"] for row in report["reasons"]} == {
        "another record has the same text",
        "the evaluation set has the same record or question",
        "field 'answer_icliniq' is missing",
        "1 columns, the header has 4",
        "the answer is not one of the 2 choices, read as the labels of the choices",
    }
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [row["line"] is None for row in lines] == sorted(row["line"] is None for row in lines), "unread rows first"


def test_the_same_sources_give_the_same_bytes(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "assemble", str(data.parent / "tiny.toml"), "--data", str(data), "--json"]
    first, second = data.parent / "first", data.parent / "second"
    assert main([*arguments, "--out", str(first)]) == 0
    report = json.loads(capfd.readouterr().out)
    assert main([*arguments, "--out", str(second)]) == 0
    assert contents(first) == contents(second)
    assert hashlib.sha256(contents(first)["train.jsonl"]).hexdigest() == report["sha256"]["train.jsonl"]


def test_unexpected_counts_raise_unless_allowed(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, out = data.parent / "tiny.toml", data.parent / "o"
    file.write_text(RECIPE.replace("rows = 30", "rows = 31").replace("records = 38", "records = [39, 50]"))
    common = ["data", "assemble", str(file), "--data", str(data), "--out", str(out)]
    assert main(common) == 1
    said = capfd.readouterr().err
    assert "doctor has 30 rows, expected 31; exams has 38 records, expected 39 to 50: " in said
    assert not out.exists()
    assert main([*common, "--allow-counts", "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)["unexpected"]) == 2
    (data / "test.jsonl").write_text((data / "test.jsonl").read_text().splitlines()[0] + "\n")
    file.write_text(RECIPE)
    assert main([*common, "--overwrite"]) == 1
    assert "test has 1 rows, expected 2" in capfd.readouterr().err
    assert main([*common, "--overwrite", "--limit", "4", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["read"] == {"chatdoctor": 4, "exams": 4}, "no counts are compared with a limit"


def test_a_licence_that_differs_from_the_recipe_raises(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = RECIPE.replace('path = "test.jsonl"', 'path = "test.jsonl"\nlicence = "MIT"')
    (data.parent / "tiny.toml").write_text(text)
    assert (
        main(["data", "assemble", str(data.parent / "tiny.toml"), "--data", str(data), "--out", str(data / "o")]) == 1
    )
    assert "x of test has licence 'l', but the recipe states 'MIT'" in capfd.readouterr().err


def test_dry_run_lists_the_place_of_every_source(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, other = str(data.parent / "tiny.toml"), data / "other.jsonl"
    other.write_text("")
    dry = ["data", "assemble", file, "--dry-run", "--out", str(data / "o"), "--json"]
    assert main([*dry, "--data", str(data), "--skip", "test", "--local", f"exams={other}"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert [(row["name"], row["from"]) for row in plan["sources"]] == [
        ("doctor", str(data / "doctor.json")),
        ("exams", str(other)),
    ]
    assert (plan["left_out"], plan["evaluation"]) == (["test"], [])
    assert main([*dry, "--only", "doctor"]) == 0
    (row,) = json.loads(capfd.readouterr().out)["sources"]
    assert (row["from"], row["revision"], row["expect"]) == ("hf:owner/name#train", "main", {"rows": 30})
    wrong = {
        ("--only", "exams"): "name its parent folder with --data",
        ("--only", "nothing"): "has no source 'nothing'",
        ("--only", "test"): "no source of recipe tiny is left",
        ("--local", "exams=/does/not/exist"): "there is no /does/not/exist",
        ("--local", "exams=a", "exams=b"): "--local exams is given twice (a, b); give it once",
        ("--sources", "sample"): "and not both",
        ("--limit", "0"): "leaves nothing to read",
    }
    for options, message in wrong.items():
        assert main([*dry, *options]) == 1
        assert message in capfd.readouterr().err
    assert not (data / "o").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('name = "tiny"', "name ="), "is not TOML"),
        (('reader = "table"', 'reader = "tabel"'), "there is no reader 'tabel'"),
        (('licence = "MIT"', ""), "a licence is missing"),
        (('revision = "main"', ""), "hub and revision must be given together"),
        (("expect = { rows = 30 }", ""), "expect.rows is missing"),
        (('path = "exams.csv"', ""), "a path, a hub id or both must be given"),
        (('name = "exams"', 'name = "doctor"'), "two sources have the same name"),
        (("heldout_fraction", "held_out"), "held_out"),
    ],
)
def test_invalid_recipes_raise(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(RECIPE.replace(*change))
    with pytest.raises(BimedixError, match=message):
        recipe.load(str(tmp_path / "r.toml"))


def test_paths_outside_the_data_folder_and_unknown_options_raise(data: Path) -> None:
    for change, message in {
        ('path = "exams.csv"', 'path = "../tiny.toml"'): "not a path inside that folder",
        ('source = "exams"', 'surce = "exams"'): "has no option 'surce'",
    }.items():
        (data.parent / "r.toml").write_text(RECIPE.replace(*(change, message)[0]))
        with pytest.raises(BimedixError, match=message):
            recipe.resolve(recipe.load(str(data.parent / "r.toml")), data)


def test_bundled_recipes_resolve(tmp_path: Path) -> None:
    """Every revision is a full commit hash or the first seven digits of one."""
    assert recipe.names() == ["bimed-en", "published-data"]
    loaded = recipe.load("bimed-en")
    (tmp_path / "medquad").mkdir()
    (tmp_path / "mts_dialog").mkdir()
    resolved = recipe.resolve(loaded, tmp_path)
    assert [source.name for source in resolved.sources] == ["pmc_llama", "chatdoctor", "medquad", "mts_dialog"]
    assert all(
        source.revision is None or len(source.revision) in (7, 40) for source in (*loaded.sources, *loaded.evaluation)
    )
    subsets = [count for name, count in loaded.sources[0].expect.items() if name.startswith("pmc_llama/")]
    least, most = (sum(count[i] if isinstance(count, tuple) else count for count in subsets) for i in (0, 1))
    assert least <= 513_999 <= most
    with pytest.raises(BimedixError, match="there is no recipe nothing; name one of bimed-en, published-data"):
        recipe.load("nothing")


def test_a_candidate_survives_its_line() -> None:
    line = make("a\tb", "Tab\tand line\n?").to_json().encode()
    candidate = Candidate(number=3, source="s", id="a\tb", keys=(("id", b"k" * 16),), line=line)
    assert Candidate.from_bytes(candidate.to_bytes()) == candidate


def test_the_help_names_every_reader_and_recipe() -> None:
    words = set(re.findall(r"[\w-]+", Config.__doc__ or ""))
    assert not {*READERS, *recipe.names()} - words
