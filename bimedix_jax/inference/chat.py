"""Conversation with a model: replies streamed as text, several turns, in English or Arabic.

Nothing that is said here is written to disk.
"""

import dataclasses
import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any, get_args

import jax
import numpy as np

from bimedix_jax.data.encoding import encode_chat
from bimedix_jax.data.records import Turn
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.errors import BimedixError
from bimedix_jax.inference.generate import stream
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import Record, Routing, RoutingPlan

REPLACEMENT = "\ufffd"
"""What bytes that are no UTF-8, or not yet, decode to."""


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """How replies are chosen; see generate.Sampling for the filters."""

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_k: int | None = None
    top_p: float | None = 0.9
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Reply:
    """One finished answer.

    Attributes:
      text: without surrounding blanks.
      tokens: tokens generated, the stop token not counted.
      seconds: from the question to the last token, compilation included.
      finished: False where max_new_tokens or an interruption cut it.
      dropped_turns: oldest turns that the model was not shown, since the context was full.
      routing: what the routers did with every token that the model read, those of the prompt first, as NumPy arrays
        [L, 1, T, ...]; None unless recorded.
    """

    text: str
    tokens: int
    seconds: float
    finished: bool
    dropped_turns: int
    routing: Routing | None = None


class Detokenizer:
    """Token ids to text as they come, never a part of a character: an Arabic letter may span several tokens.

    Pieces joined equal `tokenizer.decode(ids, skip_special=True)` wherever that is valid UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        # ids before `shown` have been given out; those from `context` on are decoded again, for blanks between words
        self.context = self.shown = 0

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self.ids.append(token)
        before, text = self._decoded()
        if text.endswith(REPLACEMENT) or len(text) <= len(before):
            return ""
        self.context, self.shown = self.shown, len(self.ids)
        return text[len(before) :]

    def flush(self) -> str:
        """What is left at the end: incomplete characters as U+FFFD."""
        before, text = self._decoded()
        self.context = self.shown = len(self.ids)
        return text[len(before) :]

    def _decoded(self) -> tuple[str, str]:
        before = self.tokenizer.decode(self.ids[self.context : self.shown], skip_special=True)
        return before, self.tokenizer.decode(self.ids[self.context :], skip_special=True)


def pieces_of(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Text of a stream of tokens, in pieces of whole characters."""
    detokenizer = Detokenizer(tokenizer)
    for token in tokens:
        piece = detokenizer.push(token)
        if piece:
            yield piece
    rest = detokenizer.flush()
    if rest:
        yield rest


def fit(tokenizer: Tokenizer, turns: list[Turn], room: int) -> tuple[list[int], int]:
    """Prompt tokens of a conversation in at most `room` tokens, and how many of its oldest turns were dropped for that.

    The system prompt and the last question always stay; turns go in pairs, a question with its answer.

    Raises:
      BimedixError: even the last question alone does not fit.
    """
    system = turns[:1] if turns[0].speaker == "system" else []
    rest = turns[len(system) :]
    length = 0
    for dropped in range(0, len(rest), 2):
        ids, _ = encode_chat(tokenizer, [*system, *rest[dropped:]], add_generation_prompt=True)
        length = len(ids)
        if length <= room:
            return ids, dropped
    raise BimedixError(
        f"this question needs {length} tokens and the model's context has room for {room} beside the answer; "
        "shorten it or ask for fewer new tokens"
    )


class Chat:
    """A conversation with its history."""

    def __init__(
        self,
        model: Mixtral,
        tokenizer: Tokenizer,
        system: str | None = None,
        options: ChatOptions | None = None,
        plan: RoutingPlan | None = None,
        record: Record = "none",
    ):
        """`plan` steers the routers in every reply, `record` keeps what they did in `Reply.routing`; see `generate`."""
        self.model = model
        self.tokenizer = tokenizer
        self.options = options or ChatOptions()
        if record not in get_args(Record):
            raise BimedixError(f"record is {record!r}; choose one of {', '.join(get_args(Record))}")
        if not isinstance(plan, RoutingPlan | None):
            raise BimedixError(f"plan is {plan!r}; give a RoutingPlan or None")
        self.plan = plan
        self.record: Record = record
        self.turns: list[Turn] = []
        self.system = None
        self.last: Reply | None = None
        self.restart(system)

    def restart(self, system: str | None) -> None:
        """Forget the conversation and set the system prompt (None for none)."""
        self.system = system
        self.turns = [] if system is None else [Turn(speaker="system", value=system)]
        self.last = None

    def stream(self, question: str) -> Generator[str, None, None]:
        """The reply in pieces of text; afterwards `last` describes it and the history holds both turns.

        A caller that stops early (closing the iterator, or Ctrl-C) keeps what was said so far. Where the model says
        nothing, the question leaves the history too: an empty turn fits no template.

        Raises:
          BimedixError: the question is blank or longer than the context.
        """
        if not question.strip():
            raise BimedixError("the question is empty; write something")
        turns = [*self.turns, Turn(speaker="human", value=question)]
        options, context = self.options, self.model.config.max_position_embeddings
        if options.max_new_tokens >= context:
            raise BimedixError(
                f"max_new_tokens {options.max_new_tokens} leaves no room for a question in this model's context of "
                f"{context}; ask for fewer"
            )
        prompt, dropped = fit(self.tokenizer, turns, context - options.max_new_tokens)
        start, said, tokens, finished = time.perf_counter(), "", _Answer(self.record), False
        answer = stream(
            self.model,
            prompt,
            stop_tokens=self.tokenizer.stop_ids,
            plan=self.plan,
            record=self.record,
            **dataclasses.asdict(options),
        )
        try:
            for piece in pieces_of(self.tokenizer, tokens.of(answer)):
                shown = piece if said else piece.lstrip()  # some templates open an answer with a space
                said += shown
                if shown:
                    yield shown
            finished = tokens.count < options.max_new_tokens
        finally:
            said = said.rstrip()
            seconds = time.perf_counter() - start
            self.last = Reply(said, tokens.count, seconds, finished, dropped, tokens.routing)
            if said:
                self.turns = [*turns, Turn(speaker="gpt", value=said)]

    def ask(self, question: str) -> Reply:
        """The whole reply at once."""
        for _ in self.stream(question):
            pass
        assert self.last is not None  # the stream sets it
        return self.last


class _Answer:
    """Counts the tokens of an answer as they pass, and keeps what the routers did."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.count = 0
        self.parts: list[Routing] = []

    def of(self, answer: Iterable[Any]) -> Iterator[int]:
        for item in answer:
            self.count += 1
            if self.record == "none":
                yield item
            else:
                token, routing = item
                self.parts.append(routing)
                yield token

    @property
    def routing(self) -> Routing | None:
        """Of all parts, one after the other."""
        if not self.parts:
            return None
        return jax.tree.map(lambda *parts: np.concatenate(parts, axis=2), *self.parts)


def reply(
    model: Mixtral,
    tokenizer: Tokenizer,
    question: str,
    system: str | None = None,
    options: ChatOptions | None = None,
    plan: RoutingPlan | None = None,
) -> str:
    """The answer to one question."""
    return Chat(model, tokenizer, system, options, plan).ask(question).text
