"""The table of tasks on three-record fixtures, the printed tables, and `bimedix eval run` end to end."""

import io
import json

import pytest
from rich.console import Console
from tiny_benchmarks import write_benchmarks

from bimedix_jax import cli
from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.commands.eval_run import predictions_path, write_predictions
from bimedix_jax.data.records import write_jsonl
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals import tables, tasks
from bimedix_jax.evals.heldout import heldout_loss, heldout_records
from bimedix_jax.evals.multiple_choice import multiple_choice

SUBJECTS = [name.removeprefix("mmlu_") for name in tasks.TASKS if name.startswith("mmlu_")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """All four folders in the published layout, with made-up questions."""
    return write_benchmarks(tmp_path_factory.mktemp("data"), invalid_row=True)


@pytest.fixture(scope="module")
def scored(model, tokenizer, data):
    return tasks.run_tasks(model, tokenizer, ["all"], data, limit=2)


def test_nine_tasks_with_the_papers_counts():
    assert len(tasks.TASKS) == 9
    assert sum(task.questions or 0 for name, task in tasks.TASKS.items() if name.startswith("mmlu_")) == 1089
    assert tasks.named(["pubmedqa", "medqa"]) == ["medqa", "pubmedqa"]
    with pytest.raises(BimedixError, match="no task medqaa"):
        tasks.named(["medqaa"])


def test_every_task_reads_its_own_questions(data):
    sizes = {name: len(tasks.questions_of(name, data)[0]) for name in tasks.TASKS}
    assert sizes == {name: 2 if name.startswith(("mmlu", "pubmed")) else 3 for name in tasks.TASKS}
    assert tasks.questions_of("medqa", data)[1] == 1  # the row without a question
    with pytest.raises(BimedixError, match="needs the folder"):
        tasks.questions_of("medqa", data / "nowhere")


def test_results_have_the_counts_of_their_files(scored):
    assert list(scored) == list(tasks.TASKS)
    medqa = scored["medqa"].to_dict()
    assert (medqa["n"], medqa["available"], medqa["paper_questions"], medqa["limited"]) == (2, 3, 1273, True)
    assert medqa["rejected"] == 1
    assert medqa["chance"] == 0.25
    assert scored["pubmedqa"].to_dict()["chance"] == pytest.approx(1 / 3)
    assert not scored["mmlu_anatomy"].limited


def test_the_average_is_unweighted_and_needs_all_nine():
    assert tasks.average([0.5] * 8 + [1.0]) == pytest.approx(5 / 9)
    assert tasks.average([0.5] * 8) is None


def printed(table):
    screen = io.StringIO()
    Console(file=screen, width=240).print(table)
    return screen.getvalue()


def test_tables_show_results_alone_and_against_earlier_ones(model, tokenizer, mixed, mcqa, scored):
    loss = heldout_loss(model, tokenizer, mixed).to_dict()
    worse = loss | {"nats_per_token": {group: value + 1 for group, value in loss["nats_per_token"].items()}}
    assert "(-1.0000)" in printed(tables.loss_table(loss, worse))
    assert "->" not in printed(tables.loss_table(loss))
    short = heldout_loss(model, tokenizer, mixed, max_length=120).to_dict()
    assert "records exceed" in printed(tables.loss_table(short))
    choice = multiple_choice(model, tokenizer, mcqa).to_dict()
    assert "6 groups of fewer than 5 questions" in printed(tables.accuracy_table(choice))
    many = {
        part: {group: row | {"n": 9} for group, row in choice[part].items()} for part in ("by_group", "by_group_text")
    }
    assert "(+0.0)" in printed(tables.accuracy_table(choice | many, choice))
    rows = {name: result.to_dict() for name, result in scored.items()}
    shown = printed(tables.task_table(rows, 0.25))
    assert "AVG" in shown
    assert "first 2 of 3; 1 invalid rows" in shown
    assert "questions differ from the paper's" in shown
    assert "1 of 9 tasks" in printed(tables.task_table({"medqa": rows["medqa"]}, None, rows))


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    return export_hf(model, tmp_path_factory.mktemp("model") / "hf", tokenizer_from=tokenizer.folder)


def test_the_command_gives_one_json_document_and_the_same_file(folder, data, mixed, tmp_path, capsys):
    path, out = tmp_path / "records.jsonl", tmp_path / "results" / "run.json"
    path.write_text("".join(record.to_json() + "\n" for record in mixed), "utf-8")
    words = ["--json", "eval", "run", "--model", str(folder), "--base", "float32", "--heldout", str(path)]
    words += ["--tasks", "medqa", "pubmedqa", "--data", str(data), "--out", str(out)]
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result.pop("compiled_programs") + result.pop("cached_programs") > 0
    assert result == json.loads(out.read_text("utf-8"))
    assert {"en", "ar", "en/qa", "ar/mcqa"} <= set(result["heldout"]["nats_per_token"])
    assert set(result["choice"]["by_group"]) >= {"en", "ar"}
    assert list(result["tasks"]) == ["medqa", "pubmedqa"]
    assert result["average"] is None
    assert result["predictions"] == {"file": "run.predictions.jsonl", "lines": 4 + 3 + 2}
    lines = (out.parent / "run.predictions.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert sorted(out.parent.iterdir()) == [out, out.parent / "run.predictions.jsonl"], "nothing half-written is left"
    assert [row["set"] for row in rows] == [str(path)] * 4 + ["medqa"] * 3 + ["pubmedqa"] * 2
    assert [row["id"] for row in rows[:4]] == ["q1", "q2", "q3", "q4"]
    assert rows[2]["groups"] == ["ar", "ar/endocrinology"]
    assert rows[2]["language"] == "ar"
    for row in rows:
        logprobs = row["text_logprobs"] if row["letter_logprobs"] is None else row["letter_logprobs"]
        assert logprobs[row["chosen"]] == max(logprobs)
        assert row["correct"] == (row["chosen"] == row["answer"])
        assert 0 <= row["chosen_by_text"] < len(row["text_logprobs"])
    for name, group in {"medqa": result["tasks"]["medqa"], str(path): result["choice"]["by_group"]["en"]}.items():
        own = [row["correct"] for row in rows if row["set"] == name and row["language"] == "en"]
        assert (sum(own), len(own)) == (group["correct"], group["n"])
    assert cli.main([*words[:-2], "--compare", str(out)]) == 0
    assert "before -> after" in capsys.readouterr().err


def test_predictions_are_in_the_folder_of_the_result(tmp_path):
    assert predictions_path(tmp_path / "a.json") == tmp_path / "a.predictions.jsonl"
    assert predictions_path(tmp_path / "a.v2") == tmp_path / "a.v2.predictions.jsonl"
    assert write_predictions(tmp_path / "new/a.json", {"sample": []}) == {"file": "a.predictions.jsonl", "lines": 0}
    assert (tmp_path / "new/a.predictions.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to evaluate"),
        (["--tasks", "all"], "needs --data"),
        (["--tasks", "nope", "--data", "."], "no task nope"),
        (["--heldout", "nowhere.jsonl"], "there is no file"),
        (["--heldout", "sample", "--limit", "0"], "at least 1"),
        (["--heldout", "sample", "--max-length", "0"], "--max-length is 0; give at least 1"),
        (["--heldout", "sample", "--batch-tokens", "0"], "--batch-tokens is 0; give at least 1"),
        (["--heldout", "sample", "--compare", "nowhere.json"], "cannot be read"),
    ],
)
def test_wrong_options_raise_before_the_model_loads(options, message, capsys):
    assert cli.main(["eval", "run", "--model", "no-such-model", *options]) == 1
    assert message in capsys.readouterr().err


