"""A study of three arms whose runs are a stub: a program of the standard library that writes what a run writes."""

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bimedix_jax.sweeps import sweep

STUDY = '''
"""Which arm is lowest?"""

from bimedix_jax.experiment import override
from bimedix_jax.presets import smoke
from bimedix_jax.sweeps.study import Contrast, Size

ARMS = {name: override(smoke(), {"lora.rank": rank}) for name, rank in {"base": 1, "low": 2, "high": 3}.items()}
SEEDS = 6
PRIMARY = Contrast("nats_per_token", "low", "base", -1)
SIZES = {
    "smoke": Size(changes={"steps": 4}, seeds=2, minutes=0.5, heldout="sample"),
    "lab": Size(minutes=40, heldout="sample"),
    "full": Size(heldout="sample"),
}
'''

STUB = """
import json, math, os, pathlib, signal, sys, threading, time

def tether():
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)

threading.Thread(target=tether, daemon=True).start()
folder = pathlib.Path(sys.argv[2])
arm = json.loads((folder / "arm.json").read_text())
how = json.loads((pathlib.Path(__file__).parent / "behaviour.json").read_text())
mine = how.get(f"{arm['arm']}-{arm['seed']}", "finish")
training = folder / "training"
training.mkdir(exist_ok=True)
(training / "config.json").write_text(json.dumps(arm["experiment"]))
with (folder / "starts").open("a") as starts:
    starts.write(f"{os.getpid()} {sorted(os.sched_getaffinity(0))}\\n")
if mine == "crash":
    print("some output", flush=True)
    sys.exit("error: the disk is full; free some space")
if mine == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if mine == "busy":
    sys.exit(75)
if mine == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    time.sleep(60)
level = {"base": 3.0, "low": 2.8, "high": 3.1}[arm["arm"]] + 0.01 * math.sin(7 * arm["seed"] + len(arm["arm"]))
same = {"load_max_share": [0.5, 0.7], "tokens": 8, "seconds": time.time() % 1}
lines = [{"step": s, "nll": 5 - 0.1 * s + 0.01 * arm["seed"], **same} for s in range(1, 5)]
(training / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
records = [
    {"id": f"r{i}", "language": ("en", "ar")[i % 2], "kind": "qa", "nats": level * 10 + i, "tokens": 10, "bytes": 30}
    for i in range(6)
]
done = {name: arm[name] for name in ("study", "size", "arm", "seed", "identity")}
done |= {"steps": 4, "trainable_parameters": 12, "tokens": 32, "training_flops": 1e6, "records": records}
(folder / "evaluation.json").write_text(json.dumps(done))
"""


@pytest.fixture
def study(tmp_path) -> Path:
    file = tmp_path / "arms.py"
    file.write_text(STUDY, "utf-8")
    return file


@pytest.fixture
def stub(tmp_path, monkeypatch) -> Callable[..., None]:
    """Replaces the runs by the stub. The returned function sets what runs do: `behave(low_0="crash")`."""
    import json

    program, how = tmp_path / "stub.py", tmp_path / "behaviour.json"
    program.write_text(textwrap.dedent(STUB), "utf-8")

    def behave(**runs: Any) -> None:
        how.write_text(json.dumps({name.replace("_", "-"): what for name, what in runs.items()}), "utf-8")

    behave()
    monkeypatch.setattr(sweep, "WORKER", (sys.executable, str(program)))
    return behave
