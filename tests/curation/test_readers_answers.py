"""A column of answers has one reading for all its rows: the right one, or a refusal. Choices are read in every form."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from bimedix_jax.curation.quarantine import Quarantine, WrongSource
from bimedix_jax.curation.readers import read
from bimedix_jax.curation.readers.answers import READINGS, Column
from bimedix_jax.curation.readers.choices import Choices, choices_of, label_of, split_labelled
from bimedix_jax.data.records import Record

ORGANS = ["Liver", "Pancreas", "Spleen", "Kidney"]


def run(source: str) -> tuple[list[Record], Quarantine]:
    quarantine = Quarantine()
    return list(read(source, quarantine)), quarantine


def told(records: list[Record]) -> list[str]:
    return [record.conversations[-1].value.partition("\n")[0] for record in records]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format of the file's ending."""
    if path.suffix == ".jsonl":
        return jsonl(path, rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(
            {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()} for row in rows
        )
        path.write_text(text.getvalue(), encoding="utf-8")
    return path


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("answers", "right"),
    [
        (["B", "A", "D", "C"], [1, 0, 3, 2]),
        (["(b)", "a.", "d)", "C:"], [1, 0, 3, 2]),
        (["Option B", "option_a", "D", "choice c"], [1, 0, 3, 2]),
        (["B. Pancreas", "A) Liver", "(D) Kidney", "C: Spleen"], [1, 0, 3, 2]),
        (["ب", "أ", "د", "ج"], [1, 0, 3, 2]),
        (["ب", "ا", "ث", "ت"], [1, 0, 3, 2]),
        ([1, 0, 3, 2], [1, 0, 3, 2]),
        ([2, 1, 4, 3], [1, 0, 3, 2]),
        (["2", "1", "4", "3"], [1, 0, 3, 2]),
        (["٢", "١", "٤", "٣"], [1, 0, 3, 2]),
        (["۱", "۰", "۳", "۲"], [1, 0, 3, 2]),
        ([1.0, 0.0, 3.0, 2.0], [1, 0, 3, 2]),
        (["Pancreas", "liver", "Kidney.", " Spleen "], [1, 0, 3, 2]),
    ],
)
def test_every_reading_is_recognised_in_every_format(
    ending: str, answers: list[Any], right: list[int], tmp_path: Path
) -> None:
    rows = [{"q": f"Which is number {i}?", "o": ORGANS, "a": answer} for i, answer in enumerate(answers)]
    records, quarantine = run(f"table={write(tmp_path / f'x.{ending}', rows)}?question=q&choices=o&answer=a&licence=x")
    assert [record.answer for record in records] == right
    assert quarantine.count == 0
    assert sum("column a is read as" in note for note in quarantine.account.notes) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        # letters and wordings, each of them possible in all rows
        ([(["O", "A", "B", "AB"], "A"), (["D", "C", "B", "A"], "B")], "two readings.*lines 1, 2; pass answers=letter"),
        # digits of a text file among choices that are numbers
        ([(["1", "2", "3", "4"], "3"), (["4", "2", "3", "1"], "2")], "two readings"),
        # neither the first nor the last number occurs
        ([(ORGANS, 1), (ORGANS, 2), (ORGANS, 3)], "numbers from 0 and numbers from 1"),
        ([(ORGANS, 0), (ORGANS, 4), (ORGANS, 2)], r"both 0 \(lines 1\) and the number of choices \(lines 2\)"),
        ([(ORGANS, answer) for answer in [*(1, 2, 3) * 20, "Spleen"]], "numbers from 0 and numbers from 1"),
        ([(ORGANS, answer) for answer in [*(1, 2, 3, 4) * 20, 0]], "both 0"),
        ([(ORGANS, "B"), (ORGANS, 0), (ORGANS, "Spleen")], "no reading that fits all its 3 answers"),
    ],
)
def test_what_two_readings_fit_is_refused(rows: list[tuple[list[str], Any]], message: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"q": "Which one?", "o": choices, "a": answer} for choices, answer in rows])
    with pytest.raises(WrongSource, match=message):
        run(f"table={path}?question=q&choices=o&answer=a&licence=x")