def test_a_limit_spreads_over_the_records():
    """The sample is sorted by language and kind, yet a few spread records have all of them."""
    few = heldout_records("sample", 12)
    assert len(few) == 12
    assert {record.language for record in few} == {"en", "ar"}
    assert {record.kind for record in few} == {"qa", "mcqa", "chat"}
    assert heldout_records("sample", 1000) == heldout_records("sample", None)


def test_own_sets_are_scored_whole_in_any_language(model, tokenizer, tmp_path):
    rows = [{"سؤال": f"سؤال {n}؟", "a": "نعم", "b": "لا", "key": "AB"[n % 2]} for n in range(3)]
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    own = {"data": "exam.jsonl", "question": "سؤال", "choices": ["a", "b"], "answer": "key", "language": "ar"}
    source = "table=exam.jsonl?question=%D8%B3%D8%A4%D8%A7%D9%84&choices=a,b&answer=key&licence=own"
    (tmp_path / "sets.json").write_text(json.dumps({"exam": own, "again": source}), "utf-8")
    questions = tasks.read_sets(tmp_path / "sets.json")
    assert [[one.answer for one in records] for records, _ in questions.values()] == [[0, 1, 0]] * 2
    found = tasks.run_tasks(model, tokenizer, questions, questions=questions)
    result = found["exam"].to_dict()
    assert (result["n"], result["available"], result["paper_questions"]) == (3, 3, None)
    assert result["chance"] == pytest.approx(0.5)
    assert [one.id for one in found["exam"].choice.predictions] == [one.id for one in questions["exam"][0]]
    printed = io.StringIO()
    Console(file=printed, width=160).print(tables.task_table({"exam": result}, None))
    assert "of 9 tasks" not in printed.getvalue()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"medqa": {"data": "x.jsonl"}}, "as a task of the paper"),
        ({"exam": {"data": "x.jsonl"}}, "x.jsonl"),
        ({"exam": {"path": "x.jsonl"}}, "path"),
    ],
)
def test_wrong_sets_raise(tmp_path, content, problem):
    (tmp_path / "sets.json").write_text(json.dumps(content))
    with pytest.raises(BimedixError, match=problem):
        tasks.read_sets(tmp_path / "sets.json")


