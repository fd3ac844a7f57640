"""Human review: what is exported comes back as verdicts, edits are carried out, statistics are the known ones."""

import csv
import hashlib
import io
import json
import math
import random
import re
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from bimedix_jax.cli import main
from bimedix_jax.curation.checks.flags import Flag
from bimedix_jax.curation.review import agreement, export, label_studio, presentation, tables, verdicts
from bimedix_jax.curation.review.items import Decision, Reason, ReviewItem, Verdict, dump, read_items
from bimedix_jax.curation.review.segments import digest, segments, with_edits
from bimedix_jax.curation.review.statistics import statistics
from bimedix_jax.data.records import (
    Language,
    Record,
    conversation,
    multiple_choice_answer,
    multiple_choice_question,
    read_jsonl,
    write_jsonl,
)
from bimedix_jax.errors import BimedixError
from bimedix_jax.process.folders import WRITTEN

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
CHOICES: dict[str, tuple[str, ...]] = {
    "en": ("Acute gout", "Bronchial asthma", "12.5"),
    "ar": ("النقرس الحاد", "الربو القصبي", "12.5"),
}


def mcqa(name: str, language: Language = "en", extra: str = "") -> Record:
    stem = {"en": "A man wheezes. What is it?", "ar": "رجل لديه أزيز. ما التشخيص؟"}[language] + extra
    because = {"en": "He wheezes at night.", "ar": "لديه أزيز في الليل."}[language]
    return Record(
        id=name if language == "en" else f"{name}/ar",
        language=language,
        kind="mcqa",
        source="test",
        licence="CC0",
        conversations=conversation(
            multiple_choice_question(stem, CHOICES[language]),
            multiple_choice_answer(CHOICES[language], 1, language, because),
        ),
        choices=CHOICES[language],
        answer=1,
    )


def item(name: str = "q1", reason: Reason = "sample", score: float | None = 90.0, **fields) -> ReviewItem:
    translation = None if reason == "no translation" else mcqa(name, "ar")
    return ReviewItem(id=name, reason=reason, source=mcqa(name), translation=translation, score=score, **fields)


def verdict(name: str, reviewer: str, decision: Decision, score: float | None = None, **fields) -> Verdict:
    return Verdict(item=name, reviewer=reviewer, time=NOON, decision=decision, score=score, **fields)


# --- segments


def test_segments_are_the_texts_and_not_the_structure():
    parts = {part.id: (part.source, part.translation) for part in segments(item())}
    assert ("Acute gout", "النقرس الحاد") in parts.values()
    assert ("A man wheezes. What is it?", "رجل لديه أزيز. ما التشخيص؟") in parts.values()
    assert ("He wheezes at night.", "لديه أزيز في الليل.") in parts.values()
    assert not any("12.5" in text or "Answer" in text or "الإجابة" in text for pair in parts.values() for text in pair)


def test_an_edited_choice_changes_everywhere():
    part = next(part for part in segments(item()) if part.translation == "الربو القصبي")
    record = with_edits(item(), {part.id: "ربو القصبات"}, {"review": "x"})
    assert record.choices == ("النقرس الحاد", "ربو القصبات", "12.5")
    assert "\nB. ربو القصبات\n" in record.conversations[0].value
    assert record.conversations[1].value.startswith("الإجابة: B. ربو القصبات\n")
    assert (record.id, record.answer, record.provenance["review"]) == ("q1/ar", 1, "x")


def test_no_edit_changes_nothing():
    assert with_edits(item(), {}, {}) == item().translation


def test_a_reviewer_can_add_a_missing_translation():
    empty = item(reason="no translation", score=None)
    texts = {part.id: f"نص {number}" for number, part in enumerate(segments(empty))}
    assert with_edits(empty, texts, {}).language == "ar"
    with pytest.raises(BimedixError, match="has no translation"):
        with_edits(empty, {}, {})


def test_a_translation_with_another_structure_is_an_error():
    other = mcqa("q1", "ar").model_copy(update={"conversations": conversation("سؤال بلا خيارات؟", "جواب")})
    with pytest.raises(BimedixError, match="does not have the structure"):
        segments(ReviewItem(id="q1", reason="sample", source=mcqa("q1"), translation=other))


# --- files of items


