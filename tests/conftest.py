"""Strict: warnings are errors (pyproject.toml), implicit rank promotion raises, annotated shapes are checked.

Eight fake CPU devices stand in for a pod, so that every sharding runs in every test session. All of this must be set
before JAX is imported, which is why it stands above the imports.
"""

import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import chromium
import pytest

assert "jax" not in sys.modules, "a pytest plugin imported JAX before tests/conftest.py could configure it"

# a shell that starts the tests in the background lets them ignore Ctrl-C, and so would what they start and interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)

# the tests of kernels also run where the kernels are for (docs/kernels.md); everything else is tested on a CPU
PLATFORM = os.environ.get("BIMEDIX_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(PLATFORM, PLATFORM)
if PLATFORM != "cpu":  # accelerators round float32 operands by default, which would hide what a test looks for
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
# Code is generated faster: without LLVM's optimisations in a third of the time, and without MLIR and in one module a
# program in a third of the rest. XLA ends the process at an unknown flag, and JAX 0.12 no longer knows the last one.
# Flags of the caller come last and win.
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
FLAGS += ["--xla_cpu_parallel_codegen_split_count=1"]
if metadata.version("jaxlib").startswith("0.10."):
    FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()
# Every worker has its core. More threads only wait for each other: with two, PyTorch takes twice the time of its tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Workers, and programs that tests start, share what they compile through files that are deleted at the end.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="bimedix-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is a mistake, not a slow test
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no warning about threads when a test starts a subprocess

gc.set_threshold(50_000, 20, 20)  # tracing makes so many objects that collecting garbage takes a sixth of its time

from hypothesis import settings  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

settings.register_profile("suite", deadline=None)  # no test depends on how busy the machine is
settings.load_profile("suite")

LARGE = 9 << 28
"""Bytes of a worker from which on compiled programs are freed between files."""

# Every annotated function and dataclass of the two layers about arrays is checked by beartype at each call. The third
# is left to pyright: its pytrees also hold JAX's placeholders, and beartype cannot decorate a lone `-> typing.Self`.
install_import_hook(["bimedix_jax.kernels", "bimedix_jax.models"], "beartype.beartype")


def pytest_collection_finish() -> None:
    """Modules and collected tests stay to the end: collecting garbage need not look at them each time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: no worker waits for one at the end, and their programs run while the workers are small."""
    items.sort(key=lambda item: item.get_closest_marker("whole_process") is None)


@pytest.fixture(autouse=True, scope="module")
def free_compiled_programs() -> Iterator[None]:
    """Frees what was compiled once a worker has grown: kept, programs fill 10 GiB and run out of memory mappings."""
    yield
    pages = Path("/proc/self/statm")
    if not pages.exists() or int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > LARGE:
        import ctypes

        import jax

        jax.clear_caches()
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)


@pytest.fixture(autouse=True, scope="session")
def give_back_memory() -> Iterator[None]:
    """A command that a test calls must not make the worker keep its peak memory."""
    from bimedix_jax import startup

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup, "reuse_memory", lambda: None)
        yield


QUICK = {"evals", "experiments", "inference", "routing", "training"}
"""Folders whose tests take `tiny.quick_kernels`. Where the platform's kernels matter, a module has `DEFAULT_KERNELS =
True`: comparisons with other libraries, the choice of kernels, and generation."""


@pytest.fixture(autouse=True, scope="module")
def quick_kernels_in_folders(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.path.parent.name not in QUICK or getattr(request.module, "DEFAULT_KERNELS", False):
        yield
        return
    import tiny

    with tiny.quick_kernels():
        yield


@pytest.fixture
def least_effort() -> Iterator[None]:
    """XLA's lowest level of optimisation: programs of TPUs have the same products, and compile in less time."""
    import jax

    usual = jax.config.values["jax_optimization_level"]
    jax.config.update("jax_optimization_level", "O0")
    yield
    jax.config.update("jax_optimization_level", usual)


@pytest.fixture(scope="session")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Tokenizer of bytes with ChatML."""
    from bimedix_jax.data.tokenizer import byte_tokenizer

    return byte_tokenizer(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Chromium]:
    """A headless Chromium, where one is installed."""
    program = chromium.installed()
    if program is None:
        pytest.skip("Chromium is not installed, so no page is checked in a browser")
    with chromium.opened(program, tmp_path_factory.mktemp("chromium")) as found:
        yield found
