"""Kernels in C++ are compiled once, into a folder of the user's; where that fails, the reason is one sentence."""

import ctypes
import errno
import fcntl
import logging
import os
import signal
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bimedix_jax.kernels import backends, native
from bimedix_jax.kernels.expert_mlp import api, expert_mlp
from bimedix_jax.kernels.nf4 import quantize
from bimedix_jax.kernels.permute import sort_by_expert

ANSWER = 'extern "C" int answer() { return ANSWER; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, avx512_machine: None) -> Path:
    """A small C++ file with a header, and an empty cache."""
    monkeypatch.setenv("BIMEDIX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "answer.h").write_text("#define ANSWER 42\n")
    (folder / "answer.cc").write_text('#include "answer.h"\n' + ANSWER)
    return folder / "answer.cc"


def script(source: Path, text: str) -> str:
    """A compiler that is a shell script."""
    found = source.with_name(f"compiler{len(list(source.parent.iterdir()))}")
    found.write_text(f"#!/bin/sh\n{text}\n")
    found.chmod(0o755)
    return str(found)


def cached() -> list[str]:
    return sorted(path.name for path in native.cache_folder().iterdir())


def test_it_is_compiled_once_and_again_after_a_change(source: Path) -> None:
    first = native.build(source, ())
    made = first.stat().st_mtime_ns
    assert ctypes.CDLL(str(native.build(source, ()))).answer() == 42
    assert native.build(source, ()).stat().st_mtime_ns == made
    assert cached() == [first.name]
    (source.parent / "answer.h").write_text("#define ANSWER 43\n")
    assert ctypes.CDLL(str(native.build(source, ()))).answer() == 43
    assert len(cached()) == 2
    assert native.cache_folder().stat().st_mode & 0o777 == 0o700


def test_processes_that_compile_at_once_do_not_disturb_each_other(source: Path) -> None:
    threads = [threading.Thread(target=native.build, args=(source, ())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cached()) == 1
    assert ctypes.CDLL(str(native.build(source, ()))).answer() == 42


def test_missing_libraries_of_other_kernels_are_compiled_at_the_same_time(source: Path) -> None:
    others = [source.with_name(name) for name in ("made.cc", "missing.cc", "wrong.cc")]
    for other in others:
        other.write_text(ANSWER.replace("ANSWER", "7"))
    others[2].write_text("int wrong(")
    made = native.build(others[0], ())
    before = made.stat().st_mtime_ns
    library = native.build(source, (), [*others, source])
    assert made.stat().st_mtime_ns == before
    missing = native.existing(native.own_folder(), native.library_name(others[1], ()))
    assert missing is not None
    assert cached() == sorted(path.name for path in (library, made, missing))
    assert ctypes.CDLL(str(missing)).answer() == 7
    with pytest.raises(native.CannotBuild, match=r"cannot compile wrong.cc"):
        native.build(others[2], (), others)


def test_the_kernels_of_a_model_are_compiled_together() -> None:
    assert [source.parents[1].name for source in native.X86_KERNELS] == ["attention", "expert_mlp", "nf4_matmul"]


@pytest.mark.parametrize("kept", [0, 500, 4096, 10_000])
def test_a_truncated_library_is_compiled_again(source: Path, kept: int) -> None:
    """Loading one would kill the process."""
    library = native.build(source, ())
    whole = library.read_bytes()
    library.write_bytes(whole[:kept])
    again = native.build(source, ())
    assert again.stat().st_size == len(whole)
    assert ctypes.CDLL(str(again)).answer() == 42
    assert len(cached()) == 1


@pytest.mark.parametrize("locks", [True, False])
def test_a_killed_compilation_leaves_nothing_for_long(
    source: Path, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one removes it; where files have no locks, ten minutes later."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", refuse)
    left = [native.own_folder() / f"{native.UNFINISHED}{name}" for name in ("old", "new")]
    for folder in left:
        folder.mkdir()
        (folder / "library.so").write_text("half")
    os.utime(left[0], (0, 0))
    native.build(source, ())
    assert [folder.exists() for folder in left] == [False, not locks]


def test_a_finished_library_needs_no_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = native.build(source, ())
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.build(source, ()) == library


def test_a_library_without_the_function(source: Path) -> None:
    reason = native.register(source, (), ("question",))
    assert reason is not None
    assert "cannot be loaded (" in reason
    assert "and was deleted; name another compiler by CXX" in reason
    assert cached() == []


@pytest.mark.parametrize("command", ['echo nonsense > "$last"', 'g++ "$@"; truncate -s 6000 "$last"'])
def test_a_compiler_that_writes_nonsense_leaves_nothing(
    source: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", script(source, f"for last; do :; done; {command}"))
    reason = native.register(source, ("-O1",), ("answer",))
    assert reason is not None
    assert "its library cannot be loaded: " in reason
    assert cached() == []
    monkeypatch.delenv("CXX")
    assert ctypes.CDLL(str(native.build(source, ("-O1",)))).answer() == 42


def test_no_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(source.parent))
    with pytest.raises(native.CannotBuild, match="no C\\+\\+ compiler was found; install g\\+\\+"):
        native.build(source, ())
    monkeypatch.setenv("CXX", "/no/such/compiler -O2")
    with pytest.raises(native.CannotBuild, match="CXX is '/no/such/compiler', which is no program; set it to"):
        native.build(source, ())


def test_what_the_compiler_refuses(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.write_text("int wrong(")
    with pytest.raises(native.CannotBuild, match=r"cannot compile answer.cc \(.*error: .*\); name another"):
        native.build(source, ())
    for name, problem in (("false", "exit 1"), ("true", "it wrote no library")):
        monkeypatch.setenv("CXX", name)
        with pytest.raises(native.CannotBuild, match=rf"{name} cannot compile answer.cc \({problem}\); name another"):
            native.build(source, ())
    full = "echo ld: final link failed: No space left on device >&2; echo collect2: error: ld returned 1 >&2; exit 1"
    monkeypatch.setenv("CXX", script(source, full))
    with pytest.raises(native.CannotBuild, match=r"\(ld: .* No space left on device\); set BIMEDIX_CACHE to another"):
        native.build(source, ())
    assert cached() == []


def test_compilers_that_cannot_be_run(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ '")
    with pytest.raises(native.CannotBuild, match=r"CXX is \"g\+\+ '\", which is no command"):
        native.build(source, ())
    broken = source.with_name("broken")
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(native.CannotBuild, match=r"\(it cannot be run: Exec format error\); name another compiler"):
        native.build(source, ())


def test_a_compiler_that_hangs_is_stopped(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "MOST_SECONDS", 0.3)
    alive = source.with_name("alive")
    monkeypatch.setenv("CXX", script(source, f"(sleep 2; touch {alive}) & wait"))
    with pytest.raises(native.CannotBuild, match=r"\(it took more than 0.3 s\)"):
        native.build(source, ())
    time.sleep(2.5)
    assert not alive.exists(), "what the compiler started is stopped, too"
    assert cached() == []


def test_an_interrupt_stops_the_compilers(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", script(source, "sleep 60"))
    others = [source.with_name("other.cc")]
    others[0].write_text(ANSWER)
    threading.Timer(0.5, signal.raise_signal, (signal.SIGINT,)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        native.build(source, (), others)
    assert time.monotonic() - started < 20
    assert cached() == []


def test_each_file_is_compiled_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By threads or processes at once, and by a compiler that fails."""
    count = source.with_name("count")
    monkeypatch.setenv("CXX", script(source, f'echo >> {count}; exec g++ "$@"'))
    threads = [threading.Thread(target=native.build, args=(source, ())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(count.read_text()) == 1
    wrong = [source.with_name(f"wrong{number}.cc") for number in range(3)]
    for path in wrong:
        path.write_text("int wrong(")
    for path in wrong:
        with pytest.raises(native.CannotBuild, match=f"cannot compile {path.name} "):
            native.build(path, (), wrong)
    assert len(count.read_text()) == 4


def test_folders_that_cannot_be_used(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native.own_folder().chmod(0o777)
    with pytest.raises(native.CannotBuild, match=r"other users can write .*; set BIMEDIX_CACHE"):
        native.build(source, ())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BIMEDIX_CACHE", str(tmp_path / "file"))
    with pytest.raises(native.CannotBuild, match="cannot be made"):
        native.build(source, ())


def test_without_a_compiler_another_backend_runs_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, avx512_machine: None
) -> None:
    monkeypatch.setattr(native, "register", lambda *_: "no C++ compiler was found; install g++ or name one by CXX.")
    monkeypatch.setattr(native, "cpu_flags", lambda: native.AVX512_NEEDS)
    monkeypatch.setattr(backends, "announced", set())
    weights = tuple(jnp.zeros((2, *shape), jnp.bfloat16) for shape in ((32, 64), (32, 64), (64, 32)))
    with caplog.at_level(logging.WARNING):
        assert api.pick_backend(None, 64, 128, weights, jnp.bfloat16) == "xla"
    assert "avx512 cannot be used, falling back: no C++ compiler was found; install g++" in caplog.text


def test_calls_at_the_same_time_do_not_wait_for_each_other(avx512_machine: None) -> None:
    """Several in one program, in several threads: more than XLA has threads."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((50, 64)), jnp.bfloat16)
    shapes = ((4, 64, 128), (4, 64, 128), (4, 128, 64))
    dense = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]
    weights = tuple(quantize(jnp.copy(w.mT), batch_dims=1).mT for w in dense)
    permutation = sort_by_expert(jnp.asarray(rng.integers(0, 4, (50, 2)), jnp.int32), 4)
    pairs = jnp.ones((50, 2), jnp.float32)

    def one(x: jax.Array) -> jax.Array:
        return expert_mlp(x, pairs, permutation, weights, backend="avx512")

    several = jax.jit(lambda x: [one(x * factor) for factor in (1, 2, 4, 8)])
    expected = several(x)
    found: list[list[jax.Array]] = []
    threads = [threading.Thread(target=lambda: found.extend(several(x) for _ in range(20))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == 120
    for results in found:
        for got, exact in zip(results, expected, strict=True):
            np.testing.assert_array_equal(got, exact)


def test_instruction_sets_of_this_machine() -> None:
    flags = native.cpu_flags()
    assert not flags or {"fpu", "sse2"} <= flags
    assert native.has_avx512(matrix_units=False) <= native.has_avx512()
    assert native.SHARED.is_dir()
