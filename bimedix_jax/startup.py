"""What must be settled before JAX is imported: the platform, and the noise of its C++ libraries.

The command line calls `prepare`; a script that imports JAX itself may do so first.
"""

import ctypes
import importlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# what Linux shows of a GPU (the third line is WSL's) or of a TPU
ACCELERATORS = ("nvidia[0-9]*", "nvidiactl", "dxg", "accel[0-9]*", "vfio/[0-9]*", "kfd")

# the CUDA plugin's libraries write these when they are loaded without a driver; no setting reaches them
_CUDA_CHATTER = re.compile(rb"WARNING: All log messages before absl::InitializeLog|Could not find cuda drivers")


def prepare() -> None:
    """Choose the CPU where nothing else can be meant, and keep start-up quiet. What the user set stays as it is.

    The wheels of the extra `aot` compile for GPUs and TPUs that are absent. With them installed, JAX would try to start
    those at every run and report that it cannot. On a machine without any, JAX_PLATFORMS becomes `cpu`.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA: errors only
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    plugin = importlib.util.find_spec("jax_cuda12_plugin")
    if not sys.platform.startswith("linux") or _has_accelerator() or not (plugin or importlib.util.find_spec("libtpu")):
        return
    if "JAX_PLATFORMS" not in os.environ:
        os.environ["JAX_PLATFORMS"] = "cpu"
        print("note: no GPU or TPU here, JAX runs on the CPU (JAX_PLATFORMS chooses)", file=sys.stderr)
    if plugin and plugin.origin:
        _load_cuda_quietly(Path(plugin.origin).parent)


def reuse_memory() -> None:
    """Keep freed memory for the next allocation instead of returning it to the system: for work that repeats.

    A step's large temporaries would otherwise be mapped anew each time, and a CPU spends as long on filling them with
    zeros, page by page, as on computing them: logits of 1,024 tokens over 32,000 words took 89 ms that way and 46
    this way. The price is that the process keeps the memory of its largest moment. Only glibc has these settings.
    """
    one_arena, no_mapping, never_trim, grow_by = (-8, 1), (-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)  # <malloc.h>
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in (one_arena, no_mapping, never_trim, grow_by):
            libc.mallopt(parameter, value)


def _load_cuda_quietly(plugin: Path) -> None:
    """Load now, with the chatter held back, the libraries that JAX loads later: it finds them loaded."""
    with _without_lines(_CUDA_CHATTER), suppress(ImportError, OSError):  # JAX itself says which one it cannot use
        for library in sorted(plugin.glob("[!l]*.so")):  # not lib*.so: those are no Python modules
            importlib.import_module(f"{plugin.name}.{library.name.split('.')[0]}")
        ctypes.CDLL(str(plugin.parent / "jax_plugins/xla_cuda12/xla_cuda_plugin.so"))


def _has_accelerator(devices: Path = Path("/dev")) -> bool:
    return any(True for pattern in ACCELERATORS for _ in devices.glob(pattern))


@contextmanager
def _without_lines(pattern: re.Pattern[bytes]) -> Iterator[None]:
    """Hold back what reaches the stderr descriptor, C++ included, and pass on the lines that do not match."""
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
