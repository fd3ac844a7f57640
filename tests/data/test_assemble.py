import json
from pathlib import Path

import pytest

from bimedix_jax.cli import main
from bimedix_jax.data import records
from bimedix_jax.data.assemble import assemble
from bimedix_jax.data.disjoint import Overlap, assert_disjoint, normalise, overlaps
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


def test_two_spellings_of_a_question_are_one() -> None:
    assert normalise("What  is (are) Asthma ?") == normalise("what is are asthma")
    assert normalise("ما هِيَ أعراضُ الرّبـو؟") == normalise("ما هي اعراض الربو")
    assert normalise("ما هي أعراض الربو") != normalise("ما هي أسباب الربو")


def test_an_overlap_is_found_by_id_by_pubmed_id_and_by_question() -> None:
    evaluation = [make("e1", "What is asthma?"), make("e2", "Does it help?", pmid="123")]
    train = [make("t1", "what is ASTHMA"), make("e2", "new"), make("t2", "other", pmid="123"), make("t3", "free")]
    found = overlaps(train, evaluation)
    assert found == [Overlap("t1", "e1", "question"), Overlap("e2", "e2", "id"), Overlap("t2", "e2", "id")]
    with pytest.raises(BimedixError, match="3 training records are also in the evaluation set, the first is t1"):
        assert_disjoint(train, evaluation)
    assert_disjoint(train[3:], evaluation)


def test_training_never_keeps_what_is_evaluated_and_everything_left_out_is_on_record(tmp_path: Path) -> None:
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
    report = assemble([str(source)], out, evaluation=[str(evaluation)])
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
    assert sorted(path.name for path in out.iterdir()) == [
        "heldout.jsonl",
        "quarantine.jsonl",
        "report.json",
        "train.jsonl",
    ]


def test_a_group_stays_on_one_side(tmp_path: Path) -> None:
    made = [make(f"r{i}", f"Question {i}?", group=f"g{i // 5}") for i in range(100)]
    records.write_jsonl(tmp_path / "s.jsonl", made)
    (tmp_path / "out").mkdir()
    assemble([str(tmp_path / "s.jsonl")], tmp_path / "out", heldout_fraction=0.5)
    sides = [
        {record.provenance["group"] for record in records.read_jsonl(tmp_path / "out" / f"{split}.jsonl")}
        for split in ("train", "heldout")
    ]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 20


def test_the_commands_walk_from_the_sample_to_rows(
    tmp_path: Path, bytes_tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    out, rows, tokenizer = tmp_path / "records", tmp_path / "rows", str(bytes_tokenizer.folder)
    assert main(["data", "assemble", "--sources", "sample", "--output", str(out), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["train"] + report["heldout"] == len(list(records.sample()))
    packing = ["--records", str(out / "train.jsonl"), "--tokenizer", tokenizer, "--sequence-length", "4096"]
    assert main(["data", "pack", *packing, "--output", str(rows), "--json"]) == 0
    index = json.loads(capfd.readouterr().out)
    assert index["examples"] == report["train"]
    assert index["efficiency"] > 0.9
    assert main(["data", "pack", *packing, "--output", str(rows)]) == 1
    assert "pass --overwrite" in capfd.readouterr().err
    assert main(["data", "stats", "--tokenizer", tokenizer, "--examples", "1"]) == 0
    shown = capfd.readouterr().out
    assert "1.0" in shown
    assert "\ufefb" in shown or "\ufe8d" in shown, "Arabic is shown with joined letters"