def test_items_survive_writing_and_reading(tmp_path):
    flagged = item("q2", "flag", None, flags=(Flag(name="doses", detail="5 mg became g", place="turn 1"),))
    (tmp_path / "review.jsonl").write_text(f"{item().to_json()}\n\n{flagged.to_json()}\n", "utf-8")
    assert list(read_items(tmp_path / "review.jsonl")) == [item(), flagged]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "review.jsonl:1"), (f"{item().to_json()}\n{item().to_json()}", "is already in line 1"),
     ('{"id": "q"}', "reason: Field required")],
)  # fmt: skip
def test_bad_item_files_are_explained(tmp_path, text, message):
    (tmp_path / "review.jsonl").write_text(text, "utf-8")
    with pytest.raises(BimedixError, match=message):
        list(read_items(tmp_path / "review.jsonl"))


def test_inconsistent_items_are_errors():
    with pytest.raises(ValueError, match="sampled item was accepted"):
        ReviewItem(id="q", reason="sample", source=mcqa("q"))
    with pytest.raises(ValueError, match="only 'edit' changes texts"):
        verdict("q", "first", "accept", edited={"t1": "x"})
    with pytest.raises(ValueError, match="the decision is 'edit' and no text is changed"):
        verdict("q", "first", "edit")


# --- Label Studio


def annotated(task: dict, **controls) -> dict:
    """What Label Studio exports of a task after somebody used these controls."""
    kinds = {"decision": "choices", "edited": "text", "comment": "text", "score": "number"}
    result = [
        {"id": "x", "from_name": name, "to_name": "pair", "type": kinds[name], "origin": "manual",
         "value": {kinds[name]: value if name == "score" else [value]}}
        for name, value in controls.items()
    ]  # fmt: skip
    annotation = {"id": 7, "completed_by": {"id": 3, "email": "first@example.org"}, "was_cancelled": False,
                  "created_at": "2026-03-01T12:00:00.5Z", "updated_at": "2026-03-01T12:01:00.5Z",
                  "lead_time": 9.5, "result": result}  # fmt: skip
    return {"id": 1, "project": 2, "data": task["data"], "annotations": [annotation], "predictions": []}


def test_the_labelling_configuration_fits_the_tasks():
    root = ElementTree.fromstring(label_studio.labelling_config())
    named = {element.get("name"): element for element in root.iter() if element.get("name")}
    assert set(label_studio.FIELDS) == set(named) - {"pair"}
    assert all(element.get("toName") == "pair" for name, element in named.items() if name != "pair")
    assert [choice.get("value") for choice in named["decision"]] == ["accept", "edit", "reject"]
    (task,) = label_studio.tasks([item()], blind=True)
    used = {element.get("value", "") for element in root.iter() if element.get("value", "").startswith("$")}
    assert {name.removeprefix("$") for name in used} <= set(task["data"])
    assert "direction: rtl" in (root.findtext("Style") or "")


def test_a_task_shows_arabic_from_right_to_left_and_no_markup_of_the_text():
    source = mcqa("q1", extra=" <script>alert(1)</script>")
    wild = ReviewItem(id="q1", reason="sample", source=source, translation=mcqa("q1", "ar", "<b>"))
    (task,) = label_studio.tasks([wild], blind=True)
    shown = task["data"]["html"]
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert 'dir="rtl" lang="ar"' in shown
    table = ElementTree.fromstring(shown.replace("·", ""))
    assert {cell.get("dir") for cell in table.iter("td")} == {None, "ltr", "rtl"}


def test_score_and_flags_are_shown_only_on_request():
    blind, open_ = (label_studio.tasks([item()], blind)[0]["data"]["html"] for blind in (True, False))
    assert "score: 90" not in blind
    assert "score: 90" in open_
    assert "machine,\r\n" not in tables.to_csv([item()], None, blind=False)
    assert "score: 90" in tables.to_csv([item()], None, blind=False)
    assert "score: 90" not in tables.to_jsonl([item()], None, blind=True)


def test_verdicts_from_label_studio():
    items = {"q1": item()}
    (task,) = label_studio.tasks(items.values(), blind=True)
    text = task["predictions"][0]["result"][0]["value"]["text"][0]
    edited = text.replace("أزيز في الليل", "أزيز ليلا")
    exported = json.dumps([annotated(task, decision="accept", edited=edited, score=80, comment="ok")])
    (found,) = label_studio.verdicts(exported, "export.json", items)
    assert (found.reviewer, found.decision, found.score, found.comment) == ("first@example.org", "edit", 80, "ok")
    assert found.time.isoformat() == "2026-03-01T12:01:00.500000+00:00"
    assert list((found.edited or {}).values()) == ["لديه أزيز ليلا."]
    (same,) = label_studio.verdicts(json.dumps([annotated(task, decision="accept", edited=text)]), "e", items)
    assert same.decision == "accept"
    assert same.edited is None


