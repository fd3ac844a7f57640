"""Which of our chat templates a checkpoint's Jinja source is.

The source is run in Jinja's sandbox, with the extensions that transformers gives it, on conversations with one and
several turns, with and without a system prompt, and with blanks and markup in the texts. One of our templates is
recognised if it renders every one of them exactly alike. Three things may differ from the template as it is declared:
the beginning-of-sequence token at the start, a default system prompt, and whether turns are stripped of blanks.
"""

import dataclasses
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from bimedix_jax.data.records import Turn, conversation
from bimedix_jax.data.templates import TEMPLATES, ChatTemplate
from bimedix_jax.data.tokenizer_files import chat_templates
from bimedix_jax.errors import BimedixError, listed

log = logging.getLogger(__name__)

PLAIN = ("First question?", "First answer.", "Second question?", "Second answer.")
BLANK = (" \n One\n\n question? ", " An  answer.\n", "\tTwo \n", " \nb ")
MARKUP = ('1 < 2 & "a"\'s', "<think>x</think>y {{ z }}", "[/INST] {% if %}", "</b>&amp;é الربو")
SYSTEM = (None, "System prompt.", " \nA system\n\nprompt. \n")
SPEAKERS = ("system", "human", "gpt")

JINJA_FAILURES = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)
"""What the source can raise besides Jinja's own errors, since it is a program by somebody else."""


def source(folder: str | Path) -> str | None:
    """Jinja source of a checkpoint's chat template, None if it has none (base models).

    Raises:
        BimedixError: it has several, and none of them is called `default`.
    """
    found = chat_templates(Path(folder))
    if found and "default" not in found:
        raise BimedixError(
            f"{folder} has the chat template(s) {listed(sorted(found))}, but none is named default; rename one, or "
            f"{_remedy()}"
        )
    return found.get("default")


def detect(folder: str | Path, special: Mapping[str, str]) -> ChatTemplate:
    """The template of templates.py that renders like the checkpoint's own, changed as the module describes.

    `special` has the tokenizer's special tokens by role (bos, eos, pad, unk).

    Raises:
        BimedixError: the checkpoint has no template, or one that renders like none of TEMPLATES.
    """
    jinja = source(folder)
    if jinja is None:
        raise BimedixError(f"{folder} has no chat template; {_remedy()}")
    try:
        own = Jinja(jinja, special)
    except ValueError as error:
        raise BimedixError(f"the chat template of {folder} is not valid Jinja ({error}); {_remedy()}") from None
    bare = own.render(conversation(*PLAIN[:3]), True)
    if bare is not None:
        bos, eos = special.get("bos", ""), special.get("eos", "")
        wanted = [(turns, prompt, own.render(turns, prompt)) for turns, prompt in _probes()]
        for template in itertools.chain.from_iterable(
            _variants(declared, bos, bare) for declared in TEMPLATES.values()
        ):
            if _renders(template, wanted, bos, eos):
                if own.reads_clock:
                    log.warning("The chat template of %s writes today's date, so its tokens differ every day.", folder)
                return dataclasses.replace(template, jinja=jinja)
    reason = f" (it fails with {own.failure!r})" if bare is None else ""
    raise BimedixError(f"the chat template of {folder} is not a known one{reason}; {_remedy()}")


def _remedy() -> str:
    return f"name the template to use ({', '.join(TEMPLATES)}), for instance `--template plain`"


def _probes() -> Iterator[tuple[tuple[Turn, ...], bool]]:
    """Conversations, and whether a prompt for an answer follows."""
    for texts, system in itertools.product((PLAIN, BLANK, MARKUP), SYSTEM):
        for length in (1, 2, 3, 4):
            yield conversation(*texts[:length], system=system), length % 2 == 1


def _variants(declared: ChatTemplate, bos: str, bare: str) -> Iterator[ChatTemplate]:
    """`declared` with and without a beginning-of-sequence token, default system prompt and stripped turns.

    `bare` is what the checkpoint's template renders for PLAIN[:3].
    """
    starts = [declared.start, *(start for start in ("", "{bos}") if start != declared.start)] if bos else [""]
    subsets = [trimmed for size in range(4) for trimmed in itertools.combinations(SPEAKERS, size)]
    for start, trimmed in itertools.product(starts, subsets):
        template = dataclasses.replace(declared, start=start, trimmed=trimmed)
        yield template
        if template.system is None:
            continue
        before, after = template.system.split("{text}")
        opening = start.replace("{bos}", bos) + before
        end = bare.find(after, len(opening))
        if bare.startswith(opening) and bare[len(opening) : max(end, 0)].strip():
            # kept as it is where system prompts are stripped: a default that a template writes has its blanks
            yield dataclasses.replace(template, default_system=bare[len(opening) : end])


def _renders(
    template: ChatTemplate, wanted: Iterable[tuple[Sequence[Turn], bool, str | None]], bos: str, eos: str
) -> bool:
    """Whether the template renders the probes as wanted.

    None for every probe with a system prompt is accepted: the published Mixtral template raises an error there, and
    ours renders it nevertheless. None for any other probe is not.
    """
    pairs = [(turns, text, template.text(turns, bos, eos, prompt)) for turns, prompt, text in wanted]
    instructed = [text for turns, text, _ in pairs if turns[0].speaker == "system"]
    refuses = all(text is None for text in instructed)
    return all(text == ours for turns, text, ours in pairs if not (refuses and turns[0].speaker == "system"))


class Jinja:
    """A chat template as transformers' `apply_chat_template(tokenize=False)` renders it."""

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        """Raises ValueError with line and message if the source is not valid Jinja."""
        import jinja2

        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"line {error.lineno}: {error.message}") from None
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(str(error)) from None
        tokens = {f"{role}_token": text for role, text in special.items()}
        self._values = {"bos_token": "", "eos_token": "", **tokens, "tools": None, "documents": None}
        self.failure = ""  # the message of the last error
        self.reads_clock = False  # whether the time was asked for
        self._template.globals["strftime_now"] = self._now

    def _now(self, form: str) -> str:
        self.reads_clock = True
        return datetime.now().strftime(form)

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool) -> str | None:
        """The text of the conversation; None if the template raises an error."""
        import jinja2

        roles = {"system": "system", "human": "user", "gpt": "assistant"}
        messages = [{"role": roles[turn.speaker], "content": turn.value} for turn in turns]
        try:
            return self._template.render(**self._values, messages=messages, add_generation_prompt=add_generation_prompt)
        except (*JINJA_FAILURES, jinja2.TemplateError) as error:
            self.failure = str(error) or type(error).__name__
            return None


def _environment() -> Any:
    """Jinja's sandbox with the extensions of transformers' chat_template_utils.py."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant writes; it changes no text."""

        tags = {"generation"}  # noqa: RUF012  # declared by Jinja as it is

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

        def _text(self, caller: Any) -> str:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment
