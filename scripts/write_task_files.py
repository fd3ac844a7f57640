"""Writes our task files for lm-evaluation-harness into bimedix_jax/assets/tasks; a test compares them with this table.

    python scripts/write_task_files.py            # writes
    python scripts/write_task_files.py --check    # exits with 1 if a file differs

Prompts by letter in English are those of the harness's own tasks. Those in Arabic are their counterparts.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from bimedix_jax.evals.documents import NINE, SUBJECTS

FOLDER = Path(__file__).resolve().parents[1] / "bimedix_jax/assets/tasks"
ARABIC = {
    "clinical_knowledge": "المعرفة السريرية",
    "college_biology": "علم الأحياء الجامعي",
    "college_medicine": "الطب الجامعي",
    "medical_genetics": "علم الوراثة الطبية",
    "professional_medicine": "الطب المهني",
    "anatomy": "علم التشريح",
}
LATIN = "['A', 'B', 'C', 'D', 'E', 'F']"
ABJAD = "['أ', 'ب', 'ج', 'د', 'هـ', 'و']"
WORDS = {
    "en": {"question": "Question", "choices": "Choices", "answer": "Answer", "abstract": "Abstract"},
    "ar": {"question": "السؤال", "choices": "الخيارات", "answer": "الإجابة", "abstract": "الملخص"},
}
MODES = {"en": ("letter", "text", "gen"), "ar": ("letter", "abjad", "text", "gen")}
SUFFIX = {"letter": "", "abjad": "_abjad", "text": "_text", "gen": "_gen"}
METRICS = {"letter": ("acc",), "abjad": ("acc",), "text": ("acc", "acc_bytes"), "gen": ("exact_match",)}
PRIMARY = {"letter": "acc", "abjad": "acc", "text": "acc_bytes", "gen": "exact_match"}
NATIVE = (*(f"{name}_{subject}" for name in ("mmmlu", "htmmlu") for subject in SUBJECTS), "arabicmmlu_biology",
          "medarabench", "medarabench_clinical")  # fmt: skip
"""Arabic sets of others."""


def quoted(text: str) -> str:
    """A YAML string in double quotes, with Arabic letters as they are."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def options(letters: str) -> str:
    """The lettered choices of a prompt, one a line."""
    return "{% for choice in choices %}{{" + letters + "[loop.index0]}}. {{choice}}\n{% endfor %}"


def prompt(benchmark: str, language: str, mode: str) -> str:
    """The template of a prompt."""
    words = WORDS[language]
    if benchmark == "pubmedqa":
        return f"{words['abstract']}: {{{{context}}}}\n{words['question']}: {{{{question}}}}\n{words['answer']}:"
    if mode == "text":
        return f"{words['question']}: {{{{question}}}}\n{words['answer']}:"
    listed = options(ABJAD if mode == "abjad" else LATIN)
    if "mmlu_" in benchmark and benchmark != "arabicmmlu_biology":
        return f"{{{{question.strip()}}}}\n{listed}{words['answer']}:"
    heading = f"{words['choices']}:\n" if benchmark == "medmcqa" else ""
    return f"{words['question']}: {{{{question}}}}\n{heading}{listed}{words['answer']}:"


def description(benchmark: str, language: str, mode: str) -> str | None:
    """The line before the first question; MMLU has one."""
    if "mmlu_" not in benchmark or benchmark == "arabicmmlu_biology" or mode == "text":
        return None
    subject = benchmark.split("mmlu_")[1]
    if language == "en":
        about = subject.replace("_", " ")
        return f"The following are multiple choice questions (with answers) about {about}.\n\n"
    return f"فيما يلي أسئلة اختيار من متعدد (مع إجاباتها) في {ARABIC[subject]}.\n\n"