def test_skipped_annotations_are_no_verdicts():
    (task,) = label_studio.tasks([item()], blind=True)
    exported = annotated(task)
    exported["annotations"][0]["was_cancelled"] = True
    assert label_studio.verdicts(json.dumps([exported]), "e", {"q1": item()}) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda task: task["annotations"][0].update(result=[]), "has no decision"),
        (lambda task: task["annotations"][0].update(completed_by=None), "completed_by is missing"),
        (lambda task: task.pop("annotations"), "not as JSON-MIN"),
        (lambda task: task["data"].update(item="other"), "no item 'other'"),
        (lambda task: task["data"].update(digest="x"), "translated again"),
        (lambda task: task["annotations"][0]["result"][0].update(from_name="mood"), "unknown control 'mood'"),
        (lambda task: task["annotations"][0]["result"][0].update(value={"rating": 3}), "neither a choice"),
        (lambda task: task["annotations"][0]["result"][0]["value"].update(choices=["maybe"]), "decision: Input"),
        (lambda task: task["annotations"][0]["result"][1]["value"].update(text=["no marks"]), r"begin with \[\["),
        (lambda task: task["annotations"][0]["result"][1]["value"].update(text=["[[t9]]\nx"]), "has the marks t9"),
        (lambda task: task["annotations"][0]["result"][2]["value"].update(number=101), "score: Input"),
    ],
)
def test_exports_that_do_not_fit_are_explained(change, message):
    (task,) = label_studio.tasks([item()], blind=True)
    exported = annotated(task, decision="accept", edited=presentation.editable(segments(item())), score=50)
    change(exported)
    with pytest.raises(BimedixError, match=message):
        label_studio.verdicts(json.dumps([exported]), "export.json", {"q1": item()})


# --- CSV and JSONL


def fill(text: str, **cells: str) -> str:
    """A CSV file with cells of its first row filled in."""
    rows = list(csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline="")))
    rows[0].update(cells)
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def from_csv(text: str) -> list[Verdict]:
    return tables.from_csv(text, "back.csv", {"q1": item()}, NOON, "file")


def test_csv_survives_writing_and_reading():
    text = tables.to_csv([item()], "first", blind=True)
    assert text.startswith("\ufeffitem,")
    assert from_csv(text) == []
    first = segments(item())[0]
    (found,) = from_csv(fill(text, edited="نص جديد", score="70", time="2026-03-02T08:00:00+03:00"))
    assert (found.reviewer, found.decision, found.score, found.edited) == ("first", "edit", 70, {first.id: "نص جديد"})
    assert found.time.isoformat() == "2026-03-02T08:00:00+03:00"
    (found,) = from_csv(fill(text, decision="Reject", edited="نص جديد", reviewer=""))
    assert (found.reviewer, found.decision, found.edited, found.time) == ("first", "reject", None, NOON)


@pytest.mark.parametrize(
    ("written", "score"),
    [("85", 85), ("85.5", 85.5), ("85,5", 85.5), ("٨٥", 85), ("۸۵", 85), ("٨٥٫٥", 85.5), ("85%", 85), ("85 %", 85),
     ("٨٥٪", 85), ("85/100", 85), ("0", 0), ("", None), (" 100 ", 100)],
)  # fmt: skip
def test_scores_are_read_as_people_write_them(written, score):
    (found,) = from_csv(fill(tables.to_csv([item()], "first", blind=True), decision="accept", score=written))
    assert found.score == score
    line = json.loads(tables.to_jsonl([item()], "first", blind=True)) | {"decision": "accept", "score": written}
    (found,) = tables.from_jsonl(json.dumps(line), "back.jsonl", {"q1": item()}, NOON, "file")
    assert found.score == score


@pytest.mark.parametrize("written", ["good", "8 5", "1,000", "-1", "101", "85,5,5"])
def test_other_scores_are_errors(written):
    with pytest.raises(BimedixError, match=r"back\.csv"):
        from_csv(fill(tables.to_csv([item()], "first", blind=True), decision="accept", score=written))


@pytest.mark.parametrize("delimiter", [";", "\t", "؛", "،"])
def test_sheets_with_another_delimiter_are_read(delimiter):
    text = fill(tables.to_csv([item()], "first", blind=True), decision="accept", score="85,5", comment="a, b; c")
    rows = list(csv.reader(io.StringIO(text.removeprefix("\ufeff"))))
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter).writerows(rows)
    (found,) = from_csv(buffer.getvalue())
    assert (found.decision, found.score, found.comment) == ("accept", 85.5, "a, b; c")


def test_no_spreadsheet_takes_a_digest_for_a_number():
    for number in range(100):
        source, translation = mcqa("q", "en", f" {number}"), mcqa("q", "ar", f" {number}")
        found = digest(ReviewItem(id="q", reason="sample", source=source, translation=translation))
        assert re.fullmatch("[a-z]{16}", found)
        assert not set(found) & set("efil")


