"""The quickstart, end to end on a laptop: upcycle, quantise, fine-tune adapters, evaluate before and after, plot, ask.

The result of a stage gets its final name in the run's folder only when it is complete, so that an interrupted run
resumes with the first incomplete stage.
"""

import dataclasses
import hashlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.console import Console

from bimedix_jax import __version__, files
from bimedix_jax.adapters import add_lora, coverage
from bimedix_jax.checkpoint import upcycle
from bimedix_jax.checkpoint.load import load
from bimedix_jax.data import pack
from bimedix_jax.data.records import Record, sample
from bimedix_jax.data.tokenizer import Tokenizer, load_tokenizer
from bimedix_jax.data.vocabulary import require_fit, vocab_size_of
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.heldout import heldout_loss
from bimedix_jax.evals.multiple_choice import multiple_choice
from bimedix_jax.evals.tables import accuracy_table, loss_table
from bimedix_jax.experiment import Experiment, override
from bimedix_jax.inference.chat import ChatOptions, reply
from bimedix_jax.models.config import LoraConfig
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.notice import NOTICE_AR, NOTICE_EN
from bimedix_jax.presets import PRESETS
from bimedix_jax.process import signals
from bimedix_jax.process.terminal import Screen
from bimedix_jax.quickstart import report
from bimedix_jax.quickstart.base_model import cache_folder, dense_source, require_writable_cache
from bimedix_jax.quickstart.run_folder import SETTINGS, run_folder, write_json
from bimedix_jax.quickstart.tiny import tiny_dense
from bimedix_jax.routing.claims import Gate
from bimedix_jax.routing.divergence import expert_distance, verdict
from bimedix_jax.routing.load import ExpertLoad
from bimedix_jax.routing.load_and_gate import load_and_gate
from bimedix_jax.routing.picture import draw
from bimedix_jax.training.loop import train
from bimedix_jax.training.metrics_file import read_metrics
from bimedix_jax.training.picture import draw_run

QUESTIONS = {
    "en": "What are the first steps when someone is having an asthma attack?",
    "ar": "ما أعراض انخفاض سكر الدم وكيف يعالج؟",
}
"""Questions for the trained model, one in each language."""
LOAD_EVERY = 4
"""Expert load and the divergence gate are measured on every fourth held-out record."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartOptions:
    """The options of a quickstart. They are saved in its folder, and `--resume` reads them."""

    smoke: bool
    steps: int
    base: str
    recipe: upcycle.UpcycleRecipe
    max_new_tokens: int

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    @classmethod
    def of(cls, smoke: bool, steps: int | None, base: str) -> "QuickstartOptions":
        recipe = upcycle.UpcycleRecipe(experts=4, top_k=2)
        if smoke:
            return cls(smoke=True, steps=steps or 12, base="a tiny random model", recipe=recipe, max_new_tokens=16)
        steps = steps or PRESETS["quickstart"]().steps or 1
        return cls(smoke=False, steps=steps, base=base, recipe=recipe, max_new_tokens=72)

    @classmethod
    def read(cls, folder: Path) -> "QuickstartOptions":
        if not (folder / SETTINGS).is_file():
            raise BimedixError(f"{folder} contains no quickstart to resume; start one without --resume")
        return files.read_json(folder / SETTINGS, cls, "start a new quickstart without --resume")

    def experiment(self, base: Path, packed: Path) -> Experiment:
        """The training run: the preset with changes."""
        changes: dict[str, Any] = {"model.path": str(base), "data.path": str(packed), "steps": self.steps}
        if self.smoke:
            changes |= {
                "name": "quickstart-smoke",
                "data.sequence_length": 512,
                "batch.rows": 2,
                "lora.rank": 8,
                "lora.alpha": 16.0,
                "optimiser.learning_rate": 1e-2,
                "optimiser.warmup_steps": 2,
                "checkpoint_every": 4,
                "tracking.mode": "disabled",
            }
        return override(PRESETS["quickstart"](), changes)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One evaluation on the held-out sample."""

    heldout: dict[str, Any]
    choice: dict[str, Any]
    load: ExpertLoad
    gate: Gate
    expert_distance: float

    def to_dict(self) -> dict[str, Any]:
        plain = {"heldout": self.heldout, "choice": self.choice, "load": self.load.to_dict()}
        return {**plain, "gate": dataclasses.asdict(self.gate), "expert_distance": self.expert_distance}

    @classmethod
    def read(cls, path: Path) -> "Measured":
        plain = json.loads(path.read_text("utf-8"))
        load = plain["load"]
        arrays = {name: {g: np.array(v) for g, v in load[name].items()} for name in ("counts", "entropy", "top_weight")}
        loaded = ExpertLoad(**arrays, tokens=load["tokens"], too_long=load["too_long"])
        return cls(plain["heldout"], plain["choice"], loaded, Gate(**plain["gate"]), plain["expert_distance"])

    @property
    def scores(self) -> dict[str, Any]:
        """Multiple-choice accuracy by language, with its interval and number of questions."""
        return {group: score for group, score in self.choice["by_group"].items() if "/" not in group}

    @property
    def accuracy(self) -> dict[str, float]:
        """Multiple-choice accuracy by language."""
        return {group: score["accuracy"] for group, score in self.scores.items()}


