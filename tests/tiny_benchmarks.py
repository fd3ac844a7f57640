"""The files of the paper's nine tasks in their published layouts, with two or three made-up questions each."""

import json
from pathlib import Path

from bimedix_jax.evals.tasks import TASKS

SUBJECTS = [name.removeprefix("mmlu_") for name in TASKS if name.startswith("mmlu_")]


def write_benchmarks(folder: Path, invalid_row: bool = False) -> Path:
    """Writes the English files into `folder` and returns it; `invalid_row` adds a row of MedQA without a question."""

    def questions(name, file, rows):
        (folder / name).mkdir()
        (folder / name / file).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    def row(number, answer, **rest):
        options = {"A": "one", "B": "two", "C": "three", "D": "four"}
        return {"realidx": number, "question": f"Question {number}?", "options": options, "answer_idx": answer} | {
            "answer": options[answer],
            **rest,
        }

    broken = [{"realidx": 4}] if invalid_row else []
    questions("medqa_usmle_en", "medqa_4options_test.jsonl", [row(1, "A"), row(2, "B"), row(3, "D"), *broken])
    questions("medmcqa_en", "medmcqa_val2816_single.jsonl", [row(1, "C"), row(2, "B"), row(3, "A")])
    questions(
        "mmlu_medical_en",
        "medagents_mmlu_test.jsonl",
        [row(number, "C", subject=subject) for subject in SUBJECTS for number in (1, 2)],
    )
    entry = {"QUESTION": "Does it?", "CONTEXTS": ["We looked."], "LONG_ANSWER": "It seems so.", "final_decision": "yes"}
    (folder / "pubmedqa").mkdir()
    (folder / "pubmedqa/ori_pqal.json").write_text(json.dumps({"1": entry, "2": entry, "3": entry}), "utf-8")
    (folder / "pubmedqa/test_ground_truth.json").write_text(json.dumps({"1": "yes", "2": "yes"}), "utf-8")
    return folder


def write_arabic(folder: Path) -> None:
    """Writes TASK_ar.jsonl with two questions of each task."""
    for task in TASKS:
        choices = ["نعم", "لا", "ربما"] if task == "pubmedqa" else ["الكبد", "القلب", "الرئة", "الكلية"]
        rows = [{"id": f"{task}/{n}", "question": f"السؤال {n}؟", "choices": choices, "answer": "B"} for n in (1, 2)]
        lines = [json.dumps({**row, "context": "نظرنا."}, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{task}_ar.jsonl").write_text("".join(lines), "utf-8")
