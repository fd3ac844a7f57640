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
        with pytest.raises(BimedixError, match="at least two choices"):
            document_of(row, "here")


def test_the_authors_file_of_medmcqa_counts_from_one_and_comes_first(tmp_path):
    (tmp_path / "medmcqa_en").mkdir()
    rows = [{**row, "cop": row["cop"] + 1, "choice_type": "multi"} for row in MEDMCQA]
    put(tmp_path, "medmcqa_en/dev.json", rows)
    put(tmp_path, "medmcqa_en/medmcqa_val2816_single.jsonl", [])
    found = documents.read("medmcqa", "en", str(tmp_path))
    assert [document.answer for document in found.questions] == [0, 1, 2]
    assert found.source.endswith("dev.json")


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
