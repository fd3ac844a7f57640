"""`bimedix eval compare` on results written by hand: numbers against counts, refusals, files. No model runs."""

import csv
import json
import math
from typing import Any

import numpy as np
import pytest

from bimedix_jax import cli
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals import answers, compare, compare_page, samples
from bimedix_jax.evals.accuracy import Accuracy
from bimedix_jax.evals.samples import Sample

HASHES = {"model": "1" * 64, "adapter": None, "prompt": "2" * 64}


def prediction(task, number, language, chosen, answer=0, sure=2.0, **rest):
    """A line of NAME.predictions.jsonl; the chosen option is e^sure times as likely as each other one."""
    logprobs = [-5.0 + sure * (option == chosen) for option in range(4)]
    return {
        "set": task,
        "id": f"{task}-{number}",
        "language": language,
        "groups": [language, f"{language}/{('surgery', 'anatomy')[number % 2]}"],
        "answer": answer,
        "chosen": chosen,
        "chosen_by_text": chosen,
        "correct": chosen == answer,
        "letter_logprobs": logprobs,
        "text_logprobs": logprobs,
        "asked_bytes": 100 + number,
        **rest,
    }


def eval_run(path, rows, **about):
    """A result of `bimedix eval run` with these predictions; it states their number if `about` does not."""
    digests = dict.fromkeys(sorted({row["set"] for row in rows}), "3" * 64)
    result = {"model": "m", "harness": "bimedix eval run, protocol 1", "hashes": HASHES, "records": digests}
    predictions = {"file": f"{path.stem}.predictions.jsonl", "lines": len(rows)}
    result |= {"template": "chatml", "tasks": {}, "predictions": predictions} | about
    path.write_text(json.dumps(result), "utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.with_name(f"{path.stem}.predictions.jsonl").write_text(lines, "utf-8")
    return path


def harness(folder, rows, **task):
    """A result of `bimedix eval harness`."""
    with samples.writer(folder / samples.NAME) as file:
        file.write(rows)
    about = {"version": 1, "documents": "4" * 64, "prompts": "5" * 64, "num_fewshot": 0, "primary": "acc"} | task
    tasks = dict.fromkeys((row.task for row in rows), about)
    result = {"model": "m", "versions": {"lm_eval": "0.4.13"}, "tasks": tasks, "chat": False}
    (folder / answers.RESULT).write_text(json.dumps(result), "utf-8")
    return folder


@pytest.fixture
def two(tmp_path):
    """On 200 questions of medqa, B alone is right in 30 and A alone in 10. On 40 of pubmedqa they agree."""
    medqa = [[prediction("medqa", n, "en", n % 2 if n >= 10 else 1) for n in range(200)] for _ in "ab"]
    b_right = {n for n in range(200) if medqa[0][n]["correct"]}
    b_right = (b_right - set(sorted(b_right)[:10])) | set(sorted(set(range(200)) - b_right)[:30])
    medqa[1] = [prediction("medqa", n, "en", 0 if n in b_right else 3) for n in range(200)]
    pubmedqa = [prediction("pubmedqa", n, "en", n % 2) for n in range(40)]
    return [
        eval_run(tmp_path / f"{name}.json", [*own, *pubmedqa], model=f"models/{name}")
        for name, own in zip("ab", medqa, strict=True)
    ]


def compared(two):
    return compare.compare(*map(answers.read, two))


def test_rows_are_those_of_the_counts(two):
    medqa, pubmedqa = compared(two)["tasks"]
    assert (medqa["name"], medqa["n"], medqa["only_a"], medqa["only_b"]) == ("medqa", 200, 10, 30)
    assert medqa["difference"] == pytest.approx(0.1)
    assert medqa["b"] - medqa["a"] == pytest.approx(0.1)
    exact = 2 * sum(math.comb(40, k) for k in range(11)) / 2**40
    assert medqa["p"] == pytest.approx(exact)
    assert medqa["p_holm"] == pytest.approx(2 * exact)
    assert medqa["low"] > 0
    assert 0.05 < medqa["detectable"] < 0.12
    assert (pubmedqa["difference"], pubmedqa["p"], pubmedqa["p_holm"]) == (0, 1, 1)
    assert pubmedqa["high"] > 0  # no disagreement among 40 questions does not show that there is none


@pytest.mark.parametrize("right", [0, 3, 8])
def test_accuracies_have_the_intervals_of_the_results(tmp_path, right):
    """Of eight questions; a bootstrap would have no width where all answers are wrong or right."""
    rows = [prediction("mine", n, "en", int(n >= right)) for n in range(8)]
    (row,) = compared([eval_run(tmp_path / "r.json", rows)] * 2)["tasks"]
    expected = Accuracy(right, 8).interval
    assert [row["a_low"], row["a_high"], row["b_low"], row["b_high"]] == pytest.approx(expected * 2)


def test_a_model_against_itself_is_as_uncertain_on_average_as_by_task(tmp_path):
    rows = [prediction(task, n, "en", n % 2) for task in ("one", "two") for n in range(8)]
    found = compared([eval_run(tmp_path / "r.json", rows)] * 2)
    (row, _), mean = found["tasks"], found["average"]
    assert mean["difference"] == 0
    assert mean["high"] == pytest.approx(row["high"] / math.sqrt(2))
    assert mean["low"] == pytest.approx(row["low"] / math.sqrt(2))
    assert mean["a_high"] - mean["a"] == pytest.approx((row["a_high"] - row["a"]) / math.sqrt(2))


def test_the_page_says_what_decides_where_the_interval_and_p_disagree(tmp_path):
    """Five questions that B alone answers, of eight."""
    two = [[prediction("t", n, "en", chosen if n < 5 else 2) for n in range(8)] for chosen in (2, 0)]
    found = compared([eval_run(tmp_path / f"{name}.json", rows) for name, rows in zip("ab", two, strict=True)])
    (row,) = found["tasks"]
    assert row["low"] > 0
    assert (row["p"], row["detectable"]) == (0.0625, None)
    page = compare_page.markdown(found)
    assert "+13.3 to +86.7" in page
    assert "p decides" in page
    assert "`none`: even if" in page


def test_protocols_that_ask_the_same_questions_are_not_pooled(tmp_path):
    """By letter, by text and generated, in both languages, and a subset that repeats questions of another task."""
    names = [f"bimedix_{name}_{language}{kind}" for language in ("en", "ar") for name in ("medqa", "anatomy")
             for kind in ("", "_text", "_gen")]  # fmt: skip
    names.append("bimedix_medqa_clinical_en")
    rows = []
    for name in names:
        generated, language = name.endswith("_gen"), "ar" if "_ar" in name else "en"
        for n in range(20 if "clinical" in name else 40):
            own: dict[str, Any] = {"chosen": n % 2, "target": 0, "logprobs": (-1.0, -2.0)}
            own = {"chosen": "A", "target": "A"} if generated else own
            known = f"{name.replace('_clinical', '').split('_')[1]}/{n}"
            rows.append(Sample(task=name, id=known, language=language, correct=n % 2 == 0, asked_bytes=n + 1, **own))
    one = answers.read(harness(tmp_path / "one", rows))
    found = compare.compare(one, one)
    assert {(row["name"], row["protocol"], row["n"]) for row in found["groups"]["language"]} == {
        (language, protocol, 80) for language in ("en", "ar") for protocol in ("letters", "texts", "generated")
    }
    averages = {part["protocol"]: part["average"]["tasks"] for part in compare_page.parts(found)}
    assert averages == {"letters": 4, "texts": 4, "generated": 4}
    assert {part["protocol"]: part["languages"]["a"] and part["languages"]["a"]["n"]
            for part in compare_page.parts(found)} == {"letters": 80, "texts": 80, "generated": None}  # fmt: skip
    assert found["protocol"] == "letters"
    assert len(found["tasks"]) == 13
    page = compare_page.markdown(found)
    assert "| mean of 4 tasks (texts) |" in page
    assert "## By length (generated)" in page
    assert "protocols are not pooled" in page
    table = list(csv.DictReader(compare_page.csv_text(found).splitlines()))
    assert {row["protocol"] for row in table if row["table"] == "average"} == {"letters", "texts", "generated"}


def test_a_set_in_another_folder_is_the_same_set(tmp_path):
    rows = [prediction("x", n, "en", 0) for n in range(20)]
    paths = []
    for name in ("a", "b"):
        moved = [row | {"set": f"table=/data/{name}/exam.csv?question=q&answer=a/b"} for row in rows]
        paths.append(eval_run(tmp_path / f"{name}.json", moved))
    (row,) = compared(paths)["tasks"]
    assert (row["name"], row["n"]) == ("table=exam.csv?question=q&answer=a/b", 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "it has 29 complete lines, and the result names 30"),
        (lambda lines: [*lines[:-1], lines[-1][:40]], "it has 29 complete lines"),
        (lambda lines: [*lines, lines[0]], "it has 31 complete lines"),
        (lambda lines: [*lines[1:], lines[1]], "has 14 right answers to 30 questions of t, and the result has 15"),
        (lambda lines: [lines[0].replace("true", "false"), *lines[1:]], "question t-0 of t is marked as wrong, but"),
        (lambda lines: [lines[0].replace('"chosen": 0', '"chosen": 7'), *lines[1:]], "option that it does not have"),
        (lambda lines: [lines[0].replace("-5.0", "NaN"), *lines[1:]], "NaN is not a number"),
        (lambda lines: [lines[0].replace('"answer"', '"answers"'), *lines[1:]], "is not a prediction of"),
    ],
)
def test_damaged_predictions_are_refused(tmp_path, capsys, change, message):
    rows = [prediction("t", n, "en", n % 2) for n in range(30)]
    path = eval_run(tmp_path / "r.json", rows, tasks={"t": Accuracy(15, 30).to_dict()})
    file = tmp_path / "r.predictions.jsonl"
    answers.read(path)
    lines = change(file.read_text("utf-8").splitlines(keepends=True))
    file.write_text("".join(lines), "utf-8")
    assert cli.main(["eval", "compare", str(path), str(path)]) == 1
    (shown,) = [line for line in [" ".join(capsys.readouterr().err.split())] if line]
    assert message in shown
    assert "evaluate again" in shown or "name a samples.jsonl" in shown