def test_digests_of_earlier_versions_are_read_and_rounded_ones_explained():
    text = fill(tables.to_csv([item()], "first", blind=True), decision="accept")
    seen = "\0".join(f"{part.id}\0{part.source}\0{part.translation}" for part in segments(item()))
    earlier = hashlib.sha256(seen.encode()).hexdigest()[:16]
    assert len(from_csv(text.replace(digest(item()), earlier))) == 1
    for rounded in ("1.23457E+15", "1,23457E+15", "1234567890123450"):
        with pytest.raises(BimedixError, match="rounded the digest"):
            from_csv(fill(text, digest=rounded))
    with pytest.raises(BimedixError, match="translated again"):
        from_csv(fill(text, digest="x" * 16))


def test_a_cell_is_never_a_formula():
    evil = item().model_copy(update={"source": mcqa("q1", extra="").model_copy(update={"id": "=1+1"})})
    wild = ReviewItem(id="=cmd()", reason="sample", source=evil.source, translation=mcqa("q1", "ar"))
    rows = list(csv.reader(io.StringIO(tables.to_csv([wild], None, blind=True).removeprefix("\ufeff"))))
    assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@"))]
    text = fill(tables.to_csv([wild], None, blind=True), decision="accept")
    (found,) = tables.from_csv(text, "b.csv", {"=cmd()": wild}, NOON, "file")
    assert found.item == "=cmd()"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lambda text: text.replace("decision", "verdict"), "no column 'decision'"),
        (lambda text: fill(text, decision="perhaps"), "decision: Input"),
        (lambda text: fill(text, decision="accept", score="good"), "is not a number"),
        (lambda text: fill(text, decision="accept", item="q9"), "no item 'q9'"),
        (lambda text: fill(text, decision="accept", digest="x"), "translated again"),
        (lambda text: fill(text, edited="نص", segment="t99"), "no segment 't99'"),
        (lambda text: fill(text, score="5"), "and no decision"),
        (lambda text: fill(text, decision="accept", translation="نص"), "write the correction in `edited`"),
        (lambda text: fill(text, translation="نص"), "write the correction in `edited`"),
        (lambda text: fill(text, decision="accept", translation=""), "write the correction in `edited`"),
        (lambda text: fill(text, decision="accept", source="A"), "`source` of segment .* was changed"),
        (lambda text: fill(text, decision="accept").rstrip().rpartition("\n")[0], "item 'q1' lacks segment 't2'"),
        (lambda text: fill(text, edited="نص").rstrip().rpartition("\n")[0], "item 'q1' lacks segment"),
        (lambda text: fill(text, edited="نص") + text.splitlines()[1] + "\n", "there twice, with different edited"),
        (lambda text: fill(text, decision="accept", time="yesterday"), "time: Input"),
        (lambda text: text + "q1," + "x," * 20, "more cells than the header"),
        (lambda text: text + '"open', "not a CSV file"),
    ],
)
def test_errors_in_a_csv_file_are_explained(text, message):
    with pytest.raises(BimedixError, match=message):
        from_csv(text(tables.to_csv([item()], "first", blind=True)))


def test_what_a_spreadsheet_changes_in_a_text_is_no_edit():
    """Spaces and line breaks; and nothing that was exported matters where an item is rejected or has no decision."""
    text = tables.to_csv([item()], "first", blind=True)
    shown = segments(item())[0].translation
    (found,) = from_csv(fill(text, decision="accept", translation=f" {shown.replace(' ', chr(10))} "))
    assert (found.decision, found.edited) == ("accept", None)
    (found,) = from_csv(fill(text, translation="نص", edited="نص"))
    assert found.decision == "edit"
    (found,) = from_csv(fill(text, decision="reject", translation="نص"))
    assert found.decision == "reject"
    assert from_csv(text.rstrip().rpartition("\n")[0]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row["segments"].pop(), "lacks segment"),
        (lambda row: row["segments"][0].update(translation="نص"), "write the correction in `edited`"),
        (lambda row: row["segments"][0].update(id="t99"), "no segment 't99'"),
    ],
)
def test_lines_that_lost_or_changed_a_text_are_errors(change, message):
    row = json.loads(tables.to_jsonl([item()], "first", blind=True)) | {"decision": "accept"}
    change(row)
    with pytest.raises(BimedixError, match=message):
        tables.from_jsonl(json.dumps(row), "b", {"q1": item()}, NOON, "file")


