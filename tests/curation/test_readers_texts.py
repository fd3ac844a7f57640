"""Open questions, instructions, conversations and tables, with the field names of their publishers."""

import csv
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from bimedix_jax.curation.quarantine import Quarantine
from bimedix_jax.curation.readers import read
from bimedix_jax.data.records import Record, question_of
from bimedix_jax.errors import BimedixError

LIVEQA_TRAIN = """<?xml version="1.0" encoding="UTF-8"?>
<LiveQA-Med-Training>
 <NLM-QUESTION qid="Q1" fileid="11373">
  <SUBJECT>gout</SUBJECT>
  <MESSAGE>What helps
   &amp; what causes it</MESSAGE>
  <SUB-QUESTIONS>
   <SUB-QUESTION subqid="Q1-S1"><ANNOTATIONS><FOCUS>gout</FOCUS><TYPE>treatment</TYPE></ANNOTATIONS>
    <ANSWERS><ANSWER answerid="Q1-S1-A1" pairid="1">Rest.
       Ice.</ANSWER></ANSWERS></SUB-QUESTION>
   <SUB-QUESTION subqid="Q1-S2"><ANNOTATIONS><FOCUS>gout</FOCUS><TYPE>cause</TYPE></ANNOTATIONS>
    <ANSWERS><ANSWER answerid="Q1-S2-A1" pairid="2">Crystals.</ANSWER><ANSWER answerid="Q1-S2-A2"> </ANSWER></ANSWERS>
   </SUB-QUESTION>
  </SUB-QUESTIONS>
 </NLM-QUESTION>
</LiveQA-Med-Training>"""
LIVEQA_TEST = """<?xml version="1.0" encoding="UTF-8"?>
<LiveQA2017-Medical-Test-Set-Full>
 <NLM-QUESTION qid="TQ1">
  <Original-Question qfile="71.txt"><SUBJECT></SUBJECT><MESSAGE>Is it safe?</MESSAGE></Original-Question>
  <NIST-PARAPHRASE>Is the drug safe?</NIST-PARAPHRASE>
  <ANNOTATIONS><FOCUS fid="F1" fcategory="Drug">drug</FOCUS><TYPE tid="T1" hasFocus="F1">DOSE</TYPE></ANNOTATIONS>
  <ReferenceAnswers>
   <RefAnswer aid="TQ1A1"><ANSWER>Mostly.</ANSWER><AnswerURL> https://a.example </AnswerURL></RefAnswer>
   <ReferenceAnswer aid="TQ1A2"><ANSWER>Not always.</ANSWER><AnswerURL/><COMMENT/></ReferenceAnswer>
  </ReferenceAnswers>
 </NLM-QUESTION>
</LiveQA2017-Medical-Test-Set-Full>"""
MEDQUAD_PAGES = {
    "9_CDC_QA/0000001.xml": """<Document id="1" source="CDC" url="u"><Focus>Gout</Focus><QAPairs>
     <QAPair pid="1"><Question qid="1-1" qtype="causes">What causes Gout ?</Question><Answer>Crystals.</Answer></QAPair>
     <QAPair pid="2"><Question qid="1-2" qtype="causes">And then ?</Question><Answer/></QAPair></QAPairs></Document>""",
    "6_NINDS_QA/0000007.xml": """<doc docid="7" corpus="NINDS" url="u"><doctitle-focus>Adie</doctitle-focus><qaPairs>
     <pair pid="1"><question qid="7-1" qtype="information">what is Adie ?</question><answer>A pupil.</answer></pair>
     </qaPairs></doc>""",
}


def run(source: str) -> tuple[list[Record], Quarantine]:
    quarantine = Quarantine()
    return list(read(source, quarantine)), quarantine


def unhashed(record: Record) -> str:
    """The id without the hash of its row."""
    return record.id.rpartition("-")[0]


def values(record: Record) -> list[str]:
    return [turn.value for turn in record.conversations]


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def workbook(path: Path, rows: list[list[str]]) -> Path:
    """A workbook as LibreOffice writes it: texts are in a shared table, and one of them has a phonetic guide."""
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    texts = [text for row in rows for text in row if text]
    shared = "".join(f"<si><r><t>{text[:2]}</t></r><r><t>{text[2:]}</t></r><rPh><t>x</t></rPh></si>" for text in texts)
    numbers, cells = iter(range(len(texts))), []
    for line, row in enumerate(rows, start=1):
        inner = "".join(
            f'<c r="{"ABCDEF"[i]}{line}" t="s"><v>{next(numbers)}</v></c>' for i, text in enumerate(row) if text
        )
        cells.append(f'<row r="{line}">{inner}</row>')
    with zipfile.ZipFile(path, "w") as book:
        book.writestr("xl/sharedStrings.xml", f'<sst xmlns="{main}">{shared}</sst>')
        book.writestr(
            "xl/worksheets/sheet1.xml", f'<worksheet xmlns="{main}"><sheetData>{"".join(cells)}</sheetData></worksheet>'
        )
        sheet = '<sheets><sheet name="DrugQA" sheetId="1" r:id="rId2"/></sheets>'
        book.writestr("xl/workbook.xml", f'<workbook xmlns="{main}" xmlns:r="{office}">{sheet}</workbook>')
        target = '<Relationship Id="rId2" Target="worksheets/sheet1.xml"/>'
        book.writestr("xl/_rels/workbook.xml.rels", f"<Relationships>{target}</Relationships>")
    return path


