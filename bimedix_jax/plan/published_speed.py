"""Table 6 of the BiMediX paper beside the planner's model of an A100, and what was measured or compiled here."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bimedix_jax import files
from bimedix_jax.costs.devices import DEVICES
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.paper import Paper
from bimedix_jax.evals.typeset import Cell, Sheet
from bimedix_jax.plan.latency import Generation, architecture, generation

DEVICE = "a100-80gb"
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits of a weight with double quantisation: a code, an 8-bit scale of 64 weights, a 32-bit scale of 256 scales."""
PROMPT = 512
"""Tokens of the prompt, the default of llm-analysis; the paper states none."""
SETTINGS = (("16 bits, 2 GPUs", 2, 16.0), ("NF4, 1 GPU", 1, NF4_BITS))
"""(heading, devices, bits of a stored weight). Neither the 70B models nor Mixtral fit one GPU in 16 bits."""
NOTES = (
    'Time of 512 tokens at batch 1. Printed: the paper\'s figures, "computed with LLM-analysis on GPU A100-80GB". It '
    "states neither the precision nor the number of GPUs nor the efficiencies.",
    "Planner: a floor from the data sheet of the A100 with the efficiencies of `bimedix plan`, for 512 tokens after a "
    "prompt of 512 (bimedix_jax/plan/latency.py). The compiled step of `bimedix plan` moves more memory.",
    "With llm-analysis 0.2.2, 16-bit weights and two GPUs, 0.59 of the memory bandwidth gives the figures of the 70B "
    "models and Jais. It gives BiMediX's only for one feed-forward layer of 4 x the width, as if one expert were used; "
    "with its two experts BiMediX needs 0.91, as PMC-LLaMA does. With two experts and one share for all it is 5.7 "
    "times as fast as the 70B models, not 8.7 times (docs/results/paper_tables.md).",
)
MEASURED = "Rows of ours are from the files of --speed: other sizes, machines or devices, so compare with care."


def sheet(paper: Paper, measured: Iterable[tuple[str, float]] = ()) -> Sheet:
    """Table 6; `measured` adds a row for each (name, tokens/s)."""
    rows = []
    for row in paper.efficiency.rows:
        cells = [
            Cell(row.model),
            Cell(row.active),
            Cell(f"{row.latency:.1f}", row.latency),
            Cell(f"{row.tokens_per_s:.1f}", row.tokens_per_s),
        ]
        for found in planned(paper, row.architecture):
            cells += speed_cells(found.seconds if found.fits else None, found.tokens, ours=False)
        rows.append(tuple(cells))
    for name, rate in measured:
        seconds = Cell(f"{paper.efficiency.tokens / rate:.1f}", paper.efficiency.tokens / rate, ours=True)
        empty = [Cell("", ours=True)] * (2 * len(SETTINGS))
        rows.append((Cell(name, ours=True), Cell("", ours=True), seconds, Cell(f"{rate:.1f}", rate, ours=True), *empty))
    headings = [f"{what} ({name})" for name, *_ in SETTINGS for what in ("s", "tokens/s")]
    return Sheet(
        name=f"table{paper.efficiency.number}",
        title=f"Table {paper.efficiency.number}: latency and speed of {paper.efficiency.tokens} tokens on an A100-80GB",
        columns=("model", "active", "s (printed)", "tokens/s (printed)", *headings),
        rows=tuple(rows),
        notes=(*NOTES, *([MEASURED] if len(rows) > len(paper.efficiency.rows) else [])),
    )


def planned(paper: Paper, name: str) -> list[Generation]:
    """Times of an architecture in each of SETTINGS."""
    config = architecture(**dataclasses.asdict(paper.efficiency.architectures[name]))
    return [
        generation(config, DEVICES[DEVICE], count, bits, PROMPT, paper.efficiency.tokens) for _, count, bits in SETTINGS
    ]


def speed_cells(seconds: float | None, tokens: int, ours: bool) -> list[Cell]:
    if seconds is None:
        return [Cell("does not fit", ours=ours)] * 2
    return [Cell(f"{seconds:.1f}", seconds, ours=ours), Cell(f"{tokens / seconds:.1f}", tokens / seconds, ours=ours)]


def measured_rows(path: Path) -> list[tuple[str, float]]:
    """(name, tokens/s at batch 1) from the JSON of `bimedix bench decode` or `bimedix plan`.

    Raises:
      BimedixError: the file is neither.
    """
    found = files.read_json(path, dict[str, Any], "name a file that `bimedix bench decode --json` printed")
    rates = [*benchmarked(found), *compiled(found)]
    if not rates:
        raise BimedixError(
            f"{path} has no speed of decoding at batch 1; name the output of `bimedix bench decode --json` or "
            "`bimedix plan --json`"
        )
    return rates


def benchmarked(document: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    for row in document.get("rows", ()):
        if isinstance(row, dict) and row.get("name") == "decode_b1":
            where = f"{document.get('size', '?')} model, {row.get('ours_dtype', '?')}, {document.get('device', '?')}"
            yield f"bench decode: {where}", float(row["ours_tokens_per_s"])


def compiled(document: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    decode = document.get("decode", {})
    if decode.get("rows") == 1 and "tokens_per_s" in decode:
        where = f"{str(document.get('target', '')).split(':')[0]}:{decode['devices']}"
        yield f"{document.get('model', 'model')}, compiled for {where}", float(decode["tokens_per_s"])
