"""The paper's tables: its figures, their errors, our rows, and every format."""

import csv
import io
import json
import re
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

from bimedix_jax.cli import main
from bimedix_jax.commands import eval_tables
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.accuracy import Accuracy
from bimedix_jax.evals.paper import by_benchmark, published, sheet
from bimedix_jax.evals.tasks import TASKS
from bimedix_jax.evals.typeset import Cell, Sheet, render

RIGHT = {
    "Jais-30B": 50.6,
    "BiMediX (Bilingual)": 65.4,
    "BiMediX (Arabic)": 55.4,
    "Med42-70B": 72.9,
    "Meditron-70B": 71.3,
    "BiMediX (English)": 75.4,
}
"""Averages of the text of the paper and of its abstract."""


def score(accuracy, n=100, **rest):
    return {"accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1, "n": n, **rest}


def result(accuracy=0.5, tasks=tuple(TASKS), **rest):
    return {"model": "runs/mixture", "adapter": None, "tasks": {task: score(accuracy, **rest) for task in tasks}}


def note_of(cell, made):
    assert cell.note is not None
    return made.notes[cell.note - 1]


def test_the_figures_agree_with_the_text_and_only_one_average_is_wrong():
    wrong = {}
    for table in published().tables:
        for row in table.rows:
            assert len(row.accuracies) == 9
            if abs(row.mean - row.average) > 0.0501:
                wrong[table.number, row.model] = (row.average, round(row.mean, 1))
    assert wrong == {(4, "BiMediX (Bilingual)"): (56.5, 57.3)}
    printed = {row.model: row.average for table in reversed(published().tables) for row in table.rows}
    assert printed | RIGHT == printed
    speeds = published().efficiency
    assert all(row.latency * row.tokens_per_s == pytest.approx(512, rel=0.015) for row in speeds.rows)
    assert {row.architecture for row in speeds.rows} == set(speeds.architectures)


def test_the_footnotes_name_the_errors():
    arabic = sheet(published(), "Arabic", [])
    (row,) = (row for row in arabic.rows if row[0].text == "BiMediX (Bilingual)")
    assert "prints 56.5; the mean of its row is 57.3" in note_of(row[-1], arabic)
    assert any("wrong for CMed and ProMed" in note for note in arabic.notes)
    (derived,) = (row for row in sheet(published(), "English", []).rows if "derived" in row[0].text)
    assert derived[-1].value == pytest.approx(73.4, abs=0.05)


def test_the_bilingual_accuracy_is_the_mean_of_both_languages():
    arabic = {"tasks": {f"bimedix_{task}_ar": score(0.3) for task in TASKS}}
    found = by_benchmark("ours", [result(0.5), arabic])
    assert {name: one.average for name, one in found.items()} == pytest.approx(
        {"English": 50.0, "Arabic": 30.0, "bilingual": 40.0}
    )
    assert by_benchmark("ours", [result(0.5, tasks=("medqa",))])["English"].average is None
    with pytest.raises(BimedixError, match="two results of ours have task mmlu_clinical_knowledge in English"):
        by_benchmark("ours", [result(), result()])


def test_results_of_the_harness_are_read():
    """Our tasks by language, the harness's own in English; other protocols and other tasks are left out."""
    names = {"bimedix_medqa_en": 0.5, "bimedix_medqa_ar": 0.25, "bimedix_medqa_ar_text": 0.9, "hellaswag": 0.8}
    found = by_benchmark("ours", [{"tasks": {name: score(value) for name, value in names.items()}}])
    assert {name: one.rows["medqa"]["accuracy"] for name, one in found.items()} == {
        "English": 0.5,
        "Arabic": 0.25,
        "bilingual": 0.375,
    }
    assert found["Arabic"].rows["medqa"]["note"] == "100 of the paper's 1,273 questions in MedQA"
    assert found["Arabic"].others == {"the options' texts": 1}
    assert found["bilingual"].rows["medqa"]["note"] == "100 of the paper's 1,273 questions in MedQA"
    own = by_benchmark("ours", [{"tasks": {"medqa_4options": score(0.5, n=1273)}}])
    assert own["English"].rows["medqa"]["note"] == ""


def test_what_is_not_comparable_has_a_footnote():
    limited = result(tasks=("medqa",), limited=True, available=1273, paper_questions=1273, too_long=0, rejected=0)
    found = sheet(published(), "English", by_benchmark("ours", [limited]).values())
    cells = dict(zip(found.columns, found.rows[-1], strict=True))
    assert cells["MedQA"].shown == "50.0 [40.0, 60.0]"
    assert "In brackets: Wilson's 95 % interval." in found.notes
    assert "first 100 of 1273" in note_of(cells["MedQA"], found)
    assert "1 of 9 tasks" in note_of(cells["AVG"], found)
    assert cells["CliKG"].text == ""


def test_no_right_answer_has_the_interval_of_the_result():
    """0 of 4: Wilson's interval is not symmetric about the accuracy."""
    one = {"tasks": {"medqa": Accuracy(0, 4).to_dict()}}
    (cell,) = [
        cell for cell in sheet(published(), "English", by_benchmark("o", [one]).values()).rows[-1] if cell.low == 0
    ]
    assert cell.shown == "0.0 [0.0, 49.0]"


EVAL_RUN = {"limited": False, "available": 1273, "paper_questions": 1273, "too_long": 0, "rejected": 0}


@pytest.mark.parametrize(
    ("about", "row", "expected"),
    [
        ({"template": "chatml"}, EVAL_RUN, "measured with bimedix eval run, in the chat template chatml, by letter or"),
        ({"chat": False}, {}, "measured with lm-evaluation-harness, by letter (PubMedQA: by yes, no, maybe), without"),
        ({"chat": True}, {"num_fewshot": 5}, "lm-evaluation-harness, in the chat template, by letter (PubMedQA: by"),
        ({"chat": False}, {"num_fewshot": 1}, "with 1 solved example."),
        ({"limit": 100}, {}, "first 100 of the paper's 1,273 questions in MedQA"),
        ({}, {"excluded": {"low_score": 10, "no_valid_option": 2}}, "12 questions left out (low_score 10, no_valid_"),
        ({}, {"primary": "acc_norm"}, "metric acc_norm"),
        ({"intervene": {}}, {}, "without solved examples"),
        ({"intervene": {"rules": []}}, {}, "with rules for the routers"),
    ],
)
def test_every_row_says_how_it_was_measured(about, row, expected):
    one = {"tasks": {"medqa": score(0.5, **row)}, **about}
    found = sheet(published(), "English", by_benchmark("ours", [one]).values())
    said = " ".join(note_of(cell, found) for cell in found.rows[-1] if cell.note)
    assert expected in said


def test_rows_of_two_protocols_are_told_apart():
    """English by eval run, Arabic by the harness with examples; and a task that has more of them than the others."""
    english = {"template": "chatml", "tasks": {"medqa": score(0.5, n=1273, **EVAL_RUN)}}
    arabic = {"tasks": {"bimedix_medqa_ar": score(0.3, n=1273, num_fewshot=5), "bimedix_medmcqa_ar": score(0.2, n=4183),
                        "bimedix_medmcqa_ar_gen": score(0.9)}}  # fmt: skip
    found = by_benchmark("ours", [english, arabic])
    both = sheet(published(), "bilingual", [found["bilingual"]])
    assert "in English bimedix eval run, in the chat" in note_of(both.rows[-1][0], both)
    assert "; in Arabic lm-evaluation-harness" in note_of(both.rows[-1][0], both)
    made = sheet(published(), "Arabic", [found["Arabic"]])
    cells = dict(zip(made.columns, made.rows[-1], strict=True))
    assert "with 5 solved examples" in note_of(cells["MedQA"], made)
    assert "without solved examples" in note_of(cells["MedMCQA"], made)
    assert "leave out tasks under other protocols, 1 by generated answers" in note_of(cells["model"], made)
    assert "names lm-evaluation-harness and no number of solved examples" in made.notes[-1]


def test_every_format_has_every_cell():
    made = sheet(published(), "English", by_benchmark("ours_100%", [result()]).values())
    rows = list(csv.reader(io.StringIO(render(made, "csv"))))
    ends = [name for task in made.columns[1:-1] for name in (task, f"{task} low", f"{task} high")]
    assert rows[0] == ["model", *ends, "AVG", "ours", "notes"]
    read = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    assert [[row[name] for name in made.columns] for row in read] == [[cell.text for cell in row] for row in made.rows]
    assert [(row["MedQA low"], row["MedQA high"]) for row in read] == [*[("", "")] * (len(read) - 1), ("40.0", "60.0")]
    lines = [line for line in render(made, "markdown").splitlines() if line.startswith("|")]
    assert len(lines) == len(made.rows) + 2
    assert re.match(r"\| \*\*ours_100%\*\* \[\d\] \| \*\*50\.0 \[40\.0, 60\.0\]\*\* \[", lines[-1])
    tex = render(made, "latex")
    assert r"ours\_100\%" in tex
    assert "50.0 [40.0, 60.0]" in tex
    assert tex.count(r"\midrule") == 2  # one of them before our row
    assert not re.search(r"(?<!\\)[%_#]", tex)


def test_cells_with_special_characters_are_escaped():
    odd = Sheet(name="t", title="a & b", columns=("x|y", "n"), rows=((Cell("a|b\\_{}$^~"), Cell("1", 1.0)),))
    assert r"a\|b" in render(odd, "markdown")
    assert r"a|b\textbackslash{}\_\{\}\$\textasciicircum{}\textasciitilde{}" in render(odd, "latex")


@pytest.fixture
def files(tmp_path):
    (tmp_path / "en.json").write_text(json.dumps(result() | {"adapter": "runs/first/adapter"}))
    row = {"name": "decode_b1", "ours_tokens_per_s": 64.0, "ours_dtype": "bfloat16"}
    (tmp_path / "bench.json").write_text(json.dumps({"size": "small", "device": "cpu", "rows": [row]}))
    plan = {"model": "mixtral-8x7b", "target": "a100-80gb:8", "decode": {"rows": 1, "devices": 1, "tokens_per_s": 16.0}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    return tmp_path


def test_the_command_prints_and_writes(files, capsys):
    words = ["eval", "tables", str(files / "en.json"), "--speed", str(files / "bench.json"), str(files / "plan.json")]
    assert main([*words, "--out", str(files / "out"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["table5"]["rows"][-1]["model"] == "mixture + first"
    assert document["table5"]["rows"][-1]["AVG"] == pytest.approx(50.0)
    assert document["table5"]["rows"][-1]["MedQA low"] == pytest.approx(40.0)
    assert not any(row["ours"] for row in document["table3"]["rows"])
    speeds = {row["model"]: row["tokens/s (printed)"] for row in document["table6"]["rows"] if row["ours"]}
    assert speeds == {"bench decode: small model, bfloat16, cpu": 64.0, "mixtral-8x7b, compiled for a100-80gb:1": 16.0}
    names = {f"table{number}{suffix}" for number in (3, 4, 5, 6) for suffix in (".md", ".tex", ".csv")}
    assert {Path(name).name for name in document["files"]} == names
    (files / "run").mkdir()
    (files / "en.json").rename(files / "run/result.json")
    words[2] = str(files / "run")
    assert main([*words, "--out", str(files / "out")]) == 1
    assert "exists; name another folder or pass --overwrite" in capsys.readouterr().err


def test_tables_go_to_wandb_as_text_and_numbers(files, monkeypatch):
    logged, summary, settings = {}, {}, {}

    class Run:
        def __init__(self):
            self.summary = summary

        def log(self, values):
            logged.update(values)

        def finish(self):
            settings["finished"] = True

    monkeypatch.setattr("wandb.init", lambda **what: settings.update(what) or Run())
    options = {"results": (f"A={files / 'en.json'}",), "tables": (5,), "wandb": "offline", "out": files / "out"}
    eval_tables.run(eval_tables.Config(**options), Console(stderr=True))
    assert settings["finished"]
    assert settings["mode"] == "offline"
    assert summary == {"table5/A": pytest.approx(50.0)}
    assert logged["table5"].columns[0] == "model"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"tables": (7,)}, "--tables names 7"),
        ({"wandb": "offline"}, "pass --out DIR"),
        ({"results": ("no/file.json",)}, "no/file.json"),
        ({"speed": (Path("no/file.json"),)}, "no/file.json"),
    ],
)
def test_invalid_options_raise(options, problem):
    with pytest.raises(BimedixError, match=re.escape(problem)):
        eval_tables.run(eval_tables.Config(**options), Console(stderr=True))


def test_a_result_without_the_tasks_is_refused(tmp_path):
    (tmp_path / "r.json").write_text('{"model": "m", "heldout": {}}')
    with pytest.raises(BimedixError, match="no result has one of the nine tasks"):
        eval_tables.run(eval_tables.Config(results=(str(tmp_path / "r.json"),)), Console(stderr=True))


def test_the_data_file_is_in_the_package():
    path = Path(__file__).parents[2] / "bimedix_jax/assets/paper/tables.toml"
    assert tomllib.loads(path.read_text("utf-8"))["source"].endswith("arXiv 2402.13253")