def test_jsonl_survives_writing_and_reading():
    text = tables.to_jsonl([item()], "first", blind=True)
    row = json.loads(text)
    row["segments"][0]["edited"] = "نص جديد"
    row |= {"score": 0, "comment": "x"}
    (found,) = tables.from_jsonl(json.dumps(row), "b", {"q1": item()}, NOON, "file")
    assert (found.decision, found.score, found.comment) == ("edit", 0, "x")
    assert tables.from_jsonl(dump(found), "b", {"q1": item()}, NOON, "file") == [found]
    for bad, message in (("{", "is not JSON"), ('{"segments": 1}', "Field required"), ('{"item": "q1"}', "reviewer")):
        with pytest.raises(BimedixError, match=message):
            tables.from_jsonl(bad, "b", {"q1": item()}, NOON, "file")


def attempt(read, *arguments) -> list[Verdict] | str:
    """Verdicts, or the one sentence that says why there are none."""
    try:
        return read(*arguments)
    except BimedixError as error:
        return str(error)


WILD = st.one_of(
    st.text(max_size=60),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.one_of(st.sampled_from(["data", "item", "annotations", "result", "value", "segments"]), st.text()),
                inner,
                max_size=4,
            ),
        ),
        max_leaves=12,
    ).map(json.dumps),
)


@settings(max_examples=60, deadline=None)
@given(WILD, st.sampled_from([".json", ".csv", ".jsonl"]))
def test_any_input_gives_verdicts_or_one_clear_error(tmp_path_factory, text, ending):
    path = tmp_path_factory.mktemp("wild") / f"back{ending}"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    outcome = attempt(verdicts.read, path, {"q1": item()})
    assert isinstance(outcome, list) or outcome.startswith(("back", str(path)))


def test_damaged_exports_give_verdicts_or_one_clear_error():
    """Every byte of a good export counts: whatever one of them becomes, nothing but a clear error comes of it."""
    items = {"q1": item()}
    (task,) = label_studio.tasks(items.values(), blind=True)
    good = json.dumps([annotated(task, decision="accept", score=50)], ensure_ascii=False)
    pick = random.Random(0)
    for _ in range(300):
        place = pick.randrange(len(good))
        bad = good[:place] + pick.choice(['"', "{", "]", "9", "null", "", "x"]) + good[place + 1 :]
        outcome = attempt(label_studio.verdicts, bad, "e.json", items)
        assert isinstance(outcome, list) or outcome.startswith("e.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("back.txt", b"", "one of .json"), ("back.csv", b"\xff\xfe\x00", "UTF-16"),
     ("back.json", None, "cannot read"),
     ("back.json", b"[" * 100_000, "is not JSON")],
)  # fmt: skip
def test_unreadable_files_are_explained(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BimedixError, match=message):
        verdicts.read(tmp_path / name, {})


# --- carrying verdicts out


def test_the_majority_decides_and_ties_are_undecided():
    items = [item(name) for name in ("a", "b", "c", "d", "e")]
    part = segments(items[0])[0].id
    said = [
        verdict("a", "first", "accept"), verdict("a", "second", "accept"), verdict("a", "third", "reject"),
        verdict("b", "first", "reject"), verdict("b", "second", "accept"),
        verdict("c", "first", "reject"),
        verdict("d", "first", "edit", edited={part: "نص أول"}),
        verdict("d", "second", "edit", edited={part: "نص ثان"}).model_copy(update={"time": NOON.replace(hour=13)}),
    ]  # fmt: skip
    settled = verdicts.settle(items, said)
    assert [row.result for row in settled] == ["accepted", "undecided", "rejected", "edited", "unreviewed"]
    assert verdicts.counts(settled)["differing_edits"] == 1
    edited = settled[3].record
    assert edited is not None
    assert "نص ثان" in edited.conversations[0].value
    kept = edited.provenance["review"]
    assert [(row["reviewer"], row["decision"]) for row in kept] == [("first", "edit"), ("second", "edit")]
    assert kept[1]["time"] == "2026-03-01T13:00:00+00:00"


def test_only_the_latest_verdict_of_a_reviewer_counts():
    later = verdict("a", "first", "reject").model_copy(update={"time": NOON.replace(hour=20)})
    assert verdicts.latest([later, verdict("a", "first", "accept")]) == [later]


def test_flags_that_an_edit_raises_are_kept():
    part = next(part for part in segments(item()) if part.source.startswith("He wheezes"))
    (row,) = verdicts.settle([item()], [verdict("q1", "first", "edit", edited={part.id: "He wheezes at night."})])
    assert row.record is not None
    assert any("untranslated" in flag for flag in row.record.provenance["flags_after_review"])