def test_liveqa_has_a_record_for_every_answer(tmp_path: Path) -> None:
    (tmp_path / "TREC-2017-LiveQA-Medical-Train-1.xml").write_text(LIVEQA_TRAIN)
    (tmp_path / "TREC-2017-LiveQA-Medical-Test.xml").write_text(LIVEQA_TEST)
    records, quarantine = run(f"liveqa={tmp_path}")
    test, train = "liveqa/TREC-2017-LiveQA-Medical-Test", "liveqa/TREC-2017-LiveQA-Medical-Train-1"
    assert [(record.id, record.split) for record in records] == [
        (f"{test}/TQ1A1", "heldout"),
        (f"{test}/TQ1A2", "heldout"),
        (f"{train}/Q1-S1-A1", "train"),
        (f"{train}/Q1-S2-A1", "train"),
    ]
    assert values(records[0]) == ["Is it safe?", "Mostly."]
    assert values(records[2]) == ["gout\nWhat helps\n& what causes it", "Rest.\nIce."]
    assert records[0].provenance["url"] == "https://a.example"
    assert records[2].provenance["type"] == ["treatment"]
    assert [(row.file, row.line) for row in quarantine.rejected] == [("TREC-2017-LiveQA-Medical-Train-1.xml", 3)]


def test_medquad_pages_with_both_element_names(tmp_path: Path) -> None:
    for name, text in MEDQUAD_PAGES.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    records, quarantine = run(f"medquad={tmp_path}")
    assert [(record.id, *values(record)) for record in records] == [
        ("medquad/6_NINDS_QA/0000007/1", "what is Adie?", "A pupil."),
        ("medquad/9_CDC_QA/0000001/1", "What causes Gout?", "Crystals."),
    ]
    assert records[1].provenance["group"] == "gout"
    assert [(row.file, row.line) for row in quarantine.rejected] == [("9_CDC_QA/0000001.xml", 2)]


def test_medicationqa_from_the_workbook_and_from_csv(tmp_path: Path) -> None:
    header = ["Question", "Focus (Drug)", "Question Type", "Answer", "Section Title", "URL"]
    rows = [header, ["is it safe", "aspirin", "Usage", "Ask.", "", "u"], [""] * 6, ["how", "", "Dose", "", "", "u"]]
    from_book, quarantine = run(f"medicationqa={workbook(tmp_path / 'MedInfo2019-QA-Medications.xlsx', rows)}")
    text = io.StringIO()
    csv.writer(text).writerows(rows[:2] + rows[3:])
    (tmp_path / "m.csv").write_text(text.getvalue())
    from_csv, other = run(f"medicationqa={tmp_path / 'm.csv'}")
    assert values(from_book[0]) == values(from_csv[0]) == ["is it safe", "Ask."]
    assert from_book[0].provenance == {"question_type": "Usage", "url": "u", "drug": "aspirin"}
    assert [row.line for row in quarantine.rejected] == [4]
    account = quarantine.account
    assert (account.lines, account.header, account.blank, account.rows) == (4, 1, 1, 2)
    book = workbook(tmp_path / "x.xlsx", [["what", "this"], ["who", "that"]])
    assert len(run(f"table={book}?question=0&answer=1&licence=x&header=no")[0]) == 2
    assert [row.line for row in other.rejected] == [3]


def test_chatdoctor_and_data_sets_of_the_same_form(tmp_path: Path) -> None:
    told = "If you are a doctor, please answer the medical questions based on the patient's description."
    rows: list[dict[str, Any]] = [
        {"instruction": told, "input": "My knee hurts.", "output": "Hi, rest it."},
        {"instruction": "Translate.", "input": "knee", "output": "ركبة"},
        {"input": "My head.", "answer_icliniq": "Rest.", "answer_chatgpt": "x", "answer_chatdoctor": "y"},
        {"instruction": told, "input": "", "output": "?"},
        {"instruction": told, "input": "No answer."},
    ]
    (tmp_path / "HealthCareMagic-100k.json").write_text(json.dumps(rows, indent=1))
    records, quarantine = run(f"chatdoctor={tmp_path}?licence=X")
    assert [values(record)[0] for record in records] == ["My knee hurts.", "Translate.\nknee", "My head.", told]
    assert {(record.kind, record.licence) for record in records} == {("qa", "X")}
    assert [(row.line, row.reason) for row in quarantine.rejected] == [(5, "field 'answer_icliniq' is missing")]


