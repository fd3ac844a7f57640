"""One run of lm-evaluation-harness: loading tasks, evaluating, and its result in our formats."""

import contextlib
import difflib
import functools
import hashlib
import itertools
import json
import logging
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from unittest import mock

import lm_eval
import numpy as np
from lm_eval.api import task as harness_task
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from bimedix_jax.errors import BimedixError
from bimedix_jax.evals import documents
from bimedix_jax.evals import samples as sample_files
from bimedix_jax.evals.harness import HarnessModel
from bimedix_jax.evals.multiple_choice import Accuracy
from bimedix_jax.evals.samples import Sample
from bimedix_jax.files import write_text
from bimedix_jax.inference.planning import language_of

PREFIX = "bimedix_"
"""What the names of our tasks begin with."""
METRICS = ("acc", "acc_bytes", "acc_norm", "exact_match")
"""Metrics by which an option or an answer is right, the default one first."""
FEWSHOT_SEED = 1234
"""The harness's seed for choosing solved examples."""


def task_folder() -> Path:
    """The folder of our task files; `lm_eval --include_path` takes it."""
    return Path(str(resources.files("bimedix_jax"))) / "assets" / "tasks"


def load_tasks(
    names: Sequence[str],
    data: Sequence[Path] = (),
    folders: Sequence[Path] = (),
    exclude_flagged: bool = False,
    shots: int | None = None,
    limit: int | None = None,
) -> Any:
    """Tasks and groups by name with their data, as the harness's TaskManager loads them.

    Args:
      data: folders of the data of our tasks; without any they come from the hub.
      folders: of further task files.
      shots: solved examples before each question; None: as each task has it. A task that is set to 0 keeps that.
      limit: questions of each task that are used, of which the options are checked.

    Raises:
      BimedixError: there is no such task or folder, two groups have a task in common, its data are missing, or an
        option is empty.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    metadata: dict[str, Any] = {"exclude_flagged": True} if exclude_flagged else {}
    require_folders(data, "name the folders of the tasks' data")
    require_folders(folders, "name folders of task files with --task-files")
    if data:
        metadata["data"] = os.pathsep.join(str(folder.resolve()) for folder in data)
    own = all(name.startswith(PREFIX) for name in names) and not folders
    include: list[str | Path] = [task_folder(), *folders]
    manager = TaskManager(include_path=include, include_defaults=not own, metadata=metadata)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise BimedixError(f"there is no task {', '.join(unknown)}; {instead_of(unknown[0], manager)}")
    try:
        loaded: Any = manager.load(list(names))
    except IndexError as error:  # the harness looks at the first question
        raise BimedixError(
            f"the first question of {', '.join(names)} is missing or has an empty option; check the data of the task"
        ) from error
    except (OSError, ValueError) as error:
        if "Duplicate task" in str(error):
            remedy = "name each task once, or run the groups one after another"
            raise BimedixError(f"{error}; {remedy}") from None
        if not isinstance(error, OSError) and "cache" not in str(error):  # offline, `datasets` looks into its cache
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BimedixError(
            f"the data of {', '.join(names)} cannot be loaded ({reason}); check the connection to the hub, or run once "
            "where there is one: what was downloaded is used offline too"
        ) from error
    for name, task in loaded["tasks"].items():  # as `simple_evaluate` does
        own = task.get_config("num_fewshot")
        if own is None or (shots is not None and own != 0):
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        require_solved(task)
        require_options(name, task, limit)
    return loaded


def require_folders(folders: Sequence[Path], remedy: str) -> None:
    """Raises BimedixError if one of these is not a folder."""
    for folder in folders:
        if not folder.is_dir():
            raise BimedixError(f"there is no folder {folder}; {remedy}")


def instead_of(unknown: str, manager: Any) -> str:
    """The nearest tasks and our groups, for a message."""
    groups = [name for name in sorted(manager.all_groups) if name.startswith(PREFIX) and not name.endswith("_by_size")]
    near = difflib.get_close_matches(unknown, manager.all_tasks, n=3)
    question = f"did you mean {' or '.join(near)}? Our" if near else "our"
    return f"{question} groups are {', '.join(groups)}, and docs/harness.md lists our tasks"


def require_options(name: str, task: Any, limit: int | None) -> None:
    """Raises BimedixError if an option of a task is empty, which has no log-likelihood. Ours were checked when they
    were read."""
    ours = "benchmark" in (task.get_config("dataset_kwargs") or {})
    if ours or task.OUTPUT_TYPE != "multiple_choice":
        return
    for number, doc in enumerate(itertools.islice(task.eval_docs, limit)):
        texts = [task.doc_to_target(doc)] if task.multiple_input else task.doc_to_choice(doc)
        if not all(str(text).strip() for text in texts):
            raise BimedixError(
                f"document {doc.get('id', number)} of {name} (number {number + 1}) has an empty option; correct or "
                "remove it"
            )


def require_solved(task: Any) -> None:
    """Raises BimedixError if one of our tasks has fewer solved examples than it is asked to show."""
    own, asked = task.get_config("dataset_kwargs") or {}, task.get_config("num_fewshot")
    if "benchmark" in own and len(task.dataset["fewshot"]) < asked:
        name = f"{own['benchmark']}_{own['language']}.fewshot.jsonl"
        raise BimedixError(
            f"{task.config.task} has {len(task.dataset['fewshot'])} solved examples, not {asked}; put {name} into the "
            "folder of the data, or pass a smaller --num-fewshot"
        )


def questions_hash(tasks: Any, limit: int | None) -> str:
    """SHA-256 of the questions and the solved examples of what `load_tasks` returned."""
    found = hashlib.sha256()
    for name, task in tasks["tasks"].items():
        solved = task.fewshot_docs() if task.get_config("num_fewshot") else ()
        for doc in (name, *itertools.islice(task.eval_docs, limit), *(solved or ())):
            found.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return found.hexdigest()


def evaluate(lm: HarnessModel, tasks: Any, limit: int | None, chat: bool) -> dict[str, Any]:
    """Runs the harness on what `load_tasks` returned. Unlike `simple_evaluate` it does not ask torch, pip and git for
    their versions, which takes longer than small tasks.

    Returns: `tasks`, `groups` and `samples`; see `task_result` and `average_of`.
    """
    random.seed(0)
    np.random.seed(FEWSHOT_SEED)  # noqa: NPY002 (what tasks of the harness draw from)
    run: Any = lm_eval.evaluate  # whose decorator hides its parameters
    with labelled_bars():
        found: Any = run(
            lm=lm,
            task_dict=tasks,
            limit=limit,
            bootstrap_iters=0,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    samples: list[Sample] = []
    results = {}
    for name, rows in found["samples"].items():
        config = found["configs"][name]
        of_task = [sample_of(name, row, config, tasks["tasks"][name].doc_to_text(row["doc"])) for row in rows]
        samples += of_task
        results[name] = task_result(found, name, rows, of_task)
    groups = {name: group_result(name, found, results) for name in found.get("groups", {})}
    return {"tasks": results, "groups": groups, "chat": chat, "samples": samples}


@contextlib.contextmanager
def labelled_bars() -> Iterator[None]:
    """Gives a label to the harness's bars of building prompts, for which it has no option."""
    label = functools.partial(tqdm, desc="prompts", unit="prompt", delay=2)
    with mock.patch.object(harness_task, "tqdm", label):
        yield


