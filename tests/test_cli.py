"""`bimedix` as a process: its output on stdout and stderr, its exit codes and what it imports.

Made-up commands stand in for real ones, so that these tests are about the command line alone.
"""

import argparse
import ast
import itertools
import json
import os
import pkgutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import bimedix_jax
from bimedix_jax import cli, startup
from bimedix_jax.errors import natural, positive, run_script

COMMANDS_FOR_TESTS = '''
import ctypes, errno, os, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from bimedix_jax import cli
from bimedix_jax.errors import BimedixError

@dataclass(frozen=True)
class Config:
    """Count, to have something to do."""

    count: int
    """How far."""
    name: str = "x"
    """Whose."""

    def __post_init__(self):
        if self.count < 0:
            raise ValueError("count must not be negative: give 0 or more")

def count(config, console):
    print("stray print")
    os.write(1, b"stray write\\n")
    subprocess.run(["echo", "stray child"], check=True)
    console.print(f"counted to {config.count}")
    return {"count": np.int64(config.count), "mean": np.float32(0.5), "loss": float("nan"), "path": Path("/a"),
            "by": {1: (np.arange(3), True, None)}, "text": "\\u0645\\u0631\\u062d\\u0628\\u0627"}

def user_error(config, console):
    raise BimedixError("the folder is empty;\\n put a model there")

def bug(config, console):
    return {}["missing"]

def stop(config, console):
    raise KeyboardInterrupt("continue with --resume")

def wait(config, console):
    print("waiting", file=sys.stderr, flush=True)
    time.sleep(60)

def imports(config, console):
    Path(config.name, ".out.12345678.partial").mkdir()  # as files.new_folder makes it
    from bimedix_jax.process import signals
    with signals.on_abandon(lambda: Path(config.name, ".out.12345678.partial").rmdir()):
        sys.meta_path.insert(0, type("Slow", (), {"find_spec": lambda *_: wait(config, console)}))
        import a_module_that_takes_long

def hangs(config, console):
    from bimedix_jax.files import new_folder
    with new_folder(Path(config.name) / "out"):
        print("waiting", file=sys.stderr, flush=True)
        # a wait in C that a signal does not end, and that lets other threads run, as XLA's compiler
        lock_forever()

def lock_forever():
    library = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(128)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)  # a second time by the same thread: never returns

def hints(config, console):
    from bimedix_jax.process import signals
    with signals.hint("continue with --resume"):
        wait(config, console)

def disk(config, console):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/out")

def denied(config, console):
    raise RuntimeError("a library") from OSError(errno.EROFS, os.strerror(errno.EROFS), "/home/x")

def port(config, console):
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

def encode(config, console):
    "\\ud800".encode()

def surrogate(config, console):
    print("\\udcff")
    return {"text": "\\udcff"}

def unprintable(config, console):
    return {"result": object()}

def prints_at_exit(config, console):
    import atexit
    atexit.register(print, "stray print at exit")
    return {"ok": True}

OTHERS = (imports, hangs, hints, disk, denied, port, encode, surrogate)
for run in (count, user_error, bug, stop, wait, unprintable, prints_at_exit, *OTHERS):
    module = ModuleType(f"made_up_{run.__name__}")
    module.Config, module.run = Config, run
    sys.modules[module.__name__] = module
    cli.COMMANDS[run.__name__] = (f"Help of {run.__name__}.", module.__name__)
cli.COMMANDS["group count"] = ("Count in a group.", "made_up_count")
cli.COMMANDS["group wait"] = ("Wait in a group.", "made_up_wait")
sys.exit(cli.main())
'''


def bimedix(*words: str) -> subprocess.CompletedProcess[str]:
    """Run one command line in which the made-up commands exist."""
    command = [sys.executable, "-c", COMMANDS_FOR_TESTS, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def real_bimedix(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "bimedix_jax", *words], capture_output=True, text=True, timeout=60)