PMC = {"instruction": "You're a doctor.\nAnswer with the best option directly.", "sample_id": 0}
PMC_ROWS = [
    {
        **PMC,
        "source": "medqa_train",
        "input": "###Question: Best for cystitis?\n###Options:\nA. Ampicillin\nB. Nitrofurantoin\nin water\n",
        "output": "###Answer: OPTION B IS CORRECT.",
    },
    {
        **PMC,
        "source": "medmcqa",
        "input": "###Question: Scurvy?\n###Options:\nA. A\nB. B\nC. C\nD. D\n",
        "output": "###Rationale: Ascorbic acid.\n\n###Answer: OPTION C IS CORRECT.",
    },
    {
        **PMC,
        "source": "pubmedqa.ori_pqaa",
        "instruction": "Analyze the question given its context.",
        "input": "###Question: Does it?\n###Context: We found.",
        "output": "###Rationale: It does. ###Answer: yes",
    },
    {**PMC, "source": "liveqa", "instruction": "", "input": "###Question: Is it safe?", "output": "Mostly."},
    {**PMC, "source": "umls_relation", "input": "###Question: a and b?\n###Context: UMLS", "output": "###Answer: is a"},
    {**PMC, "source": "medmcqa", "input": "###Question: Q?\n###Options:\nA. x\nB. y", "output": "###Answer: maybe"},
    {**PMC, "source": "unheard_of", "input": "x", "output": "y"},
]


def test_pmc_llama_by_its_parts(tmp_path: Path) -> None:
    (tmp_path / "release.json").write_text(json.dumps(PMC_ROWS))
    records, quarantine = run(f"pmc_llama={tmp_path}")
    assert [(record.source, record.kind, record.answer, record.split) for record in records] == [
        ("pmc_llama/medqa", "mcqa", 1, "train"),
        ("pmc_llama/medmcqa", "mcqa", 2, "train"),
        ("pmc_llama/pubmedqa", "mcqa", 0, "train"),
        ("pmc_llama/liveqa", "qa", None, "train"),
        ("pmc_llama/umls", "qa", None, "train"),
    ]
    told = PMC["instruction"]
    assert values(records[0]) == [
        f"{told}\nBest for cystitis?\nA. Ampicillin\nB. Nitrofurantoin\nin water",
        "Answer: B. Nitrofurantoin\nin water",
    ]
    assert [question_of(record) for record in records][:4] == [
        "Best for cystitis?",
        "Scurvy?",
        "Does it?",
        "Is it safe?",
    ]
    assert values(records[1])[1] == "Answer: C. C\nAscorbic acid."
    assert values(records[2]) == [
        "Analyze the question given its context.\nAbstract: We found.\nQuestion: Does it?",
        "Answer: yes\nIt does.",
    ]
    assert values(records[4]) == [f"{told}\na and b?\nContext: UMLS", "is a"]
    assert quarantine.read == {
        "pmc_llama/medqa": 1,
        "pmc_llama/medmcqa": 2,
        "pmc_llama/pubmedqa": 1,
        "pmc_llama/liveqa": 1,
        "pmc_llama/umls": 1,
        "pmc_llama": 1,
    }
    assert [(row.source, row.line) for row in quarantine.rejected] == [("pmc_llama/medmcqa", 6), ("pmc_llama", 7)]
    dropped = run(f"pmc_llama={tmp_path}?instruction=drop")[0]
    assert values(dropped[0])[0].startswith("Best for cystitis?")


def test_sharegpt_and_vicuna(tmp_path: Path) -> None:
    def said(*pairs: tuple[str, str]) -> dict[str, Any]:
        return {"id": f"c{len(pairs)}", "conversations": [{"from": who, "value": text} for who, text in pairs]}

    rows = [
        {**said(("human", "Hi"), ("gpt", "Hello")), "id": "fastchat", "system": "Be kind."},
        said(
            ("system", "Be kind."),
            ("human", "مرحبا"),
            ("gpt", "أهلا"),
            ("human", "كيف؟"),
            ("chatgpt", "هكذا"),
            ("user", "شكرا"),
        ),
        said(("human", "Hi"), ("gpt", "Hello")),
        said(("gpt", "Hello"), ("human", "Hi"), ("gpt", "?")),
        said(("human", "Hi"), ("bing", "Hello")),
    ]
    (tmp_path / "sharegpt.json").write_text(json.dumps(rows))
    records, quarantine = run(f"sharegpt={tmp_path}?licence=CC0-1.0&language=ar&source=mine")
    assert [(unhashed(record), record.kind, record.language, len(record.conversations)) for record in records] == [
        ("mine/sharegpt/fastchat", "qa", "ar", 3),
        ("mine/sharegpt/c6", "chat", "ar", 5),
        ("mine/sharegpt/c2", "qa", "ar", 2),
    ]
    assert records[0].is_system(0)
    assert records[1].provenance == {"unanswered_turns": 1}
    assert "'human' must speak" in quarantine.rejected[0].reason
    assert "'bing' is not a speaker" in quarantine.rejected[1].detail


