"""Requests, tokens and costs for data of the paper's size, from the estimates of `--dry-run`.

    python scripts/estimate_data_costs.py --data ../shared/data --prices small=0.15/0.075/0.60

The paper translated 444,995 English samples and has more than 200,000 chats on exam questions. This script runs the
estimates of both commands, with their prompts and defaults, on the records of each kind that are nearest in size to the
paper's mean sample. It scales the sums to the paper's counts. Nothing is sent. `--prices` is as in `bimedix data
translate`: US dollars per million tokens.
"""

import argparse
import itertools
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bimedix_jax.commands import data_chats, data_translate
from bimedix_jax.curation.annotate.job import Job, forecast
from bimedix_jax.curation.annotate.task import Task
from bimedix_jax.curation.llm.account import Price, parse_prices
from bimedix_jax.curation.llm.config import LlmConfig
from bimedix_jax.curation.llm.estimate import Estimate
from bimedix_jax.curation.llm.request import Usage, likely_tokens
from bimedix_jax.curation.llm.store import open_store
from bimedix_jax.curation.quarantine import Quarantine
from bimedix_jax.curation.readers import read
from bimedix_jax.data.records import Record
from bimedix_jax.errors import positive, run_script

TRANSLATED = {"qa": 155_600, "mcqa": 224_500, "chat": 64_900}
"""Samples by kind: the paper's bilingual set minus its English set (tables 7 and 8), 445.0 K in total."""
CHATS = 200_000
PAPER_TOKENS = {"qa": 192, "mcqa": 394, "chat": 398}
"""Tokens of an English sample in the paper, with Mixtral's tokenizer (table 7)."""
SOURCES = {"qa": ["medquad"], "mcqa": ["medmcqa_en", "medqa_usmle_en", "pubmedqa"], "chat": ["mts_dialog"]}
MODEL = LlmConfig(model="any")


@dataclass(frozen=True)
class Row:
    """A row of the table: a task for `count` samples, and the tool's estimate for `sample` of them."""

    name: str
    count: int
    sample: int
    rounds: int
    estimates: tuple[Estimate, ...]

    def usage(self, refined: float) -> tuple[float, Usage]:
        """Requests and tokens for `count` samples, if the share `refined` of them needs one more round."""
        factor = self.count / self.sample

        def one(low: int, high: int) -> float:
            rounds = max(1, self.rounds)
            return factor * (low + refined * (high - low) / rounds)

        requests = sum(one(row.low_requests, row.high_requests) for row in self.estimates)
        prompt = sum(one(row.low.prompt, row.high.prompt) for row in self.estimates)
        reply = sum(one(row.low.completion, row.high.completion) for row in self.estimates)
        return requests, Usage(round(prompt), 0, round(reply))


def size(record: Record) -> int:
    """Tokens of a record by `likely_tokens`."""
    return sum(likely_tokens(turn.value) for turn in record.conversations)


def records(data: Path, kind: str, number: int) -> list[Record]:
    """The English records of a kind that are nearest in size to the paper's mean, half of them above it."""
    everything = itertools.chain.from_iterable(read(f"{name}={data / name}", Quarantine()) for name in SOURCES[kind])
    found = sorted(
        (record for record in everything if record.kind == kind), key=lambda record: (size(record), record.id)
    )
    middle = sum(size(record) < PAPER_TOKENS[kind] for record in found)
    half = min(number // 2, middle, len(found) - middle)
    return found[middle - half : middle + half]


def estimate(name: str, count: int, task: Task[Any], rows: list[Record], scratch: Path) -> Row:
    job = Job(records=lambda: iter(rows), task=task, writer=MODEL, judge=MODEL)
    with open_store(scratch / f"{name}.sqlite") as store:
        found = forecast(job, store)
    return Row(name, count, found.records, task.rounds, found.estimates)


def estimates(rows: dict[str, list[Record]], scratch: Path) -> list[Row]:
    """With the defaults of both commands."""
    options: dict[str, Any] = {"sources": (), "out": Path(), "llm": MODEL}
    translate = data_translate.task_of(data_translate.Config(**options))
    found = [estimate(f"translation, {kind}", TRANSLATED[kind], translate, rows[kind], scratch) for kind in rows]
    return [*found, estimate("chats", CHATS, data_chats.task_of(data_chats.Config(**options)), rows["mcqa"], scratch)]


def report(jobs: list[Row], tokens: dict[str, float], prices: dict[str, Price], refined: float) -> dict[str, Any]:
    rows = []
    for job in jobs:
        requests, usage = job.usage(refined)
        costs = {
            name: {"usd": price.cost(usage), "batch_usd": price.cost(usage, True)} for name, price in prices.items()
        }
        rows.append(
            {
                "job": job.name,
                "samples": job.count,
                "estimated_on": job.sample,
                "requests": round(requests),
                "prompt_tokens": usage.prompt,
                "completion_tokens": usage.completion,
                "cost": costs,
            }
        )
    return {"refined": refined, "tokens_per_sample": tokens, "paper_tokens_per_sample": PAPER_TOKENS, "jobs": rows}


def show(result: dict[str, Any]) -> None:
    names = list(result["jobs"][0]["cost"])
    print(f"| job | samples | requests | prompt tokens | reply tokens | {' | '.join(names)} |")
    print(f"|---|---|---|---|---|{'---|' * len(names)}")
    for row in result["jobs"]:
        costs = " | ".join(f"${row['cost'][name]['usd']:,.0f}" for name in names)
        tokens = (f"{row[key] / 1e6:,.0f} M" for key in ("prompt_tokens", "completion_tokens"))
        print(f"| {row['job']} | {row['samples']:,} | {row['requests'] / 1e6:.2f} M | {' | '.join(tokens)} | {costs} |")
    totals = [sum(row["cost"][name]["usd"] for row in result["jobs"]) for name in names]
    sums = [sum(row[key] for row in result["jobs"]) / 1e6 for key in ("requests", "prompt_tokens", "completion_tokens")]
    print(
        f"| all | | {sums[0]:.2f} M | {sums[1]:,.0f} M | {sums[2]:,.0f} M | "
        f"{' | '.join(f'${total:,.0f}' for total in totals)} |"
    )
    for kind, number in result["tokens_per_sample"].items():
        print(f"{kind}: {number:.0f} estimated tokens a sample, {PAPER_TOKENS[kind]} in the paper")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with medquad, medmcqa_en, medqa_usmle_en, ...")
    parser.add_argument("--prices", nargs="*", default=[], help="NAME=PROMPT/CACHED/COMPLETION or a .json file")
    parser.add_argument("--refined", type=float, default=0.3, help="share of samples that need one more round")
    parser.add_argument("--sample", type=positive, default=1000, help="records of each kind to estimate on")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    rows = {kind: records(options.data, kind, options.sample) for kind in SOURCES}
    with tempfile.TemporaryDirectory() as folder:
        jobs = estimates(rows, Path(folder))
    tokens = {kind: sum(map(size, found)) / len(found) for kind, found in rows.items()}
    result = report(jobs, tokens, parse_prices(options.prices), options.refined)
    if options.json:
        json.dump(result, sys.stdout)
        print()
    else:
        show(result)


if __name__ == "__main__":
    run_script(main)