def test_help_loads_only_the_standard_library():
    code = """
        import sys
        before = set(sys.modules)
        from bimedix_jax import cli
        code = cli.main(["--help"])
        loaded = {name.split(".")[0] for name in set(sys.modules) - before}
        assert loaded <= {*sys.stdlib_module_names, "bimedix_jax"}, loaded
        assert not [name for name in sys.modules if name.startswith("bimedix_jax.commands.")]
        sys.exit(code)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    for name, (help_line, _) in cli.COMMANDS.items():
        assert f" {name} {help_line} " in words


@pytest.mark.parametrize("columns", [50, 80, 200])
def test_the_list_of_commands_is_wrapped_to_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for group in ("", "data", "bench"):
        assert max(map(len, cli._help(group).splitlines())) <= columns


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_shows_its_options_without_jax(name):
    """Its module has Config and run, and its help does not import JAX."""
    code = f"""
        import importlib, sys, dataclasses, inspect
        from bimedix_jax import cli
        code = cli.main({name.split()!r} + ["--help"])
        assert not {{"jax", "torch"}} & set(sys.modules), "JAX is imported"
        module = importlib.import_module(cli.COMMANDS[{name!r}][1])
        assert dataclasses.is_dataclass(module.Config) and module.Config.__dataclass_params__.frozen
        assert list(inspect.signature(module.run).parameters) == ["config", "console"]
        sys.exit(code)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: bimedix {name}" in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_has_a_help_text(name):
    """The text below a field of `Config` is the help of its option."""
    path = Path(bimedix_jax.__file__).parent / "commands" / f"{name.replace(' ', '_')}.py"
    tree = ast.parse(path.read_text("utf-8"))
    (config,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    assert ast.get_docstring(config)
    for field, following in itertools.pairwise([*config.body, ast.Pass()]):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(following, ast.Expr), f"{path.name}:{field.lineno} has no text below it"
            assert isinstance(following.value, ast.Constant)


def test_commands_keep_freed_memory_and_programs_before_jax_is_imported():
    code = """
        import importlib, sys
        from bimedix_jax import cli, startup
        asked = []

        def keep():
            asked.append("jax" in sys.modules)
            raise SystemExit  # the rest of the command is not needed

        startup.keep_programs = keep
        for words in (["train", "smoke", "--out", "x"], ["quickstart", "--out", "x"], ["chat", "--model", "x"]):
            cli.main(words)
        assert asked == [False, False, False], asked
        asked.clear()
        startup.reuse_memory = lambda: asked.append("jax" in sys.modules)
        for words in (["train", "smoke", "--out", "x"], ["quickstart"], ["chat", "--model", "x"], ["plan"]):
            module = importlib.import_module(cli.COMMANDS[words[0]][1])
            module.run = lambda config, console: {}
            before = len(asked)
            cli.main(words)
            assert len(asked) - before == (words[0] in cli.REPEATING), words
        assert asked == [False, False], asked
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(cli.COMMANDS) >= cli.REPEATING


@pytest.mark.parametrize(
    "words", [["train", "smoke"], ["--json", "quickstart"], ["bench", "train"], ["bench", "decode"]]
)
def test_freed_memory_is_kept_before_the_first_thread(words: list[str]) -> None:
    """Later, a thread would already have an arena whose large blocks are mapped again each time."""
    code = f"""
        import sys, threading
        from bimedix_jax import cli, startup

        def reuse_memory():
            print("threads:", threading.active_count(), "jax" in sys.modules)
            raise SystemExit

        startup.reuse_memory = reuse_memory
        sys.argv = ["bimedix", *{words!r}]
        cli.main()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout == "threads: 1 False\n", done.stderr


def test_scripts_that_have_imported_jax_run_on_the_cpu_without_an_accelerator() -> None:
    code = """
        import jax
        from bimedix_jax import startup

        startup._has_accelerator = lambda: False
        startup.importlib.util.find_spec = lambda name: name == "libtpu" or None  # as with the extra `aot`
        startup.prepare()
        print(jax.config.jax_platforms, jax.devices()[0].platform)
    """
    words = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.stdout == "cpu cpu\n", done.stderr


def test_problems_of_scripts_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"^error: {tmp_path}: Is a directory; name a file instead of a folder$"):
        run_script(lambda: print(tmp_path.read_text()))
    with pytest.raises(argparse.ArgumentTypeError, match="0 is too small; give at least 1"):
        positive("0")
    with pytest.raises(argparse.ArgumentTypeError, match=r"'1\.5' is no whole number"):
        natural("1.5")
    assert (positive("1"), natural("0")) == (1, 0)


