"""`bimedix eval run`: held-out loss, and accuracy on multiple-choice questions and benchmark tasks."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from bimedix_jax import startup
from bimedix_jax.curation.llm.config import JudgeConfig
from bimedix_jax.errors import BimedixError

if TYPE_CHECKING:
    from bimedix_jax.data.records import Record
    from bimedix_jax.data.tokenizer import Tokenizer
    from bimedix_jax.evals.multiple_choice import Prediction
    from bimedix_jax.evals.tasks import Questions
    from bimedix_jax.models.mixtral import Mixtral
    from bimedix_jax.routing.interventions import Interventions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Evaluate a model: held-out loss by language and kind of record, multiple choice, and the paper's nine tasks."""

    model: str
    """Model folder or hub id."""
    adapter: Path | None = None
    """Folder of adapters to apply; by default none."""
    tokenizer: Path | None = None
    """Folder of the tokenizer; by default the model's."""
    template: str | None = None
    """Chat template by name (mixtral, mixtral-2023, chatml, plain); by default the model's own."""
    base: Literal["bfloat16", "float32", "nf4"] | None = None
    """Storage of the weights; by default the one that the adapter was trained over, that of a native checkpoint, or
    else bfloat16."""
    router: str | None = None
    """Router variant (topk, softmax_topk, sigmoid_bias); by default the one that the model was trained with."""
    revision: str | None = None
    """Revision of a hub id; by default the main branch."""
    heldout: str | None = None
    """Held-out records: `sample`, a JSONL file of records, or NAME=PLACE?options with a reader's name (docs/data.md);
    those in the training split are ignored. By default none."""
    tasks: tuple[str, ...] = ()
    """Benchmark tasks by name, or `all`; by default none. They are mmlu_clinical_knowledge, mmlu_college_biology,
    mmlu_college_medicine, mmlu_medical_genetics, mmlu_professional_medicine, mmlu_anatomy, medmcqa, medqa, pubmedqa."""
    sets: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON file of your own sets of questions, which are scored as tasks (docs/data.md); by default none."""
    data: Path | None = None
    """Folder with the folders mmlu_medical_en, medmcqa_en, medqa_usmle_en and pubmedqa; --tasks needs it."""
    open: tuple[Literal["answers", "behaviour"], ...] = ()
    """Also generate: `answers` to the held-out questions and chats, scored by chrF, ROUGE-L and language; `behaviour`
    in emergencies and the like (a smoke test of 24 questions and 8 switches of language). NAME.answers.jsonl in the
    folder of --out gets every answer."""
    max_new_tokens: int = 256
    """Longest generated answer in tokens."""
    judge: JudgeConfig = dataclasses.field(default_factory=JudgeConfig)
    """A model that compares the answers with the references, or with the answers of --compare. Without --judge.model
    there is none, and nothing leaves this machine; with it, conversations and answers are sent to its endpoint."""
    judge_tokens: int | None = None
    """Limit of the judge's tokens, which includes earlier runs with the same --out."""
    limit: int | None = None
    """Use N held-out records, spread over the file, and the first N questions of each task; by default all."""
    max_length: int | None = None
    """Longest record or question in tokens, by default the model's context; longer ones are counted and not scored."""
    batch_tokens: int = 4096
    """Tokens run at a time; it affects speed and memory only."""
    intervene: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON file of rules that tell the routers what to do (docs/routing.md); by default none."""
    compare: Path | None = None
    """JSON result of an earlier run (--out) to compare with; by default none. It must have the same model (with any
    adapter), limit, records, template and tokenizer."""
    force: bool = False
    """Compare even if the model, the limit or the protocol differs."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON file to write the result to; by default it is only printed. NAME.predictions.jsonl in the same folder gets
    one line for each question."""
    overwrite: bool = False
    """Replace the result of an earlier run in --out, and its predictions."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Loads the model, evaluates, prints tables."""
    startup.keep_programs()
    from bimedix_jax.checkpoint.hub import resolve
    from bimedix_jax.checkpoint.load import load
    from bimedix_jax.commands.eval_run_open import OpenOptions, answers_path, is_answers, open_results
    from bimedix_jax.data.vocabulary import tokenizer_of_model
    from bimedix_jax.evals import comparison, tasks
    from bimedix_jax.files import check_file
    from bimedix_jax.routing.interventions import report, rules_of

    check_options(config)
    rules = rules_of(config.intervene, config.adapter)
    before = None if config.compare is None else read_result(config.compare)
    if config.out is not None:
        check_file(config.out, config.overwrite, is_result)
        check_file(predictions_path(config.out), config.overwrite, is_predictions)
        check_file(answers_path(config.out), config.overwrite, is_answers)
    questions = tasks.read_tasks(config.tasks, config.data) if config.data is not None else {}
    questions |= {} if config.sets is None else tasks.read_sets(config.sets)
    records = [] if config.heldout is None else tasks.heldout_of(config.heldout, config.limit)
    folder = resolve(config.model, config.revision)
    tokenizer = tokenizer_of_model(folder, config.model, config.tokenizer, config.template)
    result = setting(config, tokenizer, records, questions)
    if before is not None and config.compare is not None:
        parts = set(questions) | ({"heldout"} if records else set())
        comparison.check(before, result, parts, config.compare, config.force)
    model = load(folder, base=config.base, adapter=config.adapter, router=config.router)
    result |= loaded(model)
    rules = with_base(rules, model, folder, config)
    if before is not None and config.compare is not None:
        comparison.check_weights(before, result, config.compare, config.force)
    predictions: dict[str, list[Prediction]] = {}
    if records:
        assert config.heldout is not None  # no records without it
        found, predictions[config.heldout] = evaluate_records(
            model, tokenizer, records, config.max_length, config.batch_tokens, rules
        )
        result |= found
    if questions:
        options = (config.limit, config.max_length, config.batch_tokens)
        scored = tasks.run_tasks(model, tokenizer, questions, config.data, *options, rules, questions=questions)
        result["tasks"] = {name: outcome.to_dict() for name, outcome in scored.items()}
        result["average"] = tasks.average([scored[name].score.value for name in scored if name in tasks.TASKS])
        predictions |= {name: outcome.choice.predictions for name, outcome in scored.items()}
    if config.open:
        result["open"] = open_results(OpenOptions.of(config), model, tokenizer, records, rules, before)
    result |= report(rules, console)
    for table in result_tables(result, before):
        console.print(table)
    if config.out is not None:
        result["predictions"] = write_predictions(config.out, predictions)
        write_result(config.out, result)
        console.print(
            f"The result is in {config.out}, its predictions in {predictions_path(config.out)}.", highlight=False
        )
    return result