def test_damaged_samples_of_the_harness_are_refused(tmp_path):
    rows = [Sample(task="bimedix_medqa_en", id=str(n), language="en", target=0, chosen=n % 2, correct=n % 2 == 0,
                   logprobs=(-1.0, -2.0)) for n in range(8)]  # fmt: skip
    folder = harness(tmp_path / "r", rows, **Accuracy(4, 8).to_dict())
    file = folder / samples.NAME
    answers.read(folder)
    whole = file.read_text("utf-8")
    file.write_text(whole[:-5], "utf-8")  # the last line is cut off
    with pytest.raises(BimedixError, match="has 4 right answers to 7 questions of bimedix_medqa_en, and the result"):
        answers.read(folder)
    file.write_text(whole.replace('"correct": true', '"correct": false', 1), "utf-8")
    with pytest.raises(BimedixError, match="question 0 of bimedix_medqa_en is marked as wrong"):
        answers.read(folder)


def test_the_average_is_unweighted(two):
    found = compared(two)["average"]
    assert found["difference"] == pytest.approx(0.05)
    assert found["b"] - found["a"] == pytest.approx(0.05)
    assert 0 < found["low"] < 0.05 < found["high"]


def test_groups_have_all_questions_once(two):
    groups = compared(two)["groups"]
    assert {row["name"]: row["n"] for row in groups["specialty"]} == {"anatomy": 120, "surgery": 120}
    assert {row["name"]: row["n"] for row in groups["language"]} == {"en": 240}
    assert [row["name"] for row in groups["length"]] == list(compare.QUARTERS)
    assert sum(row["n"] for row in groups["length"]) == 240