def test_a_stated_reading_is_used_and_rows_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    groups = [(["O", "A", "B", "AB"], "A"), (["D", "C", "B", "A"], "B"), (ORGANS, "Spleen")]
    path = jsonl(tmp_path / "x.jsonl", [{"q": "Which one?", "o": o, "a": a} for o, a in groups])
    source = f"table={path}?question=q&choices=o&answer=a&licence=x"
    assert told(run(f"{source}&answers=letter")[0]) == ["Answer: A. O", "Answer: B. C"]
    assert told(run(f"{source}&answers=text")[0]) == ["Answer: B. A", "Answer: C. B", "Answer: C. Spleen"]
    numbers = jsonl(tmp_path / "n.jsonl", [{"q": "Which one?", "o": ORGANS, "a": a} for a in (1, 2, 3, 0)])
    source = f"table={numbers}?question=q&choices=o&answer=a&licence=x"
    assert [record.answer for record in run(f"{source}&first_option=1")[0]] == [0, 1, 2]
    assert [record.answer for record in run(f"{source}&answers=from0")[0]] == [1, 2, 3, 0]
    with pytest.raises(WrongSource, match="contradict"):
        run(f"{source}&answers=letter&first_option=1")


def test_letters_win_over_wordings_that_do_not_fit_all_rows(tmp_path: Path) -> None:
    groups = [(["D", "C", "B", "A"], "B"), (ORGANS, "A"), (["O", "A", "B", "AB"], "A")]
    path = jsonl(tmp_path / "x.jsonl", [{"q": "Which one?", "o": o, "a": a} for o, a in groups])
    records, _ = run(f"table={path}?question=q&choices=o&answer=a&licence=x")
    assert told(records) == ["Answer: B. C", "Answer: A. Liver", "Answer: A. O"]
    groups = [(["O", "A", "B", "AB"], "AB"), (["D", "C", "B", "A"], "B")]
    path = jsonl(tmp_path / "y.jsonl", [{"q": "Which one?", "o": o, "a": a} for o, a in groups])
    records, _ = run(f"table={path}?question=q&choices=o&answer=a&licence=x")
    assert told(records) == ["Answer: D. AB", "Answer: C. B"], "AB is no letter, so the column has wordings"


def test_a_number_of_json_is_an_index_and_never_a_wording(tmp_path: Path) -> None:
    rows = [
        {"q": "How many?", "o": ["1", "2", "3", "4"], "a": 3},
        {"q": "How many?", "o": ["4", "2", "3", "1"], "a": 2},
    ]
    assert told(run(f"table={jsonl(tmp_path / 'x.jsonl', rows)}?question=q&choices=o&answer=a&licence=x")[0]) == [
        "Answer: D. 4",
        "Answer: C. 3",
    ]


def test_an_odd_answer_among_many_is_left_out(tmp_path: Path) -> None:
    answers = [*"ABCD" * 10, "Spleen", "E", "", "nan", "A,C"]
    path = jsonl(tmp_path / "x.jsonl", [{"q": "Which one?", "o": ORGANS, "a": answer} for answer in answers])
    records, quarantine = run(f"table={path}?question=q&choices=o&answer=a&licence=x")
    assert len(records) == 40
    assert [row.line for row in quarantine.rejected] == [41, 42, 43, 44, 45]
    assert {row.reason for row in quarantine.rejected} == {
        "the answer is not one of the 4 choices, read as letters A, B, C",
        "the answer is missing",
    }