def test_repeated_records_are_counted_in_a_warning(mcqa, tmp_path, caplog):
    again = [mcqa[0], mcqa[1].model_copy(update={"id": "other"})]
    write_jsonl(tmp_path / "records.jsonl", [*mcqa, *again])
    tasks.heldout_of(str(tmp_path / "records.jsonl"), None)
    assert "records.jsonl has 1 question with the id of an earlier one and 2 questions with the text and" in caplog.text
    (tmp_path / "sets.json").write_text(json.dumps({"exam": f"records={tmp_path / 'records.jsonl'}"}))
    caplog.clear()
    tasks.read_sets(tmp_path / "sets.json")
    assert "exam has 1 question with the id" in caplog.text
    caplog.clear()
    tasks.heldout_of("sample", None)
    assert not caplog.text


def test_rows_that_are_left_out_are_named_with_their_reason(tmp_path, caplog):
    good = {"question": "Which organ pumps blood?", "choices": ["the heart", "the liver"], "answer": "A"}
    rows = [good, {**good, "answer": "E"}, good | {"question": "And which filters it?"}, {**good, "choices": ["one"]}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    columns = "licence=own&question=question&choices=choices&answer=answer"
    (tmp_path / "sets.json").write_text(json.dumps({"own": f"table=own.jsonl?{columns}"}), "utf-8")
    [(records, rejected)] = tasks.read_sets(tmp_path / "sets.json").values()
    assert (len(records), rejected) == (2, 2)
    assert "own: 2 rows are not valid and were left out: 1 because " in caplog.text
    assert "(line 2)" in caplog.text
    assert "(line 4)" in caplog.text


def test_a_file_of_another_layout_is_no_file_of_records(tmp_path):
    path = tmp_path / "exam.jsonl"
    path.write_text(json.dumps({"question": "q", "choices": ["a", "b"], "answer": "A"}))
    remedy = r"--heldout 'table=.*exam.jsonl\?question=...&choices=...&answer=...&licence=...'$"
    with pytest.raises(BimedixError, match=f"exam.jsonl:1 is not a record, since it has no id, language, .*{remedy}"):
        tasks.heldout_of(str(path), None)


def test_heldout_takes_any_reader(tmp_path):
    rows = [{"id": str(n), "question": f"Which {n}?", **dict.fromkeys(("opa", "opb", "opc"), "x"), "opd": "y", "cop": 4,
             "choice_type": "multi"} for n in range(4)]  # fmt: skip
    (tmp_path / "medmcqa_en").mkdir()
    (tmp_path / "medmcqa_en/dev.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = tasks.heldout_of(f"medmcqa={tmp_path}/medmcqa_en/dev.json?split=heldout", 2)
    assert [one.id for one in found] == ["medmcqa/0", "medmcqa/2"]
    whole, rejected = tasks.questions_of("medmcqa", tmp_path)  # the authors' file, multiple-choice questions included
    assert (len(whole), rejected, {one.answer for one in whole}) == (4, 0, {3})
    with pytest.raises(BimedixError, match="no reader 'nothing'"):
        tasks.heldout_of("nothing=x", None)