def check_options(config: Config) -> None:
    """Raises BimedixError for options that contradict each other."""
    from bimedix_jax.commands.eval_run_open import OpenOptions, check_open

    check_open(OpenOptions.of(config))
    if not config.tasks and config.heldout is None and config.sets is None and not config.open:
        raise BimedixError(
            "there is nothing to evaluate on; pass --heldout sample, --tasks all --data DIR, --sets FILE, or --open"
        )
    if config.tasks and config.data is None:
        raise BimedixError("--tasks needs --data, the folder with the folders of the tasks")
    if config.limit is not None and config.limit < 1:
        raise BimedixError(f"--limit is {config.limit}; give at least 1")
    if config.force and config.compare is None:
        raise BimedixError("--force is for --compare; leave it out")


def with_base(rules: "Interventions | None", model: "Mixtral", folder: Path, config: Config) -> "Interventions | None":
    """The rules, with the model without its adapter if a rule freezes the routes of the base."""
    from bimedix_jax.checkpoint.load import load
    from bimedix_jax.quantise import storage_of

    if rules is None or not rules.needs_base:
        return rules
    base: Any = storage_of(model).base
    return dataclasses.replace(rules, base=load(folder, base=base, router=config.router))


def loaded(model: "Mixtral") -> dict[str, Any]:
    """The part of a result that is known when the model is loaded."""
    from bimedix_jax.checkpoint.identity import base_identity
    from bimedix_jax.quantise import storage_of

    return {
        "base": storage_of(model).base,
        "dtype": model.dtype,
        "router": model.config.router.variant,
        "weights": base_identity(model)["weights"],
    }


