"""Time until the first token of `bimedix chat`, and to compile the training step of the quickstart.

    python scripts/measure_start.py --model FOLDER --adapter FOLDER     # also four starts of chat
    python scripts/measure_start.py --json                              # compilations only; one JSON document

Chat starts with an empty folder of compiled programs, and then again with what the start before has left there. Each
start is a new process that answers one prompt. The training step is that of the preset `quickstart`, compiled from
shapes only, in a new process without a folder of programs. Before it, the kernels in C++ are compiled into an empty
folder, which happens once on a machine (null where they do not run). Processor times (user and system) are beside the
wall times, since on busy cores only they can be compared. A quickstart leaves a model in
~/.cache/bimedix_jax/quickstart-base-* and an adapter in the folder of the run.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bimedix_jax import presets, startup
from bimedix_jax.errors import positive, run_script
from bimedix_jax.models.config import MixtralConfig, RouterConfig

PROMPT = "What is anaemia?"
CHAT_BAR, STEP_BAR = 5.0, 6.0
"""Largest accepted seconds on two idle cores: of the second start of chat, and of compiling the step."""
GROUPS = 6
"""Groups of language and kind in the quickstart's data."""

SMOLLM2_135M_IN_FOUR = MixtralConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    router=RouterConfig(num_experts=4, top_k=2),
    rope_theta=100_000.0,
    rms_norm_eps=1e-5,
    sliding_window=None,
    tie_embeddings=True,
    max_position_embeddings=8192,
)
"""The quickstart's mixture, upcycled from SmolLM2-135M (its config.json)."""


def processor_seconds(process: int) -> float:
    """User and system time of a running process on Linux."""
    with open(f"/proc/{process}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start_chat(model: str, adapter: str | None, cache: str) -> dict[str, float]:
    """Seconds from the start of a process to the first token of its reply."""
    command = [sys.executable, "-m", "bimedix_jax", "chat", "--model", model, "--prompt", PROMPT]
    command += ["--temperature", "0", "--max-new-tokens", "64", *(["--adapter", adapter] if adapter else [])]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache}
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        shown, question = b"", f"you> {PROMPT}".encode()
        while not shown.partition(question)[2].strip():
            piece = os.read(process.stdout.fileno(), 4096)
            if not piece:
                raise SystemExit(f"bimedix chat ended without a reply; its error is above. {shown.decode()}".strip())
            shown += piece
        found = {"wall": time.perf_counter() - began, "processor": processor_seconds(process.pid)}
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    return found


def compile_step() -> dict[str, dict[str, float]]:
    """Seconds to trace, lower and compile the training step of the quickstart, in this process."""
    startup.reuse_memory()  # as `bimedix quickstart` does
    startup.prepare()
    import jax
    import jax.numpy as jnp

    from bimedix_jax.adapters import add_lora
    from bimedix_jax.models.mixtral import Mixtral
    from bimedix_jax.quantise import quantise_base
    from bimedix_jax.training.optimiser import make_optimiser
    from bimedix_jax.training.state import init_state, split_params
    from bimedix_jax.training.step import make_train_step

    experiment = presets.quickstart()
    assert experiment.lora is not None
    assert experiment.steps is not None
    model = add_lora(quantise_base(Mixtral(SMOLLM2_135M_IN_FOUR)), experiment.lora)
    structure, params, frozen = split_params(model)
    optimiser = make_optimiser(experiment.optimiser, experiment.steps)
    state = jax.eval_shape(lambda params: init_state(params, optimiser, structure.router_state(frozen)), params)
    step: Any = make_train_step(structure, experiment, experiment.steps, optimiser, GROUPS)
    shape = (1, experiment.batch.rows, experiment.data.sequence_length)
    ids_ABT, mask_ABT = (jax.ShapeDtypeStruct(shape, kind) for kind in (jnp.int32, jnp.bool_))
    batch_A = {"tokens_BT": ids_ABT, "segment_ids_BT": ids_ABT, "loss_mask_BT": mask_ABT, "group_BT": ids_ABT}

    marks = [(time.perf_counter(), time.process_time())]

    def mark(result: Any) -> Any:
        marks.append((time.perf_counter(), time.process_time()))
        return result

    mark(mark(mark(step.trace(state, frozen, batch_A)).lower()).compile())
    ends = {"trace": marks[:2], "lower": marks[1:3], "compile": marks[2:], "total": marks[::3]}
    return {name: {"wall": end[0] - start[0], "processor": end[1] - start[1]} for name, (start, end) in ends.items()}


def compile_kernels() -> dict[str, float] | None:
    """Seconds to compile the kernels in C++, all at once."""
    from bimedix_jax.kernels import native

    if not native.has_avx512(matrix_units=False):
        return None
    marks = []
    for action in (lambda: None, lambda: native.build(native.X86_KERNELS[0], native.AVX512, native.X86_KERNELS)):
        action()
        marks.append((time.perf_counter(), sum(os.times()[:4])))  # with the compilers' processes
    return {name: end - start for name, start, end in zip(("wall", "processor"), *marks, strict=True)}


CHILDREN: dict[str, Callable[[], Any]] = {"kernels": compile_kernels, "step": compile_step}


def compile_both() -> dict[str, Any]:
    """Runs both compilations, each in a new process. The second one finds the libraries of the first."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "BIMEDIX_CACHE": cache}
        for name in CHILDREN:
            command = [sys.executable, __file__, "--child", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, **environment}, check=True)
            found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def require_model(model: str, adapter: str | None) -> None:
    """Raises BimedixError for a model without a tokenizer, and for a folder without an adapter."""
    from bimedix_jax.checkpoint.hub import resolve
    from bimedix_jax.checkpoint.load import check_adapter
    from bimedix_jax.data.vocabulary import tokenizer_of_model

    tokenizer_of_model(resolve(model), model)
    if adapter:
        check_adapter(Path(adapter))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--model", help="model of chat; by default chat is not measured")
    parser.add_argument("--adapter", help="adapter of chat")
    parser.add_argument("--starts", type=positive, default=4, help="starts of chat, the first one with an empty folder")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child]()))
        return
    if arguments.adapter and not arguments.model:
        parser.error("--adapter is used with --model only")
    if arguments.model:
        require_model(arguments.model, arguments.adapter)  # a wrong path is found before the compilations
    result: dict[str, Any] = {**compile_both(), "step_bar": STEP_BAR, "chat": [], "chat_bar": CHAT_BAR}
    if arguments.model:
        with tempfile.TemporaryDirectory() as cache:
            result["chat"] = [start_chat(arguments.model, arguments.adapter, cache) for _ in range(arguments.starts)]
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{'seconds':<28}{'wall':>8}{'processor':>12}")
    rows = {"kernels in C++": result["kernels"]} if result["kernels"] else {}
    rows |= {f"training step: {name}": seconds for name, seconds in result["step"].items()}
    rows |= {f"chat: start {number}": seconds for number, seconds in enumerate(result["chat"], 1)}
    for name, seconds in rows.items():
        print(f"{name:<28}{seconds['wall']:>8.2f}{seconds['processor']:>12.2f}")


if __name__ == "__main__":
    run_script(main)