def run_quickstart(folder: Path, options: QuickstartOptions, resume: bool, console: Console) -> dict[str, Any]:
    """Runs all stages in `folder` and returns the result, which is also written to result.json."""
    began = time.perf_counter()
    console.print(f"[bold]{NOTICE_EN}[/]\n{NOTICE_AR}\n")
    with (
        run_folder(folder, dataclasses.asdict(options), resume),
        signals.hint(f"resume with `{resume_command(folder)}`"),
    ):
        base = prepare_base(folder, options, console)
        tokenizer = load_tokenizer(base)
        require_fit(tokenizer, vocab_size_of(base), options.base)
        packed = prepare_rows(folder, tokenizer, options, console)
        experiment = options.experiment(base, packed)
        lora = experiment.lora
        assert lora is not None  # the preset has adapters
        before, after, model = tune(folder, base, tokenizer, experiment, lora, options, resume, console)
        answers = ask(model, tokenizer, options, console)
        result = conclude(folder, base, options, experiment.seed, before, after, answers, time.perf_counter() - began)
    report.print_summary(result, console)
    return result


def resume_command(folder: Path) -> str:
    return f"bimedix quickstart --resume --out {folder}"


def prepare_base(folder: Path, options: QuickstartOptions, console: Console) -> Path:
    """The mixture to start from. It is cached, because it is the same every time; a smoke run has its own."""
    console.rule("1. Upcycle a dense model into a mixture of experts")
    key = json.dumps([options.base, dataclasses.asdict(options.recipe), __version__])
    name = f"quickstart-base-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    target = folder / "base" if options.smoke else cache_folder() / name
    if not target.exists():
        if options.smoke:
            tiny_dense(folder / "dense")
        source = str(folder / "dense") if options.smoke else options.base
        if not options.smoke:
            require_writable_cache()
        with dense_source(source, None, target.parent, console) as dense:
            upcycle.upcycle(dense, target, options.recipe, options.base)
    upcycled = upcycle.read_report(target)
    console.print(
        f"{options.base}: {options.recipe.experts} experts, top-{options.recipe.top_k}, in {target}", highlight=False
    )
    for warning in upcycled.warnings:
        console.print(f"[yellow]note:[/] {warning}", highlight=False)
    return target


def prepare_rows(folder: Path, tokenizer: Tokenizer, options: QuickstartOptions, console: Console) -> Path:
    """Packs the training records of the sample."""
    console.rule("2. Pack the bilingual sample")
    packed = folder / "packed"
    length = options.experiment(folder, packed).data.sequence_length
    if not packed.exists():
        records = list(sample("train"))
        order = np.random.default_rng(0).permutation(len(records))
        packing = pack.PackReport()
        examples = (pack.encode_record(tokenizer, records[i]) for i in order)
        rows = pack.pack(examples, length, tokenizer.pad_id, report=packing)
        facts = {
            "tokenizer": tokenizer.fingerprint,
            "template": tokenizer.template.name,
            "vocab_size": tokenizer.vocab_size,
            "pad_id": tokenizer.pad_id,
        }
        with files.new_folder(packed) as partial:
            pack.write(partial, rows, packing, length, facts)
    index = json.loads((packed / "index.json").read_text("utf-8"))
    console.print(
        f"{index['examples']} records in {index['rows']} rows of {length} tokens, {index['efficiency']:.0%} full; "
        f"{index['truncated']} longer than a row were cut by {index['truncated_tokens']:,} tokens",
        highlight=False,
    )
    return packed


def heldout_records(options: QuickstartOptions) -> list[Record]:
    """The held-out records of the sample; in a smoke run only the shortest of each language and kind."""
    records = list(sample("heldout"))
    return shortest_of_each(records, 1) if options.smoke else records


def load_records(options: QuickstartOptions) -> list[Record]:
    """The records for expert load and divergence gate, at least the 10 that the gate needs."""
    records = list(sample("heldout"))
    return shortest_of_each(records, 2) if options.smoke else records[::LOAD_EVERY]


