"""`bimedix COMMAND [options]`: finds the command, reads its options, runs it, and reports errors.

For every command, results are written to stdout (with `--json` exactly one JSON document), progress and warnings to
stderr. The exit code is 0 for success, 1 for a failure, 2 for wrong usage and 130 for an interruption. A failure is one
sentence `error: ...`, with a traceback only under `--debug`. `bimedix --help` imports only the standard library.
"""

import dataclasses
import difflib
import importlib
import io
import json
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from bimedix_jax import __version__, startup
from bimedix_jax.errors import BimedixError, UsageError, problem_of
from bimedix_jax.process import signals

# command -> (one-line help, module with `Config` and `run(config, console) -> dict`)
COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": (
        "the whole pipeline on a laptop, end to end in minutes: start here",
        "bimedix_jax.commands.quickstart",
    ),
    "convert": ("check a checkpoint and write it in another precision", "bimedix_jax.commands.convert"),
    "export": (
        "write a model, a merge or adapters for transformers, peft, bitsandbytes",
        "bimedix_jax.commands.export",
    ),
    "upcycle": ("make a mixture of experts from a dense Llama model", "bimedix_jax.commands.upcycle"),
    "coverage": (
        "list every tensor with its bits, its adapter and whether it is trained",
        "bimedix_jax.commands.coverage",
    ),
    "data assemble": ("turn published data sets into checked records", "bimedix_jax.commands.data_assemble"),
    "data translate": (
        "translate English records into Arabic, score, refine and check the translations",
        "bimedix_jax.commands.data_translate",
    ),
    "data check": ("find wrong translations among pairs that you have", "bimedix_jax.commands.data_check"),
    "data mix": (
        "mix records of both languages into one training set at an exact ratio",
        "bimedix_jax.commands.data_mix",
    ),
    "data review": (
        "export translations for reviewers, import their verdicts, bound the error rate",
        "bimedix_jax.commands.data_review",
    ),
    "data chats": (
        "turn exam questions into consultations that keep the correct answer",
        "bimedix_jax.commands.data_chats",
    ),
    "data pack": ("pack records into rows of tokens for training", "bimedix_jax.commands.data_pack"),
    "data stats": ("count records and tokens by language, kind and source", "bimedix_jax.commands.data_stats"),
    "eval run": ("measure held-out loss, multiple choice and the paper's nine tasks", "bimedix_jax.commands.eval_run"),
    "eval harness": (
        "run tasks of lm-evaluation-harness, among them the paper's in English and Arabic",
        "bimedix_jax.commands.eval_harness",
    ),
    "eval tables": ("print the paper's Tables 3 to 6 with ours beside them", "bimedix_jax.commands.eval_tables"),
    "eval compare": ("compare two evaluations, with intervals and tests", "bimedix_jax.commands.eval_compare"),
    "chat": ("chat with a model in the terminal, in English or Arabic", "bimedix_jax.commands.chat"),
    "train": ("fine-tune a model: adapters on a frozen base, or every parameter", "bimedix_jax.commands.train"),
    "checkpoints list": ("list the checkpoints of a run", "bimedix_jax.commands.checkpoints_list"),
    "checkpoints verify": (
        "compare every file of a run's checkpoints with its hash",
        "bimedix_jax.commands.checkpoints_verify",
    ),
    "checkpoints prune": ("remove damaged and older checkpoints of a run", "bimedix_jax.commands.checkpoints_prune"),
    "sweep run": (
        "run the arms and seeds of a study; what is finished never runs again",
        "bimedix_jax.commands.sweep_run",
    ),
    "sweep report": (
        "tables of a sweep: differences with intervals, curves, compute",
        "bimedix_jax.commands.sweep_report",
    ),
    "track upload": ("make the runs of a folder again in Weights & Biases", "bimedix_jax.commands.track_upload"),
    "routes record": ("record which experts every token of a data set uses", "bimedix_jax.commands.routes_record"),
    "routes import": (
        "check routes that another program recorded, and import them",
        "bimedix_jax.commands.routes_import",
    ),
    "routes export": ("write recorded routes in the format of another program", "bimedix_jax.commands.routes_export"),
    "routes report": (
        "test what routes depend on, and claim only what the recording carries",
        "bimedix_jax.commands.routes_report",
    ),
    "routes knockout": (
        "measure what single experts do for each language, by switching them off",
        "bimedix_jax.commands.routes_knockout",
    ),
    "routes replay": (
        "split an adapter's gain into what attention, experts and routes brought",
        "bimedix_jax.commands.routes_replay",
    ),
    "plan": ("estimate memory, FLOPs and time of a run on hardware that you do not have", "bimedix_jax.commands.plan"),
    "bench moe": (
        "measure the speed of the experts' matrix products on this machine",
        "bimedix_jax.commands.bench_moe",
    ),
    "bench train": (
        "measure the speed of training steps, against transformers + peft",
        "bimedix_jax.commands.bench_train",
    ),
    "bench decode": (
        "measure the speed of prefill and decoding, against transformers",
        "bimedix_jax.commands.bench_decode",
    ),
}