def test_openai_messages(tmp_path: Path) -> None:
    def said(*pairs: tuple[str, Any]) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": content} for role, content in pairs]}

    tool = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    image = [{"type": "image_url", "image_url": {"url": "u"}}]
    path = lines(
        tmp_path / "train.jsonl",
        said(("developer", "Be kind."), ("user", [{"type": "text", "text": "Hi"}]), ("assistant", "Hello")),
        {"messages": [{"role": "user", "content": "Hi"}, tool]},
        said(("user", image), ("assistant", "A knee.")),
        said(("user", "Hi"), ("tool", "x"), ("assistant", "y")),
    )
    records, quarantine = run(f"messages={path}?licence=MIT")
    assert [(unhashed(record), record.split, values(record)) for record in records] == [
        ("messages/train/1", "train", ["Be kind.", "Hi", "Hello"])
    ]
    assert [(row.detail or row.reason).split(";")[0] for row in quarantine.rejected] == [
        "a message calls a tool",
        "a message has parts that are not text",
        "'tool' is not a speaker",
    ]


def test_a_table_by_the_names_of_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "qa.csv"
    path.write_text("Q,A,field,nr\nWhat?,That.,eyes,7\nWhat?,,eyes,8\nonly one\n")
    records, quarantine = run(f"table={path}?question=Q&answer=A&specialty=field&id=nr&licence=MIT&source=mine")
    assert [(unhashed(record), record.specialty, record.licence) for record in records] == [
        ("mine/qa/7", "eyes", "MIT")
    ]
    assert [row.line for row in quarantine.rejected] == [3, 4]
    choices = lines(
        tmp_path / "mc.jsonl",
        {"q": "?", "o": {"all": ["x", "y"]}, "a": "B", "c": "Given.", "why": "Because."},
        {"q": "?", "o": {"all": ["x", "y"]}, "a": "A"},
        {"q": "?", "o": {"all": ["x", "y"]}, "a": "b", "c": None},
        {"q": "?", "o": {"all": ["x", "y"]}, "a": "C", "c": None, "why": None},
        {"q": "?", "o": "x,y", "a": "C", "c": None, "why": None},
    )
    made, quarantine = run(f"table={choices}?question=q&answer=a&choices=o.all&context=c&explanation=why&licence=MIT")
    assert values(made[0]) == ["Given.\n?\nA. x\nB. y", "Answer: B. y\nBecause."]
    assert (made[0].kind, made[0].answer, made[0].provenance) == ("mcqa", 1, {"question": "?"})
    assert len(made) == 1
    assert [row.line for row in quarantine.rejected] == [2, 3, 4, 5]
    made, quarantine = run(f"table={choices}?question=q&answer=a&choices=o.all&licence=MIT")
    assert [record.answer for record in made] == [1, 0, 1]
    columns = lines(tmp_path / "c.jsonl", {"q": "?", "a1": "x", "a2": "y", "right": "1"})
    assert run(f"table={columns}?question=q&answer=right&choices=a1,a2&licence=MIT&first_option=0")[0][0].answer == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("table={}?question=q&licence=MIT", "table needs answer=..."),
        ("table={}?question=q&answer=a&licence=MIT&kind=qa", "has no option 'kind'"),
        ("table={}?question=q&answer=a&licence=MIT&language=fr", "write language=en or language=ar"),
        ("sharegpt={}", "needs licence=..."),
        ("pmc_llama={}?instruction=no", "neither keep nor drop"),
        ("medmcqa={}?first_option=2", "neither 0 nor 1"),
        ("medquad={}?split=train", "has no option 'split'; its options are language, html, placeholders"),
        ("chatdoctor={}?x", "has no option 'x'"),
        ("liveqa=hf:owner/name", "reads only the files of the authors"),
    ],
)
def test_wrong_options_raise(source: str, message: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", {"q": "?", "a": "!"})
    with pytest.raises(BimedixError, match=message):
        run(source.format(path))