def test_calibration_uses_the_share_of_the_chosen_option(two):
    found = compared(two)["calibration"]["a"]
    share = math.exp(2) / (math.exp(2) + 3)
    (row,) = found["bins"]
    assert (row["n"], row["confidence"]) == (240, pytest.approx(share))
    assert found["ece"] == pytest.approx(abs(share - row["accuracy"]))


def test_a_question_and_its_translation_are_compared(tmp_path):
    """Of 40 questions, 30 get the same option in both languages, 20 the right one; 10 are right in English only."""
    rows = []
    for n in range(40):
        english = 0 if n < 20 or n >= 30 else 1
        arabic = english if n < 30 else 2
        rows += [
            prediction("mine", n, "en", english),
            prediction("mine", n, "ar", arabic, id=f"ar-{n}", pair=f"mine-{n}"),
        ]
    path = eval_run(tmp_path / "r.json", rows)
    found = compare.compare(answers.read(path), answers.read(path))
    own = found["languages"]["a"]
    assert (own["n"], own["same_option"], own["both"], own["only_en"], own["only_ar"], own["neither"]) == (
        40, 0.75, 20, 10, 0, 10,
    )  # fmt: skip
    assert own["arabic_minus_english"] == -0.25
    chance = (30 * 20 + 10 * 10) / 40**2  # of options 0 and 1; English never chooses 2
    assert own["kappa"] == pytest.approx((0.75 - chance) / (1 - chance))
    assert [row["name"] for row in found["tasks"]] == ["mine en", "mine ar"]
    (quarter, *_) = found["groups"]["length"]
    assert quarter["n"] == 20
    assert (quarter["p"], quarter["only_a"], quarter["only_b"]) == (1, 0, 0)