def test_an_edit_without_arabic_is_an_error_unless_it_is_a_name_of_the_source(tmp_path):
    text = tables.to_csv([item()], "first", blind=True)
    path = tmp_path / "first.csv"
    path.write_text(fill(text, edited="English text only"), "utf-8")
    with pytest.raises(BimedixError, match="has no Arabic"):
        verdicts.read(path, {"q1": item()})
    (found,) = from_csv(fill(text, edited="English text only"))
    lines = tmp_path / "verdicts.jsonl"
    lines.write_text(dump(found) + "\n", "utf-8")
    with pytest.raises(BimedixError, match="has no Arabic"):
        verdicts.read(lines, {"q1": item()})
    kept = ReviewItem.model_validate_json(item().to_json().replace("Acute gout", "HLA-B27"))
    (part,) = [part for part in segments(kept) if part.source == "HLA-B27"]
    lines.write_text(dump(verdict("q1", "first", "edit", edited={part.id: "HLA-B27"})) + "\n", "utf-8")
    assert len(verdicts.read(lines, {"q1": kept})) == 1


def test_accept_with_a_changed_text_is_counted_as_edit(tmp_path, capsys):
    (tmp_path / "review.jsonl").write_text(item().to_json() + "\n", "utf-8")
    text = tables.to_csv([item()], "first", blind=True)
    (tmp_path / "first.csv").write_text(fill(text, decision="accept", edited="جرعة 500 ملغ"), "utf-8")
    words = ["--items", str(tmp_path / "review.jsonl"), "--verdicts", str(tmp_path / "first.csv")]
    assert main(["data", "review", "import", *words, "--out", str(tmp_path / "out")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 verdicts say accept and have a changed text: they count as edit" in shown
    assert "1 records that reviewers kept raise flags of the checks" in shown
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert (report["accept_became_edit"], report["flagged"]) == (1, 1)


# --- statistics


def test_kappa_of_the_known_example():
    """Two raters, 50 items: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no give 0.4."""
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    left, right = zip(*pairs, strict=True)
    assert agreement.cohen_kappa(left, right) == pytest.approx(0.4)
    assert agreement.cohen_kappa("aab", "aab") == 1
    assert agreement.cohen_kappa("aaa", "aaa") is None
    assert agreement.cohen_kappa("", "") is None


# Krippendorff (2011), section D: four observers, twelve units, gaps as None
KRIPPENDORFF = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]


@pytest.mark.parametrize(("level", "value"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_the_published_example(level, value):
    units = [[row[unit] for row in KRIPPENDORFF if row[unit] is not None] for unit in range(12)]
    assert agreement.krippendorff_alpha(units, level) == pytest.approx(value, abs=5e-4)


def test_alpha_where_it_is_undefined():
    assert agreement.krippendorff_alpha([[1], [2]]) is None
    assert agreement.krippendorff_alpha([[1, 1], [1, 1]]) is None
    assert agreement.krippendorff_alpha([[1, 1], [2, 2]], "interval") == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(-3, 3)), min_size=2, max_size=30))
def test_correlations_equal_scipys(pairs):
    x, y = zip(*pairs, strict=True)
    if len(set(x)) > 1 and len(set(y)) > 1:
        assert agreement.pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y)[0], abs=1e-9)
        assert agreement.spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y)[0], abs=1e-9)
    else:
        assert agreement.pearson(x, y) is None


def test_the_bootstrap_covers_the_true_value():
    random_ = np.random.default_rng(0)
    inside = 0
    for trial in range(60):
        x = random_.normal(size=40)
        found = agreement.bootstrap("pearson", x, 0.6 * x + 0.8 * random_.normal(size=40), resamples=300, seed=trial)
        assert found["low"] is not None
        assert found["high"] is not None
        inside += found["low"] <= 0.6 <= found["high"]
    assert inside >= 50


@pytest.mark.parametrize(
    ("kind", "value", "low", "high"),
    [
        ("pearson", 0.48412031346892026, 0.2867663604701486, 0.6451642345092242),
        ("spearman", 0.487800644357315, 0.2620030438731159, 0.6674897321549313),
    ],
)
def test_correlations_and_bootstrap_keep_their_numbers(kind, value, low, high):
    """The numbers of the implementation without SciPy, which resampled in the same order."""
    random_ = np.random.default_rng(7)
    x = np.round(random_.normal(size=60) * 10 + 80)
    y = np.round(x / 20 + random_.normal(size=60))
    found = agreement.bootstrap(kind, x, y, seed=3)
    assert (found["value"], found["low"], found["high"]) == pytest.approx((value, low, high), rel=1e-12)
    few = agreement.bootstrap(kind, [90.0, 95.0, 95.0, 95.0], [2.0, 2.0, 2.0, 1.0], seed=1)
    assert few["value"] == pytest.approx(-1 / 3)
    assert (few["undefined"], few["low"]) == (1091, None)


