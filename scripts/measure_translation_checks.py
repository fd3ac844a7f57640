"""Measure how many professional translations pass the rule-based checks, and how many damaged ones they find.

    python scripts/measure_translation_checks.py --pairs tico19_en_ar.jsonl --json

`--pairs` is a JSONL file with the fields `en` and `ar` (TICO-19: 3,071 sentences). Every damage of
bimedix_jax/curation/checks/damage.py is applied to every pair to which it can be applied. A pair passes if it raises no
flag. Damage counts as found if it raises a flag that the undamaged pair does not raise. `halves` are the pairs at even
and odd positions, counted from 0. Numeric thresholds were chosen on the even ones. `file` is one file with every fifth
translation swapped, from which the checks also learn which words go together.
"""

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bimedix_jax.curation.checks import damage
from bimedix_jax.curation.checks.api import FLAG_NAMES, Batch, check_text
from bimedix_jax.curation.checks.related import Corpus
from bimedix_jax.curation.checks.segments import Segments
from bimedix_jax.errors import BimedixError, natural, positive, run_script


def read_pairs(path: Path) -> list[damage.Pair]:
    """The pairs (`en`, `ar`) of a JSONL file."""
    if not path.is_file():
        raise BimedixError(f"there is no file {path}; name a JSONL file with the fields en and ar")
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        return [(row["en"], row["ar"]) for row in rows]
    except (ValueError, TypeError, KeyError):
        raise BimedixError(f"{path} is no JSONL file whose rows have en and ar; correct the path") from None


class Tally:
    """Counts of pairs and of flagged pairs, in total and in the two halves, and counts of flags."""

    def __init__(self) -> None:
        self.n: Counter[str] = Counter()
        self.flagged: Counter[str] = Counter()
        self.flags: Counter[str] = Counter()
        self.examples: list[dict[str, Any]] = []

    def add(self, place: int, names: Iterable[str], texts: tuple[str, str], wanted: bool) -> None:
        names = set(names)
        for part in ("all", "odd" if place % 2 else "even"):
            self.n[part] += 1
            self.flagged[part] += bool(names)
        self.flags.update(names)
        if bool(names) != wanted:
            self.examples.append({"flags": sorted(names), "source": texts[0], "translation": texts[1]})

    def rate(self, part: str = "all") -> float:
        return self.flagged[part] / self.n[part] if self.n[part] else float("nan")


def measure(pairs: list[damage.Pair], seed: int) -> dict[str, Tally]:
    """Tallies for `clean`, for `injected` (good pairs with the additions of the damages) and for each kind."""
    places = {source: place for place, (source, _) in enumerate(pairs)}
    tallies = {"clean": Tally(), "injected": Tally(), "boilerplate_alone": Tally()}
    clean = Batch(pairs)
    before: dict[damage.Pair, set[str]] = {}
    for place, pair in enumerate(pairs):
        before[pair] = {flag.name for flag in check_text(*pair, clean)}
        tallies["clean"].add(place, before[pair], pair, wanted=False)
    for kind, make in {**damage.BAR, **damage.ALSO}.items():
        tally = tallies[kind] = Tally()
        cases = list(make(pairs, random.Random(f"{seed}:{kind}")))
        batch = Batch((case.source, case.damaged) for case in cases)
        for number, case in enumerate(cases):
            place = places.get(case.source, number)  # pairs stay in their half, also for kinds that skip some
            good, damaged = (case.source, case.good), (case.source, case.damaged)
            if good not in before:
                before[good] = {flag.name for flag in check_text(*good)}
                tallies["injected"].add(place, before[good], good, wanted=False)
            names = {flag.name for flag in check_text(*damaged)}
            if kind == "boilerplate":
                tallies["boilerplate_alone"].add(place, names - before[good], damaged, wanted=True)
            shared = batch.check(*damaged)
            names |= {shared.name} if shared else set()
            tally.add(place, names - before[good], damaged, wanted=True)
    return tallies