def test_results_of_the_harness_are_compared_by_task_and_prompt(tmp_path):
    rows = [
        Sample(task="bimedix_medqa_ar", id=str(n), language="ar", target=0, chosen=n % 2, correct=n % 2 == 0,
               logprobs=(-1.0, -2.0), asked_bytes=n)
        for n in range(30)
    ]  # fmt: skip
    one = harness(tmp_path / "one", rows)
    found = compare.compare(answers.read(one), answers.read(one / answers.RESULT))
    assert found["differs"] == []
    assert found["tasks"][0]["n"] == 30
    other = harness(tmp_path / "other", rows, prompts="6" * 64, num_fewshot=5)
    (problem,) = answers.differing(answers.read(one), answers.read(other))
    assert problem == "task bimedix_medqa_ar has another set of prompts and another number of solved examples"


def test_pairs_of_tasks_in_two_languages():
    sample = {"language": "ar", "target": 0, "correct": True}
    assert answers.pair_of(Sample(task="bimedix_medqa_ar", id="7", **sample)) == ("bimedix_medqa", "7")
    assert answers.pair_of(Sample(task="mmlu_ar_generative", id="7", pair="5", **sample)) == ("mmlu_generative", "5")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"harness": "bimedix eval run, protocol 2"}, "the program is bimedix eval run, protocol 1 in A and"),
        ({"hashes": HASHES | {"prompt": "7" * 64}}, "the hash of the prompts is 222222222222 in A and 777777777777"),
        ({"records": {"medqa": "8" * 64}}, "the records of medqa differ"),
        ({"max_length": 300}, "the maximum length is none in A and 300 in B"),
        ({"versions": {"bimedix_jax": "9.9"}}, "the version of bimedix_jax is none in A and 9.9 in B"),
        ({"versions": {"jax": "9.9"}}, "the version of JAX is none in A and 9.9 in B"),
    ],
)
def test_other_versions_are_refused_unless_forced(two, capsys, about, message):
    a, b = two
    b.write_text(json.dumps(json.loads(b.read_text("utf-8")) | about), "utf-8")
    assert cli.main(["eval", "compare", str(a), str(b)]) == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert message in shown
    assert "--force" in shown
    assert cli.main(["--json", "eval", "compare", str(a), str(b), "--force"]) == 0
    assert message in json.loads(capsys.readouterr().out)["differs"][0]


def test_other_models_are_compared(two):
    b = two[1]
    changes = {"base": "nf4", "adapter": "x", "router": "y", "hashes": HASHES | {"model": "9" * 64}}
    b.write_text(json.dumps(json.loads(b.read_text("utf-8")) | changes), "utf-8")
    assert compared(two)["differs"] == []


