"""Compiled programs that are kept on disk: bounded, shared by processes, deleted at any time."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import monitoring
from jax._src.lru_cache import LRUCache  # through which every process reads and writes its programs
from jax.experimental.compilation_cache import compilation_cache

from bimedix_jax import startup

SETTINGS = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_COMPILATION_CACHE_MAX_SIZE",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "JAX_ENABLE_COMPILATION_CACHE",
    "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES",
)


@pytest.fixture
def fresh(monkeypatch, tmp_path) -> Path:
    """The folder of an environment without any setting for programs."""
    for name in SETTINGS:
        monkeypatch.setenv(name, "")  # restored later, also what keep_programs sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("BIMEDIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "programs"


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*-cache"))


def test_the_folder_is_bounded_and_settings_of_the_user_are_kept(fresh, monkeypatch) -> None:
    startup.keep_programs()
    assert fresh.is_dir()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(fresh)
    assert int(os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"]) == 2 << 30
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/programs")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "5")
    startup.keep_programs()
    assert [os.environ[name] for name in SETTINGS[:2]] == ["gs://bucket/programs", "5"]
    monkeypatch.delenv("JAX_COMPILATION_CACHE_MAX_SIZE")
    startup.keep_programs()
    assert "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ, "other processes may fill the folder without a limit"


def test_a_folder_that_cannot_be_written_is_named_once(fresh, capsys) -> None:
    fresh.parent.write_text("a file")
    startup.keep_programs()
    startup.keep_programs()
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false"
    assert capsys.readouterr().err == f"note: compiled programs are not kept in {fresh} (not a directory)\n"


def test_what_a_killed_process_left_half_written_is_removed(fresh) -> None:
    programs = LRUCache(str(fresh), max_size=100)
    programs.put("whole", b"x" * 40)
    for name, age in (("old", 120), ("new", 0)):  # killed between its two files
        (fresh / f"{name}-cache").write_bytes(b"x" * 30)
        os.utime(fresh / f"{name}-cache", (0, (fresh / "whole-cache").stat().st_mtime - age))
    with pytest.raises(FileNotFoundError):
        programs.put("next", b"x" * 40)
    startup._remove_unfinished(fresh)
    assert sorted(path.name for path in fresh.glob("*-cache")) == ["new-cache", "whole-cache"]
    startup._remove_unfinished(fresh, seconds=-1)
    programs.put("next", b"x" * 40)
    assert programs.get("whole") == programs.get("next") == b"x" * 40


def test_processes_share_a_folder_that_stays_bounded(tmp_path) -> None:
    def work(step: int) -> None:
        programs = LRUCache(str(tmp_path), max_size=100)  # its lock excludes other threads as it excludes processes
        for name in (str(index * step % 7) for index in range(20)):
            programs.put(name, name.encode() * 30)
            assert programs.get(name) in (None, name.encode() * 30)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, (1, 2, 3)))
    assert 0 < stored(tmp_path) <= 100


def test_programs_are_found_again_evicted_and_survive_deletion(tmp_path) -> None:
    events: list[str] = []

    def listen(event: str, **_: object) -> None:
        events.append(event.rsplit("/", 1)[-1])

    monitoring.register_event_listener(listen)
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    names += ("jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}

    def start(size: int) -> None:
        """What a new process has: this folder, and no program in memory."""
        compilation_cache.reset_cache()
        for name, value in zip(names, (str(tmp_path / "programs"), size, 0.0, True), strict=True):
            jax.config.update(name, value)

    def hits(number: int) -> int:
        events.clear()
        assert jax.jit(lambda x: x * number)(jnp.float32(2)) == 2 * number
        return events.count("cache_hits")

    try:
        start(1 << 20)
        assert [hits(3), hits(3)] == [0, 1]
        shutil.rmtree(tmp_path / "programs")
        assert [hits(3), hits(3)] == [0, 1]
        one = stored(tmp_path / "programs")
        start(one * 5 // 2)
        assert [hits(number) for number in (3, 4, 5, 3)] == [1, 0, 0, 0]
        assert stored(tmp_path / "programs") <= one * 5 // 2
    finally:
        compilation_cache.reset_cache()
        for name, value in before.items():
            jax.config.update(name, value)
        monitoring.unregister_event_listener(listen)


START = """
from bimedix_jax import startup
startup.keep_programs()
import jax, jax.numpy as jnp
from bimedix_jax.evals import programs
before = programs.count()
assert jax.jit(lambda x: x * 3)(jnp.float32(2)) == 6
print(programs.since(before)["compiled_programs"])
"""


def test_a_folder_may_move_and_damaged_programs_are_replaced(tmp_path) -> None:
    def start(cache: str) -> tuple[int, str]:
        kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        environment = {**kept, "JAX_PLATFORMS": "cpu", "BIMEDIX_CACHE": str(tmp_path / cache)}
        run = subprocess.run([sys.executable, "-c", START], env=environment, capture_output=True, text=True, check=True)
        return int(run.stdout), run.stderr

    built, _ = start("first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    assert built > 0
    assert start("second")[0] == 0
    for program in (tmp_path / "second").glob("programs/*-cache"):
        program.write_bytes(program.read_bytes()[:100])
    again, text = start("second")
    assert again == built
    assert text.count("is damaged and is compiled again") == built
    assert "UserWarning" not in text
    assert start("second")[0] == 0


def test_prepare_adds_its_flags_once_and_before_those_of_the_user(monkeypatch):
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    for _ in range(2):
        startup.prepare()
    assert os.environ["XLA_FLAGS"] == f"{startup.COMPILE_FLAGS} --xla_force_host_platform_device_count=2"
    own = "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling=false"
    monkeypatch.setenv("XLA_FLAGS", own)
    startup.prepare()
    assert os.environ["XLA_FLAGS"] == own
