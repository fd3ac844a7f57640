"""`bimedix chat`: talk with a model in the terminal, or get the replies to prompts from the command line."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.text import Text

from bimedix_jax.errors import BimedixError
from bimedix_jax.notice import NOTICE_AR, NOTICE_EN

if TYPE_CHECKING:
    from bimedix_jax.inference.chat import Chat

COMMANDS_HELP = "/reset forgets the conversation, /system TEXT sets a system prompt and starts over, /quit exits."


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
    """Choose among the most likely tokens that together reach this probability; 1 keeps all."""
    min_p: float | None = None
    """Choose among tokens at least this fraction as likely as the most likely one; by default among all."""
    repetition_penalty: float | None = None
    """Above 1, makes tokens less likely that occurred before; by default 1."""
    seed: int = 0
    """Seed of the sampling."""
    bidi: bool = False
    """Reorder and join Arabic letters before printing, line by line: for terminals without bidirectional text, such as
    Windows Terminal, kitty, Alacritty, xterm and tmux."""
    save: Path | None = None
    """Write the conversation to this new JSONL file; by default it is not stored. It may contain words of patients."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Runs the conversation. Returns the replies if prompts were given, otherwise only counts."""
    from bimedix_jax.bidi import is_needed
    from bimedix_jax.checkpoint.hub import resolve
    from bimedix_jax.checkpoint.load import load
    from bimedix_jax.data.tokenizer import load_tokenizer
    from bimedix_jax.data.vocabulary import require_fit, vocab_size_of
    from bimedix_jax.inference.chat import Chat, ChatOptions, require_text

    config = dataclasses.replace(config, bidi=is_needed(config.bidi, console.file))
    if console.stderr and not config.prompt:
        raise BimedixError("with --json nothing is read from the keyboard; give at least one --prompt")
    if config.save is not None and config.save.exists():
        raise BimedixError(f"{config.save} exists; name a new file for the conversation")
    for text in (config.system or "", *config.prompt):
        require_text(text, "a prompt")
    folder = resolve(config.model, config.revision)
    tokenizer = load_tokenizer(config.tokenizer or folder, config.template)
    _ = tokenizer.template  # an unknown template is an error before the weights are loaded
    require_fit(tokenizer, vocab_size_of(folder), config.model)  # and so is a tokenizer of another model
    model = load(folder, base=config.base, adapter=config.adapter, router=config.router)
    options = ChatOptions(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        seed=config.seed,
    )
    chat = Chat(model, tokenizer, config.system, options)
    show_notice(console, config.bidi)
    try:
        if config.prompt:
            return answer_prompts(chat, config, console)
        return converse(chat, console, lambda: console.input("[bold]you>[/] "), config.bidi)
    finally:
        if config.save is not None:
            save(chat, config.model, config.save)
            console.print(f"The conversation is in {config.save}.", style="dim", markup=False)


def show_notice(console: Console, bidi: bool = False) -> None:
    """Prints the research-only notice in both languages."""
    console.print(NOTICE_EN, style="yellow")
    if bidi:
        from bimedix_jax.bidi import visual

        # wrapped before it is reordered: a terminal would break reordered lines at the wrong end
        for line in Text(NOTICE_AR).wrap(console, console.width):
            console.print(visual(line.plain.strip()), style="yellow", justify="right", highlight=False)
    else:
        console.print(NOTICE_AR, style="yellow", highlight=False)


def answer_prompts(chat: "Chat", config: Config, console: Console) -> dict[str, Any]:
    """Answers the prompts of the command line in order, as the turns of one conversation."""
    replies = []
    for prompt in config.prompt:
        console.print(Text(f"you> {shown(prompt, config.bidi)}", style="bold"))
        print_reply(chat, prompt, console, config.bidi)
        replies.append({"prompt": prompt, **dataclasses.asdict(chat.last)} if chat.last else {"prompt": prompt})
    return {"notice": {"en": NOTICE_EN, "ar": NOTICE_AR}, "system": config.system, "replies": replies}


def converse(chat: "Chat", console: Console, read: Callable[[], str], bidi: bool = False) -> dict[str, Any]:
    """Reads questions until /quit, the end of the input or Ctrl-C. The result has counts and no words of it."""
    console.print(COMMANDS_HELP, style="dim", highlight=False)
    counts = {"turns": 0, "tokens": 0, "dropped_turns": 0, "seconds": 0.0}
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return counts
        if line.startswith("/"):
            if line in ("/quit", "/exit"):
                return counts
            run_slash_command(chat, line, console)
        elif line:
            try:
                print_reply(chat, line, console, bidi)
            except BimedixError as error:  # the question does not fit; the conversation continues
                console.print(f"error: {error}", style="red", highlight=False, markup=False)
                continue
            if chat.last is not None:
                counts["turns"] += 1
                counts["tokens"] += chat.last.tokens
                counts["seconds"] += chat.last.seconds
                counts["dropped_turns"] = max(counts["dropped_turns"], chat.last.dropped_turns)


def run_slash_command(chat: "Chat", line: str, console: Console) -> None:
    """Runs a line that begins with a slash."""
    word, _, rest = line.partition(" ")
    if word == "/reset":
        chat.restart(chat.system)
        console.print("The conversation is forgotten.", style="dim")
    elif word == "/system":
        chat.restart(rest.strip() or None)
        console.print(f"{'New' if chat.system else 'No'} system prompt, new conversation.", style="dim")
    else:
        console.print(f"There is no command {word}. {COMMANDS_HELP}", style="red", highlight=False, markup=False)


def print_reply(chat: "Chat", question: str, console: Console, bidi: bool) -> None:
    """Streams the reply to the console; Ctrl-C ends the reply and not the conversation."""
    pieces = chat.stream(question)
    try:
        for text in lines(pieces) if bidi else pieces:
            console.print(Text(shown(text, bidi)), end="", soft_wrap=True)
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


def lines(pieces: Iterator[str]) -> Iterator[str]:
    """Pieces joined to complete lines, since only a complete line can be reordered."""
    waiting = ""
    for piece in pieces:
        *whole, waiting = (waiting + piece).split("\n")
        for line in whole:
            yield f"{line}\n"
    if waiting:
        yield waiting


def save(chat: "Chat", model: str, path: Path) -> None:
    """Writes the conversation as one line of JSON, with the keys of records; only the owner can read the file."""
    turns = [{"from": turn.speaker, "value": turn.value} for turn in chat.turns]
    row = {"saved": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "model": model, "conversations": turns}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