SHORT = {"sweep": "sweep run"}
"""Group -> the command that is meant where no command of the group is named. It takes a file."""

REPEATING = frozenset({"train", "quickstart", "bench train", "bench decode"})
"""Commands that allocate the same large buffers in every step: they keep freed memory (startup.reuse_memory)."""

GLOBAL_FLAGS = {
    "--json": "print the result as one JSON document on stdout, everything else on stderr",
    "--debug": "show the traceback of an error",
    "--version": "print the version and exit",
}

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, signals.INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code. `argv` (without the program name) defaults to the process's.

    Only without `argv` does it change how the process handles signals, and does an interruption end the process here.
    """
    words = _split_flags(list(sys.argv[1:] if argv is None else argv))[1]
    if not REPEATING.isdisjoint((" ".join(words[:1]), " ".join(words[:2]))):
        startup.reuse_memory()  # before the first thread
    if argv is not None:
        return _command_line(list(argv), for_good=False)
    try:
        _prepare_streams()
        signals.catch_signals()
        code = _command_line(sys.argv[1:], for_good=True)
        signals.command_ended()
    except KeyboardInterrupt:
        signals.abandon()
        return INTERRUPTED
    if code == INTERRUPTED:
        signals.leave(code)
    return code


def _command_line(words: list[str], for_good: bool) -> int:
    flags, words = _split_flags(words)
    if "--version" in flags:
        return _guarded(lambda: print(f"bimedix_jax {__version__}"), debug="--debug" in flags, as_json=False)[0]
    as_json = "--json" in flags
    if not as_json:
        return _guarded(lambda: _dispatch(words, as_json), "--debug" in flags, as_json)[0]
    with _stdout_reserved(for_good) as stdout:
        if for_good:
            signals.write_errors_to(stdout.fileno())
        code, document = _guarded(lambda: _dispatch(words, as_json), "--debug" in flags, as_json)
        signals.write_errors_to(None)
        if document is None:
            return code
        text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=2)
        return _guarded(lambda: print(text, file=stdout, flush=True), "--debug" in flags, False, stdout)[0] or code


def _guarded(
    action: Callable[[], dict[str, Any] | None], debug: bool, as_json: bool, stdout: TextIO | None = None
) -> tuple[int, dict[str, Any] | None]:
    """Exit code and JSON document of an action that prints to `stdout`; every exception becomes a sentence on stderr"""
    try:
        try:
            document = action()
        finally:
            (stdout or sys.stdout).flush()  # a closed pipe raises here, and not when Python exits
        return DONE, _plain(document) if as_json else None
    except BrokenPipeError:  # as in `bimedix --help | head`: the reader has closed the pipe
        _discard(stdout or sys.stdout)
        return DONE, None
    except SystemExit as left:  # tyro has printed the help (0) or an error in the options (2)
        code = left.code if isinstance(left.code, int) else (DONE if left.code is None else FAILED)
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        return code, None if code == DONE else {"error": "see stderr"}
    except UsageError as error:
        return _failed(str(error), USAGE)
    except KeyboardInterrupt as stop:
        return _failed(signals.sentence(*stop.args), INTERRUPTED, prefix="")
    except BimedixError as error:
        if debug:
            _print_traceback(error)
        code, document = _failed(" ".join(str(error).split()), FAILED)
        return code, document | _plain(error.document)
    except Exception as error:
        if debug:
            _print_traceback(error)
        if isinstance(error, OSError) and error.filename is None:
            _discard_unwritable(stdout or sys.stdout)
        if isinstance(error, BimedixError):
            return _failed(" ".join(str(error).split()), FAILED)
        if problem := problem_of(error):
            return _failed(" ".join(problem.split()), FAILED)
        hint = "" if debug else " (run again with --debug for the traceback)"
        return _failed(f"unexpected {type(error).__name__}: {' '.join(str(error).split())}{hint}", FAILED)


def _prepare_streams() -> None:
    """Replaces closed streams, and lets the others print any text, and read text that is not UTF-8."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:  # closed by `>&-`; otherwise the next file that is opened would take its place
            opened = os.open(os.devnull, os.O_WRONLY)
            if opened != descriptor:
                os.dup2(opened, descriptor)
            setattr(sys, name, os.fdopen(descriptor, "w", encoding="utf-8"))
        getattr(sys, name).reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def _discard(stream: TextIO) -> None:
    """Discards what is still buffered, so that Python does not fail when it exits."""
    with suppress(OSError):  # a stream in memory has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _discard_unwritable(stream: TextIO) -> None:
    """Discards what is buffered if it cannot be written, as to /dev/full."""
    try:
        stream.flush()
    except OSError:
        _discard(stream)


