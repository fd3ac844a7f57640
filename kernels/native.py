"""Kernels in C++: compiled once on this machine, and called by XLA through its foreign function interface (jax.ffi)."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import ManualAxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bimedix_jax.kernels import backends
from bimedix_jax.kernels.manual_axes import varying

SHARED = Path(__file__).parent / "x86"
"""Headers of all kernels for x86 processors."""
X86_KERNELS = tuple(sorted(Path(__file__).parent.glob("*/avx512/*.cc")))
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility-inlines-hidden", "-w")
AVX512 = ("-march=x86-64-v4", "-mavx512bf16")
AVX512_NEEDS = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16"})
COMPILERS = ("c++", "g++", "clang++")
MOST_SECONDS = 600.0
"""Time that a compiler gets for a file; on two cores it takes 5 s."""
UNFINISHED = "compiling-"
"""Beginning of the names of folders in which a library is being compiled."""


failures: dict[tuple[str, ...], str] = {}
"""Why there is no library, by its folder, its name and the compiler's command, in this process."""


class CannotBuild(Exception):
    """Why there is no library, as a sentence that follows a colon."""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction sets of an x86 processor under Linux, by the kernel's names; empty elsewhere."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return frozenset()
    try:
        text = Path("/proc/cpuinfo").read_text("ascii", errors="replace")
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def compiler() -> list[str]:
    """The words of $CXX, else the first C++ compiler on the path.

    Raises:
      CannotBuild: there is none, or CXX names no program.
    """
    named = os.environ.get("CXX", "")
    try:
        words = shlex.split(named)
    except ValueError as error:
        raise CannotBuild(f"CXX is {named!r}, which is no command ({error}); set it to a C++ compiler.") from error
    if words:
        if shutil.which(words[0]) is None:
            raise CannotBuild(f"CXX is {words[0]!r}, which is no program; set it to a C++ compiler, or unset it.")
        return words
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise CannotBuild("no C++ compiler was found; install g++ or name one by CXX.")


def cache_folder() -> Path:
    """$BIMEDIX_CACHE/native or ~/.cache/bimedix_jax/native."""
    return Path(os.environ.get("BIMEDIX_CACHE") or Path.home() / ".cache" / "bimedix_jax") / "native"


def own_folder() -> Path:
    """The cache folder, made for this user alone. A library from a folder that others can write could be anyone's.

    Raises:
      CannotBuild: it cannot be made, or others can write it.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except OSError as error:
        raise CannotBuild(
            f"{folder} cannot be made ({error.strerror}); set BIMEDIX_CACHE to a folder that you can write."
        ) from error
    if found.st_uid not in (0, os.getuid()) or found.st_mode & 0o022:
        raise CannotBuild(f"other users can write {folder}, or own it; set BIMEDIX_CACHE to a folder of your own.")
    return folder


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def existing(folder: Path, name: str) -> Path | None:
    """The library `NAME-CONTENT.so` whose bytes have the digest CONTENT; one that is damaged is removed.

    Loading a truncated library would kill the process.
    """
    for library in folder.glob(f"{name}-*.so"):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            if library.name == f"{name}-{digest(library.read_bytes())}.so":
                return library
            library.unlink()
    return None


def library_name(source: Path, options: Sequence[str]) -> str:
    """Another one whenever the library would be another."""
    parts = [jax.__version__, *FLAGS, *options]
    parts += [f"{path.name}\n{path.read_text('utf-8')}" for path in sources(source)]
    return f"{source.stem}-{digest(chr(0).join(parts).encode())}"


def build(source: Path, options: Sequence[str], others: Sequence[Path] = ()) -> Path:
    """The shared library of a C++ file and its headers, from the cache, or compiled into it in some seconds.

    If it must be compiled, those of `others` that are missing are compiled at the same time, with the same options: a
    model needs all of them. Whoever needs one that fails is told when they build it. Of several processes one compiles,
    and the others wait for it.

    Raises:
      CannotBuild: no compiler, it fails, or the cache cannot be used.
    """
    folder = own_folder()
    try:
        if found := existing(folder, library_name(source, options)):
            return found
        command = compiler()
        with locked(folder) as alone:
            remove_unfinished(folder, 0.0 if alone else MOST_SECONDS)
            asked = [source, *(path for path in others if path != source)]
            missing = [path for path in asked if not existing(folder, library_name(path, options))]
            compile_all(command, missing, options, folder)
            found = existing(folder, library_name(source, options))
    except OSError as error:
        where = error.filename or folder
        raise CannotBuild(f"{where} cannot be used ({error.strerror}); set BIMEDIX_CACHE to another folder.") from error
    if found is None:
        raise CannotBuild(failures[str(folder), library_name(source, options), *command])
    return found


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Holds the lock of a folder, which the operating system frees if this process ends. Yields False on a file system
    without locks, where several processes may compile the same."""
    import fcntl  # not on Windows

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            backends.announce("native", f"waiting for another process that compiles into {folder}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(handle)


def compile_all(command: Sequence[str], files: Sequence[Path], options: Sequence[str], folder: Path) -> None:
    """Compiles files into the cache, all at once. Those that this compiler could not compile before are left out, and
    the reason for each is in `failures`."""
    runs: list[Compilation] = []
    with contextlib.ExitStack() as stack:
        for source in files:
            if (str(folder), library_name(source, options), *command) not in failures:
                runs.append(stack.enter_context(Compilation(command, source, options, folder)))
        for run in runs:
            if (reason := run.finish()) is not None:
                failures[str(folder), run.name, *command] = reason


class Compilation(contextlib.AbstractContextManager["Compilation"]):
    """A compiler that runs for one file, until the context ends."""

    def __init__(self, command: Sequence[str], source: Path, options: Sequence[str], folder: Path) -> None:
        backends.announce("native", f"compiling {source.name} into {folder}, once")
        self.source, self.name, self.folder = source, library_name(source, options), folder
        self.scratch = tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder)
        self.made, self.messages = (Path(self.scratch.name, name) for name in ("library.so", "messages"))
        includes = ["-isystem", jax.ffi.include_dir(), "-I", str(SHARED)]
        words = [*command, *FLAGS, *options, *includes, str(source), "-o", str(self.made)]
        self.process: subprocess.Popen[bytes] | None = None
        self.program, self.cannot_run = command[0], ""
        with self.messages.open("wb") as file:
            try:
                # in a group of its own, which can be killed with all that a compiler starts
                self.process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True
                )
            except OSError as error:
                self.cannot_run = f"it cannot be run: {error.strerror}"

    def finish(self) -> str | None:
        """Waits for the library and moves it into the cache; returns the reason and a remedy if there is none."""
        problem = self.problem()
        if problem is None:
            self.made.rename(self.folder / f"{self.name}-{digest(self.made.read_bytes())}.so")
            return None
        full = "No space left" in problem
        remedy = "set BIMEDIX_CACHE to another folder" if full else "name another compiler by CXX"
        return f"{self.program} cannot compile {self.source.name} ({problem}); {remedy}."

    def problem(self) -> str | None:
        """How the compiler failed, or None."""
        if self.process is None:
            return self.cannot_run
        try:
            code = self.process.wait(MOST_SECONDS)
        except subprocess.TimeoutExpired:
            return f"it took more than {MOST_SECONDS:g} s"
        if code == 0:
            return self.damage()
        # the last line of GCC says only that another program failed
        lines = self.messages.read_text("utf-8", errors="replace").splitlines()
        lines = [line.strip() for line in lines if line.strip() and not line.startswith("collect2:")]
        return next((line for line in lines if "error" in line), lines[-1] if lines else f"exit {code}")

    def damage(self) -> str | None:
        """What is wrong with the library. Another process loads it, which a truncated one would kill."""
        if not self.made.is_file():
            return "it wrote no library"
        load = [sys.executable, "-I", "-S", "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", str(self.made)]
        found = subprocess.run(load, capture_output=True, text=True, errors="replace", check=False)
        if found.returncode == 0:
            return None
        reason = found.stderr.strip().rpartition("OSError: ")[2] or "this ends a process"
        return f"its library cannot be loaded: {reason.replace(str(self.made), self.made.name)}"

    def __exit__(self, *exception: object) -> None:
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.scratch.cleanup()


