"""`bimedix sweep FILE`, short for `bimedix sweep run FILE`: run the arms and seeds of a study."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from bimedix_jax.errors import BimedixError, listed

if TYPE_CHECKING:
    from bimedix_jax.sweeps.folder import Run
    from bimedix_jax.sweeps.study import Study
    from bimedix_jax.sweeps.sweep import Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Run every arm of a study with every seed, and write the table of results. `bimedix sweep FILE` is short for it.

    A study is a Python file such as those in experiments/. Each run has a folder of its own, named by a hash of its
    experiment, seed, data and base. A finished run never runs again, an interrupted one resumes, a changed one runs
    anew. Ctrl-C saves and stops all runs; the same command continues.
    """

    study: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Python file of the study."""
    size: Literal["smoke", "lab", "full"] = "lab"
    """How large it runs: minutes in all, minutes a run on 2 cores, or the full size on accelerators."""
    seeds: int | None = None
    """Use the first N seeds; by default all that the study has at this size."""
    arms: tuple[str, ...] = ()
    """Run these arms; by default all."""
    only: Annotated[str | None, tyro.conf.arg(metavar="ARM")] = None
    """Run this arm alone, as one task of many does; with --seed a single run."""
    seed: int | None = None
    """Run this seed alone."""
    out: Path | None = None
    """Folder of the sweep, by default runs/STUDY. Several studies may share one, and one report."""
    model: str | None = None
    """Folder or hub id of the base model; by default the one that the study names or makes."""
    data: str | None = None
    """Packed folder of training data; by default the one that the study names or makes."""
    heldout: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Held-out records for the evaluation, `sample` or a JSONL file; by default those of the study."""
    wandb: Literal["disabled", "offline", "online"] | None = None
    """Whether the runs are also logged to Weights & Biases; by default as the study says."""
    jobs: int = 1
    """Run so many at once, with cores and GPUs divided among them."""
    retry: bool = False
    """Start runs again that crashed."""
    slurm: bool = False
    """Run nothing; write OUT/STUDY-SIZE/array.sbatch, an array job with one task for each run."""
    wandb_sweep: bool = False
    """Run nothing; write OUT/STUDY-SIZE/wandb-sweep.yaml, the grid as a W&B sweep whose agents call this command."""
    dry_run: bool = False
    """Print the runs and how far they are, and exit. The rules of their interventions are read and checked."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Runs the study. Raises BimedixError, with the result as its document, if a run is not finished."""
    from bimedix_jax.process.terminal import Screen
    from bimedix_jax.sweeps import sweep
    from bimedix_jax.sweeps.page import document  # before the runs, which may take a day and outlive an update
    from bimedix_jax.sweeps.report import write_report

    plan = plan_of(config)
    sweep.check_interventions(plan)
    if config.dry_run:
        return dry_run(plan, config.jobs, console)
    progress = Screen(stderr=True)
    sweep.check_data(plan)
    sweep.prepare_inputs(plan, progress)
    wanted = sweep.prepare_folder(plan, progress)
    if config.slurm or config.wandb_sweep:
        return write_grids(config, plan, wanted, console)
    elsewhere = sweep.run_all(plan, wanted, config.jobs, config.retry, progress)
    tables = write_report(plan.out)
    table = next(one for one in tables if (one.study, one.size) == (plan.study.name, plan.name))
    result = document(table, plan.out, elsewhere)
    show(table, plan.out, console)
    if problem := sweep.unfinished(wanted, elsewhere):
        raise BimedixError(problem, document=result)
    return result