def _failed(message: str, code: int, prefix: str = "error: ") -> tuple[int, dict[str, Any]]:
    try:
        print(f"{prefix}{message}", file=sys.stderr, flush=True)
    except OSError:  # stderr is full or closed; the exit code still tells
        _discard(sys.stderr)
    return code, {"error": message}


def _print_traceback(error: BaseException) -> None:
    import traceback

    traceback.print_exception(error)


def _dispatch(words: list[str], as_json: bool) -> dict[str, Any] | None:
    """Run the command named by `words`. Returns None if only help was printed."""
    name, options = _find_command(words)
    if name not in COMMANDS:  # the program itself, or a group such as `data`
        if not options:
            print(_help(name), end="", file=sys.stderr)
            raise UsageError(f"name a command of `{_program(name)}`")
        print(_help(name), end="")
        return None
    return _run(name, options, as_json)


def _run(name: str, options: list[str], as_json: bool) -> dict[str, Any]:
    from bimedix_jax.options import read_options
    from bimedix_jax.process.terminal import Screen

    module = importlib.import_module(COMMANDS[name][1])
    flags = " and ".join(f"{flag} ({text})" for flag, text in GLOBAL_FLAGS.items() if flag != "--version")
    config = read_options(module.Config, options, _program(name), f"Every command also takes {flags}.")
    startup.prepare(name)
    startup.log_as_sentences()
    return module.run(config, Screen(stderr=as_json))


def _split_flags(words: list[str]) -> tuple[set[str], list[str]]:
    """Remove the global flags from the words, wherever they are; a bare `--` ends the search."""
    end = words.index("--") if "--" in words else len(words)
    flags = {word for word in words[:end] if word in GLOBAL_FLAGS}
    return flags, [word for word in words[:end] if word not in GLOBAL_FLAGS] + words[end:]


