"""Sensitivity to form: the same questions with their options in other orders, and with other wordings of the request.

A question is only lettered again if its text ends with its lettered options. Others, such as PubMedQA's yes, no, maybe,
have no visible order.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from bimedix_jax.data.records import Record, Turn, multiple_choice_question
from bimedix_jax.evals.multiple_choice import Prediction

WORDINGS: dict[str, tuple[str, ...]] = {
    "en": (
        "Answer the following medical question.",
        "You are a physician taking an examination. Choose the best answer.",
        "Read the question carefully, and reply with the one correct option.",
    ),
    "ar": (
        "أجب عن السؤال الطبي التالي.",
        "أنت طبيب يؤدي امتحانًا. اختر أفضل إجابة.",
        "اقرأ السؤال بعناية، وأجب بالخيار الصحيح الوحيد.",
    ),
}
"""Sentences before the question, in its language."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One form of a list of questions. `orders` has, for each record, the original index of each of its options."""

    name: str
    records: list[Record]
    orders: list[list[int]]


def reordered(record: Record, order: Sequence[int]) -> Record | None:
    """The question with option `order[i]` at place i; None if its text does not end with its lettered options."""
    assert record.choices is not None
    assert record.answer is not None
    asked = record.conversations[-2]
    before = multiple_choice_question("", record.choices)
    if record.kind != "mcqa" or not asked.value.endswith(before):
        return None
    choices = tuple(record.choices[index] for index in order)
    text = asked.value.removesuffix(before) + multiple_choice_question("", choices)
    turns = (*record.conversations[:-2], asked.model_copy(update={"value": text}), record.conversations[-1])
    answer = list(order).index(record.answer)
    return record.model_copy(update={"choices": choices, "answer": answer, "conversations": turns})


def reworded(record: Record, sentence: str) -> Record:
    """The question with a sentence before it."""
    asked: Turn = record.conversations[-2]
    turns = (
        *record.conversations[:-2],
        asked.model_copy(update={"value": f"{sentence}\n{asked.value}"}),
        record.conversations[-1],
    )
    return record.model_copy(update={"conversations": turns})


def order_of(record: Record, number: int, seed: int) -> list[int]:
    """A random order of the options of a question, which depends on its id, the number of the variant and the seed."""
    key = int.from_bytes(hashlib.sha256(record.id.encode()).digest()[:8], "little")
    return np.random.default_rng([seed, number, key]).permutation(len(record.choices or ())).tolist()


def variants(records: Sequence[Record], orders: int, wordings: bool, seed: int) -> Iterator[tuple[str, Variant]]:
    """("orders" or "wordings", variant) of a list of questions; no orders if no question has lettered options."""
    for number in range(1, orders + 1):
        drawn = [order_of(record, number, seed) for record in records]
        found = [reordered(record, order) for record, order in zip(records, drawn, strict=True)]
        if any(record is not None for record in found):
            kept = [new or old for new, old in zip(found, records, strict=True)]
            own = [order if new else sorted(order) for new, order in zip(found, drawn, strict=True)]
            yield "orders", Variant(f"orders-{number}", kept, own)
    for number in range(len(WORDINGS["en"]) if wordings else 0):
        new = [reworded(record, WORDINGS[record.language][number]) for record in records]
        yield "wordings", Variant(f"wordings-{number + 1}", new, [list(range(len(r.choices or ()))) for r in records])


def original(prediction: Prediction, order: Sequence[int]) -> Prediction:
    """A prediction for a question in another order, with options numbered as in the original."""
    places = np.argsort(order).tolist()
    return dataclasses.replace(
        prediction,
        answer=order[prediction.answer],
        letters=None if prediction.letters is None else [prediction.letters[place] for place in places],
        texts=[prediction.texts[place] for place in places],
        chosen=order[prediction.chosen],
        chosen_by_text=order[prediction.chosen_by_text],
    )


Score = Callable[[str, list[Record]], list[Prediction]]
"""Scores the questions of a variant, given its name."""


def sensitivity(
    name: str,
    records: Sequence[Record],
    predictions: Sequence[Prediction],
    score: Score,
    orders: int,
    wordings: bool,
    seed: int,
) -> tuple[dict[str, Any], dict[str, list[Prediction]]]:
    """Scores all variants of a set.

    Args:
      records: all questions. predictions: of those that are short enough, in their original form.

    Returns: for "orders" and "wordings" what `spread` says of the questions that are short enough in every form, and
      the predictions by the name of the variant, with options numbered as in the original.
    """
    groups: dict[str, list[dict[Name, Prediction]]] = {}
    found: dict[str, list[Prediction]] = {}
    drawn: dict[str, list[Prediction]] = {}
    for kind, variant in variants(records, orders, wordings, seed):
        label = f"{name}@{variant.name}"
        order_of_question = dict(zip(named(variant.records), variant.orders, strict=True))
        scored = named(score(label, variant.records))
        own = {key: original(one, order_of_question[key]) for key, one in scored.items()}
        groups.setdefault(kind, []).append(own)
        drawn.setdefault(kind, []).extend(scored.values())
        found[label] = list(own.values())
    result = {}
    for kind, own in groups.items():
        forms = [named(predictions), *own]
        common = [key for key in forms[0] if all(key in form for form in forms)]
        result[kind] = {"n": len(common), **spread([[form[key] for key in common] for form in forms])}
        if kind == "orders":
            result[kind]["places"] = places(drawn[kind])
    return result, found


Name = tuple[str, int]
"""Id of a question, and the number of questions before it with the same id."""
Named = TypeVar("Named", Record, Prediction)


def named(items: Sequence[Named]) -> dict[Name, Named]:
    """Records or predictions by name."""
    found: dict[Name, Named] = {}
    seen: dict[str, int] = {}
    for item in items:
        found[item.id, seen.get(item.id, 0)] = item
        seen[item.id] = seen.get(item.id, 0) + 1
    return found


def spread(forms: Sequence[Sequence[Prediction]]) -> dict[str, Any]:
    """How far the accuracy and the answers depend on the form.

    `accuracies`: of each form, the original first. `same`: share of the questions that get the same answer in all.
    """
    chosen_FN = np.array([[one.chosen for one in form] for form in forms])
    accuracies = [float(np.mean([one.chosen == one.answer for one in form])) for form in forms]
    return {
        "accuracies": accuracies,
        "lowest": min(accuracies),
        "highest": max(accuracies),
        "sd": float(np.std(accuracies, ddof=1)),
        "same": float((chosen_FN == chosen_FN[0]).all(axis=0).mean()),
    }


def places(scored: Sequence[Prediction]) -> dict[str, list[float]]:
    """How often the option at each place was chosen, and how often it was right, over all orders."""
    flat = [one for one in scored if one.letters is not None]
    size = max(len(one.texts) for one in flat)
    return {
        name: (np.bincount([getattr(one, field) for one in flat], minlength=size) / len(flat)).tolist()
        for name, field in (("chosen", "chosen"), ("right", "answer"))
    }
