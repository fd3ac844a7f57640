"""The report page of a quickstart, its facts, and what is printed at the end."""

import os
import platform
from pathlib import Path
from typing import Any

from rich.console import Console

from bimedix_jax import __version__
from bimedix_jax.quickstart import page
from bimedix_jax.quickstart.base_model import NAME
from bimedix_jax.routing.claims import Gate
from bimedix_jax.routing.divergence import verdict

LIMITS = {
    NAME: "SmolLM2-135M was trained on English: with 135 M parameters and this short training it cannot answer in "
    "Arabic, and no answer below is medical information.",
    "tiny": "The model is tiny and random: its answers are noise, and its numbers only show that every part runs.",
}
"""The limits of the base, printed next to its answers."""


def limits_of(base: str, smoke: bool) -> str:
    return LIMITS["tiny"] if smoke else LIMITS.get(base, "")


def facts(seed: int) -> dict[str, Any]:
    """Version, seed and hardware of the run."""
    import jax

    return {
        "version": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "seed": seed,
        "hardware": {
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "platform": platform.platform(),
        },
    }


def processor() -> str:
    """Name of the processor, as the kernel or the platform tells it."""
    listed = Path("/proc/cpuinfo")
    if listed.exists():
        for line in listed.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def facts_line(result: dict[str, Any]) -> str:
    hardware = result["hardware"]
    return (
        f"bimedix_jax {result['version']}, JAX {result['jax']}, Python {result['python']}, seed {result['seed']}; "
        f"{hardware['devices']} x {hardware['device']}; {hardware['processor']}, {hardware['cores']} cores, "
        f"{hardware['memory_bytes'] / 2**30:.0f} GiB, "
        f"{hardware['platform']}; {result['seconds'] / 60:.1f} minutes"
    )


def divergence(gates: dict[str, Any], distances: dict[str, float]) -> dict[str, str]:
    """One sentence about the model before training, and one about the model after it."""
    return {
        when: f"{when.capitalize()} training: {verdict(Gate(**gate), distances[when])}." for when, gate in gates.items()
    }


def accuracies(scores: dict[str, Any], chance: dict[str, float]) -> list[tuple[str, str, str, str, str]]:
    """Rows of (language, before, after, n, chance); accuracies in percent with their 95 % intervals."""
    rows = []
    for language, before in scores["before"].items():
        after = scores["after"][language]
        rows.append((language, percent(before), percent(after), f"{after['n']}", f"{100 * chance[language]:.1f}"))
    return rows


def percent(score: dict[str, Any]) -> str:
    return f"{100 * score['accuracy']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"


def overlap(scores: dict[str, Any]) -> bool:
    """Whether the intervals before and after overlap in every language, so that no change is shown."""
    pairs = [(before, scores["after"][language]) for language, before in scores["before"].items()]
    return all(after["low"] <= before["high"] and before["low"] <= after["high"] for before, after in pairs)


def write_report(result: dict[str, Any], title: str, run_picture: Path, load_picture: Path) -> None:
    scores = result["accuracy"]
    parts = [
        page.paragraph(f"{title}; {result['steps']} optimiser steps on the sample's training part."),
        page.paragraph(facts_line(result)),
        page.picture(run_picture, "Training loss by step, and held-out loss before and after"),
        page.heading("Held-out loss"),
        page.before_after("bits per byte", result["bits_per_byte_before"], result["bits_per_byte_after"]),
        page.before_after("nats per token", result["loss_before"], result["loss_after"]),
        page.heading("Multiple-choice accuracy, percent [95 % interval]"),
        page.table(("language", "before", "after", "questions", "chance"), accuracies(scores, result["chance"])),
    ]
    if overlap(scores):
        parts.append(page.paragraph("The intervals before and after overlap: so few questions show no change."))
    parts += [
        page.heading("Expert load"),
        *(page.paragraph(sentence) for sentence in divergence(result["gate"], result["expert_distance"]).values()),
        page.picture(load_picture, "Share of router choices by layer, expert and language, before and after"),
        page.heading("One answer in each language"),
    ]
    if result["limits"]:
        parts.append(page.paragraph(result["limits"]))
    for language, pair in result["answers"].items():
        parts.append(page.paragraph(pair["question"], language))
        parts.append(page.paragraph(pair["answer"] or "-", language, "answer"))
    parts += [page.heading("Next steps"), page.commands(next_commands(result))]
    page.write_page(result["report"], "bimedix quickstart", parts)


def next_commands(result: dict[str, Any]) -> list[str]:
    return [
        f"bimedix chat --model {result['base']} --base nf4 --adapter {result['adapter']}",
        f"bimedix eval run --model {result['base']} --base nf4 --adapter {result['adapter']} --heldout sample",
    ]


def print_summary(result: dict[str, Any], console: Console) -> None:
    console.rule("Done")
    for sentence in divergence(result["gate"], result["expert_distance"]).values():
        console.print(sentence, highlight=False)
    minutes, gib = result["seconds"] / 60, result["peak_rss_bytes"] / 2**30
    console.print(f"{minutes:.1f} minutes, at most {gib:.1f} GiB of memory. The results are in {result['folder']}:")
    for name, description in (
        ("report", "the report with pictures"),
        ("adapter", "the adapter"),
        ("base", "its base model"),
    ):
        console.print(f"  {result[name]}  {description}", highlight=False, soft_wrap=True)
    console.print("Next steps:")
    for command in next_commands(result):
        console.print(f"  {command}", highlight=False, soft_wrap=True)