def setting(config: Config, tokenizer: "Tokenizer", records: "list[Record]", questions: "Questions") -> dict[str, Any]:
    """The part of a result that says what was evaluated, and how."""
    from bimedix_jax.evals.comparison import digest

    digests = {name: digest(found[: config.limit]) for name, (found, _) in questions.items()}
    return {
        "model": config.model,
        "revision": config.revision,
        "adapter": config.adapter,
        "template": tokenizer.template.name,
        "tokenizer": tokenizer.fingerprint,
        "limit": config.limit,
        "max_length": config.max_length,
        "records": digests | ({"heldout": digest(records)} if records else {}),
    }


def evaluate_records(
    model: "Mixtral",
    tokenizer: "Tokenizer",
    records: "list[Record]",
    max_length: int | None,
    batch_tokens: int,
    rules: "Interventions | None" = None,
) -> "tuple[dict[str, Any], list[Prediction]]":
    """Held-out loss of all records, and accuracy and predictions for those with choices."""
    from bimedix_jax.evals.heldout import heldout_loss
    from bimedix_jax.evals.multiple_choice import multiple_choice

    result = {"heldout": heldout_loss(model, tokenizer, records, max_length, batch_tokens, rules).to_dict()}
    questions = [record for record in records if record.choices is not None]
    if not questions:
        return result, []
    choice = multiple_choice(model, tokenizer, questions, max_length, batch_tokens, rules)
    return {**result, "choice": choice.to_dict()}, choice.predictions


def result_tables(result: dict[str, Any], before: dict[str, Any] | None) -> list[Any]:
    """Tables of the parts of the result, each compared with the same part of `before` if it has one."""
    from bimedix_jax.evals import open_tables, tables

    old = before or {}
    found = []
    if "heldout" in result:
        found.append(tables.loss_table(result["heldout"], old.get("heldout")))
    if "choice" in result:
        found.append(tables.accuracy_table(result["choice"], old.get("choice")))
    if "tasks" in result:
        found.append(tables.task_table(result["tasks"], result["average"], old.get("tasks")))
    found += open_tables.tables_of(result.get("open", {}), old.get("open", {}))
    return found


def read_result(path: Path) -> dict[str, Any]:
    """The result that an earlier run wrote. Raises BimedixError if the file is not one."""
    from bimedix_jax.files import read_json

    value = read_json(path, dict[str, Any], "name a file that --out wrote")
    if not {"heldout", "choice", "tasks", "open"} & set(value):
        raise BimedixError(f"{path} is not a result of `bimedix eval run`; name a file that --out wrote")
    return value


def is_result(path: Path) -> bool:
    """Whether a file has the keys of a result."""
    from bimedix_jax.files import peek_json

    found = set(peek_json(path))
    return {"model", "template"} <= found and bool({"heldout", "choice", "tasks", "open"} & found)


def is_predictions(path: Path) -> bool:
    """Whether every line of a file is a prediction, as `write_predictions` writes it."""
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError):
        return False
    return all(isinstance(row, dict) and {"set", "id"} <= set(row) for row in rows)


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes the result as JSON, and creates the folder if needed."""
    from bimedix_jax.files import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, ensure_ascii=False, indent=2, default=str) + "\n")


def predictions_path(out: Path) -> Path:
    """Path of the predictions that belong to the result `out`."""
    return out.with_name(f"{out.name.removesuffix('.json')}.predictions.jsonl")


def write_predictions(out: Path, predictions: "dict[str, list[Prediction]]") -> dict[str, Any]:
    """Writes one line of JSON for each scored question; its `set` is the name of the task or the value of --heldout.

    Returns: name of the file in the result's folder, and its number of lines.
    """
    from bimedix_jax.files import write_text

    rows = [{"set": name, **row.to_dict()} for name, found in predictions.items() for row in found]
    path = predictions_path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
    return {"file": path.name, "lines": len(rows)}
