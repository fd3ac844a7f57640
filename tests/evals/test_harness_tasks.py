"""Our task files: prompts equal those of the harness's own tasks, and every published layout is read."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from bimedix_jax.errors import BimedixError
from bimedix_jax.evals import documents
from bimedix_jax.evals.extraction import INVALID, letter_of
from bimedix_jax.evals.harness_run import task_folder
from bimedix_jax.evals.layouts import document_of

ROOT = Path(__file__).resolve().parents[2]
HARNESS = Path(lm_eval.__file__).parent / "tasks"

QUESTIONS = ["Which organ makes insulin? ", "A drug of choice  for {{fever}}?", "10%"]
OPTIONS = [["pancreas", "liver ", "spleen", "heart"], ["aspirin", "none", "a b", "c"], ["1", "2", "3", "4"]]
MMLU = [
    {"question": q, "choices": c, "answer": 2, "subject": "anatomy"} for q, c in zip(QUESTIONS, OPTIONS, strict=True)
]
MEDMCQA = [
    {"id": str(n), "question": q, **dict(zip(("opa", "opb", "opc", "opd"), c, strict=True)), "cop": n}
    for n, (q, c) in enumerate(zip(QUESTIONS, OPTIONS, strict=True))
]
MEDQA = [
    {"id": str(n), "sent1": q, "sent2": "", **{f"ending{i}": text for i, text in enumerate(c)}, "label": n}
    for n, (q, c) in enumerate(zip(QUESTIONS, OPTIONS, strict=True))
]
PUBMEDQA = [
    {"QUESTION": q, "CONTEXTS": [f"Background {n}.", "Result: 5 % "], "final_decision": decision}
    for n, (q, decision) in enumerate(zip(QUESTIONS, ("yes", "no", "maybe"), strict=True))
]
OWN = {
    "mmlu_anatomy": ("mmlu/default/mmlu_anatomy.yaml", MMLU),
    "medmcqa": ("medmcqa/medmcqa.yaml", MEDMCQA),
    "medqa": ("medqa/medqa.yaml", MEDQA),
    "pubmedqa": ("pubmedqa/pubmedqa.yaml", PUBMEDQA),
}
"""Benchmark -> (the harness's file, rows as on the hub)."""


def put(folder: Path, name: str, rows: list[dict]) -> None:
    (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def prompts_of(task: ConfigurableTask, shots: int) -> list[tuple]:
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    return [instance.args for instance in task.instances]


def our_task(name: str, **changes) -> ConfigurableTask:
    return ConfigurableTask(config={**load_yaml(task_folder() / f"{name}.yaml"), **changes})


@pytest.mark.parametrize("benchmark", OWN)
def test_english_prompts_equal_those_of_the_harness(benchmark, tmp_path):
    path, rows = OWN[benchmark]
    put(tmp_path, f"{benchmark}_en.jsonl", rows)
    put(tmp_path, f"{benchmark}_en.fewshot.jsonl", rows)
    theirs: Any = load_yaml(HARNESS / path)
    splits: set[str] = {
        theirs.get(key) for key in ("training_split", "validation_split", "test_split", "fewshot_split")
    } - {None}
    theirs["custom_dataset"] = lambda **_: datasets.DatasetDict(
        **{name: datasets.Dataset.from_list(rows) for name in splits}
    )
    theirs["dataset_path"] = theirs["dataset_name"] = None
    other: Any = ConfigurableTask(config=theirs)
    ours: Any = our_task(f"bimedix_{benchmark}_en", metadata={"data": str(tmp_path)})
    for shots in (0, 2):
        assert prompts_of(ours, shots) == prompts_of(other, shots)
    assert [ours.doc_to_target(doc) for doc in ours.eval_docs] == [
        doc if isinstance(doc, int) else ("yes", "no", "maybe").index(doc)
        for doc in (other.doc_to_target(doc) for doc in other.eval_docs)
    ]


def test_arabic_prompts_have_arabic_words_and_the_chosen_letters(tmp_path):
    rows = [{"id": "1", "question": "ما العضو الذي يفرز الأنسولين؟", "choices": ["الكبد", "البنكرياس"], "answer": "ب"}]
    for benchmark in ("medmcqa", "mmlu_anatomy", "pubmedqa"):
        put(tmp_path, f"{benchmark}_ar.jsonl", rows)
    where = {"metadata": {"data": str(tmp_path)}}
    ((prompt, first), (_, second)) = prompts_of(our_task("bimedix_medmcqa_ar_abjad", **where), 0)
    assert prompt == "السؤال: ما العضو الذي يفرز الأنسولين؟\nالخيارات:\nأ. الكبد\nب. البنكرياس\nالإجابة:"
    assert (first, second) == (" أ", " ب")
    ((prompt, first), _) = prompts_of(our_task("bimedix_mmlu_anatomy_ar", **where), 0)
    assert prompt.startswith("فيما يلي أسئلة اختيار من متعدد (مع إجاباتها) في علم التشريح.\n\nما العضو")
    assert prompt.endswith("A. الكبد\nB. البنكرياس\nالإجابة:")
    assert first == " A"
    ((prompt, first), _) = prompts_of(our_task("bimedix_medmcqa_ar_text", **where), 0)
    assert prompt == "السؤال: ما العضو الذي يفرز الأنسولين؟\nالإجابة:"
    assert first == " الكبد"


AR = ["الكبد", "البنكرياس", "الطحال", "القلب"]
PUBLISHED = {
    "openai/MMMLU": {"Unnamed: 0": 7, "Question": "س", **dict(zip("ABCD", AR, strict=True)), "Answer": "B",
                     "Subject": "anatomy_test.csv_ar-XY.csv"},
    "human_translated_arabic_mmlu": {"question": "س", "choices": AR, "answer": 1},
    "ArabicMMLU": {"ID": 3, "Question": "س", "Context": "", "Option 1": AR[0], "Option 2": AR[1], "Option 3": AR[2],
                   "Option 4": AR[3], "Option 5": None, "Answer Key": "B", "Subject": "Biology"},
    "MedAraBench": {"Question Number": "9", "Question": "س",
                    **{f"Option {x}": text for x, text in zip("ABCD", AR, strict=True)}, "Option E": "",
                    "Option F": "", "Correct Answer": "b", "Medical Specialty": "Anatomy"},
    "MedQA of its authors": {"question": "س", "options": dict(zip("ABCD", AR, strict=True)), "answer_idx": "B"},
    "BiMediX/medmcqa-arabic": {"question": "س", **dict(zip(("opa", "opb", "opc", "opd"), AR, strict=True)), "cop": 1},
    "letters in Arabic": {"question": "س", "choices": AR, "answer": "ب"},
    "an answer's text": {"question": "س", "choices": AR, "answer": "البنكرياس"},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts_are_read(name):
    found = document_of(PUBLISHED[name], "here")
    assert (found.question, found.choices, found.answer, found.flags) == ("س", tuple(AR), 1, ())
    assert found.subject in (None, "anatomy", "Biology", "Anatomy")


def test_unknown_layouts_and_broken_rows_raise():
    with pytest.raises(BimedixError, match=r"here has the columns prompt.*question"):
        document_of({"prompt": "x"}, "here")
    for row in ({"question": " ", "choices": AR, "answer": 0}, {"question": "q", "choices": ["a"], "answer": 0}):
        with pytest.raises(BimedixError, match=r"at least two choices.*; correct the row or remove it"):
            document_of(row, "here")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"question": "q", "choices": ["a"], "answer": 0}', "a question needs a text and at least two choices"),
        ('{"question": ', r"the row is not valid JSON \(Expecting value\); correct the row"),
        ('{"prompt": "q"}', "has the columns prompt; .*; rename its columns, or remove the row"),
        ('{"conversations": [], "choices": [], "answer": 0}', "id: Field required; .*; correct the row or remove it"),
        ('{"Question": "q", "Option A": "a", "Correct Answer": "A"}', "field 'Question Number' is missing; correct"),
    ],
)
def test_broken_rows_are_named_with_folder_and_remedy(tmp_path, line, problem):
    path = tmp_path / "medqa_en.jsonl"
    path.write_text(json.dumps(own("A")[0]) + "\n" + line + "\n")
    with pytest.raises(BimedixError, match=f"^{path}:2:? .*{problem}") as found:
        documents.read("medqa", "en", str(tmp_path))
    assert "\n" not in str(found.value)