def test_the_bootstrap_is_seeded_and_undefined_for_constants():
    x, y = [1.0, 2.0, 3.0, 4.0, 9.0], [2.0, 1.0, 5.0, 4.0, 5.0]
    assert agreement.bootstrap("spearman", x, y, seed=3) == agreement.bootstrap("spearman", x, y, seed=3)
    few = agreement.bootstrap("spearman", [1.0, 2.0], [1.0, 1.0])
    assert (few["value"], few["low"]) == (None, None)


@pytest.mark.parametrize(("errors", "n"), [(0, 50), (1, 50), (10, 30), (5, 5)])
def test_wilson_equals_scipys(errors, n):
    """Also at an effective sample size that happens to be whole."""
    expected = scipy.stats.binomtest(errors, n).proportion_ci(0.95, "wilson")
    assert agreement.wilson(errors, n) == pytest.approx((expected.low, expected.high), abs=1e-9)
    weighted = agreement.stratified_wilson({"only": (errors, n, n)})
    assert (weighted["low"], weighted["high"]) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert agreement.wilson(0, 0) == (0, 1)


def test_proportional_strata_give_the_plain_bound_and_others_are_weighted():
    same = agreement.stratified_wilson({"a": (1, 10, 100), "b": (2, 20, 200)})
    assert (same["low"], same["high"]) == pytest.approx(agreement.wilson(3, 30))
    skewed = agreement.stratified_wilson({"large": (0, 10, 990), "small": (5, 10, 10)})
    assert skewed["share"] == pytest.approx(0.005)
    assert skewed["effective_n"] < 11
    part = agreement.stratified_wilson({"a": (1, 10, 100), "b": (0, 0, 300)})
    assert part["covered"] == pytest.approx(0.25)
    assert math.isnan(agreement.stratified_wilson({})["share"])


def test_the_stratified_bound_holds():
    """Of 200 sets whose strata hold 2 % and 30 % of errors, the true share is below the bound in at least 95 %."""
    random_ = np.random.default_rng(1)
    true = 0.9 * 0.02 + 0.1 * 0.3
    held = 0
    for _ in range(200):
        rows = {"a": (int(random_.binomial(60, 0.02)), 60, 9000), "b": (int(random_.binomial(20, 0.3)), 20, 1000)}
        held += true <= agreement.stratified_wilson(rows)["high"]
    assert held >= 190


def test_statistics_of_a_review():
    names = [f"q{number}" for number in range(20)]
    items = {name: item(name, score=50.0 + 2 * number) for number, name in enumerate(names)}
    said = []
    for number, name in enumerate(names):
        decision: Decision = "reject" if number < 4 else "accept"
        said.append(verdict(name, "first", decision, 50.0 + number))
        if number % 2:
            said.append(verdict(name, "second", decision, 48.0 + number))
    result = statistics(items, said)
    assert (result["reviewed"], result["verdicts"], result["reviewers"]) == (20, 30, {"first": 20, "second": 10})
    assert result["agreement"]["pairs"][0]["kappa"] == 1
    assert result["agreement"]["alpha_decision"] == 1
    assert 0.5 < result["agreement"]["alpha_score"] < 1
    assert result["judge"]["score"]["pearson"]["value"] > 0.95
    assert 0 < result["judge"]["decision"]["spearman"]["low"] <= result["judge"]["decision"]["spearman"]["value"] <= 1
    assert result["unseen"]["rejected"]["errors"] == 4
    assert result["unseen"]["rejected"]["high"] == pytest.approx(agreement.wilson(4, 20)[1])
    json.dumps(result, allow_nan=False)


def test_bounds_use_only_the_random_sample():
    low = item("low", "low score", 10.0)
    strata = {"stratum": "qa/any/90-95", "stratum_accepted": 50}
    sampled = item("s", score=95.0, **strata)
    found = statistics(
        {"low": low, "s": sampled},
        [verdict("low", "first", "reject"), verdict("s", "first", "edit", edited={"t": "x"})],
    )
    unseen = found["unseen"]
    assert (unseen["sampled"], unseen["seen"], unseen["accepted"]) == (1, 1, 50)
    assert (unseen["rejected"]["errors"], unseen["changed"]["errors"]) == (0, 1)
    assert unseen["rejected"]["weighted"]["covered"] == 1
    nothing = statistics({"s": sampled}, [])
    assert nothing["unseen"]["rejected"]["high"] == 1
    json.dumps(nothing, allow_nan=False)


