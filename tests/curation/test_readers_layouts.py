"""Layouts that people have: delimiters, quotation marks, keys, missing values, markup, splits, languages, and marks.

Every line that is read is accounted for, and a source without a usable row is an error that shows what it has.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from bimedix_jax.cli import main
from bimedix_jax.curation.accounting import SourceAccount
from bimedix_jax.curation.quarantine import Quarantine, WrongSource
from bimedix_jax.curation.readers import READERS, options_of, read
from bimedix_jax.curation.readers.delimited import MAX_SPAN
from bimedix_jax.curation.readers.reading import split_of
from bimedix_jax.curation.readers.texts import is_missing, is_placeholder, without_html
from bimedix_jax.curation.readers.turns import parse_style
from bimedix_jax.data.records import Record
from bimedix_jax.errors import BimedixError

TABLE = "question=q&answer=a&licence=x"


def run(source: str) -> tuple[list[Record], Quarantine]:
    quarantine = Quarantine()
    return list(read(source, quarantine)), quarantine


def texts(records: list[Record]) -> list[list[str]]:
    return [[turn.value for turn in record.conversations] for record in records]


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", "q,a\nWhat is it?,A knee\n"),
        ("x.csv", "\ufeffq;a\r\nWhat is it?;A knee\r\n"),
        ("x.csv", "q\ta\nWhat is it?\tA knee\n"),
        ("x.csv", "q|a\nWhat is it?|A knee\n"),
        ("x.csv", "sep=;\nq;a\nWhat is it?;A knee\n"),
        ("x.csv", " q , a \nWhat is it?, A knee\n"),
        ("x.csv", 'q, a\nWhat is it?, "A knee"\n'),
        ("x.csv", "\n\nq,a\n\nWhat is it?,A knee\n\n"),
        ("x.tsv", "q\ta\nWhat is it?\tA knee\n"),
        ("x.tsv", "q,a\nWhat is it?,A knee\n"),
        ("x.tsv", 'q\ta\n"What is it?"\t"A knee"\n'),
    ],
)
def test_delimiters_and_headers_as_programs_write_them(name: str, text: str, tmp_path: Path) -> None:
    for path, data in ((tmp_path / name, text.encode()), (tmp_path / f"{name}.gz", gzip.compress(text.encode()))):
        path.write_bytes(data)
        records, quarantine = run(f"table={path}?{TABLE}")
        assert texts(records) == [["What is it?", "A knee"]]
        assert quarantine.account.lines == len(text.splitlines())


def test_a_delimiter_can_be_stated(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("q, or so;a\nWhat, then?;A knee\n")
    with pytest.raises(WrongSource, match="its columns or keys are 'q', 'or so;a'"):
        run(f"table={path}?{TABLE}")
    assert texts(run(f"table={path}?question=q, or so&answer=a&licence=x&delimiter=semicolon")[0]) == [
        ["What, then?", "A knee"]
    ]
    path.write_text("q#a\nWhat?#A knee\n")
    assert len(run(f"table={path}?{TABLE}&delimiter=%23")[0]) == 1
    with pytest.raises(WrongSource, match="neither one character"):
        run(f"table={path}?{TABLE}&delimiter=ab")


def test_a_quotation_mark_that_is_text_takes_no_rows_with_it(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text('q\ta\n"Aspirin\tis good\nfine\tok\n"quoted" word\tyes\n5\'10"\ttall\n"whole"\tso\n')
    records, quarantine = run(f"table={path}?{TABLE}")
    assert texts(records) == [
        ['"Aspirin', "is good"], ["fine", "ok"], ['"quoted" word', "yes"], ["5'10\"", "tall"], ["whole", "so"]
    ]  # fmt: skip
    assert quarantine.account.rows == 5
    path = tmp_path / "x.csv"
    rows = "".join(f'"Question {n}, then?","Answer\n{n}, so"\n' for n in range(5))
    path.write_text(f'q,a\n{rows}"open, and never closed\n{rows}last,one\n')
    records, quarantine = run(f"table={path}?{TABLE}")
    assert len(records) == 11
    assert [(row.line, "mark opens" in row.reason) for row in quarantine.rejected] == [(12, True)]
    assert (quarantine.account.lines, quarantine.account.continued) == (23, 10)


def test_a_row_over_several_lines_with_a_column_too_many_is_left_out_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('q,a\n"What\nis it, then?\nreally, so\n?",b,c\nWho?,"A\nnurse"\n')
    records, quarantine = run(f"table={path}?{TABLE}")
    assert texts(records) == [["Who?", "A\nnurse"]]
    assert [(row.line, row.reason) for row in quarantine.rejected] == [(5, "3 columns, the header has 2")]
    assert (quarantine.account.lines, quarantine.account.continued) == (7, 4)


def test_a_mark_that_is_never_closed_does_not_hold_the_file_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    rows = "".join(f'"Question {n}, then?","Answer {n}, so"\n' for n in range(3 * MAX_SPAN))
    path.write_text(f'q,a\n{rows}"open\n{rows.replace(chr(34), "")[:0]}' + "what,so\n" * (2 * MAX_SPAN))
    records, quarantine = run(f"table={path}?{TABLE}")
    assert (len(records), quarantine.count) == (5 * MAX_SPAN, 1)


@pytest.mark.parametrize(
    ("document", "option"),
    [
        ({"data": [{"q": "What?", "a": "A knee"}]}, ""),
        ({"version": "1.0", "info": {"by": "us"}, "data": [{"q": "What?", "a": "A knee"}]}, ""),
        ({"data": {"train": [{"q": "What?", "a": "A knee"}]}}, ""),
        ({"one": {"q": "What?", "a": "A knee"}, "two": {"q": "Who?", "a": "A nurse"}}, ""),
        ({"train": [{"q": "What?", "a": "A knee"}], "test": [{"q": "x", "a": "y"}] * 9}, "&key=train"),
        ({"data": {"train": [{"q": "What?", "a": "A knee"}], "test": [{"q": "x", "a": "y"}]}}, "&key=data.train"),
        ({"rows": {"7": {"q": "What?", "a": "A knee"}}, "other": [{"x": 1}]}, "&key=rows"),
        ({"q": "What?", "a": "A knee", "options": [{"text": "x"}]}, ""),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_rows_under_a_key_of_an_object(
    document: dict[str, Any], option: str, indent: int | None, tmp_path: Path
) -> None:
    path = tmp_path / "x.json"
    path.write_text("\ufeff" * (indent or 0) + json.dumps(document, indent=indent), encoding="utf-8")
    records, quarantine = run(f"table={path}?{TABLE}{option}")
    assert texts(records)[0] == ["What?", "A knee"]
    assert quarantine.count == 0


def test_rows_under_several_keys_need_one_of_them(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"train": [{"q": "What?", "a": "b"}], "test": [{"q": "x", "a": "y"}] * 2}))
    with pytest.raises(WrongSource, match=r"several keys: train \(1\), test \(2\); name one with key="):
        run(f"table={path}?{TABLE}")
    with pytest.raises(BimedixError, match="has no key 'valid'; its keys are train, test"):
        run(f"table={path}?{TABLE}&key=valid")
    for option in ("key=data", "delimiter=tab"):
        with pytest.raises(WrongSource, match="leave it out"):
            run(f"table={lines(tmp_path / 'x.jsonl', {'q': 'x', 'a': 'y'})}?{TABLE}&{option}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("table={csv}?question=Question&answer=Answer&licence=x", "columns or keys are 'question', 'answer'"),
        ("table={csv}?question=nan&answer=answer&licence=x", "field 'nan' is missing"),
        ("table={jsonl}?question=q&answer=a&licence=x", "columns or keys are 'prompt', 'completion'"),
        ("chatdoctor={jsonl}", "columns or keys are 'prompt', 'completion'"),
        ("messages={jsonl}?licence=x", "columns or keys are 'prompt', 'completion'"),
        ("medqa={jsonl}", "none of its 2 rows is a record"),
        ("table={empty}?question=q&answer=a&licence=x", "has no rows"),
        ("mmlu={csv}?subjects=anatomy", "were skipped by its options"),
    ],
)
def test_a_source_without_a_usable_row_is_an_error(
    source: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.csv").write_text("question,answer\nWhat?,A knee\n")
    (tmp_path / "empty.csv").write_text("q,a\n")
    row = {"prompt": "What?", "completion": "A knee"}
    places = {
        "csv": tmp_path / "x.csv",
        "empty": tmp_path / "empty.csv",
        "jsonl": lines(tmp_path / "x.jsonl", row, row),
    }
    arguments = ["data", "assemble", "--sources", "sample", source.format(**places), "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert message in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "word", ["nan", "NaN", "NULL", "null", "None", "N/A", "<NA>", "#N/A", "<noinput>", "<no input>", None]
)
def test_missing_values_are_missing(word: str | None, tmp_path: Path) -> None:
    assert is_missing(word)
    rows = [
        {"q": "What?", "a": word, "c": "Given.", "s": "Be kind."},
        {"q": word, "a": "A knee", "c": "Given.", "s": "Be kind."},
        {"q": "What?", "a": "A knee", "c": word, "s": word},
    ]
    records, quarantine = run(f"table={lines(tmp_path / 'x.jsonl', *rows)}?{TABLE}&context=c&system=s")
    assert texts(records) == [["What?", "A knee"]]
    assert [row.reason for row in quarantine.rejected] == ["the answer is missing", "a text is missing"]
    doctor = [{"instruction": "Explain a fever.", "input": word, "output": "It is a high temperature."}]
    assert texts(run(f"chatdoctor={lines(tmp_path / 'd.jsonl', *doctor)}")[0])[0][0] == "Explain a fever."


def test_words_that_only_look_missing_stay(tmp_path: Path) -> None:
    for word in ("none", "Nan bread", "No", "not", "NADH", "p < 0.05", "<5"):
        assert not is_missing(word)
        assert not is_placeholder(word)
    (record,) = run(f"table={lines(tmp_path / 'x.jsonl', {'q': 'Any allergies?', 'a': 'none'})}?{TABLE}")[0]
    assert record.conversations[1].value == "none"


@pytest.mark.parametrize(
    "word", ["No answer", "no answers.", "Not available", "---", "...", "TBD", "لا توجد إجابة", "غير متوفر."]
)
def test_placeholder_answers_are_counted_and_dropped_by_default(word: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", {"q": "What?", "a": word}, {"q": "Who?", "a": "A nurse"})
    records, quarantine = run(f"table={path}?{TABLE}")
    assert len(records) == 1
    assert quarantine.reasons() == {("table", "the answer is a placeholder"): 1}
    assert len(run(f"table={path}?{TABLE}&placeholders=keep")[0]) == 2
    said = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": word}]
    good = {"messages": [said[0], {"role": "assistant", "content": "A knee"}]}
    chats = lines(tmp_path / "m.jsonl", {"messages": said}, good)
    assert len(run(f"messages={chats}?licence=x")[0]) == 1


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("<p>Rest.</p><p>Drink &amp; sleep.</p>", "Rest.\nDrink & sleep."),
        ("Rest.<br/>Then<br>sleep", "Rest.\nThen\nsleep"),
        ('See <a href="http://x.example/?a=1&amp;b=2" target=_blank>here</a>.', "See here."),
        ("<ul><li>One</li><li>Two</li></ul>", "- One\n- Two"),
        ("10<sup>2</sup> and H<sub>2</sub>O", "10^2 and H_2O"),
        ("<!-- x --><script>alert(1)</script>Rest", "Rest"),
        ("&lt;b&gt;Rest&lt;/b&gt;&nbsp;now", "Rest\xa0now"),
        ("p < 0.05 and x<y", "p < 0.05 and x<y"),
        ("if a<b and c>d", "if a<b and c>d"),
        ("pH <7.35, AT&T, R&D; x &lt; 3", "pH <7.35, AT&T, R&D; x < 3"),
        ("<noinput>", "<noinput>"),
        ("<strong>الراحة</strong>", "الراحة"),
    ],
)
def test_html_is_dropped_and_other_signs_stay(text: str, plain: str) -> None:
    assert without_html(text).strip() == plain


def test_html_is_counted_by_source_and_can_be_kept(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", {"q": "<p>What?</p>", "a": "<b>A knee</b>"}, {"q": "Who?", "a": "A nurse"})
    records, quarantine = run(f"table={path}?{TABLE}")
    assert texts(records)[0] == ["What?", "A knee"]
    assert "texts without their HTML (html=keep leaves it in): 2" in quarantine.account.sentences()
    assert texts(run(f"table={path}?{TABLE}&html=keep")[0])[0] == ["<p>What?</p>", "<b>A knee</b>"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"), ("data/train-00000-of-00001.parquet", "train"), ("TrainingSet.csv", "train"),
        ("US_qbank_test.jsonl", "heldout"), ("dev.json", "heldout"), ("MTS-TestSet-1.csv", "heldout"),
        ("val2.csv", "heldout"), ("held-out.jsonl", "heldout"), ("questions.dev.jsonl", "heldout"),
        ("Train_Dev.tsv", None), ("train-test.csv", None), ("TrainDev.csv", None), ("trainval.json", None),
        ("train/anatomy_test.csv", None), ("blood_test.csv", None), ("test_results.csv", None), ("latest.csv", None),
        ("contest.csv", None), ("device.csv", None), ("q.csv", None),
    ],
)  # fmt: skip
def test_a_name_implies_a_split_only_if_it_is_unambiguous(name: str, split: str | None) -> None:
    assert split_of(name)[0] == split


def test_the_split_of_a_name_is_reported_by_source(tmp_path: Path) -> None:
    row = {"q": "What?", "a": "A knee"}
    for name in ("Train_Dev", "dev", "plain"):
        lines(tmp_path / f"{name}.jsonl", row)
    records, quarantine = run(f"table={tmp_path}?{TABLE}")
    assert [record.split for record in records] == [None, "heldout", None]
    assert [note for note in quarantine.account.sentences() if note.startswith("split:")] == [
        "split: the name Train_Dev.jsonl says both train and held out, so records are split by hash; split= decides "
        "otherwise",
        "split: the name dev.jsonl says heldout; split= decides otherwise",
    ]
    records, quarantine = run(f"table={tmp_path}?{TABLE}&split=train")
    assert {record.split for record in records} == {"train"}
    assert not quarantine.account.splits


ARABIC = {"q": "ما هي أعراض القلق عند البالغين؟", "a": "تشمل التوتر والأرق وسرعة ضربات القلب."}
ENGLISH = {"q": "What are the symptoms of anxiety?", "a": "They include tension and insomnia."}


def test_the_language_is_that_of_the_script_and_is_counted(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", ARABIC, ENGLISH, {"q": "How do you say knee?", "a": "ركبة وهي مفصل كبير"})
    records, quarantine = run(f"table={path}?{TABLE}")
    assert [record.language for record in records] == ["ar", "en", "en"]
    assert [turn.language for turn in records[2].conversations] == [None, "ar"]
    assert quarantine.account.languages == {"ar": 1, "en": 2}
    assert "language by script: 1 ar, 2 en; language= states it" in quarantine.account.sentences()


@pytest.mark.parametrize(("stated", "kept", "script"), [("en", ENGLISH, "Arabic"), ("ar", ARABIC, "Latin")])
def test_a_stated_language_that_the_script_contradicts_is_an_error(
    stated: str, kept: dict[str, str], script: str, tmp_path: Path
) -> None:
    path = lines(tmp_path / "x.jsonl", ARABIC, ENGLISH)
    records, quarantine = run(f"table={path}?{TABLE}&language={stated}")
    assert texts(records) == [[kept["q"], kept["a"]]]
    assert f"the text is in {script} script" in quarantine.rejected[0].reason
    other = ENGLISH if kept is ARABIC else ARABIC
    with pytest.raises(WrongSource, match=f"the text is in {script} script"):
        run(f"table={lines(tmp_path / 'y.jsonl', other)}?{TABLE}&language={stated}")


def test_an_exam_is_arabic_if_its_question_or_most_of_it_is(tmp_path: Path) -> None:
    rows = [
        {"q": "ما العلاج؟", "o": ["Metformin hydrochloride", "Insulin glargine"], "a": "A"},
        {"q": "Which?", "o": ["الكبد والطحال", "البنكرياس"], "a": "B"},
        {"q": "Which drug lowers the sugar?", "o": ["Metformin", "ميتفورمين"], "a": "A"},
    ]
    path = lines(tmp_path / "x.jsonl", *rows)
    assert [record.language for record in run(f"table={path}?{TABLE}&choices=o")[0]] == ["ar", "ar", "en"]
    assert len(run(f"table={path}?{TABLE}&choices=o&language=ar")[0]) == 3


def test_arabic_with_foreign_terms_is_arabic_and_other_scripts_are_neither(tmp_path: Path) -> None:
    mixed = {"q": "هل يمكن تناول Metformin hydrochloride مع Lisinopril؟", "a": "نعم، مع مراقبة creatinine clearance."}
    chinese = {"q": "发热的常见原因是什么?请说明", "a": "感染是最常见的原因之一"}
    path = lines(tmp_path / "x.jsonl", mixed, chinese, {"q": "5 + 5?", "a": "10"})
    records, quarantine = run(f"table={path}?{TABLE}&language=ar")
    assert len(records) == 2
    assert [row.reason for row in quarantine.rejected] == ["the text is neither in Latin nor in Arabic script"]


def test_every_reader_takes_a_language_and_exam_readers_make_arabic_records(tmp_path: Path) -> None:
    assert [name for name in READERS if name != "sample" and "language" not in options_of(name)] == []
    question = {
        "question": "أي فيتامين يمنع مرض الإسقربوط؟",
        "options": {"A": "فيتامين أ", "B": "فيتامين ج"},
        "answer_idx": "B",
        "answer": "فيتامين ج",
        "realidx": 7,
    }
    folder = tmp_path / "exam"
    folder.mkdir()
    lines(folder / "medqa_4options_test.jsonl", question)
    for source in (f"medqa_usmle_en={folder}?language=ar", f"medqa={folder}?language=ar", f"medqa={folder}"):
        (record,) = run(source)[0]
        assert (record.language, record.conversations[1].value) == ("ar", "الإجابة: B. فيتامين ج")
    with pytest.raises(WrongSource, match="Arabic script"):
        run(f"medqa={folder}?language=en")
    abstract = {
        "pubid": 1,
        "question": "هل يساعد المشي مرضى السكري؟",
        "context": {"contexts": ["درسنا مئة مريض."]},
        "long_answer": "نعم، انخفض السكر.",
        "final_decision": "yes",
    }
    (record,) = run(f"pubmedqa={lines(tmp_path / 'p.jsonl', abstract)}?language=ar")[0]
    assert record.choices == ("نعم", "لا", "ربما")
    assert texts([record])[0][1] == "الإجابة: نعم\nنعم، انخفض السكر."


def test_records_whose_script_contradicts_their_language_are_corrected_and_counted(tmp_path: Path) -> None:
    def record(name: str, language: str, *values: str) -> dict[str, Any]:
        turns = [{"from": who, "value": value} for who, value in zip(("human", "gpt"), values, strict=True)]
        return {"id": name, "language": language, "kind": "qa", "source": "s", "licence": "l", "conversations": turns}

    path = lines(
        tmp_path / "r.jsonl",
        record("a", "en", ENGLISH["q"], ENGLISH["a"]),
        record("b", "en", ARABIC["q"], ARABIC["a"]),
        record("c", "ar", ENGLISH["q"], ENGLISH["a"]),
        record("d", "ar", ARABIC["q"], "Tension and <b>insomnia</b>."),
    )
    records, quarantine = run(f"records={path}")
    assert [(r.id, r.language) for r in records] == [("a", "en"), ("b", "ar"), ("c", "en"), ("d", "ar")]
    assert records[3].conversations[1].value == "Tension and <b>insomnia</b>.", "nothing else changes"
    assert sum("corrected" in note and note.endswith(": 2") for note in quarantine.account.sentences()) == 1
    assert [r.id for r in run(f"records={path}?language=en")[0]] == ["a"]


@pytest.mark.parametrize(("mark", "value"), [("weight", 0), ("weight", "0"), ("train", False), ("train", "false")])
def test_rows_that_are_not_to_be_learned_are_left_out(mark: str, value: object, tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", {**ENGLISH, mark: value}, {**ENGLISH, mark: 1}, {**ENGLISH, "weight": 70})
    records, quarantine = run(f"table={path}?{TABLE}")
    assert len(records) == 2
    assert [row.reason for row in quarantine.rejected] == [f"the row asks not to be learned ({mark})"]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("medqa_usmle_en=.?header=no", "header"), ("mts_dialog=.?split=train", "split"),
        ("records=.?html=keep", "html"), ("medquad=.?key=data", "key"),
        ("chatdoctor=.?first_option=1", "first_option"), ("table=.?speakers=a:gpt", "speakers"),
        ("liveqa=.?delimiter=;", "delimiter"), ("messages=.?answers=letter", "answers"), ("medqa=.?join=line", "join"),
    ],
)  # fmt: skip
def test_options_that_a_reader_does_not_take_are_refused_by_name(source: str, name: str) -> None:
    with pytest.raises(BimedixError, match=f"has no option '{name}'"):
        run(source)


def test_records_whose_script_does_not_tell_their_language_are_counted(tmp_path: Path) -> None:
    rows = [
        {"q": "ما علاج التهاب المفاصل؟", "a": "Paracetamol and rest help most people."},
        {"q": "بخار کی وجہ کیا ہے اور یہ کیسے ٹھیک ہوتا ہے؟", "a": "یہ کئی بیماریوں میں ہوتا ہے۔"},
        {"q": "Quelle est la cause de la fièvre élevée ?", "a": "Une infection, très fréquente après l'été."},
        {"q": "What is Ménière's disease?", "a": "A disorder of the inner ear."},
        {"q": "ما سبب الحمى؟", "a": "العدوى هي أكثر الأسباب."},
    ]
    records, quarantine = run(f"table={lines(tmp_path / 'x.jsonl', *rows)}?{TABLE}")
    assert len(records) == 5
    counted = {name: number for name, number in quarantine.account.changes.items() if not name.startswith("turns")}
    assert counted == {
        "records whose question and answer are in different scripts": 1,
        "doubtful: records in Arabic script with letters of Urdu, labelled ar": 1,
        "doubtful: records in Latin script with many accented letters, labelled en": 1,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("question=0&question=1&answer=1&header=no&licence=x", "question= is given 2 times"),
        ("question=q&answer=a&licence=x&licence=x", "licence= is given 2 times"),
        ("question=q&answer=q&licence=x", "question= and answer= both name the column 'q'"),
        ("question=q&answer=a&context=q&licence=x", "question= and context= both name"),
        ("question=q&answer=a&choices=a,b&licence=x", "answer= and choices= both name"),
        ("question=q&answer=a&choices=b,c,b&licence=x", "choices= and choices= both name"),
    ],
)
def test_options_and_columns_that_are_given_twice_are_refused(options: str, message: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", {"q": "What?", "a": "A", "b": "x", "c": "y"})
    with pytest.raises(BimedixError, match=message):
        run(f"table={path}?{options}")


def test_a_speaker_has_one_side() -> None:
    with pytest.raises(WrongSource, match="names 'nurse' twice"):
        parse_style({}, "nurse:gpt,nurse:human", None, None)


def test_every_option_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
    names = {option for name in READERS for option in options_of(name)}
    assert [name for name in sorted(names) if f"`{name}=" not in text and f"`{name}`" not in text] == []


def test_lines_read_are_lines_accounted_for_and_printed_by_source(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.csv").write_text('q,a\n"What\nis it?",A knee\n\nbroken\nWho?,nan\nWhy?,So\n')
    (tmp_path / "m").mkdir()
    for subject in ("anatomy", "virology"):
        (tmp_path / "m" / f"{subject}_test.csv").write_text("What is it?,a,b,c,d,C\n")
    (tmp_path / "x.jsonl").write_text('{"q": "What?", "a": "So"}\n\n{broken\n')
    sources = [f"table={tmp_path / 'x.csv'}?{TABLE}", f"mmlu={tmp_path / 'm'}?subjects=anatomy"]
    sources += [f"table={tmp_path / 'x.jsonl'}?{TABLE}&source=lines", "sample"]
    assert main(["data", "assemble", "--json", "--sources", *sources, "--out", str(tmp_path / "out")]) == 0
    shown = capfd.readouterr()
    report = json.loads(shown.out)
    accounts = [source["account"] for source in report["sources"]]
    assert [(a["lines"], a["records"], a["left_out"]) for a in accounts] == [
        (7, 1, 3),  # MMLU has one of its questions, so it is left out after reading
        (2, 1, 0),
        (3, 1, 1),
        (276, 276, 0),
    ]
    assert sum(account["records"] for account in accounts) == report["train"] + report["heldout"]
    for account in accounts:
        others = sum(account[name] for name in ("header", "blank", "skipped", "continued"))
        assert account["lines"] == account["records"] + account["left_out"] + others
    assert "7 lines = 1 records + 3 left out + 1 header + 1 blank + 1 continued" in shown.err
    assert main(["data", "stats", "--json", "--sources", sources[0]]) == 0
    shown = capfd.readouterr()
    assert json.loads(shown.out)["sources"][0]["account"]["lines"] == 7
    assert "7 lines = 2 records + 2 left out" in shown.err


def test_a_line_that_is_lost_is_an_error() -> None:
    account = SourceAccount(lines=3, header=1)
    account.built(1, True)
    with pytest.raises(BimedixError, match="3 lines of x were read, but 2 are accounted for"):
        account.check("x")