def test_a_file_whose_rows_are_all_left_out_has_the_reasons(tmp_path):
    put(tmp_path, "medqa_en.jsonl", [*own([9, "Z"]), *own(["a"], "abcdefg")])
    reasons = r"2 because the answer is none of .* \(line 1\); 1 because there are more than 6 choices \(line 3\)"
    with pytest.raises(BimedixError, match=f"no question of medqa; all rows were left out: {reasons}; correct them"):
        documents.read("medqa", "en", str(tmp_path))
    put(tmp_path, "medmcqa_en.jsonl", [{**own("A")[0], "flags": ["doses"]}])
    with pytest.raises(BimedixError, match=r"1 because it has the flag doses \(line 1\)"):
        documents.read("medmcqa", "en", str(tmp_path), exclude_flagged=True)


def own(answers, choices=("a", "b", "c", "d")):
    return [{"question": f"q{n}", "choices": list(choices), "answer": answer} for n, answer in enumerate(answers)]


def answers_of(folder, rows, name="medqa_ar", solved=()):
    folder.mkdir()
    put(folder, f"{name}.jsonl", rows)
    put(folder, f"{name}.fewshot.jsonl", list(solved))
    found = documents.read(name.rsplit("_", 1)[0], name.rsplit("_", 1)[1], str(folder))
    assert not found.excluded
    return [[one.answer for one in part] for part in (found.questions, found.solved)]