# --- the command


def test_items_are_shared_out():
    items = [item(f"q{number}") for number in range(10)]
    given = export.shares(items, ["first", "second"], 0.4)
    assert sum(map(len, given.values())) == 14
    assert {one.id for own in given.values() for one in own} == {one.id for one in items}
    assert export.in_order(items, 0) == export.in_order(items[::-1], 0) != export.in_order(items, 1)
    with pytest.raises(BimedixError, match="a different name"):
        export.shares(items, ["a/b", "a b"], 0)


def test_from_export_to_import(tmp_path, capsys):
    items = [item(f"q{number}", stratum="mcqa/any/90-95", stratum_accepted=6) for number in range(6)]
    items.append(item("low", "low score", 20.0))
    (tmp_path / "review.jsonl").write_text("".join(one.to_json() + "\n" for one in items), "utf-8")
    write_jsonl(tmp_path / "translated.jsonl", [mcqa(f"q{number}", "ar") for number in range(6)])
    common = ["--items", str(tmp_path / "review.jsonl"), "--json"]
    out = tmp_path / "out"
    assert main(["data", "review", "export", *common, "--out", str(out), "--form", "csv",
                 "--reviewers", "first", "second", "--overlap", "1"]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out)["files"] == {"first.csv": 7, "second.csv": 7}
    assert (out / "guidelines.md").exists()
    for name in ("first", "second"):
        path = out / f"{name}.csv"
        rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8-sig"), newline="")))
        for row in rows:
            decisions = {"q0": "reject", "low": "accept"}
            row["decision"] = decisions.get(row["item"], "accept")
            if row["item"] == "q1" and row["role"].startswith("explanation"):
                row |= {"edited": "لديه صفير في الليل.", "decision": "edit"}
            elif row["item"] == "q1":
                row["decision"] = ""
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    back = ["--verdicts", str(out / "first.csv"), str(out / "second.csv")]
    assert main(["data", "review", "import", *common, *back, "--translated", str(tmp_path / "translated.jsonl"),
                 "--out", str(tmp_path / "final")]) == 0  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    assert (result["accepted"], result["edited"], result["rejected"], result["records"]) == (5, 1, 1, 6)
    final = {record.id: record for record in read_jsonl(tmp_path / "final" / "translated.jsonl")}
    assert set(final) == {"q1/ar", "q2/ar", "q3/ar", "q4/ar", "q5/ar", "low/ar"}
    assert "صفير" in final["q1/ar"].conversations[1].value
    assert main(["data", "review", "statistics", *common, *back]) == 0
    assert (
        json.loads(capsys.readouterr().out)
        == json.loads((tmp_path / "final" / "report.json").read_text())["statistics"]
    )


def test_files_without_verdicts_are_an_error(tmp_path, monkeypatch, capsys):
    """Forms that nobody filled in, of every kind; nothing is written."""
    monkeypatch.chdir(tmp_path)
    Path("review.jsonl").write_text(item().to_json() + "\n", "utf-8")
    for form, ending in (("csv", "csv"), ("jsonl", "jsonl"), ("label-studio", "json")):
        words = ["--items", "review.jsonl", "--out", form, "--form", form]
        assert main(["data", "review", "export", *words]) == 0
        (blank,) = [path for path in Path(form).iterdir() if path.suffix == f".{ending}" and path.name != WRITTEN]
        if ending == "json":  # as Label Studio exports tasks that nobody annotated
            tasks = [{**task, "annotations": []} for task in json.loads(blank.read_text("utf-8"))]
            blank.write_text(json.dumps(tasks), "utf-8")
        for action in (["import", "--out", "final"], ["statistics"]):
            assert main(["data", "review", *action, "--items", "review.jsonl", "--verdicts", str(blank)]) == 1
            assert f"{blank} contains no verdict" in " ".join(capsys.readouterr().err.split())
    assert not Path("final").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["statistics"], "needs --verdicts"), (["export"], "needs --out"),
     (["export", "--out", "x", "--reasons", "flag"], "no item to review")],
)  # fmt: skip
def test_missing_arguments_are_explained(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("review.jsonl").write_text(item().to_json() + "\n", "utf-8")
    assert main(["data", "review", *arguments, "--items", "review.jsonl"]) == 1
    assert message in capsys.readouterr().err


def test_reading_and_writing_marks():
    parts = segments(item())
    assert presentation.changes(presentation.editable(parts), item()) == {}
    assert all(a.id != b.id for a, b in pairwise(parts))
    assert digest(item()) != digest(item(reason="no translation", score=None))