def _find_command(words: list[str]) -> tuple[str, list[str]]:
    """The longest command that `words` begin with, and the words after it.

    If they do not begin with a command: the group that they name ("" is the program) and the help flag, if given.
    """
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS and len(words) >= length:
            return name, words[length:]
    is_group = bool(words) and any(name.startswith(f"{words[0]} ") for name in COMMANDS)
    group, rest = (words[0], words[1:]) if is_group else ("", words)
    if not rest or rest[0] in ("-h", "--help"):
        return group, rest[:1]
    if group in SHORT:
        return SHORT[group], rest
    raise _unknown(group, rest[0])


def _unknown(group: str, word: str) -> UsageError:
    kind = "option" if word.startswith("-") else "command"
    known = [name.removeprefix(group).strip().split()[0] for name in COMMANDS if name.startswith(group)]
    near = difflib.get_close_matches(word, known + ([] if group else list(GLOBAL_FLAGS)), n=1, cutoff=0.5)
    suggestion = f"; did you mean `{_program(group)} {near[0]}`?" if near else ""
    return UsageError(f"`{_program(group)}` has no {kind} {word!r}{suggestion} (`{_program(group)} --help` lists all)")


def _program(name: str) -> str:
    return f"bimedix {name}".strip()


def _help(group: str) -> str:
    rows = {name: text for name, (text, _) in COMMANDS.items() if not group or name.startswith(f"{group} ")}
    width = max(map(len, [*rows, *GLOBAL_FLAGS]))
    columns = max(shutil.get_terminal_size().columns, width + 24)  # texts in a narrower column are unreadable

    def table(entries: dict[str, str]) -> list[str]:
        indent = " " * (width + 4)
        return [
            textwrap.fill(f"  {name:<{width}}  {text}", columns, subsequent_indent=indent, break_on_hyphens=False)
            for name, text in entries.items()
        ]

    lines = [f"usage: {_program(group)} COMMAND [options]", ""]
    if not group:
        title = "BiMediX in JAX: bilingual (English, Arabic) medical mixtures of experts. For research only."
        lines += [textwrap.fill(title, columns), ""]
    lines += ["commands:", *table(rows), "", "with every command:", *table(GLOBAL_FLAGS), ""]
    if group in SHORT:
        short = f"`{_program(group)} FILE` is short for `{_program(SHORT[group])} FILE`."
        lines += [textwrap.fill(short, columns), ""]
    lines += [textwrap.fill(f"`{_program(group)} COMMAND --help` lists a command's options.", columns), ""]
    return "\n".join(lines)


@contextmanager
def _stdout_reserved(for_good: bool) -> Iterator[TextIO]:
    """Yield a stream to the real stdout, and redirect all other output to stdout, also from C++, to stderr.

    `for_good` keeps the redirection until the process exits, since libraries print from exit handlers too.
    """
    sys.stdout.flush()
    python_stdout = sys.stdout
    try:
        descriptor = python_stdout.fileno()
    except OSError:  # a caller captures sys.stdout in memory: there is no descriptor to redirect
        descriptor = None
    if descriptor is None or sys.stderr.fileno() == descriptor:
        real, saved = python_stdout, None
    else:
        saved = os.dup(descriptor)
        real = os.fdopen(os.dup(saved), "w", encoding="utf-8", newline="\n", errors="backslashreplace")
        os.dup2(sys.stderr.fileno(), descriptor)
    sys.stdout = sys.stderr
    try:
        yield real
    finally:
        if not for_good:
            real.flush()
            sys.stdout = python_stdout
            if saved is not None:
                os.dup2(saved, python_stdout.fileno())
                os.close(saved)
                real.close()


def _plain(value: Any) -> Any:
    """`value` in types of JSON: arrays as lists, array scalars as numbers, paths as text, dataclasses as objects.

    NaN and infinity become null, since JSON has neither.

    Raises:
        TypeError: a value of another type, which is a bug in the command.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return _plain(value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    raise TypeError(f"a command returned a {type(value).__name__}, which cannot be written as JSON")