def shortest_of_each(records: list[Record], count: int) -> list[Record]:
    """The shortest `count` records of each language and kind."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in sorted(records, key=lambda record: len(record.model_dump_json())):
        found.setdefault((record.language, record.kind), []).append(record)
    return [record for same in found.values() for record in same[:count]]


def measure(model: Mixtral, tokenizer: Tokenizer, options: QuickstartOptions, path: Path) -> Measured:
    """Evaluates the model, or reads the evaluation of the interrupted run."""
    if path.exists():
        return Measured.read(path)
    records = heldout_records(options)
    loss = heldout_loss(model, tokenizer, records).to_dict()
    choice = multiple_choice(model, tokenizer, [record for record in records if record.choices is not None]).to_dict()
    distance = expert_distance(model)
    load, gate = load_and_gate(model, tokenizer, load_records(options), identical=distance == 0)
    measured = Measured(loss, choice, load, gate, distance)
    write_json(path, measured.to_dict())
    return measured


def tune(
    folder: Path,
    base: Path,
    tokenizer: Tokenizer,
    experiment: Experiment,
    lora: LoraConfig,
    options: QuickstartOptions,
    resume: bool,
    console: Console,
) -> tuple[Measured, Measured, Mixtral]:
    """Quantises the base, evaluates, trains adapters, evaluates again."""
    console.rule("3. Load in 4 bits, add adapters")
    # new adapters change nothing, so "before" is the base; with them both evaluations share one compilation
    model = add_lora(load(base, base="nf4"), lora, experiment.seed)
    console.print(coverage(model).table())
    console.rule("4. Evaluate before")
    before = measure(model, tokenizer, options, folder / "before.json")
    console.print(loss_table(before.heldout))
    console.rule("5. Train the adapters")
    training = folder / "training"
    outcome = train(
        experiment,
        training,
        resume=resume and (training / "config.json").exists(),
        model=model,
        console=console if console.stderr else Screen(stderr=True),
        resume_command=resume_command(folder),
    )
    console.rule("6. Evaluate after")
    after = measure(outcome.model, tokenizer, options, folder / "after.json")
    console.print(loss_table(after.heldout, before.heldout))
    console.print(accuracy_table(after.choice, before.choice))
    return before, after, outcome.model


def ask(
    model: Mixtral, tokenizer: Tokenizer, options: QuickstartOptions, console: Console
) -> dict[str, dict[str, str]]:
    """Asks one question in each language."""
    console.rule("7. Ask")
    if limits := report.limits_of(options.base, options.smoke):
        console.print(limits, style="dim", highlight=False)
    chat_options = ChatOptions(
        max_new_tokens=options.max_new_tokens, temperature=0.0, top_p=None, repetition_penalty=1.15
    )
    answers = {}
    for language, question in QUESTIONS.items():
        console.print(f"[bold]{question}[/]", highlight=False)
        answer = reply(model, tokenizer, question, options=chat_options)
        console.print(answer or "(no answer)", highlight=False, markup=False)
        answers[language] = {"question": question, "answer": answer}
    return answers


def conclude(
    folder: Path,
    base: Path,
    options: QuickstartOptions,
    seed: int,
    before: Measured,
    after: Measured,
    answers: dict[str, dict[str, str]],
    seconds: float,
) -> dict[str, Any]:
    """Writes pictures, report and result."""
    measured = {"before": before, "after": after}
    loads = {when: found.load for when, found in measured.items()}
    notes = {when: verdict(found.gate, found.expert_distance) for when, found in measured.items()}
    load_picture = draw(loads, folder / "expert_load.png", notes=notes)
    metrics = read_metrics(folder / "training")
    bits = [found.heldout["bits_per_byte"] for found in (before, after)]
    title = f"{options.base}, {options.recipe.experts} experts top-{options.recipe.top_k}, 4-bit base, adapters"
    run_picture = draw_run(metrics, bits[0], bits[1], folder / "run.png", title)
    result = {
        "loss_before": before.heldout["nats_per_token"],
        "loss_after": after.heldout["nats_per_token"],
        "bits_per_byte_before": bits[0],
        "bits_per_byte_after": bits[1],
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "accuracy": {when: found.scores for when, found in measured.items()},
        "chance": after.choice["chance"],
        "gate": {when: dataclasses.asdict(found.gate) for when, found in measured.items()},
        "expert_distance": {when: found.expert_distance for when, found in measured.items()},
        "answers": answers,
        "limits": report.limits_of(options.base, options.smoke),
        **report.facts(seed),
        "steps": options.steps,
        "peak_rss_bytes": peak_rss_bytes(),
        "seconds": seconds,
        "base": str(base),
        "adapter": str(folder / "training" / "adapter"),
        "expert_load": str(load_picture),
        "report": str(folder / "report.html"),
        "folder": str(folder),
    }
    report.write_report(result, title, run_picture, load_picture)
    write_json(folder / "result.json", result)
    return result


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far; getrusage counts kibibytes, on a Mac bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
