"""Conversation with a model: replies streamed as text, over several turns, in English or Arabic.

Nothing is written to disk.
"""

import dataclasses
import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any, Literal, get_args, overload

import jax
import numpy as np

from bimedix_jax.data.encoding import encode_chat, roles_of_chat
from bimedix_jax.data.records import Turn
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.errors import BimedixError
from bimedix_jax.inference.generate import Sampling, stream
from bimedix_jax.inference.planning import AnyPlan, Rules, Source, language_of
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import Record, Routing, RoutingPlan

REPLACEMENT = "\ufffd"
"""Decoded from bytes that are not valid UTF-8, or not yet complete."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Options of generation; see generate.Sampling for the filters."""

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_k: int | None = None
    top_p: float | None = 0.9
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0

    def check(self, context: int | None = None) -> None:
        """Checks every number, and with `context` that there is room for a question; no model is needed.

        Raises:
          BimedixError: a number outside its range.
        """
        if self.max_new_tokens < 1:
            raise BimedixError(f"max_new_tokens is {self.max_new_tokens}; give at least 1")
        if not 0 <= self.seed < 2**32:
            raise BimedixError(f"seed is {self.seed}; give a number from 0 to {2**32 - 1}")
        Sampling.of(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        if context is not None and self.max_new_tokens >= context:
            raise BimedixError(
                f"max_new_tokens is {self.max_new_tokens}, which leaves no room for a question in this model's "
                f"context of {context}; ask for fewer"
            )


@dataclasses.dataclass(frozen=True)
class Reply:
    """One finished answer.

    Attributes:
      text: the answer without surrounding whitespace.
      tokens: number of tokens generated, without the stop token.
      seconds: from the question to the last token, compilation included.
      finished: False if max_new_tokens or an interruption cut it off.
      dropped_turns: number of the oldest turns that were left out because the context was full.
      routing: what the routers did with every token that the model read, first those of the prompt, as NumPy arrays
        [L, 1, T, ...]; None unless recorded.
    """

    text: str
    tokens: int
    seconds: float
    finished: bool
    dropped_turns: int
    routing: Routing | None = None


class Detokenizer:
    """Text from a stream of token ids, in whole characters: an Arabic letter may span several tokens.

    The pieces together equal `tokenizer.decode(ids, skip_special=True)` if that is valid UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        # ids before `shown` were returned as text; those from `context` on are decoded again, for spaces between words
        self.context = self.shown = 0

    def push(self, token: int) -> str:
        """The text that `token` completes; empty if a character is still incomplete."""
        self.ids.append(token)
        before, text = self._decoded()
        if text.endswith(REPLACEMENT) or len(text) <= len(before):
            return ""
        self.context, self.shown = self.shown, len(self.ids)
        return text[len(before) :]

    def flush(self) -> str:
        """The rest of the text at the end; an incomplete character becomes U+FFFD."""
        before, text = self._decoded()
        self.context = self.shown = len(self.ids)
        return text[len(before) :]

    def _decoded(self) -> tuple[str, str]:
        before = self.tokenizer.decode(self.ids[self.context : self.shown], skip_special=True)
        return before, self.tokenizer.decode(self.ids[self.context :], skip_special=True)


def pieces_of(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of a stream of tokens, in pieces of whole characters."""
    detokenizer = Detokenizer(tokenizer)
    for token in tokens:
        piece = detokenizer.push(token)
        if piece:
            yield piece
    rest = detokenizer.flush()
    if rest:
        yield rest


def fit(tokenizer: Tokenizer, turns: list[Turn], room: int) -> tuple[list[int], int]:
    """Prompt of a conversation in at most `room` tokens, and the number of its oldest turns that were dropped.

    Turns are dropped in pairs, a question with its answer. The system prompt and the last question are always kept.

    Raises:
      BimedixError: the last question alone does not fit.
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
        f"this question has {length} tokens, but the model's context has room for {room} besides the answer; shorten "
        "it or ask for fewer new tokens"
    )


def require_text(text: str, name: str) -> None:
    """Raises BimedixError for bytes that are not UTF-8, which Python reads as halves of surrogate pairs."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BimedixError(
            f"{name} is not valid UTF-8 (character {error.start + 1}); use a terminal or an input in UTF-8"
        ) from error