def measure_file(pairs: list[damage.Pair], seed: int) -> dict[str, Any]:
    """A file in which every fifth source has the translation of another one, checked as `bimedix data check` does."""
    order = random.Random(f"{seed}:file").sample(range(len(pairs)), len(pairs))
    wrong = order[: len(pairs) // 5]
    found = list(pairs)
    for place, other in zip(wrong, [*wrong[1:], *wrong[:1]], strict=True):
        found[place] = (pairs[place][0], pairs[other][1])
    corpus = Corpus([Segments(((None, pair),)) for pair in found])
    batch, unrelated = Batch(found), corpus.unrelated()
    flagged = [bool(check_text(*pair, batch)) or pair in unrelated for pair in found]
    caught, sound = sum(flagged[place] for place in wrong), [place for place in order if place not in set(wrong)]
    false = sum(flagged[place] for place in sound)
    return {
        "swapped": {"rate": caught / max(1, len(wrong)), "n": len(wrong)},
        "sound_flagged": {"rate": false / max(1, len(sound)), "n": len(sound)},
    }


def report(tallies: dict[str, Tally]) -> dict[str, Any]:
    """The figures as one JSON document."""

    def figures(kind: str, part: str = "all") -> dict[str, Any]:
        return {"rate": tallies[kind].rate(part), "n": tallies[kind].n[part]}

    def half(part: str) -> dict[str, Any]:
        return {
            "clean_pass_rate": 1 - tallies["clean"].rate(part),
            "clean_n": tallies["clean"].n[part],
            "caught": {kind: figures(kind, part) for kind in damage.BAR},
        }

    kinds = [*damage.BAR, *damage.ALSO]
    return {
        "clean_pass_rate": 1 - tallies["clean"].rate(),
        "clean_n": tallies["clean"].n["all"],
        "injected_pass_rate": 1 - tallies["injected"].rate(),
        "injected_n": tallies["injected"].n["all"],
        "caught": {kind: figures(kind) for kind in damage.BAR},
        "swapped": figures("swapped"),
        "also": {kind: figures(kind) for kind in [*damage.ALSO, "boilerplate_alone"] if kind != "swapped"},
        "halves": {"even": half("even"), "odd": half("odd")},
        "flags": {kind: {n: tallies[kind].flags[n] for n in FLAG_NAMES} for kind in ["clean", *kinds]},
    }


def show(result: dict[str, Any]) -> None:
    """Print the figures as Markdown tables, the second with the flags of each kind."""
    print(f"clean: {result['clean_pass_rate']:.2%} of {result['clean_n']:,} pass")
    print(f"with added doses, options or drugs: {result['injected_pass_rate']:.2%} of {result['injected_n']:,} pass\n")
    print("| damage | caught | n | even | odd |\n|---|---|---|---|---|")
    for kind, row in result["caught"].items():
        even, odd = (result["halves"][part]["caught"][kind]["rate"] for part in ("even", "odd"))
        print(f"| {kind} | {row['rate']:.2%} | {row['n']:,} | {even:.2%} | {odd:.2%} |")
    for kind, row in {**result["also"], "swapped": result["swapped"]}.items():
        print(f"| {kind} (no required share) | {row['rate']:.2%} | {row['n']:,} | | |")
    caught, false = result["file"]["swapped"], result["file"]["sound_flagged"]
    print(
        f"\nin a file with every fifth translation swapped: {caught['rate']:.2%} of {caught['n']:,} are caught, ",
        end="",
    )
    print(f"{false['rate']:.2%} of the other {false['n']:,} are flagged")
    columns = [name for name in FLAG_NAMES if any(row[name] for row in result["flags"].values())]
    print(f"\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for kind, row in result["flags"].items():
        print(f"| {kind} | {' | '.join(f'{row[name]:,}' for name in columns)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--pairs", type=Path, required=True, help="JSONL file with the fields en and ar")
    parser.add_argument("--seed", type=natural, default=0, help="seed of the damages")
    parser.add_argument("--limit", type=positive, help="use the first LIMIT pairs")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--misses", metavar="KIND", help="print the misjudged pairs of a kind (or of `clean`)")
    options = parser.parse_args()
    pairs = read_pairs(options.pairs)[: options.limit]
    tallies = measure(pairs, options.seed)
    if options.misses:
        for example in tallies[options.misses].examples:
            print(json.dumps(example, ensure_ascii=False))
        return
    result = {**report(tallies), "file": measure_file(pairs, options.seed)}
    if options.json:
        json.dump(result, sys.stdout, ensure_ascii=False)
        print()
    else:
        show(result)


if __name__ == "__main__":
    run_script(main)
