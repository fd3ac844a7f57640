"""`bimedix chat`: talk with a model in the terminal, or put prompts on the command line and read the replies."""

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

COMMANDS_HELP = "/reset forgets the conversation, /system TEXT sets a system prompt and starts anew, /quit leaves."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Chat with a model in English or Arabic. For research only.

    Nothing that is said is stored, unless --save names a file. Ctrl-C stops a reply, and leaves at the prompt.
    """

    model: str
    """Model folder or hub id."""
    adapter: Path | None = None
    """Adapter folder to put on the model."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, if it is not the model's."""
    template: str | None = None
    """Chat template by name (mixtral, chatml, plain, ...) instead of the model's own."""
    base: Literal["bfloat16", "float32", "nf4"] | None = None
    """How the weights are stored; by default bfloat16, and a native checkpoint as it was saved."""
    router: str | None = None
    """Router variant (topk, softmax_topk, sigmoid_bias) instead of the one that the model was trained with."""
    revision: str | None = None
    """Revision of a hub id."""
    prompt: tuple[str, ...] = ()
    """Ask this instead of reading the keyboard; several are the turns of one conversation."""
    system: str | None = None
    """System prompt."""
    max_new_tokens: int = 512
    """Longest reply in tokens."""
    temperature: float = 0.7
    """Randomness; 0 always takes the most likely token."""
    top_k: int | None = None
    """Choose among this many most likely tokens."""
    top_p: float | None = 0.9
    """Choose among the most likely tokens that together reach this probability."""
    min_p: float | None = None
    """Choose among tokens at least this fraction as likely as the likeliest."""
    repetition_penalty: float | None = None
    """Above 1, makes tokens that occurred less likely."""
    seed: int = 0
    """Seed of the sampling."""
    bidi: bool = False
    """Reorder and join Arabic here, line by line: for terminals without bidirectional text, such as Windows Terminal,
    kitty, Alacritty, xterm and tmux."""
    save: Path | None = None
    """Write the conversation to this JSONL file, and nowhere else; it may hold what patients said."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Runs the conversation. Returns the replies where prompts were given, else counts only."""
    from bimedix_jax.checkpoint.hub import resolve
    from bimedix_jax.checkpoint.load import load
    from bimedix_jax.data.tokenizer import load_tokenizer
    from bimedix_jax.data.vocabulary import require_fit, vocab_size_of
    from bimedix_jax.inference.chat import Chat, ChatOptions

    if console.stderr and not config.prompt:
        raise BimedixError("--json has no keyboard conversation; give at least one --prompt")
    if config.save is not None and config.save.exists():
        raise BimedixError(f"{config.save} exists; name a new file for the conversation")
    folder = resolve(config.model, config.revision)
    tokenizer = load_tokenizer(config.tokenizer or folder, config.template)
    _ = tokenizer.template  # an unknown template is said before the weights load
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
    """The research-only notice in both languages."""
    console.print(NOTICE_EN, style="yellow")
    if bidi:
        from bimedix_jax.bidi import visual

        # wrapped first: after reordering, a terminal would break the lines from the wrong end
        for line in Text(NOTICE_AR).wrap(console, console.width):
            console.print(visual(line.plain.strip()), style="yellow", justify="right", highlight=False)
    else:
        console.print(NOTICE_AR, style="yellow", highlight=False)


def answer_prompts(chat: "Chat", config: Config, console: Console) -> dict[str, Any]:
    """Answers the prompts of the command line in order, as turns of one conversation."""
    replies = []
    for prompt in config.prompt:
        console.print(Text(f"you> {shown(prompt, config.bidi)}", style="bold"))
        print_reply(chat, prompt, console, config.bidi)
        replies.append({"prompt": prompt, **dataclasses.asdict(chat.last)} if chat.last else {"prompt": prompt})
    return {"notice": {"en": NOTICE_EN, "ar": NOTICE_AR}, "system": config.system, "replies": replies}


def converse(chat: "Chat", console: Console, read: Callable[[], str], bidi: bool = False) -> dict[str, Any]:
    """Reads questions until /quit, the end of the input or Ctrl-C. The result holds counts, not what was said."""
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
            obey(chat, line, console)
        elif line:
            try:
                print_reply(chat, line, console, bidi)
            except BimedixError as error:  # the question does not fit: the conversation can go on
                console.print(f"error: {error}", style="red", highlight=False, markup=False)
                continue
            if chat.last is not None:
                counts["turns"] += 1
                counts["tokens"] += chat.last.tokens
                counts["seconds"] += chat.last.seconds
                counts["dropped_turns"] = max(counts["dropped_turns"], chat.last.dropped_turns)


def obey(chat: "Chat", line: str, console: Console) -> None:
    """Carries out a line that begins with a slash."""
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
        console.print("The model said nothing; the question is not kept.", style="yellow")
    elif not chat.last.finished:
        console.print("(cut off)", style="dim", markup=False)


def shown(text: str, bidi: bool) -> str:
    """`text` without control characters, which could steer the terminal, and in visual order if asked for."""
    clean = "".join(letter for letter in text if letter in "\n\t" or letter.isprintable() or letter in "\u200c\u200d")
    if not bidi:
        return clean
    from bimedix_jax.bidi import visual

    return "\n".join(visual(line) for line in clean.split("\n"))


def lines(pieces: Iterator[str]) -> Iterator[str]:
    """Pieces joined to whole lines: only a whole line can be reordered."""
    waiting = ""
    for piece in pieces:
        *whole, waiting = (waiting + piece).split("\n")
        for line in whole:
            yield f"{line}\n"
    if waiting:
        yield waiting


def save(chat: "Chat", model: str, path: Path) -> None:
    """The conversation as one line of JSON, in the spelling of the project's records; readable by its owner alone."""
    turns = [{"from": turn.speaker, "value": turn.value} for turn in chat.turns]
    row = {"saved": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "model": model, "conversations": turns}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