class Chat:
    """A conversation and its history.

    Each reply is sampled with its own seed, `options.seed` plus the number of replies before it. Otherwise similar
    questions would get the same words, and `retry` the same reply.
    """

    def __init__(
        self,
        model: Mixtral,
        tokenizer: Tokenizer,
        system: str | None = None,
        options: ChatOptions | None = None,
        plan: AnyPlan = None,
        record: Record = "none",
    ):
        """`plan` applies to every reply; `record` keeps what the routers did in `Reply.routing`. See `generate`."""
        self.model = model
        self.tokenizer = tokenizer
        self.options = options or ChatOptions()
        if record not in get_args(Record):
            raise BimedixError(f"record is {record!r}; choose one of {', '.join(get_args(Record))}")
        if not isinstance(plan, RoutingPlan | Rules | None):
            raise BimedixError(f"plan is {plan!r}; give a RoutingPlan, rules or None")
        self.plan = plan
        self.record: Record = record
        self.turns: list[Turn] = []
        self.system = None
        self.last: Reply | None = None
        self.asked: str | None = None
        self.replies = 0
        self.restart(system)

    def restart(self, system: str | None) -> None:
        """Forget the conversation and set the system prompt; None: no system prompt."""
        require_text(system or "", "the system prompt")
        self.system = system
        self.turns = [] if system is None else [Turn(speaker="system", value=system)]
        self.last = None
        self.asked = None

    def undo(self) -> str:
        """Forget the last question with its reply; returns the question.

        Raises:
          BimedixError: there is none.
        """
        if len(self.turns) < 2 or self.turns[-1].speaker != "gpt":
            raise BimedixError("there is no exchange to undo; ask something first")
        *self.turns, question, _ = self.turns
        self.last = None
        self.asked = None
        return question.value

    def retry(self) -> Generator[str, None, None]:
        """Another reply to the last question, also to one whose reply was empty. It replaces the old reply.

        If it is empty, the old one is kept.

        Raises:
          BimedixError: nothing was asked yet.
        """
        turns, question = self.turns, self.asked
        if question is None or (self.last is not None and self.last.text):
            question = self.undo()
        try:
            yield from self.stream(question)
        finally:
            if self.last is None or not self.last.text:
                self.turns = turns

    def stream(self, question: str) -> Generator[str, None, None]:
        """The reply in pieces of text. Afterwards `last` describes it, and both turns are in the history.

        If the caller stops early, by closing the iterator or with Ctrl-C, the text so far is kept. If the reply is
        empty, the question is removed from the history as well, since no template allows an empty turn.

        Raises:
          BimedixError: the question is blank, is not valid text, or is longer than the context.
        """
        require_text(question, "the question")
        if not question.strip():
            raise BimedixError("the question is empty; write something")
        turns = [*self.turns, Turn(speaker="human", value=question)]
        options, context = self.options, self.model.config.max_position_embeddings
        options.check(context)
        prompt, dropped = fit(self.tokenizer, turns, context - options.max_new_tokens)
        self.asked = question
        options = dataclasses.replace(options, seed=(options.seed + self.replies) % 2**32)
        self.replies += 1
        start, text, tokens, finished = time.perf_counter(), "", _Answer(self.record), False
        answer = stream(
            self.model,
            prompt,
            stop_tokens=self.tokenizer.stop_ids,
            plan=self._plan(turns, dropped),
            record=self.record,
            **dataclasses.asdict(options),
        )
        try:
            for piece in pieces_of(self.tokenizer, tokens.of(answer)):
                shown = piece if text else piece.lstrip()  # some templates begin an answer with a space
                text += shown
                if shown:
                    yield shown
            finished = tokens.count < options.max_new_tokens
        finally:
            text = text.rstrip()
            seconds = time.perf_counter() - start
            self.last = Reply(text, tokens.count, seconds, finished, dropped, tokens.routing)
            if text:
                self.turns = [*turns, Turn(speaker="gpt", value=text)]

    def _plan(self, turns: list[Turn], dropped: int) -> Any:
        """The plan of a reply to these turns. With rules, the language is that of the last question by its letters."""
        if not isinstance(self.plan, Rules):
            return self.plan
        system = turns[:1] if turns[0].speaker == "system" else []
        kept = [*system, *turns[len(system) + dropped :]]
        roles = roles_of_chat(self.tokenizer, kept, add_generation_prompt=True)
        source = Source("chat", language_of(turns[-1].value), "chat", roles, where="conversations")
        return self.plan.planner(self.model.config, [source])

    def ask(self, question: str) -> Reply:
        """The complete reply."""
        for _ in self.stream(question):
            pass
        assert self.last is not None  # the stream sets it
        return self.last


class _Answer:
    """Counts the tokens of an answer as they are generated, and keeps what the routers did."""

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
        """The record of all parts, concatenated."""
        if not self.parts:
            return None
        return jax.tree.map(lambda *parts: np.concatenate(parts, axis=2), *self.parts)


@overload
def reply(
    model: Mixtral,
    tokenizer: Tokenizer,
    question: str,
    system: str | None = None,
    options: ChatOptions | None = None,
    plan: AnyPlan = None,
    record: Literal["none"] = "none",
) -> str: ...


@overload
def reply(
    model: Mixtral,
    tokenizer: Tokenizer,
    question: str,
    system: str | None = None,
    options: ChatOptions | None = None,
    plan: AnyPlan = None,
    *,
    record: Literal["choices", "full"],
) -> tuple[str, Routing]: ...


def reply(
    model: Mixtral,
    tokenizer: Tokenizer,
    question: str,
    system: str | None = None,
    options: ChatOptions | None = None,
    plan: AnyPlan = None,
    record: Record = "none",
) -> Any:
    """The answer to one question; with a record, (answer, what the routers did as in `Reply.routing`)."""
    found = Chat(model, tokenizer, system, options, plan, record).ask(question)
    return found.text if record == "none" else (found.text, found.routing)