def remove_unfinished(folder: Path, seconds: float) -> None:
    """Removes what compilations left that began at least `seconds` ago and were killed."""
    for scratch in folder.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(FileNotFoundError):
            if scratch.stat().st_mtime <= time.time() - seconds:
                shutil.rmtree(scratch, ignore_errors=True)


def sources(source: Path) -> list[Path]:
    """A C++ file and all headers that it may include."""
    return sorted([*SHARED.glob("*.h"), *source.parent.glob("*.h"), source])


def has_avx512(matrix_units: bool = True) -> bool:
    """Whether the processor has AVX-512 with bfloat16 dot products, and if asked for, no matrix units (AMX) too."""
    return cpu_flags() >= AVX512_NEEDS and (matrix_units or "amx_bf16" not in cpu_flags())


def avx512_refusal(source: Path, functions: tuple[str, ...]) -> str | None:
    """Registers handlers that are compiled for AVX-512; the reason if that is impossible."""
    if backends.platform() != "cpu":
        return "it is for x86 processors."
    if missing := AVX512_NEEDS - cpu_flags():
        return f"this processor does not have {', '.join(sorted(missing))}."
    return register(source, AVX512, functions, X86_KERNELS)


@functools.cache
def register(
    source: Path, options: tuple[str, ...], functions: tuple[str, ...], others: tuple[Path, ...] = ()
) -> str | None:
    """Registers handlers of a C++ file with XLA, under their own names; the reason if that is impossible."""
    try:
        path = build(source, options, others)
    except CannotBuild as error:
        return str(error)
    try:
        library = ctypes.CDLL(str(path))
        handlers = {name: jax.ffi.pycapsule(getattr(library, name)) for name in functions}
    except (OSError, AttributeError) as error:
        path.unlink(missing_ok=True)
        return f"the compiled {path.name} cannot be loaded ({error}) and was deleted; name another compiler by CXX."
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return None


def call(
    name: str, results: Sequence[tuple[tuple[int, ...], Any]], operands: Sequence[Any], **attributes: int
) -> list[jax.Array]:
    """The results, of these shapes and dtypes, of a handler. Operands are arrays, or constants of rematerialised code.

    Inside shard_map with `check_vma=True`, they vary along every axis along which an operand does.
    """
    axes = varying(*operands)

    def described(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        if not axes:
            return jax.ShapeDtypeStruct(shape, dtype)
        whole = NamedSharding(jax.sharding.get_abstract_mesh(), P(*[None] * len(shape)))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole, manual_axis_type=ManualAxisType(varying=axes))

    function = jax.ffi.ffi_call(name, [described(*result) for result in results], vmap_method="sequential")
    constants = {key: np.int64(value) for key, value in attributes.items()}
    compute = jax.custom_jvp(lambda *operands: function(*operands, **constants))

    @compute.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            f"{name} can be differentiated once, and in reverse mode; choose the backends of XLA by backends.use("
            'expert_mlp="xla", attention="xla", nf4_matmul="xla").'
        )

    return list(compute(*operands))
