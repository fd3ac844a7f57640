"""The shape of a chat, drawn for each question from a seed: its length, the place of the answer, and the languages.

A turn in the paper's tables is an exchange: the patient speaks and the doctor replies. The paper gives only the mean of
its chats, 4.7 exchanges. Their distribution and everything else here are our choice.
"""

import random
from dataclasses import dataclass
from typing import Literal

from bimedix_jax.data.records import Language, Record

LEAST = 2
"""Exchanges of the shortest chat: one to ask, one to answer."""

ANSWER_LATE = 0.6
"""Mean share of the exchanges after the second that come before the answer."""


@dataclass(frozen=True, kw_only=True)
class ChatStyle:
    """The distribution from which shapes are drawn.

    Raises:
        ValueError: a mean outside 2 to the most, or a share outside 0 to 1.
    """

    mean: float = 4.7
    most: int = 10
    switch_share: float = 0.1
    language: Literal["same", "en", "ar"] = "same"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.most < LEAST or not LEAST <= self.mean <= self.most:
            raise ValueError(f"the mean number of turns must be from {LEAST} to {self.most}, not {self.mean}")
        if not 0 <= self.switch_share <= 1:
            raise ValueError("switch_share must be from 0 to 1")


@dataclass(frozen=True)
class ChatShape:
    """The language of each exchange of a chat, and the exchange (from 1) in which the doctor gives the answer."""

    languages: tuple[Language, ...]
    answer: int

    @property
    def exchanges(self) -> int:
        """Number of exchanges."""
        return len(self.languages)

    @property
    def language(self) -> Language:
        """The language of the first exchange."""
        return self.languages[0]

    @property
    def switch(self) -> int | None:
        """The exchange (from 1) in which the patient changes the language."""
        return next((n for n, language in enumerate(self.languages, start=1) if language != self.language), None)

    def turns(self) -> list[dict[str, str]]:
        """Speaker, language and purpose of every turn, for the prompt."""
        found = []
        for number, language in enumerate(self.languages, start=1):
            switches = " and goes over to this language" if number == self.switch else ""
            found.append({"speaker": "patient", "language": language, "purpose": self._patient(number) + switches})
            found.append({"speaker": "doctor", "language": language, "purpose": self._doctor(number)})
        return found

    def _patient(self, number: int) -> str:
        if number == 1:
            return "says why they came"
        if number <= self.answer:
            return "answers the doctor's questions"
        return "asks something that follows from the answer"

    def _doctor(self, number: int) -> str:
        if number < self.answer:
            return "asks what is still needed, concludes nothing"
        return "gives the answer and the reason" if number == self.answer else "replies, consistent with the answer"


def draw(record: Record, style: ChatStyle) -> ChatShape:
    """The shape of a question's chat. It depends only on the question's id and the style.

    The number of exchanges is 2 plus a binomial number out of `most` - 2, which has the requested mean and limits.
    """
    chance = random.Random(f"{style.seed}:{record.id}")
    spare = style.most - LEAST
    share = (style.mean - LEAST) / spare if spare else 0.0
    exchanges = LEAST + sum(chance.random() < share for _ in range(spare))
    answer = LEAST + sum(chance.random() < ANSWER_LATE for _ in range(exchanges - LEAST))
    first: Language = record.language if style.language == "same" else style.language
    other: Language = "ar" if first == "en" else "en"
    switches = chance.random() < style.switch_share
    at = chance.randint(2, exchanges)
    return ChatShape(tuple(other if switches and number >= at else first for number in range(1, exchanges + 1)), answer)