FOUR = Choices(tuple(ORGANS), tuple("ABCD"))


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (ORGANS, Choices(tuple(ORGANS))),
        ([*ORGANS, "", None, "nan"], Choices(tuple(ORGANS))),
        (["A. Liver", "B. Pancreas", "C. Spleen", "D. Kidney"], FOUR),
        (["(a) Liver", "(b) Pancreas", "(c) Spleen", "(d) Kidney"], FOUR),
        ({"A": "Liver", "B": "Pancreas", "C": "Spleen", "D": "Kidney", "E": None}, FOUR),
        ({"D": "Kidney", "C": "Spleen", "B": "Pancreas", "A": "Liver"}, FOUR),
        ({"opa": "Liver", "opb": "Pancreas", "opc": "Spleen", "opd": "Kidney"}, FOUR),
        ({"text": ORGANS, "label": list("ABCD")}, FOUR),
        ({"label": list("ABCD"), "text": [*ORGANS]}, FOUR),
        ([{"text": t, "label": letter} for t, letter in zip(ORGANS, "ABCD", strict=True)], FOUR),
        ([{"key": letter, "value": t} for t, letter in zip(ORGANS, "ABCD", strict=True)], FOUR),
        ([{letter: t} for t, letter in zip(ORGANS, "ABCD", strict=True)], FOUR),
        ([{"aid": i + 1, "atext": t} for i, t in enumerate(ORGANS)], Choices(tuple(ORGANS), tuple("1234"))),
        ("(A) Liver (B) Pancreas (C) Spleen (D) Kidney", FOUR),
        ("A. Liver\nB. Pancreas\nC. Spleen\nD. Kidney", FOUR),
        ("A) Liver; B) Pancreas; C) Spleen; D) Kidney", FOUR),
        ("a ) Liver , b ) Pancreas , c ) Spleen , d ) Kidney", FOUR),
        ("A: Liver, B: Pancreas, C: Spleen, D: Kidney", FOUR),
        ("1. Liver 2. Pancreas 3. Spleen 4. Kidney", Choices(tuple(ORGANS), tuple("1234"))),
        ("١) Liver ٢) Pancreas ٣) Spleen ٤) Kidney", Choices(tuple(ORGANS), tuple("1234"))),
        ("أ) الكبد ب) الطحال ج) الكلية د) القلب", Choices(("الكبد", "الطحال", "الكلية", "القلب"), tuple("أبجد"))),
        ("أ. الكبد\nب. الطحال\nت. الكلية\nث. القلب", Choices(("الكبد", "الطحال", "الكلية", "القلب"), tuple("أبتث"))),
        ("(ا) الكبد (ب) الطحال", Choices(("الكبد", "الطحال"), tuple("أب"))),
        (json.dumps(ORGANS), Choices(tuple(ORGANS))),
        (str(ORGANS), Choices(tuple(ORGANS))),
        ("['Liver' 'Pancreas'\n 'Spleen' 'Kidney']", Choices(tuple(ORGANS))),
        ("{'text': array(['Liver', 'Kidney'], dtype=object), 'label': array(['A', 'B'], dtype=object)}",
         Choices(("Liver", "Kidney"), ("A", "B"))),
        ([1, 2.5, True], Choices(("1", "2.5", "True"))),
        (["1.5", "2.5"], Choices(("1.5", "2.5"))),
        (["1:2", "2:1"], Choices(("1:2", "2:1"))),
        (["Both", "None"], Choices(("Both", "None"))),
    ],
)  # fmt: skip
def test_choices_in_every_form(value: Any, wanted: Choices) -> None:
    assert choices_of(value) == wanted


@pytest.mark.parametrize("value", [None, "", "x,y", "Liver or spleen?", {"x": "y", "z": "w"}, 7, "Which? (A) x (B) y"])
def test_what_is_no_choices_raises(value: Any) -> None:
    with pytest.raises(ValueError, match="choices"):
        choices_of(value)


def test_labels_have_one_spelling() -> None:
    assert {label_of(text) for text in ("B", "b", "(B)", "B.", " b) ", "[B]", "Option B", "opb", "choice_b")} == {"B"}
    assert {label_of(text) for text in ("أ", "ا", "(أ)", "أ-", "إ.")} == {"أ"}
    assert {label_of(text) for text in ("٢", "2", 2, 2.0, "(2)", "۲")} == {"2"}
    assert label_of("-1") == "-1"


