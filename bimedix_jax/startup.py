"""Settings that must be made before JAX is imported: the platform, and fewer log messages of its C++ libraries.

The command line calls `prepare`. Scripts that import JAX can call it first.
"""

import ctypes
import importlib
import importlib.util
import logging
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# files in /dev of a GPU (dxg is that of WSL) or a TPU
ACCELERATORS = ("nvidia[0-9]*", "nvidiactl", "dxg", "accel[0-9]*", "vfio/[0-9]*", "kfd")

WITHOUT_JAX = frozenset(
    {
        *(f"data {name}" for name in ("assemble", "chats", "check", "mix", "pack", "review", "stats", "translate")),
        *(f"routes {name}" for name in ("export", "import", "report")),
        "eval compare",
        "sweep report",
    }
)
"""Commands that never import JAX, for which `prepare` has nothing to do."""

COMPILE_FLAGS = "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling=true,xla_cpu_disable_slp_vectorizer=true"
"""LLVM then compiles a training step for a CPU in two thirds of the time (docs/results/compile.md)."""

# the CUDA plugin's libraries print these when they are loaded without a driver; no setting prevents it
_CUDA_CHATTER = re.compile(rb"WARNING: All log messages before absl::InitializeLog|Could not find cuda drivers")


def prepare(command: str = "") -> None:
    """Selects the CPU on a machine without accelerators, silences start-up messages, makes CPU programs compile faster.

    User settings are kept: flags in XLA_FLAGS come last and win.

    The extra `aot` installs compilers for absent GPUs and TPUs. With them installed, JAX would try to initialise these
    devices in every run and report that it cannot. On a machine without any, JAX_PLATFORMS becomes `cpu`.
    """
    if command in WITHOUT_JAX:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA: errors only
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if "jax" not in sys.modules and "xla_backend_extra_options" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{COMPILE_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()
    plugin = importlib.util.find_spec("jax_cuda12_plugin")
    if not sys.platform.startswith("linux") or _has_accelerator() or not (plugin or importlib.util.find_spec("libtpu")):
        return
    if "JAX_PLATFORMS" not in os.environ:
        os.environ["JAX_PLATFORMS"] = "cpu"
        if jax := sys.modules.get("jax"):  # it read the variable when it was imported
            jax.config.update("jax_platforms", jax.config.jax_platforms or "cpu")
        print("note: no GPU or TPU found, JAX runs on the CPU (set JAX_PLATFORMS to choose)", file=sys.stderr)
    if plugin and plugin.origin:
        _load_cuda_quietly(Path(plugin.origin).parent)


class _Sentences(logging.Formatter):
    """`warning: text`, without the names of modules."""

    def format(self, record: logging.LogRecord) -> str:
        record.levelname = record.levelname.lower()
        return super().format(record)


def log_as_sentences() -> None:
    """Formats log messages like the other messages of a command, unless the program has set up logging itself."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Sentences("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler])


def compile_fast() -> None:
    """Without LLVM's optimisations, for tiny programs that take longer to compile than to run; before JAX starts.

    The user's own XLA_FLAGS come last and win.
    """
    os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}".strip()


def keep_programs() -> None:
    """Keeps compiled programs on disk, so that the next run of the same model compiles nothing; before JAX starts.

    They are in $BIMEDIX_CACHE/programs or ~/.cache/bimedix_jax/programs, at most 2 GiB: JAX removes the least recently
    used ones. Processes can share the folder, and it can be deleted at any time. A damaged program is compiled again. A
    program is found again only under the same versions, options and instruction set, and with an accelerator only in
    the same folder, where JAX also keeps what XLA learned of the fastest kernels. JAX_ENABLE_COMPILATION_CACHE=false
    turns this off. Programs that compile fast are kept too: a run has a hundred of them.

    JAX_COMPILATION_CACHE_DIR names a folder of the user's, which is used unchanged and without a limit: a process with
    a limit fails on the programs of one without.
    """
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    off = os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "").lower() in ("false", "0")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or off:
        return
    folder = Path(os.environ.get("BIMEDIX_CACHE") or Path.home() / ".cache" / "bimedix_jax") / "programs"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2 << 30))
    if not _has_accelerator():
        os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        _remove_damaged(folder)
    except OSError as error:
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        reason = error.strerror or type(error).__name__
        print(f"note: compiled programs are not kept in {folder} ({reason.lower()})", file=sys.stderr)


def _remove_unfinished(folder: Path, seconds: float = 60) -> None:
    """Removes programs that a killed process left half written at least `seconds` ago.

    JAX writes `NAME-cache` and then `NAME-atime`. It would neither replace a program without the second file, nor store
    any other one beside it: it would fail to find the oldest.
    """
    for program in folder.glob("*-cache"):
        finished = program.with_name(program.name.removesuffix("-cache") + "-atime")
        with suppress(FileNotFoundError):  # another process has removed it
            if not finished.exists() and program.stat().st_mtime < time.time() - seconds:
                program.unlink()


def _remove_damaged(folder: Path) -> None:
    """From now on, removes each program that JAX warns that it cannot read, with its namesakes, so that it is replaced.

    JAX compiles such a program, but does not store it over the damaged one.
    """
    shown = warnings.showwarning

    def show(message: Warning | str, *place: Any, **more: Any) -> None:
        damaged = re.match(r"Error reading persistent compilation cache entry for '([\w.-]+)'", str(message))
        if damaged is None:
            shown(message, *place, **more)
            return
        for file in (*folder.glob(f"{damaged[1]}-*-cache"), *folder.glob(f"{damaged[1]}-*-atime")):
            file.unlink(missing_ok=True)
        print(f"note: the program {damaged[1]} in {folder} is damaged and is compiled again", file=sys.stderr)

    warnings.showwarning = show


def reuse_memory() -> None:
    """Makes glibc keep freed memory for later allocations instead of returning it to the system.

    Otherwise the large temporaries of each step are mapped again, and the kernel spends as long zeroing their pages as
    the CPU spends computing them: logits of 1,024 tokens over 32,000 words took 89 ms without this and 46 ms with it.
    The process then keeps its peak memory. Only glibc has these settings. They must be made before the first thread is
    started: a thread with an arena of its own would share it with later threads, and large blocks of such an arena are
    mapped again each time.
    """
    one_arena, no_mapping, never_trim, grow_by = (-8, 1), (-4, 0), (-1, -1), (-2, 64 << 20)  # <malloc.h>
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in (one_arena, no_mapping, never_trim, grow_by):
            libc.mallopt(parameter, value)


def one_blas_thread() -> None:
    """Makes NumPy and SciPy multiply matrices on one thread; before they are imported.

    The threads of OpenBLAS wait for each other in busy loops, which takes longer than the products of small matrices: a
    report of 1 M rows of routes took 8.4 s of processor time on two busy cores with threads, and 4.2 s without. The
    user's own OPENBLAS_NUM_THREADS wins.
    """
    if "numpy" not in sys.modules:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _load_cuda_quietly(plugin: Path) -> None:
    """Loads the libraries of the CUDA plugin with their messages filtered, before JAX loads them."""
    with _without_lines(_CUDA_CHATTER), suppress(ImportError, OSError):  # JAX reports later which one it cannot use
        for library in sorted(plugin.glob("[!l]*.so")):  # lib*.so are no Python modules
            importlib.import_module(f"{plugin.name}.{library.name.split('.')[0]}")
        ctypes.CDLL(str(plugin.parent / "jax_plugins/xla_cuda12/xla_cuda_plugin.so"))


def _has_accelerator(devices: Path = Path("/dev")) -> bool:
    return any(True for pattern in ACCELERATORS for _ in devices.glob(pattern))


@contextmanager
def _without_lines(pattern: re.Pattern[bytes]) -> Iterator[None]:
    """Removes matching lines from what is written to the stderr file descriptor, including by C++ code."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            held.seek(0)
            for line in held:
                if not pattern.search(line):
                    os.write(2, line)
