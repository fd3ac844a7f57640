"""Kernels in C++: compiled once on this machine, and called by XLA through its foreign function interface (jax.ffi)."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-w")
COMPILERS = ("c++", "g++", "clang++")


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


def compiler() -> str:
    """$CXX, else the first C++ compiler on the path.

    Raises:
      CannotBuild: there is none.
    """
    for name in (os.environ.get("CXX"), *COMPILERS):
        if name and (found := shutil.which(name)):
            return found
    raise CannotBuild("no C++ compiler was found; install g++ or name one by CXX.")


def cache_folder() -> Path:
    """$BIMEDIX_CACHE/native or ~/.cache/bimedix_jax/native."""
    return Path(os.environ.get("BIMEDIX_CACHE") or Path.home() / ".cache" / "bimedix_jax") / "native"


def build(source: Path, options: Sequence[str]) -> Path:
    """The shared library of a C++ file and the headers beside it, from the cache or compiled into it in some seconds.

    Raises:
      CannotBuild: no compiler, it fails, or the cache cannot be written.
    """
    command = [compiler(), *FLAGS, *options]
    parts = [jax.__version__, *command, *(f"{path.name}\n{path.read_text('utf-8')}" for path in sources(source))]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = cache_folder() / f"{source.stem}-{digest}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:  # another process may compile the same
            made = Path(scratch) / library.name
            found = subprocess.run(
                [*command, "-isystem", jax.ffi.include_dir(), str(source), "-o", str(made)],
                capture_output=True,
                text=True,
                check=False,
            )
            if found.returncode:
                line = next((line for line in found.stderr.splitlines() if "error" in line), found.stderr.strip())
                raise CannotBuild(f"{command[0]} cannot compile it ({line}).")
            made.rename(library)
    except OSError as error:
        raise CannotBuild(f"it cannot be compiled into {library.parent} ({error.strerror}).") from error
    return library


def sources(source: Path) -> list[Path]:
    return sorted([*source.parent.glob("*.h"), source])


@functools.cache
def register(source: Path, options: tuple[str, ...], functions: tuple[str, ...]) -> str | None:
    """Registers handlers of a C++ file with XLA, under their own names; the reason if that is impossible."""
    try:
        library = ctypes.CDLL(str(build(source, options)))
    except CannotBuild as error:
        return str(error)
    except OSError as error:
        return f"its library cannot be loaded ({error})."
    for name in functions:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return None