def test_choices_at_the_end_of_the_question(tmp_path: Path) -> None:
    assert split_labelled("What is vitamin C?") is None
    rows = [
        {"q": "Which organ makes insulin? (A) Liver (B) Pancreas (C) Spleen", "a": "B"},
        {"q": "أي عضو يفرز الإنسولين؟\nأ) الكبد\nب) البنكرياس", "a": "A"},
        {"q": "Nothing to choose.", "a": "A"},
    ]
    rows[1]["a"] = "B"
    records, quarantine = run(
        f"table={jsonl(tmp_path / 'x.jsonl', rows)}?question=q&choices=q&answer=a&licence=x&answers=letter"
    )
    assert [record.conversations[0].value for record in records] == [
        "Which organ makes insulin?\nA. Liver\nB. Pancreas\nC. Spleen",
        "أي عضو يفرز الإنسولين؟\nA. الكبد\nB. البنكرياس",
    ]
    assert [record.language for record in records] == ["en", "ar"]
    assert told(records) == ["Answer: B. Pancreas", "الإجابة: B. البنكرياس"]
    assert quarantine.count == 1


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("Does it? A. Vitamin A. B. Vitamin B. C. Vitamin C.", ("Vitamin A.", "Vitamin B.", "Vitamin C.")),
        ("Which? A. Vitamin D. B. Zinc C. Iron D. None", ("Vitamin D.", "Zinc", "Iron", "None")),
        ("Hepatitis A. is viral.\nA. Aspirin\nB. Statin", ("Aspirin", "Statin")),
        ("Hepatitis A. is viral. (A) Aspirin (B) Statin", ("Aspirin", "Statin")),
    ],
)
def test_a_label_inside_a_text_does_not_move_the_choices(text: str, texts: tuple[str, ...]) -> None:
    found = split_labelled(text)
    assert found is not None
    assert found.texts == texts


@pytest.mark.parametrize(
    "text",
    [
        "Hepatitis A. is viral. A. Aspirin B. Statin C. Insulin D. Heparin",
        "A. It is old B. It is new. Which? A. Both B. Neither",
        "Which? A. Hepatitis B. virus B. Statin C. Insulin",
        "ما العلاج؟ فيتامين أ. مفيد أ. الأسبرين ب. الستاتين",
    ],
)
def test_choices_that_can_be_split_in_several_ways_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="occurs more than once"):
        split_labelled(text)
    rows = [{"q": text, "a": "A"}, {"q": "Which organ? A. Liver B. Spleen", "a": "A"}]
    path = jsonl(tmp_path / "x.jsonl", rows)
    records, quarantine = run(f"table={path}?question=q&choices=q&answer=a&licence=x&answers=letter")
    assert (len(records), quarantine.count) == (1, 1)


def test_labels_of_the_data_decide_what_a_number_means(tmp_path: Path) -> None:
    """HEAD-QA counts from 1, ARC has letters in most rows and numbers in some."""
    headqa = [
        {"qtext": "Which organ?", "answers": [{"aid": i + 1, "atext": t} for i, t in enumerate(ORGANS)], "ra": ra}
        for ra in (2, 3)
    ]
    path = jsonl(tmp_path / "h.jsonl", headqa)
    assert [r.answer for r in run(f"table={path}?question=qtext&choices=answers&answer=ra&licence=x")[0]] == [1, 2]
    arc = [
        {"question": "Which?", "choices": {"text": ORGANS, "label": list("ABCD")}, "answerKey": "C"},
        {"question": "Which?", "choices": {"text": ORGANS, "label": list("1234")}, "answerKey": "2"},
    ]
    path = jsonl(tmp_path / "a.jsonl", arc)
    source = f"table={path}?question=question&choices=choices&answer=answerKey&licence=x"
    assert [record.answer for record in run(source)[0]] == [2, 1]
    exams = [
        {
            "question": {
                "stem": "Which?",
                "choices": [{"text": t, "label": c} for t, c in zip("xyzw", "ABCD", strict=True)],
            },
            "answerKey": "D",
        }
    ]
    path = jsonl(tmp_path / "e.jsonl", exams)
    source = f"table={path}?question=question.stem&choices=question.choices&answer=answerKey&licence=x"
    assert [record.answer for record in run(source)[0]] == [3]


