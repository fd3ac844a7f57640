"""How a process ends after a signal; the moments within a command are in tests/test_cli.py."""

import subprocess
import sys

import pytest

LATE = """
import os, signal, sys
from bimedix_jax.process import signals

class Late:
    def __del__(self):  # while modules are cleared, after Python has restored the default handlers
        os.kill(os.getpid(), signal.{name})

signals.catch_signals()
signals.command_ended()
late = Late()
print("done", flush=True)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_during_python_s_shutdown_changes_nothing(name: str) -> None:
    ended = subprocess.run([sys.executable, "-c", LATE.format(name=name)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")
