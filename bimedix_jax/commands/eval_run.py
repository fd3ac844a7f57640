"""`bimedix eval run`: held-out loss, and accuracy on multiple-choice questions and benchmark tasks."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from bimedix_jax import startup
from bimedix_jax.commands.eval_run_files import (
    check_out,
    predictions_path,
    read_result,
    write_predictions,
    write_result,
)
from bimedix_jax.curation.llm.config import JudgeConfig
from bimedix_jax.errors import BimedixError
from bimedix_jax.options import require_at_least_one

if TYPE_CHECKING:
    from bimedix_jax.data.records import Record
    from bimedix_jax.data.tokenizer import Tokenizer
    from bimedix_jax.evals.journal import Part
    from bimedix_jax.evals.multiple_choice import Prediction
    from bimedix_jax.evals.tasks import Questions
    from bimedix_jax.models.mixtral import Mixtral
    from bimedix_jax.routing.interventions import Interventions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Evaluate a model: held-out loss by language and kind of record, multiple choice, and the paper's nine tasks.

    With --out, an evaluation that was killed continues if the same command is started again.
    """

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
    """Held-out records: `sample`, a JSONL file of records, or NAME=PLACE?options with a reader's name (docs/data.md),
    such as `table=exam.csv?question=stem&choices=a,b,c,d&answer=key&licence=own`; those in the training split are
    ignored. By default none."""
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
    """Tokens run at a time; it affects speed, memory and rounding only."""
    intervene: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON file of rules that tell the routers what to do (docs/routing.md); by default none."""
    orders: int = 0
    """Also score every question with its options in N other orders, and report how far accuracy and answers change."""
    wordings: bool = False
    """Also score every question after each of three sentences that ask for an answer in other words."""
    seed: int = 0
    """Seed of --orders."""
    train: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """JSONL file of records that the model was trained on; reports which questions it contains, by id, by the words of
    the question or by runs of words, and the accuracy on them and on the others. By default none."""
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
    from bimedix_jax.commands import eval_run_train
    from bimedix_jax.data.vocabulary import tokenizer_of_model
    from bimedix_jax.evals import comparison, programs, tasks
    from bimedix_jax.routing.interventions import check_fit, report, rules_of

    check_options(config)
    started = programs.count()
    rules = rules_of(config.intervene, config.adapter)
    before = None if config.compare is None else read_result(config.compare)
    if config.out is not None:
        check_out(config.out, config.overwrite)
    questions = tasks.read_tasks(config.tasks, config.data) if config.data is not None else {}
    questions |= {} if config.sets is None else tasks.read_sets(config.sets)
    records = [] if config.heldout is None else tasks.heldout_of(config.heldout, config.limit)
    sets = sets_of(config, records, questions)
    overlap = None if config.train is None else eval_run_train.look_for(sets, config.train)
    folder = resolve(config.model, config.revision)
    check_fit(rules, folder)
    tokenizer = tokenizer_of_model(folder, config.model, config.tokenizer, config.template)
    result = setting(config, tokenizer, records, questions)
    if before is not None and config.compare is not None:
        parts = set(questions) | ({"heldout"} if records else set())
        comparison.check(before, result, parts, config.compare, config.force)
    model = load(folder, base=config.base, adapter=config.adapter, router=config.router)
    result |= loaded(model, tokenizer)
    rules = with_base(rules, model, folder, config)
    if before is not None and config.compare is not None:
        comparison.check_weights(before, result, config.compare, config.force)
    with saved_results(config, result, rules) as saved:
        found, predictions = evaluate(model, tokenizer, records, questions, config, rules, before, saved)
        result |= found | report(rules, console)
        if overlap is not None and config.train is not None:
            result["contamination"] = eval_run_train.report(overlap, predictions, config.train)
        if config.out is not None:
            result["predictions"] = write_predictions(config.out, predictions)
            write_result(config.out, result)
    for table in result_tables(result, before):
        console.print(table)
    if config.out is not None:
        answers = f", its answers in {config.out.with_name(result['answers_file'])}" if "answers_file" in result else ""
        console.print(
            f"The result is in {config.out}, its predictions in {predictions_path(config.out)}{answers}.",
            highlight=False,
        )
    return result | programs.since(started)


def evaluate(
    model: "Mixtral",
    tokenizer: "Tokenizer",
    records: "list[Record]",
    questions: "Questions",
    config: Config,
    rules: "Interventions | None",
    before: dict[str, Any] | None,
    saved: "Callable[[str], Part]",
) -> "tuple[dict[str, Any], dict[str, list[Prediction]]]":
    """The results of all parts, and the predictions of each set of questions."""
    from bimedix_jax.commands import eval_run_variants
    from bimedix_jax.commands.eval_run_open import OpenOptions, open_results
    from bimedix_jax.evals import tasks

    result: dict[str, Any] = {}
    predictions: dict[str, list[Prediction]] = {}
    if records:
        assert config.heldout is not None  # no records without it
        result, predictions[config.heldout] = evaluate_records(
            model, tokenizer, records, config.max_length, config.batch_tokens, rules, saved
        )
    if questions:
        options = (config.limit, config.max_length, config.batch_tokens)
        scored = tasks.run_tasks(
            model, tokenizer, questions, config.data, *options, rules, questions=questions, saved=saved
        )
        result["tasks"] = {name: outcome.to_dict() for name, outcome in scored.items()}
        result["average"] = tasks.average([scored[name].score.value for name in scored if name in tasks.TASKS])
        predictions |= {name: outcome.choice.predictions for name, outcome in scored.items()}
    if config.orders or config.wordings:
        sets = sets_of(config, records, questions)
        forms = eval_run_variants.Forms(config.orders, config.wordings, config.seed)
        limits = (config.max_length, config.batch_tokens, rules)
        result["sensitivity"], more = eval_run_variants.score(model, tokenizer, sets, predictions, forms, limits, saved)
        predictions |= more
    if config.open:
        result["open"] = open_results(OpenOptions.of(config), model, tokenizer, records, rules, before, saved)
    return result, predictions


def sets_of(config: Config, records: "list[Record]", questions: "Questions") -> "dict[str, list[Record]]":
    """The sets of questions with choices, by the name that their predictions have."""
    chosen = [record for record in records if record.choices is not None]
    own = {} if config.heldout is None or not chosen else {config.heldout: chosen}
    return own | {name: found[: config.limit] for name, (found, _) in questions.items()}


@contextlib.contextmanager
def saved_results(
    config: Config, setting: dict[str, Any], rules: "Interventions | None"
) -> Iterator[Callable[[str], "Part"]]:
    """The results of an earlier start by part, and where to save more of them; nothing without --out."""
    from bimedix_jax.evals.journal import journal, nothing

    if config.out is None:
        yield nothing
        return
    identity = {
        **setting,
        "heldout": config.heldout,
        "batch_tokens": config.batch_tokens,
        "variants": [config.orders, config.wordings, config.seed],
        "open": [config.open, config.max_new_tokens],
        "rules": None if rules is None else rules.digest(),
        "results": "by candidate",
    }
    counters = None if rules is None else rules.applied
    with journal(config.out, identity, config.overwrite, counters) as kept:
        yield kept.part


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
    if config.orders < 0:
        raise BimedixError(f"--orders is {config.orders}; give 0 or more")
    require_at_least_one(config, "limit", "max_length", "batch_tokens")
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


def loaded(model: "Mixtral", tokenizer: "Tokenizer") -> dict[str, Any]:
    """The part of a result that is known when the model is loaded: its storage, and versions and hashes of all that
    determines the result except the records."""
    import jax

    from bimedix_jax import __version__
    from bimedix_jax.checkpoint.identity import base_identity
    from bimedix_jax.evals.comparison import HARNESS
    from bimedix_jax.quantise import storage_of
    from bimedix_jax.routing.provenance import adapter_hash, model_hash
    from bimedix_jax.routing.recorded_data import template_hash

    return {
        "base": storage_of(model).base,
        "dtype": model.dtype,
        "router": model.config.router.variant,
        "weights": base_identity(model)["weights"],
        "harness": HARNESS,
        "hashes": {"model": model_hash(model), "adapter": adapter_hash(model), "prompt": template_hash(tokenizer)},
        "versions": {"bimedix_jax": __version__, "jax": jax.__version__, "platform": jax.default_backend()},
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
    rules: "Interventions | None",
    saved: "Callable[[str], Part]",
) -> "tuple[dict[str, Any], list[Prediction]]":
    """Held-out loss of all records, and accuracy and predictions for those with choices."""
    from bimedix_jax.evals.heldout import heldout_loss
    from bimedix_jax.evals.multiple_choice import multiple_choice

    options = (max_length, batch_tokens, rules)
    result = {"heldout": heldout_loss(model, tokenizer, records, *options, saved=saved("heldout")).to_dict()}
    questions = [record for record in records if record.choices is not None]
    if not questions:
        return result, []
    choice = multiple_choice(model, tokenizer, questions, *options, saved=saved("choice"))
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
    if result.get("sensitivity"):
        found.append(tables.sensitivity_table(result["sensitivity"]))
    if "contamination" in result:
        found.append(tables.contamination_table(result["contamination"]))
    found += open_tables.tables_of(result.get("open", {}), old.get("open", {}))
    return found