def test_names_of_columns_are_labels(tmp_path: Path) -> None:
    for names, answers in (
        (("choice1", "choice2", "choice3", "choice4"), ("choice2", "Choice4")),
        (("opa", "opb", "opc", "opd"), ("opb", "D")),
        (("أ", "ب", "ج", "د"), ("ب", "د")),
    ):
        rows = [{"q": "Which?", **dict(zip(names, ORGANS, strict=True)), "key": answer} for answer in answers]
        path = write(tmp_path / "x.csv", rows)
        records, _ = run(f"table={path}?question=q&choices={','.join(names)}&answer=key&licence=x")
        assert [record.answer for record in records] == [1, 3]
    rows = [
        {"q": "Which?", **{f"c{n}": text for n, text in enumerate(ORGANS, start=1)}, "key": key} for key in (0, 1, 3)
    ]
    path = write(tmp_path / "x.csv", rows)
    records, _ = run(f"table={path}?question=q&choices=c1,c2,c3,c4&answer=key&licence=x")
    assert [record.answer for record in records] == [0, 1, 3], "1 is not the column c1"


def test_empty_choices_at_the_end_are_no_choices_and_in_the_middle_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(
        "q,a,b,c,d,key\nCarried by?,Red cells,Platelets,,,A\nMade in?,Liver,Pancreas,Spleen,Kidney,B\n"
        "Stored in?,Liver,nan,NULL,,A\nWhere?,Liver,,Spleen,,A\nWhich?,Red,Blue,,,C\n"
    )
    records, quarantine = run(f"table={path}?question=q&choices=a,b,c,d&answer=key&licence=x")
    assert [record.choices for record in records] == [("Red cells", "Platelets"), tuple(ORGANS)]
    assert [row.line for row in quarantine.rejected] == [4, 5, 6]


@pytest.mark.parametrize("form", ["columns", "list", "cell", "object"])
def test_a_choice_that_looks_missing_is_named_and_can_be_kept(form: str, tmp_path: Path) -> None:
    words = ["NA", "viral", " None", "fungal"]
    value: Any = {
        "columns": None,
        "list": words,
        "cell": json.dumps(words),
        "object": dict(zip("ABCD", words, strict=True)),
    }
    own = dict(zip("wxyz", words, strict=True)) if form == "columns" else {"o": value[form]}
    place = f"table={jsonl(tmp_path / 'x.jsonl', [{'q': 'Which?', 'a': 'A', **own}])}"
    source = f"{place}?question=q&answer=a&licence=x&choices={'w,x,y,z' if form == 'columns' else 'o'}"
    with pytest.raises(WrongSource, match="the choice 'NA' is read as a missing value; missing=keep") as error:
        run(source)
    assert "header=no" not in str(error.value)
    (record,) = run(f"{source}&missing=keep")[0]
    assert (record.choices, record.answer) == (("NA", "viral", "None", "fungal"), 0)


def test_header_no_is_suggested_only_if_the_header_looks_like_data(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    for header, suggested in (("question,answer", False), ("What is a knee?,A joint", True)):
        path.write_text(f"{header}\nWho?,He\n")
        with pytest.raises(WrongSource, match="name those that hold") as error:
            run(f"table={path}?question=q&answer=a&licence=x")
        assert ("header=no" in str(error.value)) == suggested


def test_a_table_without_header_has_columns_by_number(tmp_path: Path) -> None:
    path = tmp_path / "anatomy_test.csv"
    path.write_text('"Where, then?",Liver,Pancreas,Spleen,Kidney,C\nWhat?,Liver,Pancreas,Spleen,Kidney,A\n')
    source = f"table={path}?question=0&choices=1,2,3,4&answer=5&licence=x&header=no"
    records, quarantine = run(source)
    assert told(records) == ["Answer: C. Spleen", "Answer: A. Liver"]
    assert (quarantine.account.lines, quarantine.account.header) == (2, 0)
    path.write_text("Where?,Liver,Pancreas,Spleen,Kidney,0\nWhat?,Liver,Pancreas,Spleen,Kidney,3\n")
    assert [record.answer for record in run(source)[0]] == [0, 3], "the names of the columns are no labels"
    with pytest.raises(WrongSource, match="pass header=no"):
        run(f"table={path}?question=question&answer=answer&licence=x")


def test_the_column_is_read_in_one_pass_of_constant_memory() -> None:
    column = Column()
    for line in range(20_000):
        column.add(line, "ABCD"[line % 4], FOUR)
    assert column.decide("a") == "label"
    assert sum(len(lines) for lines in (*column.without.values(), *column.apart.values())) < 5 * len(READINGS) ** 2
