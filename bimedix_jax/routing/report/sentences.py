"""What a report says in words. A sentence claims the level that was reached, names the first that was not, and no more.

Numbers and names in the sentences are cells of the CSV files. The page calls experts "specialised" only where a
knock-out costs one group more than the other and shuffled routes cost something; see ladder.py.
"""

import html

from bimedix_jax.routing.answers import NAME as ANSWERS
from bimedix_jax.routing.claims import LEVELS
from bimedix_jax.routing.report.answers import answers_sentence
from bimedix_jax.routing.report.contents import Contents
from bimedix_jax.routing.report.sheets import Shown, number, points, words

REACHED = {
    "association": "routes are associated with {name}",
    "token": "the same token id is routed differently",
    "geometry": "the groups are further apart than random routers on the same hidden states would bring them",
    "learned": "the difference grew in fine-tuning",
    "functional": "a knock-out of the expert costs one group more than the other, so it is specialised",
}
"""level -> what a cell that reaches it shows."""
MISSING = {
    "association": "that routes depend on {name} at all",
    "token": "anything beyond token identity: the groups may only have other words",
    "geometry": "anything beyond geometry: a random router might separate the groups as much",
    "learned": "that fine-tuning taught it",
    "functional": "that it matters to what the model predicts",
}
"""level -> what is not claimed without it."""


def gate_sentence(contents: Contents) -> str:
    """What the divergence gate says, as HTML."""
    sheet = contents.gate
    if not sheet.rows:
        return (
            "The divergence gate is <b>not tested</b>: it was not recorded what shuffled routes cost, so the experts "
            'may be equal. Claims end at "geometry".'
        )
    delta, low, high, floor = (number(sheet, 0, name, "+.3g") for name in ("delta_nll", "low", "high", "floor"))
    cost = f"giving each token the experts and weights of another token of its record changes the NLL by {delta} nats"
    diverged = sheet.value(0, "diverged")
    if diverged is None:
        return f"The divergence gate is <b>not tested</b>: {cost}, and too few clusters were recorded for an interval."
    ends = f"a token ({low} to {high})"
    if diverged:
        return f"The divergence gate <b>holds</b>: {cost} {ends}, more than the noise of {floor}. The experts differ."
    return (
        f"The divergence gate <b>fails</b>: {cost} {ends}, which is not above the noise of {floor}. It makes no "
        'difference which experts a token gets. Claims end at "geometry".'
    )


def question_sentence(contents: Contents, row: int) -> str:
    """The verdict on a question, as HTML."""
    sheet = contents.questions
    name = words(sheet, row, "question")
    level = sheet.value(row, "level")
    if sheet.value(row, "question") == ANSWERS:
        return answers_sentence(contents, row)
    if level is None:
        return f"Whether routes depend on {name} is <b>not tested</b>: {_reason(contents, row, 'claims, intervals')}."
    if level == "none":
        return f"{_unresolved(contents, row)} {_not_beyond(contents, row, 'none')}"
    ladder = contents.ladder
    parts = []
    for step in LEVELS[1 : LEVELS.index(level) + 1]:
        at = ladder.where(question=sheet.value(row, "question"), level=step)[0]
        count, total = number(ladder, at, "cells", "d"), number(ladder, at, "of", "d")
        parts.append(f"{REACHED[step].format(name=name)} ({count} of {total} experts of layers)")
    largest = points(sheet, row, "largest")
    ends = (points(sheet, row, end) for end in ("largest_low", "largest_high"))
    where = f"layer {words(sheet, row, 'largest_layer')}, expert {words(sheet, row, 'largest_expert')}"
    groups = f"{words(sheet, row, 'first')} minus {words(sheet, row, 'second')}"
    return (
        f"<b>{_capital(level)}</b>: {'; '.join(parts)}. The largest difference in load is {largest} points "
        f"({' to '.join(map(str, ends))}; {groups}), at {where}. {_not_beyond(contents, row, level)}"
    )


def _capital(level: str) -> str:
    return {"token": "Beyond token identity", "geometry": "Beyond geometry"}.get(level, level.capitalize())


def _unresolved(contents: Contents, row: int) -> str:
    sheet = contents.questions
    name = words(sheet, row, "question")
    power = contents.settings.shown("power", ".0f", 100)
    least, most = (number(sheet, row, end, ".1f", 100) for end in ("mde80_least", "mde80_most"))
    found = (
        f"Whether routes depend on {name} is <b>not resolved</b>: no expert differs significantly. A difference in "
        f"load of {least} to {most} points, depending on the expert, would have been found with a probability of "
        f"{power} %."
    )
    if sheet.value(row, "equivalent"):
        margin = contents.settings.shown("margin", "g", 100)
        found += (
            f" All loads are equivalent within {margin} points. Balanced loads are alike whatever routes depend on, so "
            "this does not say that routes do not depend on it."
        )
    return found


def _not_beyond(contents: Contents, row: int, level: str) -> str:
    """What is not claimed: the first rung that was not reached."""
    height = LEVELS.index(level) + 1
    if height == len(LEVELS):
        return ""
    step = LEVELS[height]
    claim = MISSING[step].format(name=words(contents.questions, row, "question"))
    return f"Not claimed: {claim} ({_reason(contents, row, REASONS[step])})."


REASONS = {
    "association": "no such refusal",
    "token": "beyond token identity",
    "geometry": "beyond geometry",
    "learned": "learned",
    "functional": "functional",
}
"""level -> what the claim of its refusal contains."""


def _reason(contents: Contents, row: int, claim: str) -> Shown | str:
    name, sheet = contents.questions.value(row, "question"), contents.refused
    start = f"routes depend on {name}: "
    for at in range(len(sheet.rows)):
        if str(sheet.value(at, "claim")).startswith(start + claim):
            return words(sheet, at, "why")
    return "tested, and no expert reaches it"


def refusals(contents: Contents) -> list[tuple[str, str]]:
    """Claim and reason of each refusal, as HTML."""
    sheet = contents.refused
    return [(str(words(sheet, at, "claim")), str(words(sheet, at, "why"))) for at in range(len(sheet.rows))]


def warnings(contents: Contents) -> list[str]:
    """As HTML."""
    return [str(words(contents.warnings, at, "warning")) for at in range(len(contents.warnings.rows))]


def plain(text: str) -> str:
    """Text for HTML."""
    return html.escape(text)
