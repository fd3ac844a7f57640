"""Chat templates as values, with the parts of the text that the assistant wrote marked.

A checkpoint has its template as Jinja source, which is a program by somebody else. template_detection.py recognises
which of the templates below it is. Training and chat then use that value, because Jinja's output does not say which
characters the assistant wrote.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bimedix_jax.data.records import Turn
from bimedix_jax.errors import BimedixError


@dataclass(frozen=True)
class Span:
    """A piece of rendered text, written by the template (`markup`) or by a speaker; `learned` if the loss counts it."""

    text: str
    markup: bool
    learned: bool


@dataclass(frozen=True)
class ChatTemplate:
    """How turns are rendered. `{text}` is replaced by a turn, `{bos}` and `{eos}` by the tokenizer's tokens."""

    name: str
    start: str  # once, before everything
    system: str | None  # a system prompt; None: it is put before the first human turn, with a blank line between
    human: str
    answer_opening: str  # what a prompt for an answer ends with
    answer: str  # the rest of an assistant turn: all that the model has to generate
    answer_closing: str  # what follows before the next turn; not learned
    jinja: str  # the same template for Hugging Face, written when a checkpoint is exported
    default_system: str | None = None  # the system prompt of a conversation that has none
    trimmed: tuple[str, ...] = ()  # speakers whose turns are written without surrounding whitespace

    def parts(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> list[tuple[str, str, bool]]:
        """(a wrapper of the template, the text for its `{text}`, whether it is learned), in order."""
        turns = [_trimmed(turn) if turn.speaker in self.trimmed else turn for turn in turns]
        if self.system is not None and self.default_system is not None and not _has_system(turns):
            turns.insert(0, Turn(speaker="system", value=self.default_system))
        if self.system is None and _has_system(turns):
            if len(turns) == 1:
                raise BimedixError(f"the {self.name} template needs a human turn after the system prompt; add one")
            joined = f"{turns[0].value}\n\n{turns[1].value}"
            turns = [Turn(speaker="human", value=joined), *turns[2:]]
        found = [(self.start, "", False)]
        for turn in turns:
            if turn.speaker == "gpt":
                found.append((self.answer_opening, "", False))
                found.append((self.answer, turn.value, turn.learned))
                found.append((self.answer_closing, "", False))
            else:
                wrapper = self.human if turn.speaker == "human" else self.system
                assert (
                    wrapper is not None
                )  # without a system wrapper the system prompt was joined to the first human turn above
                found.append((wrapper, turn.value, False))
        if add_generation_prompt:
            found.append((self.answer_opening, "", False))
        return found

    def render(self, turns: Sequence[Turn], bos: str, eos: str, add_generation_prompt: bool = False) -> list[Span]:
        """Spans that concatenate to the text of the conversation."""
        spans = []
        for wrapper, value, learned in self.parts(turns, add_generation_prompt):
            before, after = split_wrapper(wrapper, bos, eos)
            spans += [Span(before, True, learned), Span(value, False, learned), Span(after, True, learned)]
        return [span for span in spans if span.text]

    def text(self, turns: Sequence[Turn], bos: str, eos: str, add_generation_prompt: bool = False) -> str:
        """The rendered conversation."""
        return "".join(span.text for span in self.render(turns, bos, eos, add_generation_prompt))


_MISTRAL_JINJA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n\\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for turn in turns %}{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must alternate, after at most one system message') }}{% endif %}"
    "{% if turn['role'] == 'user' %}"
    "{{ 'SPACE[INST] ' + (system if loop.first else '') + turn['content'] + ' [/INST]' }}"
    "{% else %}{{ 'SPACE' + turn['content'] + eos_token }}{% endif %}{% endfor %}"
)

_ROLE_JINJA = (
    "{% for turn in messages %}"
    "{{ '<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_PLAIN_JINJA = (
    "{{ bos_token }}{% for turn in messages %}{% if turn['role'] == 'system' %}{{ turn['content'] + '\\n\\n' }}"
    "{% elif turn['role'] == 'user' %}{{ 'User: ' + turn['content'] + '\\n' }}"
    "{% else %}{{ 'Assistant: ' + turn['content'] + eos_token + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

TEMPLATES = {
    template.name: template
    for template in (
        # Mixtral-8x7B-Instruct-v0.1 as on its hub page today, with the spacing that Mistral calls V1
        ChatTemplate(
            name="mixtral",
            start="{bos}",
            system=None,
            human=" [INST] {text} [/INST]",
            answer_opening="",
            answer=" {text}{eos}",
            answer_closing="",
            jinja=_MISTRAL_JINJA.replace("SPACE", " "),
        ),
        # the template of the same model when it was published in December 2023; derived models still have it
        ChatTemplate(
            name="mixtral-2023",
            start="{bos}",
            system=None,
            human="[INST] {text} [/INST]",
            answer_opening="",
            answer="{text}{eos}",
            answer_closing="",
            jinja=_MISTRAL_JINJA.replace("SPACE", ""),
        ),
        ChatTemplate(
            name="chatml",
            start="",
            system="<|im_start|>system\n{text}<|im_end|>\n",
            human="<|im_start|>user\n{text}<|im_end|>\n",
            answer_opening="<|im_start|>assistant\n",
            answer="{text}<|im_end|>",
            answer_closing="\n",
            jinja=_ROLE_JINJA,
        ),
        # for base models, which were trained without a template
        ChatTemplate(
            name="plain",
            start="{bos}",
            system="{text}\n\n",
            human="User: {text}\n",
            answer_opening="Assistant:",
            answer=" {text}{eos}",
            answer_closing="\n",
            jinja=_PLAIN_JINJA,
        ),
    )
}


def named(name: str) -> ChatTemplate:
    """The template of that name.

    Raises:
        BimedixError: there is none; the message lists them.
    """
    if name not in TEMPLATES:
        raise BimedixError(f"there is no chat template {name!r}; name one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def split_wrapper(wrapper: str, bos: str, eos: str) -> tuple[str, str]:
    """The text that a wrapper writes before and after a turn."""
    before, _, after = wrapper.replace("{bos}", bos).replace("{eos}", eos).partition("{text}")
    return before, after


def _trimmed(turn: Turn) -> Turn:
    return Turn(speaker=turn.speaker, value=turn.value.strip())


def _has_system(turns: Sequence[Turn]) -> bool:
    return bool(turns) and turns[0].speaker == "system"
