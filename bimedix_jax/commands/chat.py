"""`bimedix chat`: talk with a model in the terminal, or get the replies to prompts from the command line."""

import dataclasses
import json
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from bimedix_jax.errors import BimedixError
from bimedix_jax.notice import NOTICE_AR, NOTICE_EN

if TYPE_CHECKING:
    from bimedix_jax.inference.chat import Chat

COMMANDS_HELP = (
    "/retry asks for another reply, /undo forgets the last exchange, /reset the conversation, "
    "/system TEXT sets a system prompt and starts over, /quit exits."
)
COMMANDS = ("/retry", "/undo", "/reset", "/system", "/quit", "/exit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Chat with a model in English or Arabic. For research only.

    The conversation is stored only if --save names a file. Ctrl-C stops a reply, and at the prompt it exits.
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
    prompt: tuple[str, ...] = ()
    """Prompts, as the turns of one conversation; by default they are read from the keyboard."""
    system: str | None = None
    """System prompt; by default none, or that of the chat template."""
    max_new_tokens: int = 512
    """Longest reply in tokens."""
    temperature: float = 0.7
    """Randomness; 0 always chooses the most likely token."""
    top_k: int | None = None
    """Choose among this many of the most likely tokens; by default among all."""
    top_p: float = 0.9
    """Choose among the most likely tokens that together reach this probability; with 1, among all."""
    min_p: float | None = None
    """Choose among tokens at least this fraction as likely as the most likely one; by default among all."""
    repetition_penalty: float | None = None
    """A value above 1 makes tokens that occurred before less likely; by default 1."""
    seed: int = 0
    """Seed of the sampling. Each reply of a conversation has its own seed: this one plus the number of replies before
    it."""
    intervene: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON file of rules that tell the routers what to do (docs/routing.md); by default none."""
    bidi: bool = False
    """Join Arabic letters and print them from right to left, line by line: for terminals without bidirectional text.
    Windows Terminal, kitty, Alacritty, xterm, tmux and screen are recognised (BIMEDIX_BIDI=0 turns that off)."""
    save: Path | None = None
    """Write the conversation to this new JSONL file; by default it is not stored. It may contain words of patients."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Runs the conversation. Returns the replies if prompts were given, otherwise only counts."""
    from bimedix_jax import startup

    startup.keep_programs()
    from bimedix_jax.bidi import is_needed, reorders_nothing
    from bimedix_jax.checkpoint.hub import resolve
    from bimedix_jax.checkpoint.load import load
    from bimedix_jax.data.vocabulary import context_of, tokenizer_of_model
    from bimedix_jax.inference.chat import Chat, ChatOptions, require_text
    from bimedix_jax.inference.decoding_layout import store_for_decoding
    from bimedix_jax.inference.keyboard import Keyboard
    from bimedix_jax.routing.interventions import check_fit, rules_of

    if console.stderr and not config.prompt:
        raise BimedixError("with --json nothing is read from the keyboard; give at least one --prompt")
    for text in (config.system or "", *config.prompt):
        require_text(text, "a prompt")
    options = ChatOptions(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        seed=config.seed,
    )
    options.check()
    rules = rules_of(config.intervene)
    if config.save is not None:
        create(config.save)
    try:
        folder = resolve(config.model, config.revision)
        tokenizer = tokenizer_of_model(folder, config.model, config.tokenizer, config.template)
        options.check(context_of(folder))
        check_fit(rules, folder)
        model = load(folder, base=config.base, adapter=config.adapter, router=config.router)
        store_for_decoding(model)
        chat = Chat(model, tokenizer, config.system, options, rules)
        if rules is not None:
            rules.check(model.config)
    except BaseException:
        if config.save is not None:
            config.save.unlink(missing_ok=True)
        raise
    bidi = is_needed(config.bidi or reorders_nothing(), console.file)
    show_notice(console, bidi)
    try:
        if config.prompt:
            return answer_prompts(chat, config, console, bidi)
        colour = console.is_terminal and not console.no_color
        with Keyboard("you> ", lambda: console.input("[bold]you>[/] "), COMMANDS, colour) as keyboard:
            return converse(chat, console, keyboard.read, bidi)
    finally:
        if config.save is not None:
            save(chat, config.model, config.save)
            console.print(f"The conversation is in {config.save}.", style="dim", markup=False)


def show_notice(console: Console, bidi: bool = False) -> None:
    """Prints the research-only notice in both languages."""
    console.print(NOTICE_EN, style="yellow")
    if bidi:
        for line in visual_lines(NOTICE_AR, console):
            console.print(line, style="yellow", highlight=False, soft_wrap=True)
    else:
        console.print(NOTICE_AR, style="yellow", highlight=False)


def answer_prompts(chat: "Chat", config: Config, console: Console, bidi: bool) -> dict[str, Any]:
    """Answers the prompts of the command line in order, as the turns of one conversation."""
    replies = []
    for prompt in config.prompt:
        console.print(Text(f"you> {shown(prompt, bidi)}", style="bold"))
        print_reply(chat, chat.stream(prompt), console, bidi)
        replies.append({"prompt": prompt, **dataclasses.asdict(chat.last)} if chat.last else {"prompt": prompt})
    return {"notice": {"en": NOTICE_EN, "ar": NOTICE_AR}, "system": config.system, "replies": replies}


def converse(chat: "Chat", console: Console, read: Callable[[], str], bidi: bool = False) -> dict[str, Any]:
    """Reads questions until /quit, the end of the input or Ctrl-C. The result has counts and no words of it."""
    from bimedix_jax.bidi import is_right_to_left

    console.print(COMMANDS_HELP, style="dim", highlight=False)
    counts = {"turns": 0, "tokens": 0, "dropped_turns": 0, "seconds": 0.0}
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return counts
        word = line.partition(" ")[0]
        if word in ("/quit", "/exit"):
            return counts
        if line.startswith("/") and word != "/retry":
            run_slash_command(chat, line, console)
        elif line:
            retry = word == "/retry"
            if bidi and is_right_to_left(line):  # the terminal showed what was typed in the wrong order
                for part in visual_lines(line, console):
                    console.print(part, style="dim", highlight=False, markup=False, soft_wrap=True)
            try:
                print_reply(chat, chat.retry() if retry else chat.stream(line), console, bidi)
            except BimedixError as error:  # the question does not fit; the conversation continues
                console.print(f"error: {error}", style="red", highlight=False, markup=False)
                continue
            if chat.last is not None:
                counts["turns"] += not retry
                counts["tokens"] += chat.last.tokens
                counts["seconds"] += chat.last.seconds
                counts["dropped_turns"] = max(counts["dropped_turns"], chat.last.dropped_turns)


def run_slash_command(chat: "Chat", line: str, console: Console) -> None:
    """Runs a line that begins with a slash."""
    word, _, rest = line.partition(" ")
    if word == "/reset":
        chat.restart(chat.system)
        console.print("The conversation is forgotten.", style="dim")
    elif word == "/undo":
        try:
            question = chat.undo()
        except BimedixError as error:
            console.print(f"error: {error}", style="red", highlight=False, markup=False)
        else:
            note = f"Forgotten: {shown(question, bidi=False)[:60]}"
            console.print(note, style="dim", highlight=False, markup=False)
    elif word == "/system":
        chat.restart(rest.strip() or None)
        console.print(f"{'New' if chat.system else 'No'} system prompt, new conversation.", style="dim")
    else:
        console.print(f"There is no command {word}. {COMMANDS_HELP}", style="red", highlight=False, markup=False)


def print_reply(chat: "Chat", pieces: Generator[str, None, None], console: Console, bidi: bool) -> None:
    """Streams the reply to the console; Ctrl-C ends the reply and not the conversation."""
    try:
        for text in lines(pieces) if bidi else pieces:
            clean = shown(text, bidi=False)
            if bidi:
                clean = "\n".join(visual_lines(clean.removesuffix("\n"), console)) + "\n" * clean.endswith("\n")
            console.print(Text(clean), end="", soft_wrap=True)
            console.file.flush()
    except KeyboardInterrupt:
        pieces.close()
    console.print()
    if chat.last is None:
        return
    if chat.last.dropped_turns:
        note = f"The context is full: the model no longer sees the oldest {chat.last.dropped_turns} turns."
        console.print(note, style="bold yellow", highlight=False)
    if not chat.last.text:
        console.print("The reply is empty; the question is dropped.", style="yellow")
    elif not chat.last.finished:
        console.print("(cut off)", style="dim", markup=False)


def shown(text: str, bidi: bool) -> str:
    """`text` without control characters, which could change the terminal, and with `bidi` in visual order."""
    clean = "".join(letter for letter in text if letter in "\n\t" or letter.isprintable() or letter in "\u200c\u200d")
    if not bidi:
        return clean
    from bimedix_jax.bidi import visual

    return "\n".join(visual(line) for line in clean.split("\n"))


def visual_lines(text: str, console: Console) -> list[str]:
    """`text` in visual order, one entry for each line of the console; paragraphs in Arabic are at the right margin.

    Lines are wrapped before they are reordered: a terminal would break reordered ones at the wrong end.
    """
    from bimedix_jax.bidi import is_right_to_left, visual

    found = []
    for paragraph in text.split("\n"):
        from_right = is_right_to_left(paragraph)
        for part in Text(paragraph).wrap(console, console.width) if paragraph else [Text("")]:
            line = visual(part.plain.strip(), from_right) if from_right else visual(part.plain.rstrip())
            found.append(" " * (console.width - cell_len(line)) + line if from_right else line)
    return found


def lines(pieces: Iterator[str]) -> Iterator[str]:
    """Pieces joined to complete lines, since only a complete line can be reordered."""
    waiting = ""
    for piece in pieces:
        *whole, waiting = (waiting + piece).split("\n")
        for line in whole:
            yield f"{line}\n"
    if waiting:
        yield waiting


def create(path: Path) -> None:
    """Creates the empty file of the conversation, which only its owner can read.

    Raises:
      BimedixError: it exists, or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600, exist_ok=False)
    except FileExistsError:
        blocked = path if path.exists() else path.parent
        raise BimedixError(f"{blocked} exists; name a new file for the conversation") from None
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise BimedixError(f"cannot write {path} ({reason}); name another file with --save") from None


def save(chat: "Chat", model: str, path: Path) -> None:
    """Writes the conversation as one line of JSON, with the keys of records."""
    turns = [{"from": turn.speaker, "value": turn.value} for turn in chat.turns]
    row = {"saved": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "model": model, "conversations": turns}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