@pytest.mark.parametrize("form", [int, str, float, lambda number: "٠١٢٣٤"[number]])
def test_numbers_of_a_file_count_from_zero_or_from_one(tmp_path, form):
    from_one, from_zero = map(form, (1, 2, 3, 4)), map(form, (3, 0, 2, 1))
    assert answers_of(tmp_path / "1", own(from_one), solved=own([1, 2])) == [[0, 1, 2, 3], [0, 1]]
    assert answers_of(tmp_path / "0", own(from_zero), solved=own([1, 2])) == [[3, 0, 2, 1], [1, 2]]
    assert answers_of(tmp_path / "solved", own("BA"), solved=own(map(form, (4, 1)))) == [[1, 0], [3, 0]]


def test_letters_and_texts_stay_and_numbers_in_other_layouts_are_decided_too(tmp_path):
    assert answers_of(tmp_path / "letters", own(["B", "d", "c", "أ", 4])) == [[1, 3, 2, 0, 3], []]
    assert answers_of(tmp_path / "own", own("A", "BA")) == [[0], []]  # a letter, not the text of the second choice
    hub = [{**row, "cop": row["cop"] + 2} for row in MEDMCQA]
    assert answers_of(tmp_path / "cop", hub, "medmcqa_ar") == [[1, 2, 3], []]
    exam = [{**row, "label": row["label"] + 2} for row in MEDQA]
    assert answers_of(tmp_path / "label", exam) == [[1, 2, 3], []]


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        ([1, 2, 3], "has two readings, numbers from 0 and numbers from 1.*in lines 1, 2, 3; write letters"),
        ([0, 1, 4], r"has both 0 \(lines 1\) and the number of choices \(lines 3\).*write letters"),
    ],
)
def test_numbers_that_do_not_tell_where_they_begin_are_refused(tmp_path, answers, problem):
    with pytest.raises(BimedixError, match=f"medqa_ar.jsonl: column answer {problem}"):
        answers_of(tmp_path / "data", own(answers))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"flags": "numbers"}, "flags is 'numbers', which is not a list of texts; write"),
        ({"flags": [3]}, "flags is"),
        ({"choices": "abcd"}, "choices is 'abcd', which is not a list"),
        ({"final_decision": "yes", "context": {"contexts": "long"}}, "contexts is 'long'"),
    ],
)
def test_a_text_in_place_of_a_list_is_refused(changes, problem):
    with pytest.raises(BimedixError, match=f"here: {problem}"):
        document_of({**own([0])[0], **changes}, "here")


def test_a_cell_of_a_table_has_its_list_as_json():
    found = document_of({**own([1])[0], "choices": '["a", "b"]', "flags": ""}, "here")
    assert (found.choices, found.answer, found.flags) == (("a", "b"), 1, ())


def test_repeated_questions_are_counted_in_a_warning(tmp_path, caplog):
    rows = [{**row, "id": "1"} for row in own("ABC")]
    answers_of(tmp_path / "data", [*rows, {**rows[0], "id": "2"}])
    assert "medqa_ar.jsonl has 2 questions with the id of an earlier one and 1 question with the text" in caplog.text
    caplog.clear()
    answers_of(tmp_path / "sound", own("ABC"))
    assert not caplog.text


def test_the_authors_file_of_medmcqa_counts_from_one_and_comes_first(tmp_path):
    (tmp_path / "medmcqa_en").mkdir()
    rows = [{**row, "cop": row["cop"] + 1, "choice_type": "multi"} for row in MEDMCQA]
    put(tmp_path, "medmcqa_en/dev.json", rows)
    put(tmp_path, "medmcqa_en/medmcqa_val2816_single.jsonl", [])
    found = documents.read("medmcqa", "en", str(tmp_path))
    assert [document.answer for document in found.questions] == [0, 1, 2]
    assert found.source.endswith("dev.json")


def test_questions_that_a_task_cannot_ask_are_left_out_and_counted(tmp_path):
    """More choices than letters, and the text of two choices as the answer. Marks of direction are not compared."""
    row = {"question": "q", "choices": ["same", "same", "other"], "answer": "other"}
    rows = [row, {**row, "answer": "same"}, {**row, "choices": [*("pq qr rs st tu uv vw".split())], "answer": "pq"}]
    rows.append({**row, "choices": ["\u200fقلب", "كبد"], "answer": "قلب"})
    put(tmp_path, "medqa_en.jsonl", rows)
    found = documents.read("medqa", "en", str(tmp_path))
    assert [one.answer for one in found.questions] == [2, 0]
    assert found.excluded == {"no_valid_option": 1, "more_than_6_choices": 1}


def test_questions_of_medarabench_are_flagged_and_the_clinical_subset_leaves_out_other_subjects(tmp_path):
    base = PUBLISHED["MedAraBench"]
    rows = [
        base,
        {**base, "Question Number": "10"},  # a copy
        {**base, "Question Number": "11", "Question": "ص", "Correct Answer": "A"},
        {**base, "Question Number": "12", "Question": "ص", "Correct Answer": "C"},  # another answer
        {**base, "Question Number": "13", "Question": "ع", "Correct Answer": "E"},  # no such option
        {**base, "Question Number": "14", "Question": "ف", "Medical Specialty": "Physics"},
    ]
    (tmp_path / "medarabench").mkdir()
    header = ",".join(base)
    lines = [",".join(row.values()) for row in rows]
    (tmp_path / "medarabench/medarabench-test_split.csv").write_text("\n".join([header, *lines]), "utf-8")
    whole = documents.read("medarabench", "ar", str(tmp_path))
    assert [(one.id, one.flags) for one in whole.questions] == [
        ("9", ()), ("10", ("duplicate",)), ("11", ("conflicting",)), ("12", ("conflicting", "duplicate")), ("14", ()),
    ]  # fmt: skip
    assert whole.excluded == {"no_valid_option": 1}
    assert documents.read("medarabench_clinical", "ar", str(tmp_path)).excluded == {
        "no_valid_option": 1, "not_clinical": 1,
    }  # fmt: skip
    sound = documents.read("medarabench", "ar", str(tmp_path), exclude_flagged=True)
    assert [one.id for one in sound.questions] == ["9", "14"]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        (" B", "B"), ("b) because", "B"), ("(C).", "C"), ("Answer: D", "D"), ("The correct answer is (A).", "A"),
        ("الإجابة: ب", "B"), ("الإجابة الصحيحة هي (ج)", "C"), ("ا. الكبد", "A"), ("**د**", "D"), ("هـ", INVALID),
        ("It is the pancreas, of course", "B"), ("البِنكرياس", "B"), ("A patient with a liver", "A"),
        ("A patient", INVALID), ("", INVALID), ("A or B", INVALID), ("liver and spleen", INVALID), ("E", INVALID),
        ("pancreas, not the liver", "B"),
    ],
)  # fmt: skip
def test_answers_name_options(answer, letter):
    english = ["liver", "pancreas", "spleen", "heart"]
    choices = english if not any("ء" <= char <= "ي" for char in answer) else AR
    assert letter_of(answer, choices) == letter


DECISIONS = {"yes, it does": "A", "No.": "B", "maybe": "C", "Answer: no": "B", "yes or no": INVALID}


@pytest.mark.parametrize(("answer", "letter"), DECISIONS.items())
def test_decisions_are_found(answer, letter):
    assert letter_of(answer, ["yes", "no", "maybe"]) == letter


def test_task_files_are_those_of_the_table():
    spec = importlib.util.spec_from_file_location("write_task_files", ROOT / "scripts/write_task_files.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {path.name: path.read_text("utf-8") for path in task_folder().glob("*.yaml")} == dict(module.files())