def test_the_command_writes_a_page_rows_and_a_figure(two, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["eval", "compare", *map(str, two), "--out", str(out)]
    assert cli.main(["--json", *words]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((out / "comparison.json").read_text("utf-8")) == result
    page = (out / "comparison.md").read_text("utf-8")
    assert page.startswith("# b (B) against a (A)\n")
    assert "| medqa | 200 | 47.5 | 57.5 | +10.0 |" in page
    assert "| mean of 2 tasks (eval run) |  |" in page
    assert "## By language (eval run)" in page
    assert all(line.count("|") == 12 for line in page.splitlines() if line.startswith("| medqa"))
    rows = list(csv.DictReader((out / "comparison.csv").read_text("utf-8").splitlines()))
    assert [row["name"] for row in rows if row["table"] == "tasks"] == ["medqa", "pubmedqa"]
    assert float(rows[0]["difference"]) == pytest.approx(0.1)
    picture = (out / "comparison.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert cli.main(words) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*words, "--overwrite"]) == 0
    assert (out / "comparison.png").read_bytes() == picture
    assert "Significant after adjustment for 2 tasks (Holm, 0.05): medqa (+10.0)." in capsys.readouterr().out


def test_ties_and_sensitivity_are_shown(two):
    rows = [prediction("medqa", n, "en", 0, sure=0.0 if n < 3 else 1.0) for n in range(30)]
    eval_run(two[0], rows)
    spread = {"lowest": 0.25, "highest": 0.5, "same": 0.4}
    eval_run(two[1], rows, sensitivity={"medqa": {"orders": spread}})
    found = compared(two)
    assert found["a"]["ties"] == 3
    shown = compare_page.model_rows(found)
    assert ("ties, which rounding decides", "3", "3") in shown
    assert ("medqa: lowest to highest over orders, %", "", "25.0 to 50.0, 40 % unchanged") in shown


def test_a_question_with_one_option_is_compared_and_no_tie(tmp_path):
    rows = [
        Sample(task="x", id=str(n), language="en", target=0, logprobs=(-1.0,), chosen=0, correct=True) for n in (1, 2)
    ]
    sides = [tmp_path / name for name in ("a", "b")]
    for side in sides:
        side.mkdir()
        harness(side, rows)
    found = compare.compare(*map(answers.read, sides))
    assert (found["n"], found["a"]["ties"], found["b"]["ties"]) == (2, 0, 0)


def test_what_is_no_result_is_refused(tmp_path):
    (tmp_path / "r.json").write_text('{"tasks": {}}')
    with pytest.raises(BimedixError, match="no file with the answers"):
        answers.read(tmp_path / "r.json")
    one = eval_run(tmp_path / "one.json", [prediction("t", 1, "en", 0)])
    other = eval_run(tmp_path / "other.json", [prediction("t", 2, "en", 0)])
    with pytest.raises(BimedixError, match="no question in common: both have t, but with other questions"):
        compare.compare(answers.read(one), answers.read(other))
    third = eval_run(tmp_path / "third.json", [prediction("s", 2, "en", 0)])
    with pytest.raises(BimedixError, match="no question in common: the first has t, the second s; evaluate both"):
        compare.compare(answers.read(one), answers.read(third))
    empty = eval_run(tmp_path / "empty.json", [prediction("t@orders-1", 2, "en", 0)])
    with pytest.raises(BimedixError, match="no question with an answer"):
        answers.read(empty)


def test_questions_of_one_result_only_are_counted(tmp_path):
    rows = [prediction("t", n, "en", 0) for n in range(30)]
    a, b = eval_run(tmp_path / "a.json", rows[:28]), eval_run(tmp_path / "b.json", rows[3:])
    found = compare.compare(answers.read(a), answers.read(b))
    assert (found["n"], found["a"]["questions_of_this_only"], found["b"]["questions_of_this_only"]) == (25, 3, 2)


def test_repeated_ids_are_different_questions(tmp_path):
    rows = [prediction("t", 1, "en", chosen) for chosen in (0, 1, 0)]
    found = answers.read(eval_run(tmp_path / "a.json", rows))
    assert [key[-1] for key in found.samples] == [0, 1, 2]
    assert np.array_equal(answers.correct(found, list(found.samples)), [1, 0, 1])