def plan_of(config: Config) -> "Plan":
    """What the options ask for. Raises BimedixError for a study, an arm or a combination that does not exist."""
    from bimedix_jax.sweeps.study import load_study
    from bimedix_jax.sweeps.sweep import Plan

    if config.only and config.arms:
        raise BimedixError("--only and --arms exclude each other; give one of them.")
    if config.seed is not None and config.seeds is not None:
        raise BimedixError("--seed and --seeds exclude each other; give one of them.")
    if config.jobs < 1:
        raise BimedixError(f"--jobs is {config.jobs}; give at least 1.")
    study = load_study(config.study)
    size = study.size(config.size)
    arms = (config.only,) if config.only else config.arms or tuple(study.arms)
    unknown = [arm for arm in arms if arm not in study.arms]
    if unknown:
        raise BimedixError(f"{config.study} has no arm {', '.join(unknown)}; the arms are {', '.join(study.arms)}.")
    heldout = located(config.heldout) or size.heldout
    check_primary(study, config.size, heldout)
    changes = {"model.path": located(config.model), "data.path": located(config.data), "tracking.mode": config.wandb}
    given = {name: value for name, value in changes.items() if value is not None}
    return Plan(
        study=study,
        name=config.size,
        size=dataclasses.replace(
            size,
            heldout=heldout,
            inputs=None if config.model and config.data else size.inputs,
        ),
        out=config.out or Path("runs") / study.name,
        changes=given,
        arms=tuple(dict.fromkeys(arms)),
        seeds=study.seeds_of(size, config.seeds) if config.seed is None else (config.seed,),
    )


def check_primary(study: "Study", size: str, heldout: str | None) -> None:
    """Raises BimedixError if the runs will not have the metric of the declared contrast."""
    from bimedix_jax.sweeps.study import EVALUATED

    metric = study.primary.metric
    if heldout is None and metric.partition("/")[0] in EVALUATED:
        raise BimedixError(
            f"{study.path}: PRIMARY is about {metric} of held-out records, and size {size} has none; set `heldout` of "
            "the size, pass --heldout, or declare a metric of training, such as nll."
        )


def located(name: str | None) -> str | None:
    """A path that exists as an absolute one, since runs may start elsewhere; a hub id or `sample` is unchanged."""
    return str(Path(name).resolve()) if name is not None and Path(name).exists() else name


def dry_run(plan: "Plan", jobs: int, console: Console) -> dict[str, Any]:
    """Prints and returns the runs, without making anything. Their identity is null before their inputs exist."""
    from bimedix_jax.process.terminal import FittedTable
    from bimedix_jax.sweeps import sweep

    rows = sweep.dry_rows(plan)
    table = FittedTable("arm", "seed", "state", "identity", title=f"{plan.study.name} at size {plan.name}")
    for row in rows:
        table.add_row(row["arm"], str(row["seed"]), row["state"], (row["identity"] or "inputs are not made yet")[:24])
    console.print(table)
    todo = sum(row["state"] != "finished" for row in rows)
    console.print(sweep.announcement(plan, len(rows), todo, jobs), highlight=False)
    return {"study": plan.study.name, "size": plan.name, "folder": str(plan.out), "rows": rows}


def write_grids(config: Config, plan: "Plan", wanted: "list[Run]", console: Console) -> dict[str, Any]:
    """Writes the array job or the W&B sweep. Its tasks call this command with the same options."""
    from bimedix_jax.sweeps import grids

    words = ["--size", plan.name, "--out", str(plan.out.resolve())]
    given = {"model": config.model, "data": config.data, "heldout": config.heldout, "wandb": config.wandb}
    for name, value in given.items():
        if value is not None:
            words += [f"--{name}", located(value) or ""]
    silent = [run.arm for run in wanted if run.experiment.tracking.mode == "disabled"]
    if config.wandb_sweep and silent:
        arms = listed([*dict.fromkeys(silent)])
        raise BimedixError(f"tracking.mode of {arms} is disabled, so W&B would see no run; pass --wandb online.")
    document: dict[str, Any] = {"study": plan.study.name, "size": plan.name, "runs": len(wanted)}
    if config.slurm:
        script = grids.write_slurm(plan.folder, wanted, config.study, words)
        console.print(f"{len(wanted)} tasks; submit them with: sbatch {script}", highlight=False)
        document["slurm"] = str(script)
    if config.wandb_sweep:
        grid = grids.write_wandb_sweep(plan.folder, wanted, config.study, words)
        console.print(f"{len(wanted)} runs; create the sweep with: wandb sweep {grid}", highlight=False)
        document["wandb_sweep"] = str(grid)
    return document


def show(table: Any, out: Path, console: Console) -> None:
    """Prints the arms with the primary metric, and where the report is."""
    from bimedix_jax.sweeps.page import arms_table
    from bimedix_jax.sweeps.report import HTML, MARKDOWN, primary_sentence

    console.print(arms_table(table))
    console.print(primary_sentence(table).replace("**", ""), highlight=False)
    console.print(f"report: {out / MARKDOWN}, {out / HTML}", highlight=False)