def group_result(group: str, found: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The averages of a group, also by language if its tasks have several, and the harness's own metrics."""
    leaves = leaves_of(group, found["group_subtasks"], results)
    by_language: dict[str, list[str]] = {}
    for name in leaves:
        language = (found["configs"][name].get("dataset_kwargs") or {}).get("language")
        by_language.setdefault(str(language), []).append(name)
    parts = {language: average_of([results[name] for name in own]) for language, own in by_language.items()}
    return {
        **average_of([results[name] for name in leaves]),
        **({"by_language": parts} if len(parts) > 1 and "None" not in parts else {}),
        "metrics": numbers(found["groups"][group]),
    }


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The values that are numbers."""
    return {key: value for key, value in values.items() if isinstance(value, float | int)}


def leaves_of(group: str, subtasks: Mapping[str, Sequence[str]], results: Mapping[str, Any]) -> list[str]:
    """The tasks of a group and of the groups in it."""
    waiting, leaves = [group], []
    while waiting:
        name = waiting.pop()
        waiting += subtasks.get(name, ())
        leaves += [name] if name in results else []
    return leaves


def average_of(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Averages of tasks by their primary metrics: `mean`, not weighted, as the paper takes it, and `by_size`, weighted
    by questions, as the harness's multimedqa does."""
    scores, sizes = [task["accuracy"] for task in results], [task["n"] for task in results]
    weighted = sum(score * size for score, size in zip(scores, sizes, strict=True))
    return {"mean": sum(scores) / len(scores), "by_size": weighted / sum(sizes), "tasks": len(scores), "n": sum(sizes)}


def primary_of(config: Mapping[str, Any]) -> str:
    """The primary metric of a task: what its file says under `metadata.primary`, else the first known one."""
    metadata = config.get("metadata")
    asked = metadata.get("primary") if isinstance(metadata, Mapping) else None
    names = [str(metric["metric"]) for metric in config.get("metric_list") or () if isinstance(metric["metric"], str)]
    return asked or next((name for name in METRICS if name in names), names[0] if names else "acc")


def sample_of(task: str, row: Mapping[str, Any], config: Mapping[str, Any], asked: Any) -> Sample:
    """A sample of the harness in our format; `asked` is the text of the question without solved examples, if the task
    has one."""
    doc, prompt = row["doc"], str(row["arguments"][0][0])
    primary = primary_of(config)
    scores = {name: float(row[name]) for name in row["metrics"] if isinstance(row[name], float | int)}
    common: dict[str, Any] = {
        "task": task,
        "id": str(doc.get("id", row["doc_id"])),
        "language": str(doc.get("language") or language_of(prompt)),
        "filter": row["filter"],
        "target": row["target"] if isinstance(row["target"], int | str) else json.dumps(row["target"]),
        "correct": scores.get(primary, 0.0) >= 1,
        "scores": scores,
        "subject": doc.get("subject") or None,
        "flags": tuple(doc.get("flags") or ()),
        "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
        "asked_bytes": len(asked.encode()) if isinstance(asked, str) else None,
    }
    answers = row["filtered_resps"]
    if config.get("output_type") != "multiple_choice":
        chosen = answers[0] if isinstance(answers[0], str) else None
        raw = row["resps"][0][0]
        return Sample(**common, chosen=chosen, answer=raw if isinstance(raw, str) else None)
    delimiter = str(config.get("target_delimiter", " "))
    texts = [str(arguments[1]).removeprefix(delimiter) for arguments in row["arguments"]]
    logprobs = tuple(float(answer[0]) for answer in answers)
    per_byte = sample_files.per_byte(logprobs, texts)
    lengths = {"acc_bytes": per_byte, "acc_norm": [x / len(text) for x, text in zip(logprobs, texts, strict=True)]}
    ranked = lengths.get(primary, logprobs)
    chosen = max(range(len(ranked)), key=lambda index: ranked[index])
    return Sample(**common, logprobs=logprobs, logprobs_per_byte=per_byte, chosen=chosen)


def task_result(
    found: Mapping[str, Any], name: str, rows: Sequence[Mapping[str, Any]], samples: Sequence[Sample]
) -> dict[str, Any]:
    """The result of a task.

    `accuracy` is that of the primary metric, with Wilson's interval; `metrics` are the harness's own. `available` is
    the number of questions without a limit. `prompts` and `documents` are hashes of all prompts and of all documents in
    order.
    """
    config = found["configs"][name]
    filters = list(dict.fromkeys(sample.filter for sample in samples))
    last = [sample for sample in samples if sample.filter == filters[-1]]
    score = Accuracy(sum(sample.correct for sample in last), len(last))
    flagged = Counter(flag for sample in last for flag in sample.flags)
    values = found["results"][name]
    return {
        "primary": primary_of(config),
        "filter": filters[-1],
        **score.to_dict(),
        "metrics": numbers(values),
        "num_fewshot": found["n-shot"].get(name, 0),
        "version": found["versions"].get(name),
        **source_of(config),
        "available": found["n-samples"][name]["original"],
        "flagged": dict(sorted(flagged.items())),
        "flagged_questions": sum(bool(sample.flags) for sample in last),
        "prompts": digest(row["prompt_hash"] for row in rows),
        "documents": digest(row["doc_hash"] for row in rows),
    }


def source_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Where the questions of a task come from, and how many were left out, by reason."""
    own, metadata = config.get("dataset_kwargs") or {}, config.get("metadata") or {}
    if "benchmark" not in own:
        return {"source": "#".join(str(config[key]) for key in ("dataset_path", "dataset_name") if config.get(key))}
    found = documents.read(
        own["benchmark"], own["language"], metadata.get("data"), metadata.get("exclude_flagged", False)
    )
    return {"source": found.source, "excluded": dict(found.excluded)}


def digest(parts: Any) -> str:
    """SHA-256 of texts in order."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def write(folder: Path, result: Mapping[str, Any], samples: Sequence[Sample]) -> None:
    """Writes result.json and samples.jsonl; how much of it an earlier run had answered is not a part of the result."""
    result = {name: value for name, value in result.items() if name != "reused"}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / sample_files.NAME, "".join(f"{sample.to_json()}\n" for sample in samples))
    write_text(folder / "result.json", json.dumps(result, ensure_ascii=False, indent=2, default=str) + "\n")
