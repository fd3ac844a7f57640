"""Golden text: files in tests/golden with help, presets, parameters, losses and tokens. A refactoring keeps them.

    python scripts/golden.py              # compares, prints a diff, exits 1 if there is one; a minute on 2 cores
    python scripts/golden.py --rewrite    # rewrites files that differ; the commit must explain why

Presets, tables of parameters, greedy tokens and help are compared exactly, losses and gradient norms to 1e-5 relative.
"""

import argparse
import contextlib
import dataclasses
import difflib
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from bimedix_jax import cli, files, startup
from bimedix_jax.experiment import Experiment
from bimedix_jax.models.config import MIXTRAL_8X7B, MixtralConfig
from bimedix_jax.presets import PRESETS, bimedix_mixtral_8x7b, smoke

if TYPE_CHECKING:
    from flax import nnx

GOLDEN = Path(__file__).resolve().parents[1] / "tests/golden"
TOLERANCE = 1e-5
"""Relative tolerance of losses and gradient norms in float32."""
WIDTH = 100
"""Columns of the terminal for the help."""
PROMPT = [7, 77, 177]
BATCH = [PROMPT, [1, 2, 3, 5, 8, 13, 21, 34], [250]]
NEW_TOKENS = 16


def presets() -> str:
    resolved = {name: PRESETS[name]().to_dict() for name in sorted(PRESETS)}
    return json.dumps(resolved, indent=2, ensure_ascii=False) + "\n"