def test_version():
    done = real_bimedix("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"bimedix_jax {bimedix_jax.__version__}\n", "")


def test_an_unknown_command_or_option_names_the_nearest():
    for words, suggestion in [
        (["cuont"], "did you mean `bimedix count`?"),
        (["group", "waits"], "did you mean `bimedix group wait`?"),
        (["grup", "wait"], "did you mean `bimedix group`?"),
        (["--jsn"], "did you mean `bimedix --json`?"),
        (["zzz"], "`bimedix --help` lists all"),
    ]:
        done = bimedix(*words)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert suggestion in done.stderr


def test_a_group_has_its_own_help():
    done = bimedix("group", "--help")
    assert done.returncode == 0
    assert "group count" in done.stdout
    assert "user_error" not in done.stdout
    bare = bimedix("group")
    assert (bare.returncode, bare.stdout) == (2, "")
    assert "group count" in bare.stderr


def test_no_command_is_wrong_usage():
    done = bimedix()
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: bimedix COMMAND" in done.stderr
    assert "error: name a command" in done.stderr


@pytest.mark.parametrize("words", [["--count"], ["--cnt", "3"], ["--count", "three"], [], ["--count", "-1"], ["stray"]])
def test_wrong_options_exit_with_2(words):
    done = bimedix("count", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def test_results_go_to_stdout():
    done = bimedix("group", "count", "--count", "3")
    assert done.returncode == 0
    assert "counted to 3" in done.stdout


@pytest.mark.parametrize("words", [["--json", "count", "--count", "3"], ["group", "count", "--count", "3", "--json"]])
def test_json_is_the_only_thing_on_stdout(words):
    done = bimedix(*words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "count": 3, "mean": 0.5, "loss": None, "path": "/a", "by": {"1": [[0, 1, 2], True, None]}, "text": "مرحبا",
    }  # fmt: skip
    assert "مرحبا" in done.stdout  # readable, not escaped
    for text in ("stray print", "stray write", "stray child", "counted to 3"):
        assert text in done.stderr


def test_stdout_is_json_even_if_a_library_prints_at_exit():
    done = bimedix("prints_at_exit", "--count", "1", "--json")
    assert json.loads(done.stdout) == {"ok": True}
    assert "stray print at exit" in done.stderr


@pytest.mark.parametrize(
    ("words", "code"),
    [(["user_error", "--count", "1"], 1), (["bug", "--count", "1"], 1), (["count", "--cnt", "1"], 2), (["cuont"], 2)],
)
def test_json_has_an_error_after_a_failure(words, code):
    done = bimedix(*words, "--json")
    assert done.returncode == code
    assert list(json.loads(done.stdout)) == ["error"]


def test_a_result_that_is_not_json_is_reported_as_a_bug():
    done = bimedix("unprintable", "--count", "1", "--json")
    assert done.returncode == 1
    assert "unexpected TypeError" in done.stderr
    assert "object" in json.loads(done.stdout)["error"]


def test_a_user_error_is_one_sentence():
    done = bimedix("user_error", "--count", "1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == "error: the folder is empty; put a model there"
    assert "Traceback" not in done.stderr
    assert "Traceback" in bimedix("user_error", "--count", "1", "--debug").stderr


def test_a_bug_is_one_sentence_too():
    done = bimedix("bug", "--count", "1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: unexpected KeyError: 'missing' (run again with --debug for the traceback)"
    )
    debug = bimedix("--debug", "bug", "--count", "1")
    assert "Traceback" in debug.stderr
    assert debug.stderr.splitlines()[-1] == "error: unexpected KeyError: 'missing'"


def test_an_interruption_prints_how_to_resume():
    done = bimedix("stop", "--count", "1")
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "interrupted: continue with --resume"


def test_ctrl_c_ends_without_a_traceback():
    command = [sys.executable, "-c", COMMANDS_FOR_TESTS, "wait", "--count", "1", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "waiting" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr == "interrupted\n"
    assert json.loads(stdout) == {"error": "interrupted"}


@pytest.mark.parametrize(("command", "code"), [("wait", 130), ("imports", 130), ("hangs", 130), ("hints", 130)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_in_one_sentence(command, code, number, tmp_path):
    """Also while a module is imported, and where the main thread is in a library that does not return."""
    words = [sys.executable, "-c", COMMANDS_FOR_TESTS, command, "--count", "1", "--json", "--name", str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "waiting" not in process.stderr.readline():
            pass
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    sentence = "interrupted" if number == signal.SIGINT else "interrupted by SIGTERM"
    sentence += ": continue with --resume" if command == "hints" else ""
    assert (process.returncode, stderr) == (code, f"{sentence}\n")
    assert json.loads(stdout) == {"error": sentence}
    assert list(tmp_path.iterdir()) == [], "no partial folder is left"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["disk", "--count", "1"], "no space is left for /out; free some space, or write to another disk"),
        (["denied", "--count", "1"], "/home/x: Read-only file system; write to another place"),
        (["port", "--count", "1"], "Address already in use; stop the program that uses the port"),
        (["encode", "--count", "1"], "a text contains half a surrogate pair"),
    ],
)
def test_errors_of_the_system_are_one_sentence(words, problem):
    done = bimedix(*words)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {problem}")
    assert "unexpected" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["count", "--count", "3"], ["count", "--count", "3", "--json"]]
)
def test_an_output_that_is_full_is_one_sentence(words):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", COMMANDS_FOR_TESTS, *words], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: no space is left on the device")
    assert "Traceback" not in done.stderr


def test_closed_and_full_streams_keep_the_exit_code():
    command = f'exec {sys.executable} -c "$0" nothing'
    for closed in (">&-", "2>&-", ">&- 2>&-", "2>/dev/full", "<&-"):
        done = subprocess.run(["sh", "-c", f"{command} {closed}", COMMANDS_FOR_TESTS], capture_output=True, text=True)
        assert done.returncode == 2, closed
        assert "Traceback" not in done.stderr


def test_text_that_is_not_utf8_is_printed_escaped():
    done = bimedix("surrogate", "--count", "1", "--json")
    assert json.loads(done.stdout) == {"text": "\udcff"}
    assert bimedix("surrogate", "--count", "1").stdout.endswith("\\udcff\n")


def test_main_in_process_restores_stdout(capfd):
    assert cli.main(["nothing", "--json"]) == 2
    print("after")
    out = capfd.readouterr().out
    document, end = json.JSONDecoder().raw_decode(out)
    assert document["error"].startswith("`bimedix` has no command")
    assert out[end:] == "\nafter\n"


def test_words_after_two_dashes_are_the_commands_own():
    assert cli._split_flags(["chat", "--json", "--", "--debug"]) == ({"--json"}, ["chat", "--", "--debug"])


def test_public_names_are_lazy_and_all_resolve():
    code = "import sys, bimedix_jax; assert 'jax' not in sys.modules; bimedix_jax.BimedixError"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in bimedix_jax.__all__:
        assert getattr(bimedix_jax, name) is not None
    assert set(bimedix_jax.__all__) <= set(dir(bimedix_jax))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        bimedix_jax.lod  # noqa: B018


def test_no_module_hides_a_public_name():
    """Python sets an imported submodule as an attribute of its package, in the place of a function of that name."""
    modules = {found.name for found in pkgutil.iter_modules(bimedix_jax.__path__)}
    assert modules
    assert not modules & set(bimedix_jax.__all__)


def test_type_checkers_see_the_same_public_names():
    source = Path(bimedix_jax.__file__).read_text("utf-8")
    for name, module in bimedix_jax._PUBLIC.items():
        assert f"from {module} import {name} as {name}\n" in source
    assert sorted(bimedix_jax.__all__) == sorted([*bimedix_jax._PUBLIC, "__version__"])


def test_the_cpu_is_chosen_only_without_an_accelerator(tmp_path):
    assert not startup._has_accelerator(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert startup._has_accelerator(tmp_path)


def test_start_up_messages_are_hidden_and_errors_are_not(capfd):
    with startup._without_lines(startup._CUDA_CHATTER):
        os.write(2, b"I0000 cudart_stub.cc:31] Could not find cuda drivers on your machine\nE0000 out of memory\n")
    assert capfd.readouterr().err == "E0000 out of memory\n"


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_a_closed_pipe_is_not_an_error(words):
    """As `bimedix train --help | head -1` does."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "bimedix_jax", *words]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
