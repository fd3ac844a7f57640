"""`bimedix eval harness` on tiny data: averages, one line for each question, and a second run that computes nothing."""

import dataclasses
import io
import json
import os
import re
import types
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval.api.task import ConfigurableTask
from rich.console import Console
from tiny import TINY

from bimedix_jax.checkpoint import hub
from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.commands import eval_harness
from bimedix_jax.data.tokenizer import byte_tokenizer
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals import harness_run, samples
from bimedix_jax.evals.documents import NINE
from bimedix_jax.evals.harness import HarnessModel
from bimedix_jax.evals.harness_table import table
from bimedix_jax.kernels import backends
from bimedix_jax.process.folders import one_writer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One to nine questions of each benchmark, of which the first has a flag in Arabic."""
    folder = tmp_path_factory.mktemp("data")
    for language, question in (("en", "Which one"), ("ar", "أي واحد")):
        for size, name in enumerate(NINE, start=1):
            flags = ["doses"] if language == "ar" else []
            common = {"choices": ["liver", "heart", "eye"]}
            rows = [
                {**common, "id": f"{name}/{n}", "question": f"{question} {n}?", "answer": n % 3, "flags": flags[n:]}
                for n in range(size)
            ]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}_{language}.jsonl").write_text(lines, "utf-8")
    return folder


class ByRule(HarnessModel):
    """Answers without a model: an option's log p depends on its bytes, and every answer is the second option."""

    def __init__(self, tokenizer):
        super().__init__(types.SimpleNamespace(config=TINY), tokenizer)  # pyright: ignore[reportArgumentType]

    def _run(self, groups, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        for index, group in enumerate(groups):
            yield {(index, n): (-float(sum(ids) * 7 % 13), False) for n, ids in enumerate(group.continuations)}

    def _answers(self, prompts, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        return [" B. heart" for _ in prompts]


def test_averages_and_samples(tokenizer, data, tmp_path, capsys):
    names = ("bimedix_bi", "bimedix_medqa_ar_text", "bimedix_mmlu_anatomy_en_gen")
    result = harness_run.evaluate(ByRule(tokenizer), harness_run.load_tasks(names, [data]), None, chat=False)
    found, group = result["tasks"], result["groups"]["bimedix_bi"]
    assert len(found) == 20
    both = [found[f"bimedix_{name}_{language}"] for name in NINE for language in ("en", "ar")]
    assert group["mean"] == pytest.approx(sum(task["accuracy"] for task in both) / 18)
    assert group["mean"] == pytest.approx(group["metrics"]["acc,none"])
    assert group["by_size"] == pytest.approx(sum(task["correct"] for task in both) / (2 * 45))
    assert found["bimedix_medqa_ar"]["flagged"] == {"doses": 1}
    assert found["bimedix_medqa_ar"]["source"] == str(data / "medqa_ar.jsonl")
    assert found["bimedix_medqa_ar_text"]["primary"] == "acc_bytes"
    assert found["bimedix_mmlu_anatomy_en_gen"]["filter"] == "option"
    assert found["bimedix_mmlu_anatomy_en_gen"]["correct"] == 2  # of six questions, two have B as their answer
    harness_run.write(tmp_path, {"tasks": found, "reused": 3}, result["samples"])
    assert json.loads((tmp_path / "result.json").read_text("utf-8")) == {"tasks": found}
    rows = samples.read(tmp_path)
    assert len(rows) == 2 * 45 + 8 + 6
    one = next(row for row in rows if row.task == "bimedix_medqa_ar_text" and row.id == "medqa/0")
    assert (one.language, one.target, one.flags) == ("ar", 0, ("doses",))
    asked = "السؤال: أي واحد 0?\nالإجابة:"
    assert one.asked_bytes == len(asked.encode())
    assert one.logprobs is not None
    assert one.logprobs_per_byte == pytest.approx(
        [value / size for value, size in zip(one.logprobs, (5, 5, 3), strict=True)]
    )
    for language in ("en", "ar"):
        own = [found[f"bimedix_{name}_{language}"] for name in NINE]
        part = group["by_language"][language]
        assert part["mean"] == pytest.approx(sum(task["accuracy"] for task in own) / 9)
        assert (part["tasks"], part["n"]) == (9, 45)
    for width in (80, 200):
        shown = printed(table(result), width)
        for name in (*found, "bimedix_bi (en)", "bimedix_bi (ar)"):
            assert f"{name} " in shown or f"{name}\n" in shown, "no name is cut"
    assert "prompts" not in capsys.readouterr().err, "short bars are not shown"


def printed(table, width=200):
    screen = io.StringIO()
    Console(file=screen, width=width).print(table)
    return screen.getvalue()


def test_questions_that_are_left_out_are_counted_in_the_table(tokenizer, data):
    tasks = harness_run.load_tasks(["bimedix_medmcqa_ar"], [data], exclude_flagged=True)
    result = harness_run.evaluate(ByRule(tokenizer), tasks, 3, chat=False)
    found = result["tasks"]["bimedix_medmcqa_ar"]
    assert (found["n"], found["excluded"], found["flagged"]) == (3, {"doses": 1}, {})
    assert "first 3 of 6; 1 left out (doses 1)" in printed(table(result))


def test_the_table_counts_questions_with_flags_and_not_their_flags(tokenizer, tmp_path):
    row = {"question": "q", "choices": ["liver", "heart"], "answer": "A"}
    rows = [{**row, "flags": ["doses", "numbers"]}, {**row, "question": "r"}]
    (tmp_path / "medqa_ar.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    result = harness_run.evaluate(
        ByRule(tokenizer), harness_run.load_tasks(["bimedix_medqa_ar"], [tmp_path]), None, chat=False
    )
    found = result["tasks"]["bimedix_medqa_ar"]
    assert (found["flagged"], found["flagged_questions"]) == ({"doses": 1, "numbers": 1}, 1)
    assert printed(table(result)).splitlines()[-2].split("│")[-3].strip() == "1"


def test_an_empty_option_of_a_task_file_is_refused_before_anything_is_scored(monkeypatch):
    rows = [
        {"id": f"x{n}", "q": "Which?", "options": ["liver", option], "a": 0} for n, option in enumerate(("eye", ""))
    ]
    columns = {"doc_to_text": "{{q}}", "doc_to_choice": "{{options}}", "doc_to_target": "a"}
    made = datasets.DatasetDict(test=datasets.Dataset.from_list(rows))  # pyright: ignore[reportCallIssue]
    config: Any = {"task": "odd", "custom_dataset": lambda **_: made, "test_split": "test", **columns}
    task = ConfigurableTask(config={**config, "output_type": "multiple_choice"})
    harness_run.require_options("odd", task, limit=1)
    with pytest.raises(BimedixError, match=r"document x1 of odd \(number 2\) has an empty option; correct or remove"):
        harness_run.require_options("odd", task, limit=None)

    def load(*_, **__):
        rows[1]["options"][1][0]

    monkeypatch.setattr("lm_eval.tasks.TaskManager.load", load)  # what the harness does with the first question
    with pytest.raises(BimedixError, match="the first question of bimedix_en is missing or has an empty option"):
        harness_run.load_tasks(["bimedix_en"])


def test_without_a_network_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BimedixError, match=r"medqa_ar.jsonl into a folder and name that with --data$"):
        harness_run.load_tasks(["bimedix_medqa_ar"])

    def load(*_, **__):
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr("lm_eval.tasks.TaskManager.load", load)
    with pytest.raises(BimedixError, match=r"the data of bimedix_en cannot be loaded \(Couldn't reach.*check the conn"):
        harness_run.load_tasks(["bimedix_en"])


def test_a_hub_that_does_not_answer_is_not_asked_again(monkeypatch, caplog):
    def fail(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.create_connection", fail)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    hub.offline_if_unreachable()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "huggingface.co cannot be reached (Name or service not known)" in caplog.text
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy"})
    hub.offline_if_unreachable()
    assert os.environ["HF_HUB_OFFLINE"] == ""


@pytest.fixture(scope="module")
def config(model, data, tmp_path_factory):
    place = tmp_path_factory.mktemp("harness")
    export_hf(model, place / "model")
    byte_tokenizer(place / "model")
    tasks = ("bimedix_mmlu_anatomy_ar", "bimedix_mmlu_anatomy_ar_text", "bimedix_mmlu_anatomy_en_gen")
    return eval_harness.Config(
        tasks=tasks, model=str(place / "model"), base="float32", data=(data,), out=place / "out", batch_tokens=512
    )


def evaluate(config, **changes):
    with backends.use(expert_mlp="composed", grouped_matmul="ragged_dot"):
        return eval_harness.run(dataclasses.replace(config, **changes), Console(stderr=True, quiet=True))


DEEP = {"hashes": "{}.{}", "versions": "{}.{}", "settings": "{}.{}", "run": "{}", "asked": "{}"}
"""Objects whose keys are documented one by one, and how they are written."""


def undocumented(result) -> set[str]:
    """Keys of a result that docs/harness.md does not have in backticks."""
    page = (Path(__file__).resolve().parents[2] / "docs/harness.md").read_text("utf-8")
    known = set(re.findall(r"`([^`\n]+)`", page.split("\n## Files\n")[1]))
    found = set()
    for key, value in result.items():
        if key in ("tasks", "groups") and isinstance(value, dict):
            found |= {f"{key}.NAME.{name}" for row in value.values() for name in row}
        elif key in DEEP and isinstance(value, dict):
            found |= {DEEP[key].format(key, name) for name in value}
        else:
            found.add(key)
    return found - known


def test_the_files_have_documented_keys(tokenizer, data, finished):
    result = harness_run.evaluate(ByRule(tokenizer), harness_run.load_tasks(["bimedix_bi_gen"], [data]), 1, chat=False)
    assert undocumented({"groups": result["groups"], "tasks": result["tasks"]}) == set()
    assert undocumented(dict.fromkeys(field.name for field in dataclasses.fields(samples.Sample))) == set()
    head = json.loads((finished.out / "requests.jsonl").read_text("utf-8"))
    assert undocumented(head["run"]["asked"]) == set()
    assert undocumented({"tasks": {"x": {"new": 1}}, "hashes": {"other": 2}}) == {"tasks.NAME.new", "hashes.other"}


def test_a_second_run_computes_nothing_and_ends_with_the_same_bytes(config):
    first = evaluate(config)
    assert first["reused"] == 0
    files = {name: (config.out / name).read_bytes() for name in eval_harness.FILES}
    again = evaluate(config)
    assert again["reused"] == 6 * 3 + 6 * 3 + 6
    assert again["tasks"] == first["tasks"]
    assert {name: (config.out / name).read_bytes() for name in eval_harness.FILES} == files
    with pytest.raises(BimedixError, match="an evaluation with other values of: --batch-tokens; repeat its"):
        evaluate(config, batch_tokens=256)
    rules = config.out.with_name("rules.json")
    rules.write_text(json.dumps([{"op": "ban", "experts": [2]}]), "utf-8")
    with pytest.raises(BimedixError, match="an evaluation with other values of: rules;"):
        evaluate(config, intervene=rules)
    (config.out / "result.json").unlink()  # as if it had been killed
    assert evaluate(config)["reused"] == again["reused"]
    assert {name: (config.out / name).read_bytes() for name in eval_harness.FILES} == files
    ruled = dataclasses.replace(config, tasks=config.tasks[:1], limit=2, intervene=rules, out=rules.with_name("ruled"))
    counted = evaluate(ruled)["intervene"]["rules"][0]["tokens"]
    assert counted > 0
    assert undocumented(json.loads((ruled.out / "result.json").read_text("utf-8"))) == set()
    head = json.loads((ruled.out / "requests.jsonl").read_text("utf-8").splitlines()[0])
    assert set(head["run"]) == {"hashes", "versions", "settings", "asked"}
    assert evaluate(ruled)["intervene"]["rules"][0]["tokens"] == counted, "also if nothing runs"


@pytest.fixture
def finished(config, tmp_path):
    """The command of a finished run whose files are all there but for their contents, and which never loads a model."""
    tasks = harness_run.load_tasks(config.tasks, config.data)
    asked = eval_harness.asked_of(config, harness_run.questions_hash(tasks, None))
    (tmp_path / "result.json").write_text(json.dumps({"tasks": {}, "groups": {}, "hashes": {}}), "utf-8")
    (tmp_path / "samples.jsonl").write_text('{"task": "x"', "utf-8")
    (tmp_path / "requests.jsonl").write_text(json.dumps({"run": {"asked": asked, "hashes": {}}}) + "\n", "utf-8")
    return dataclasses.replace(config, out=tmp_path, model="no/model-here")


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"limit": 2}, "--limit"),
        ({"tasks": ("bimedix_mmlu_anatomy_ar",)}, "tasks"),
        ({"num_fewshot": 0}, "--num-fewshot"),
        ({"chat": True, "exclude_flagged": True}, "--chat, --exclude-flagged"),
    ],
)
def test_another_command_does_not_replace_a_result(finished, changes, differing):
    with pytest.raises(BimedixError, match=f"an evaluation with other values of: {differing}; repeat its command"):
        evaluate(finished, **changes)