def parameters(config: MixtralConfig, experiment: Experiment) -> str:
    """A line for each variable of the experiment's model, from shapes alone: path, shape, logical axes and bits."""
    from flax import nnx

    from bimedix_jax.plan.step import abstract_model

    flat = nnx.to_flat_state(nnx.state(abstract_model(config, experiment)))
    rows = sorted(describe(".".join(map(str, path)), variable) for path, variable in flat)
    rows = [("variable", "shape", "logical axes", "bits per weight"), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def describe(path: str, variable: "nnx.Variable") -> tuple[str, str, str, str]:
    """A row of the table. A 4-bit weight has its logical shape, and its bits include the scales."""
    import jax

    value = variable.get_value()
    stored = sum(8 * math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(value))
    shape, axes = value.shape, variable.get_metadata("axes")
    assert len(shape) == len(axes), path
    names = ", ".join(axis or "-" for axis in axes)
    return path, "x".join(map(str, shape)), names, f"{stored / math.prod(shape):.6g}"


def smoke_parameters() -> str:
    experiment = smoke()
    assert experiment.model.random is not None
    return parameters(experiment.model.random, experiment)


def losses() -> str:
    """Loss and gradient norm of each step of the smoke preset, for each value of remat."""
    return by_line({"none": steps("none"), "experts": steps("experts"), "layer": steps("layer")})


def steps(remat: Any) -> list[dict[str, float]]:
    from rich.console import Console

    from bimedix_jax.training.loop import train
    from bimedix_jax.training.metrics_file import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        train(dataclasses.replace(smoke(), remat=remat, checkpoint_every=10), folder, console=Console(quiet=True))
        return [{name: line[name] for name in ("loss", "grad_norm")} for line in read_metrics(folder)]


def tokens() -> str:
    """Greedy tokens of a random model, for one prompt and for a batch of prompts with different lengths."""
    from bimedix_jax.inference.generate import generate
    from bimedix_jax.models.init import init_random
    from bimedix_jax.quantise import quantise_base

    config = smoke().model.random
    assert config is not None
    base = init_random(config, dtype="float32", std=0.2)  # at 0.02 a model only repeats the last token
    found = {}
    for name, model in {"float32": base, "nf4": quantise_base(base)}.items():
        found[f"{name}, one prompt"] = [{"prompt": PROMPT, "tokens": generate(model, PROMPT, NEW_TOKENS)}]
        answers = generate(model, BATCH, NEW_TOKENS)
        found[f"{name}, batch"] = [{"prompt": p, "tokens": t} for p, t in zip(BATCH, answers, strict=True)]
    return by_line(found)


def by_line(document: dict[str, list[Any]]) -> str:
    """JSON with one line for each item of a list; floats in full precision."""
    blocks = [
        f"  {json.dumps(name)}: [\n" + ",\n".join(f"    {json.dumps(item)}" for item in items) + "\n  ]"
        for name, items in document.items()
    ]
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def help_text(command: str) -> str:
    """What `bimedix COMMAND --help` prints into a pipe, without colours; "" is `bimedix` itself."""
    stream = io.TextIOWrapper(io.BytesIO(), "utf-8", newline="\n")  # with StringIO, tyro would draw ASCII boxes
    with mock.patch.dict(os.environ, COLUMNS=str(WIDTH)), contextlib.redirect_stdout(stream):
        code = cli.main([*command.split(), "--help"])
    assert code == cli.DONE, f"bimedix {command} --help: exit code {code}"
    stream.seek(0)
    return stream.read()


def help_pages() -> dict[str, Callable[[], str]]:
    """Golden file -> function that gives its text, for the program, every group and every command."""
    groups = sorted({name.split()[0] for name in cli.COMMANDS if " " in name})
    pages = {f"help/{name.replace(' ', '_')}.txt": name for name in [*groups, *cli.COMMANDS]}
    return {file: lambda name=name: help_text(name) for file, name in {"help/bimedix.txt": "", **pages}.items()}


FILES: dict[str, Callable[[], str]] = {
    "presets.json": presets,
    "parameters_smoke.txt": smoke_parameters,
    "parameters_mixtral_8x7b.txt": lambda: parameters(MIXTRAL_8X7B, bimedix_mixtral_8x7b()),
    "losses.json": losses,
    "tokens.json": tokens,
    **help_pages(),
}
"""Golden file -> function that gives its text."""


def names() -> list[str]:
    """Every golden file that should exist or does exist, obsolete ones included."""
    found = {path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*") if path.is_file()}
    return [*FILES, *sorted(found - FILES.keys())]


def current(name: str) -> str | None:
    """The text that a golden file must have; None for an obsolete file."""
    return FILES[name]() if name in FILES else None


def difference(name: str, text: str | None) -> str:
    """A unified diff from the golden file to `text`; empty if they are equal."""
    path = GOLDEN / name
    golden = path.read_text("utf-8") if path.is_file() else None
    if golden == text:
        return ""
    if golden is None:
        return f"tests/golden/{name} is missing.\n"
    if text is None:
        return f"tests/golden/{name} is obsolete; delete it.\n"
    if name == "losses.json":
        text = by_line(within_tolerance(json.loads(text), json.loads(golden)))
    lines = difflib.unified_diff(
        golden.splitlines(keepends=True), text.splitlines(keepends=True), f"tests/golden/{name}", "now"
    )
    return "".join(lines)


def within_tolerance(new: Any, old: Any) -> Any:
    """`new`, with each number replaced by the one at its place in `old` if the two are equal within TOLERANCE."""
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: within_tolerance(value, old.get(key)) for key, value in new.items()}
    if isinstance(new, list) and isinstance(old, list) and len(new) == len(old):
        return [within_tolerance(*pair) for pair in zip(new, old, strict=True)]
    if isinstance(new, float) and isinstance(old, float) and math.isclose(new, old, rel_tol=TOLERANCE):
        return old
    return new


def rewrite(name: str, text: str | None) -> None:
    path = GOLDEN / name
    if text is None:
        path.unlink()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewrite", action="store_true", help="write the golden files that differ")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    startup.prepare()
    listed, differing = names(), 0
    for name in listed:
        text = current(name)
        changes = difference(name, text)
        differing += bool(changes)
        print(changes, end="")
        if changes and arguments.rewrite:
            rewrite(name, text)
    outcome = "rewritten" if arguments.rewrite else "differ"
    print(f"{differing} of {len(listed)} golden files {outcome}", file=sys.stderr)
    return 1 if differing and not arguments.rewrite else 0


if __name__ == "__main__":
    sys.exit(main())