def task(benchmark: str, language: str, mode: str) -> str:
    """A task file."""
    lines = [
        f"task: bimedix_{benchmark}_{language}{SUFFIX[mode]}",
        "custom_dataset: !function bimedix_jax.evals.documents.load",
        "dataset_kwargs:",
        f"  benchmark: {benchmark}",
        f"  language: {language}",
        "test_split: test",
        "fewshot_split: fewshot",
    ]
    if "mmlu_" in benchmark:
        lines += ["fewshot_config:", "  sampler: first_n"]
    about = description(benchmark, language, mode)
    lines += [] if about is None else [f"description: {quoted(about)}"]
    lines += [f"doc_to_text: {quoted(prompt(benchmark, language, mode))}"]
    if mode == "gen":
        lines += [
            "output_type: generate_until",
            f"doc_to_target: {quoted('{{' + LATIN + '[answer]}}')}",
            "generation_kwargs:",
            f'  until: ["\\n\\n", {quoted(WORDS["en"]["question"] + ":")}, {quoted(WORDS["ar"]["question"] + ":")}]',
            "  max_gen_toks: 64",
            "  do_sample: false",
            "filter_list:",
            "  - name: option",
            "    filter:",
            "      - function: custom",
            "        filter_fn: !function bimedix_jax.evals.extraction.letters",
            "      - function: take_first",
        ]
    else:
        letters = ABJAD if mode == "abjad" else LATIN
        by_text = mode == "text" or benchmark == "pubmedqa"
        choice = "choices" if by_text else quoted("{{" + letters + "[:choices|length]}}")
        lines += ["output_type: multiple_choice", "doc_to_target: answer", f"doc_to_choice: {choice}"]
    lines += ["metric_list:"]
    for metric in METRICS[mode]:
        lines += [f"  - metric: {metric}", "    aggregation: mean", "    higher_is_better: true"]
    lines += ["metadata:", "  version: 1.0", f"  primary: {PRIMARY[mode]}"]
    return "\n".join(lines) + "\n"


def group(name: str, tasks: list[str], mode: str, by_size: bool) -> str:
    """A group file. The paper's average is the unweighted mean of its tasks, the harness's is weighted by size."""
    lines = [f"group: {name}", "task:", *(f"  - {one}" for one in tasks), "aggregate_metric_list:"]
    for metric in METRICS[mode]:
        lines += [f"  - metric: {metric}", "    aggregation: mean", f"    weight_by_size: {str(by_size).lower()}"]
        if mode == "gen":
            lines += ["    filter_list: [option]"]
    return "\n".join([*lines, "metadata:", "  version: 1.0"]) + "\n"


def files() -> Iterator[tuple[str, str]]:
    """(name, content) of every task file."""
    for language, modes in MODES.items():
        for mode in modes:
            names = []
            for benchmark in NINE:
                own = "letter" if benchmark == "pubmedqa" and mode == "abjad" else mode
                names.append(f"bimedix_{benchmark}_{language}{SUFFIX[own]}")
                if own == mode:
                    yield f"{names[-1]}.yaml", task(benchmark, language, mode)
            for by_size, end in ((False, ""), (True, "_by_size")):
                name = f"bimedix_{language}{SUFFIX[mode]}{end}"
                yield f"{name}.yaml", group(name, names, mode, by_size)
    for mode in MODES["en"]:
        both = [f"bimedix_{benchmark}_{language}{SUFFIX[mode]}" for benchmark in NINE for language in MODES]
        for by_size, end in ((False, ""), (True, "_by_size")):
            name = f"bimedix_bi{SUFFIX[mode]}{end}"
            yield f"{name}.yaml", group(name, both, mode, by_size)
    for benchmark in NATIVE:
        yield f"bimedix_{benchmark}_ar.yaml", task(benchmark, "ar", "letter")
    for family in ("mmmlu", "htmmlu"):
        names = [f"bimedix_{family}_{subject}_ar" for subject in SUBJECTS]
        yield f"bimedix_{family}_ar.yaml", group(f"bimedix_{family}_ar", names, "letter", by_size=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    wanted = dict(files())
    present = {path.name: path.read_text("utf-8") for path in FOLDER.glob("*.yaml")}
    if check:
        return int(wanted != present)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in present.keys() - wanted.keys():
        (FOLDER / name).unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8", newline="\n")
    print(f"{len(wanted)} files in {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