def test_only_one_process_writes(finished):
    before = {path.name: path.read_bytes() for path in finished.out.iterdir()}
    with (
        one_writer(finished.out, "evaluates"),
        pytest.raises(BimedixError, match=r"evaluates in .*; wait until it has"),
    ):
        evaluate(finished)
    assert {path.name: path.read_bytes() for path in finished.out.iterdir()} == before
    new = finished.out / "new/folder"
    with pytest.raises(BimedixError, match="no/model-here"):
        evaluate(finished, out=new)
    assert not new.parent.exists(), "a run that fails at once leaves nothing"


def test_other_questions_do_not_replace_a_result(finished, data, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for path in data.iterdir():
        (other / path.name).write_text(path.read_text("utf-8").replace("liver", "lung"), "utf-8")
    with pytest.raises(BimedixError, match="an evaluation with other values of: questions;"):
        evaluate(finished, data=(other,))


def test_files_that_cannot_be_repeated_or_are_not_ours_are_not_replaced(finished):
    (finished.out / "requests.jsonl").unlink()
    with pytest.raises(BimedixError, match=r"result.json exists, without the requests.jsonl that could repeat it"):
        evaluate(finished)
    for name in eval_harness.FILES:
        (finished.out / name).write_text("mine", "utf-8")
        with pytest.raises(BimedixError, match=f"{name} exists, and bimedix did not write it"):
            evaluate(finished, overwrite=True)
        (finished.out / name).unlink()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"tasks": ("bimedix_medqa",)},
            r"no task bimedix_medqa; did you mean bimedix_medqa_.. or .*\? Our groups are bimedix_ar, ",
        ),
        ({"tasks": ("xyzzy",)}, r"there is no task xyzzy; our groups are bimedix_ar, .*harness.md lists our tasks$"),
        ({"tasks": ("bimedix_bi", "bimedix_en")}, "Duplicate task"),
        ({"tasks": ("bimedix_medarabench_ar",)}, r"no questions of medarabench \(ar\)"),
        ({"num_fewshot": 2}, "has 0 solved examples, not 2; put mmlu_anatomy_en.fewshot.jsonl into"),
        ({"limit": 0}, "--limit is 0"),
        ({"num_fewshot": -1}, "--num-fewshot is -1; give 0 or more"),
        ({"batch_tokens": 0}, "--batch-tokens is 0; give at least 1"),
        ({"data": ("no/such",)}, "there is no folder no/such"),
        (
            {"task_files": (Path("no/tasks"),)},
            "there is no folder no/tasks; name folders of task files with --task-files",
        ),
        ({"mesh": ("pipe=2",)}, "--mesh pipe=2 is not AXIS=N"),
    ],
)
def test_wrong_options_raise_before_the_model_loads(data, changes, problem):
    changes = {**changes, "data": tuple(map(eval_harness.Path, changes.get("data", (data,))))}
    config = eval_harness.Config(tasks=("bimedix_mmlu_anatomy_en",), model="no/model-here")
    with pytest.raises(BimedixError, match=problem):
        evaluate(config, **changes)
