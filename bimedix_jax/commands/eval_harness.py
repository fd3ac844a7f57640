"""`bimedix eval harness`: tasks of lm-evaluation-harness, its own, ours, and other people's."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from bimedix_jax import startup
from bimedix_jax.errors import BimedixError
from bimedix_jax.options import require_at_least_one

if TYPE_CHECKING:
    from bimedix_jax.evals.harness import HarnessModel
    from bimedix_jax.models.mixtral import Mixtral

FILES = ("result.json", "samples.jsonl", "requests.jsonl")
"""What --out contains: the result, one line for each question, and the answers to single requests."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Evaluate a model on tasks of lm-evaluation-harness, among them the paper's nine benchmarks in English and Arabic.

    Needs the extra `eval`. docs/harness.md lists the tasks of bimedix_jax; any task of the harness works too.
    """

    tasks: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TASK")]
    """Tasks and groups by name, such as bimedix_en, bimedix_medqa_ar or hellaswag."""
    model: str
    """Model folder or hub id."""
    adapter: Path | None = None
    """Folder of adapters to apply; by default none."""
    tokenizer: Path | None = None
    """Folder of the tokenizer; by default the model's."""
    template: str | None = None
    """Chat template by name (mixtral, mixtral-2023, chatml, plain); by default the model's own. Used with --chat."""
    base: Literal["bfloat16", "float32", "nf4"] | None = None
    """Storage of the weights; by default the one that the adapter was trained over, that of a native checkpoint, or
    else bfloat16."""
    router: str | None = None
    """Router variant (topk, softmax_topk, sigmoid_bias); by default the one that the model was trained with."""
    revision: str | None = None
    """Revision of a hub id; by default the main branch."""
    mesh: Annotated[tuple[str, ...], tyro.conf.arg(metavar="AXIS=N")] = ()
    """Shard the model over devices: data=N, fsdp=N, expert=N, tensor=N, whose product is the number of devices; by
    default one device."""
    data: tuple[Path, ...] = ()
    """Folders with the files of our tasks (docs/harness.md); by default they are taken from the hub."""
    task_files: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="DIR")] = ()
    """Folders of further task files (YAML), which may run Python code; by default none."""
    limit: int | None = None
    """Use the first N questions of each task; by default all."""
    num_fewshot: int | None = None
    """Solved examples before each question; by default as each task has it."""
    chat: bool = False
    """Put each prompt into the chat template, with solved examples as earlier turns."""
    exclude_flagged: bool = False
    """Leave out questions of our tasks whose translation was flagged; their number is reported."""
    batch_tokens: int = 4096
    """Tokens run at a time; it affects speed, memory and rounding only."""
    max_length: int | None = None
    """Longest prompt with its answer in tokens, by default the model's context; longer ones lose their beginning."""
    intervene: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON file of rules that tell the routers what to do (docs/routing.md); by default none."""
    out: Path | None = None
    """Folder for the result and one line for each question; by default the result is only printed. If the run is
    killed, the same command continues it."""
    overwrite: bool = False
    """Delete the result of an earlier run in --out first."""


def run(config: Config, console: Console) -> dict[str, Any]:
    """Loads the model, runs the harness, prints a table."""
    startup.keep_programs()
    check_options(config)
    with writing(config):
        return evaluate(config, console)


def evaluate(config: Config, console: Console) -> dict[str, Any]:
    """As `run`, in a folder that no other process writes."""
    require_harness()
    from bimedix_jax.checkpoint.hub import HUB_ID, offline_if_unreachable, resolve
    from bimedix_jax.evals.documents import DATA

    local = config.data or os.environ.get(DATA)
    if not local or not all(name.startswith("bimedix_") for name in config.tasks):
        offline_if_unreachable()
    from bimedix_jax.checkpoint.load import load
    from bimedix_jax.data.vocabulary import tokenizer_of_model
    from bimedix_jax.evals import harness_run, programs
    from bimedix_jax.evals.harness import HarnessModel
    from bimedix_jax.evals.harness_table import table
    from bimedix_jax.evals.request_store import RequestStore, check_run
    from bimedix_jax.quantise import storage_of
    from bimedix_jax.routing.interventions import check_fit, report, rules_of

    started = programs.count()
    rules, mesh = rules_of(config.intervene, config.adapter), mesh_of(config.mesh)
    if not HUB_ID.fullmatch(config.model):
        folder = resolve(config.model, config.revision)  # a wrong path or rule is found before questions are downloaded
        check_fit(rules, folder)
    shots, flagged = config.num_fewshot, config.exclude_flagged
    tasks = harness_run.load_tasks(config.tasks, config.data, config.task_files, flagged, shots, config.limit)
    asked = asked_of(config, harness_run.questions_hash(tasks, config.limit))
    if config.out is not None and not config.overwrite:
        check_run(config.out / FILES[2], {"asked": asked})
    folder = resolve(config.model, config.revision)
    check_fit(rules, folder)
    tokenizer = tokenizer_of_model(folder, config.model, config.tokenizer, config.template)
    model = load(folder, base=config.base, adapter=config.adapter, router=config.router, mesh=mesh)
    if rules is not None and rules.needs_base:
        base: Any = storage_of(model).base
        rules = dataclasses.replace(rules, base=load(folder, base=base, router=config.router))
    lm = HarnessModel(model, tokenizer, rules, config.batch_tokens, config.max_length)
    identity = identity_of(lm, config)
    if config.out is not None:
        for name in FILES if config.overwrite else ():
            (config.out / name).unlink(missing_ok=True)
        lm.store = RequestStore(
            config.out / FILES[2], {**identity, "asked": asked}, None if rules is None else rules.applied
        )
    found = harness_run.evaluate(lm, tasks, config.limit, config.chat)
    samples = found.pop("samples")
    result = {"model": config.model, "adapter": config.adapter, "revision": config.revision, **identity, **found}
    result |= {"limit": config.limit, "truncated": lm.truncated, "reused": lm.store.reused} | report(rules, console)
    console.print(table(result))
    if lm.truncated:
        console.print(
            f"[bold yellow]{lm.truncated:,} requests[/] lost their beginning: they exceed {lm.max_length} tokens"
        )
    if config.out is not None:
        harness_run.write(config.out, result, samples)
        console.print(f"The result is in {config.out}.", highlight=False)
    return result | programs.since(started)


def check_options(config: Config) -> None:
    """Raises BimedixError for options that contradict each other or are out of range."""
    if not config.tasks:
        raise BimedixError("there is nothing to evaluate on; name tasks, such as bimedix_en")
    require_at_least_one(config, "limit", "max_length", "batch_tokens")
    if config.num_fewshot is not None and config.num_fewshot < 0:
        raise BimedixError(f"--num-fewshot is {config.num_fewshot}; give 0 or more")


@contextlib.contextmanager
def writing(config: Config) -> Iterator[None]:
    """Locks the folder of --out, since two processes would write each other's answers. An error before anything is
    written removes a new folder.

    Raises:
      BimedixError: another process writes it, it cannot be written, or as `check_out`.
    """
    from bimedix_jax.process import folders

    if config.out is None:
        yield
        return
    check_out(config)  # before anything is created in a folder that is not ours
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(folders.made_parents(config.out))
            stack.enter_context(folders.one_writer(config.out, "evaluates"))
        except OSError as error:
            raise BimedixError(f"cannot write to {config.out} ({error.strerror}); name another with --out") from error
        check_out(config)  # again, since another process may have ended there in the meantime
        yield


def check_out(config: Config) -> None:
    """Raises BimedixError if --out may not be written. A run that was killed may be continued, and one that is finished
    may be repeated; `check_run` tells whether it is the same."""
    from bimedix_jax.evals.request_store import head_of
    from bimedix_jax.files import check_file, peek_json

    out = config.out
    if out is None:
        return
    if out.is_file():
        raise BimedixError(f"{out} is a file; name a folder with --out")
    result, samples, requests = (out / name for name in FILES)
    check_file(result, True, lambda path: {"tasks", "groups", "hashes"} <= set(peek_json(path)))
    check_file(samples, True, is_samples)
    check_file(requests, True, lambda path: head_of(path) is not None)
    if not config.overwrite and not requests.exists():
        for path in (result, samples):
            if path.exists():
                raise BimedixError(
                    f"{path} exists, without the {requests.name} that could repeat it; name another folder or pass "
                    "--overwrite"
                )


def is_samples(path: Path) -> bool:
    """Whether the first line of a file, which a kill may have cut off, is a question with its result."""
    with path.open("rb") as file:
        start = file.read(9)
    return b'{"task": '.startswith(start)


def asked_of(config: Config, questions: str) -> dict[str, Any]:
    """What is asked of the model; a killed run continues with the same only."""
    return {
        "tasks": list(config.tasks),
        "task_files": [str(folder) for folder in config.task_files],
        "questions": questions,
        "limit": config.limit,
        "num_fewshot": config.num_fewshot,
        "chat": config.chat,
        "exclude_flagged": config.exclude_flagged,
    }


def require_harness() -> None:
    """Raises BimedixError where lm-evaluation-harness is not installed."""
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise BimedixError("lm-evaluation-harness is not installed; run: pip install 'bimedix_jax[eval]'")


def mesh_of(sizes: tuple[str, ...]) -> Any:
    """The mesh of --mesh, None without it.

    Raises:
      BimedixError: an unknown axis, or sizes that do not fit the devices.
    """
    from bimedix_jax.sharding.rules import AXES, make_mesh

    if not sizes:
        return None
    found: dict[str, int] = {}
    for size in sizes:
        name, _, value = size.partition("=")
        if name not in AXES or not value.isdigit() or int(value) < 1 or name in found:
            raise BimedixError(f"--mesh {size} is not AXIS=N, with {', '.join(AXES)} once each at most")
        found[name] = int(value)
    return make_mesh(**{"fsdp": 1, **found})


def identity_of(lm: "HarnessModel", config: Config) -> dict[str, Any]:
    """Hashes and versions of what determines the answers to requests."""
    from importlib.metadata import version

    from bimedix_jax import __version__
    from bimedix_jax.routing.provenance import adapter_hash, model_hash

    model: Mixtral = lm.model
    return {
        "hashes": {
            "model": model_hash(model),
            "adapter": adapter_hash(model),
            "tokenizer": lm.words.fingerprint,
            "rules": None if config.intervene is None else rules_digest(lm),
        },
        "versions": {"bimedix_jax": __version__, **{name: version(name) for name in ("lm_eval", "jax")}},
        "settings": {
            "dtype": model.dtype,
            "router": model.config.router.variant,
            "max_length": lm.max_length,
            "batch_tokens": lm.batch_tokens,
            "add_bos": lm.add_bos,
            "template": lm.words.template.name if config.chat else None,
            "mesh": list(config.mesh),
        },
    }


def rules_digest(lm: "HarnessModel") -> str:
    """Hash of the rules of --intervene."""
    rules: Any = lm.plan
    return rules.digest()
