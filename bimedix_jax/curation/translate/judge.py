"""The score of one translation, by a model of its own, and what that model found wrong."""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr

from bimedix_jax.curation.llm.prompts import Prompts, fence
from bimedix_jax.curation.llm.request import Request
from bimedix_jax.curation.llm.scores import parse_score
from bimedix_jax.curation.translate.structure import Frame

STAGE = "judge"
MOST_PROBLEMS = 5
MAX_TOKENS = 600  # five problems of a sentence each and a number


class Judgement(BaseModel):
    """What the judge returns. Models spell scores in many ways; `parse_score` says which are scores."""

    # all properties are "required" in the schema that is sent (strict modes want that), not in what is accepted
    model_config = ConfigDict(
        json_schema_serialization_defaults_required=True, json_schema_extra={"additionalProperties": False}
    )

    problems: list[str] = Field(default_factory=list)
    score: StrictInt | StrictFloat | StrictStr


def judge_request(
    frame: Frame, texts: dict[str, str], round_number: int, prompts: Prompts, temperature: float | None
) -> Request:
    """The question to the judge: source and translation of each segment side by side, as data."""
    pairs = [
        {"id": segment.id, "role": segment.role, "source": segment.text, "translation": texts[segment.id]}
        for segment in frame.segments
    ]
    shown = json.dumps({"segments": pairs}, ensure_ascii=False, indent=1)
    system = prompts.render("system", source_language="English", target_language="Arabic")
    return Request(
        stage=STAGE,
        item=frame.record.id,
        round=round_number,
        messages=(
            {"role": "system", "content": system},
            {"role": "user", "content": prompts.render("judge", pairs=fence("pairs", shown))},
        ),
        prompt_hash=prompts.hash,
        max_tokens=MAX_TOKENS,
        temperature=temperature,
        schema=Judgement,
        accept=_why_no_score,
    )


def _why_no_score(judgement: Any) -> str | None:
    return None if parse_score(judgement.score) is not None else f"no score from 0 to 100: {judgement.score!r}"
