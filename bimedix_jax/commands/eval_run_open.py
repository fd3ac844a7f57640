"""The part of `bimedix eval run` that generates: answers to held-out questions and chats, behaviour, and the judge."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bimedix_jax.curation.llm.config import JudgeConfig
from bimedix_jax.errors import BimedixError

if TYPE_CHECKING:
    from bimedix_jax.curation.answers_judge import Pair
    from bimedix_jax.data.records import Record
    from bimedix_jax.data.tokenizer import Tokenizer
    from bimedix_jax.evals.journal import Part
    from bimedix_jax.evals.open_answers import Answer, Item
    from bimedix_jax.models.mixtral import Mixtral
    from bimedix_jax.routing.interventions import Interventions


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenOptions:
    """The options of `bimedix eval run` that this part reads; its help describes them."""

    open: tuple[str, ...]
    heldout: str | None
    max_new_tokens: int
    batch_tokens: int
    judge: JudgeConfig
    judge_tokens: int | None
    compare: Path | None
    out: Path | None

    @classmethod
    def of(cls, config: Any) -> Self:
        """The options of the command's configuration."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})


def check_open(config: OpenOptions) -> None:
    """Raises BimedixError for options of open answers that contradict each other."""
    if "answers" in config.open and config.heldout is None:
        raise BimedixError("--open answers needs questions and chats; pass --heldout sample or a JSONL file")
    if config.max_new_tokens < 1:
        raise BimedixError(f"--max-new-tokens is {config.max_new_tokens}; give at least 1")
    if config.judge.model is not None and "answers" not in config.open:
        raise BimedixError("--judge.model judges open answers; add --open answers")
    if config.judge.model is not None and config.out is None:
        raise BimedixError("the judge's replies are kept beside the result, and no file is named; pass --out FILE")


def open_results(
    config: OpenOptions,
    model: "Mixtral",
    tokenizer: "Tokenizer",
    records: "list[Record]",
    rules: "Interventions | None",
    before: dict[str, Any] | None,
    saved: "Callable[[str], Part]",
) -> dict[str, Any]:
    """The parts `answers`, `behaviour` and `judge` of a result, as far as they are asked for.

    The answers are written beside the result, into NAME.answers.jsonl. `saved` has those of an earlier start.
    """
    from bimedix_jax.evals import behaviour, open_answers

    def generated(name: str, items: "list[Item]") -> "list[Answer]":
        part = saved(name)
        options = (config.max_new_tokens, config.batch_tokens, rules)
        return open_answers.answer_all(model, tokenizer, items, *options, known=part.found, keep=part.write)

    result: dict[str, Any] = {}
    lines: list[dict[str, Any]] = []
    if "answers" in config.open:
        answers = generated("answers", open_answers.items_of(records))
        result["answers"] = {"by_group": open_answers.summary(answers), "max_new_tokens": config.max_new_tokens}
        lines += [{"set": "answers", **answer.to_dict()} for answer in answers]
        if config.judge.model is not None:
            result["judge"] = judged(config, answers, before)
    if "behaviour" in config.open:
        answers = generated("behaviour", behaviour.items())
        result["behaviour"] = behaviour.summary(answers)
        lines += [{"set": "behaviour", **answer.to_dict(), **behaviour.verdict(answer)} for answer in answers]
    if lines and config.out is not None:
        result["answers_file"] = write_answers(answers_path(config.out), lines)
    return result


def answers_path(out: Path) -> Path:
    """Path of the answers that belong to the result `out`."""
    return out.with_name(f"{out.name.removesuffix('.json')}.answers.jsonl")


def write_answers(path: Path, lines: list[dict[str, Any]]) -> str:
    """Writes one line of JSON for each answer; returns the file's name."""
    from bimedix_jax.files import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines))
    return path.name


def is_answers(path: Path) -> bool:
    """Whether every line of a file is an answer, as `write_answers` writes it."""
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError):
        return False
    return all(isinstance(row, dict) and {"set", "id", "answer"} <= set(row) for row in rows)


def judged(config: OpenOptions, answers: "list[Answer]", before: dict[str, Any] | None) -> dict[str, Any]:
    """The verdicts of the judge against the references, or against the answers of the result of --compare."""
    from bimedix_jax.curation import answers_judge
    from bimedix_jax.curation.llm.config import LlmConfig

    assert config.judge.model is not None  # the caller checks both
    assert config.out is not None
    others = {} if before is None or config.compare is None else answers_of(config.compare, before)
    against = str(config.compare) if others else "references"
    pairs = pairs_of(answers, others)
    if not pairs:
        raise BimedixError(f"no answer can be compared with {against}: they have no record in common")
    store = config.out.with_name(f"{config.out.name.removesuffix('.json')}.judge.sqlite")
    settings = config.judge.over(LlmConfig(model=config.judge.model))
    found, facts = answers_judge.judge(pairs, settings, store, budget_tokens=config.judge_tokens)
    return {"against": against, **facts, "by_group": answers_judge.tally(found)}


def answers_of(path: Path, result: dict[str, Any]) -> dict[str, str]:
    """Answers by id that an earlier run wrote; empty if it generated none.

    Raises:
      BimedixError: its file of answers is gone.
    """
    if "answers" not in result.get("open", {}):
        return {}
    file = answers_path(path)
    if not is_answers(file):
        raise BimedixError(f"the answers of {path} are not in {file}; put the file there, or leave --compare out")
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return {row["id"]: row["answer"] for row in rows if row["set"] == "answers"}


def pairs_of(answers: "list[Answer]", others: dict[str, str]) -> "list[Pair]":
    """Pairs with the other model's answers, or with the references if there are none. An empty answer is "(none)"."""
    from bimedix_jax.curation.answers_judge import Pair

    found = []
    for answer in answers:
        item = answer.item
        other = others.get(item.id) if others else item.reference
        if other is not None:
            turns = tuple((turn.speaker, turn.value) for turn in item.turns)
            found.append(Pair(item.id, item.language, turns, answer.text or "(none)", other or "(none)"))
    return found
