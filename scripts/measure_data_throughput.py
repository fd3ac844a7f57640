"""Measure the preparation of a training set of the paper's size: memory, speed, and detected duplicates.

    python scripts/measure_data_throughput.py --records 20000           # a table; about a minute on 2 cores
    python scripts/measure_data_throughput.py --records 1300000 --json  # one JSON document; needs 18 GB of disk

The script generates records and writes them to disk. Kinds, languages and lengths are those of Tables 7 and 8 of the
BiMediX paper. Words are drawn by Zipf's law from half a million words similar to those of the bundled sample. Arabic
records name the English records they translate, and chats name their questions. Near-duplicates and evaluation
questions in both languages are inserted. The memory of these commands is measured, worker processes included:

    bimedix data assemble   both languages into one training and one held-out file
    bimedix data mix        no near-duplicates, no evaluation text, 1:2 in each kind
    bimedix data pack       tokens, mask and rows of 4,096 with the Mixtral tokenizer (from the package mistral-common)

On a part of the result it runs `bimedix data pack` and the `tokenizers` library alternately. The library only
tokenises: it gets the rendered texts in memory, and all cores. On a machine with other load, compare tokens per
processor second, which are printed too. The script reads /proc, so it needs Linux.
"""

import argparse
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bimedix_jax.errors import natural, positive, run_script

SEQUENCE = 4096
BAR_RSS, BAR_USED, BAR_RATIO = 1.5 * 2**30, 0.98, 0.8

KINDS = {"qa": 423.8, "mcqa": 638.1, "chat": 249.7}
"""Thousands of samples of each kind (Table 8). A third of each is Arabic here, the default of `bimedix data mix`."""

TOKENS = {("qa", "en"): 192, ("mcqa", "en"): 394, ("chat", "en"): 398}
TOKENS |= {("qa", "ar"): 516, ("mcqa", "ar"): 800, ("chat", "ar"): 1301}
"""Mean tokens of a record: Table 7, and Table 8 less Table 7."""

EXCHANGES = 4.7  # of a chat, Tables 7 and 8
EVALUATION = 7045  # questions of the paper's nine tasks
NEAR_DUPLICATE = 50  # one record in 50 repeats another
CONTAMINATED = 400  # one MCQA record in 400 contains an evaluation question

VOCABULARY = 500_000
EXPONENT = {"en": 1.28, "ar": 1.15}
"""Zipf's law, rank^-exponent: 600,000 English words then have 50,000 spellings with their punctuation (49,000 in a
mixture of MedQuAD, MTS-Dialog, PubMedQA, MedQA, MedMCQA and MMLU) and 70,000 Arabic ones 16,700 (16,900 in TICO-19). So
caches of words work no better than with real texts."""


class Words:
    """Draws words of one language, seeded."""

    def __init__(self, language: str, seed: int) -> None:
        from bimedix_jax.data.records import sample

        self.random = np.random.default_rng([seed, language == "ar"])
        said = " ".join(t.value for r in sample() if r.language == language for t in r.conversations)
        known, counts = np.unique(said.split(), return_counts=True)
        known = known[np.argsort(-counts, kind="stable")].tolist()
        long = [word for word in known if len(word) > 5 and word.isalpha()]
        heads, tails = self.random.integers(0, len(long), (2, VOCABULARY))
        made = (long[a][: 2 + a % 4] + long[b][len(long[b]) // 2 :] for a, b in zip(heads, tails, strict=True))
        self.words = np.array(known + list(made), object)
        odds = 1 / (np.arange(len(self.words)) + 2.7) ** EXPONENT[language]
        self.odds = np.cumsum(odds / odds.sum())

    def draw(self, count: int) -> list[str]:
        """Draw `count` words."""
        places = np.searchsorted(self.odds, self.random.random(count))
        return self.words[np.minimum(places, len(self.words) - 1)].tolist()

    def text(self, words: list[str]) -> str:
        """Words as sentences of 14 and paragraphs of 5."""
        sentences = [" ".join(words[i : i + 14]) for i in range(0, len(words), 14)]
        return ".\n".join(". ".join(sentences[i : i + 5]) for i in range(0, len(sentences), 5)) + "."


class Maker:
    """Generates records of one language as lines of JSON, and lists the planted ones."""

    def __init__(self, language: str, seed: int, tokenizer: Path, shrink: float) -> None:
        from bimedix_jax.curation.counts import TokenCounter
        from bimedix_jax.data.tokenizer import load_tokenizer

        self.language = language
        self.words = Words(language, seed)
        self.random = self.words.random
        probe = self.words.draw(20_000)
        per_word = TokenCounter(load_tokenizer(tokenizer, "mixtral"))(self.words.text(probe)) / len(probe)
        self.mean = {kind: TOKENS[kind, language] * shrink / per_word for kind in KINDS}
        self.questions = [self.words.draw(int(n)) for n in self.random.integers(16, 120, EVALUATION)]
        self.recent: dict[str, list[list[str]]] = {kind: [] for kind in KINDS}  # texts that may be repeated
        self.repeated: list[str] = []
        self.contaminated: list[int] = []

    def evaluation(self) -> Iterator[str]:
        """One record for each evaluation question."""
        for number, words in enumerate(self.questions):
            yield self._mcqa(f"evaluation/{self.language}/{number}", words, self.words.draw(20), {})

    def records(self, kind: str, count: int, chats_of: str = "mcqa") -> Iterator[str]:
        """Records of a kind. Arabic record n translates English record 2 n. An English chat is made from a question."""
        for number in range(count):
            name = f"{kind}/{self.language}/{number}"
            if self.language == "ar":
                origin = {"translation_of": f"{kind}/en/{2 * number}"}
            else:
                origin = {"source_id": f"{chats_of}/en/{number}"} if kind == "chat" else {}
            if kind == "mcqa" and number % CONTAMINATED == CONTAMINATED - 1:
                self.contaminated.append(number)
                question = self.questions[number // CONTAMINATED % EVALUATION]
                yield self._mcqa(
                    name, [*self.words.draw(5), *question, *self.words.draw(9)], self.words.draw(60), origin
                )
                continue
            words = self._some(kind, name, number)
            if kind == "mcqa":
                yield self._mcqa(name, words[: len(words) // 2], words[len(words) // 2 :], origin)
            else:
                parts = 2 * max(1, round(self.random.normal(EXCHANGES, 1.5))) if kind == "chat" else 2
                cuts = [len(words) * i // parts for i in range(parts + 1)]
                texts = [self.words.text(words[a:b]) for a, b in itertools.pairwise(cuts)]
                yield self._line(name, kind, texts, origin)

    def _some(self, kind: str, name: str, number: int) -> list[str]:
        """The words of a record. One in NEAR_DUPLICATE records copies an earlier one with one word in 100 changed."""
        recent = self.recent[kind]
        if recent and number % NEAR_DUPLICATE == 0:
            words = list(recent[int(self.random.integers(len(recent)))])
            for place in self.random.integers(0, len(words), len(words) // 100).tolist():
                words[place] = self.words.draw(1)[0]
            self.repeated.append(name)
            return words
        deviation = 0.6
        size = self.random.lognormal(np.log(self.mean[kind]) - deviation**2 / 2, deviation)
        words = self.words.draw(int(np.clip(size, 30, 2500)))
        if len(words) >= 100:
            if len(recent) < 1000:
                recent.append(words)
            elif number % 10 == 0:
                recent[int(self.random.integers(1000))] = words
        return words

    def _mcqa(self, name: str, question: list[str], rest: list[str], origin: dict[str, str]) -> str:
        from bimedix_jax.data.records import LETTERS, multiple_choice_answer, multiple_choice_question

        choices = tuple(f"{' '.join(rest[3 * i : 3 * i + 3])} {LETTERS[i]}" for i in range(4))
        answer = len(question) % 4
        asked = multiple_choice_question(self.words.text(question), choices)
        explained = self.words.text(rest[12:] or rest)
        said = multiple_choice_answer(choices, answer, "ar" if self.language == "ar" else "en", explained)
        return self._line(name, "mcqa", [asked, said], origin, choices=choices, answer=answer)

    def _line(self, name: str, kind: str, texts: list[str], origin: dict[str, str], **more: Any) -> str:
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        record = {"id": name, "language": self.language, "kind": kind, "source": "made-up", "licence": "none"}
        return json.dumps({**record, "conversations": turns, "provenance": origin, **more}, ensure_ascii=False) + "\n"


def make(folder: Path, records: int, seed: int, tokenizer: Path, shrink: float) -> dict[str, Any]:
    """Write the sources and evaluation sets; return the ids of the planted records."""
    share = {kind: thousands / sum(KINDS.values()) for kind, thousands in KINDS.items()}
    repeated, direct = [], []
    counts = {kind: max(1, round(records * share[kind] / 3)) for kind in KINDS}
    for language, times in (("en", 2), ("ar", 1)):
        maker = Maker(language, seed, tokenizer, shrink)
        with (folder / f"evaluation_{language}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(maker.evaluation())
        with (folder / f"{language}.jsonl").open("w", encoding="utf-8") as file:
            for kind, count in counts.items():
                file.writelines(maker.records(kind, times * count))
        repeated += maker.repeated
        direct += [(language, number) for number in maker.contaminated]
    removed = set()
    for language, number in direct:
        english = number if language == "en" else 2 * number
        removed |= {f"mcqa/{language}/{number}", f"mcqa/en/{english}"}
        family = [("chat", "en", english)] + [(k, "ar", english // 2) for k in ("mcqa", "chat") if english % 2 == 0]
        removed |= {f"{k}/{lang}/{n}" for k, lang, n in family if n < counts[k] * (2 if lang == "en" else 1)}
    return {"records": 3 * sum(counts.values()), "repeated": repeated, "direct": len(direct), "contaminated": removed}


class Watch:
    """Watches the peak memory of a process and its descendants: the sum of their resident sets."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(0.2):
            self.peak = max(self.peak, self._resident())

    def _resident(self) -> int:
        """Bytes. Shared pages are counted for each process, so this is an upper bound."""
        parents, pages = {}, {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    status = (entry / "stat").read_text().rpartition(")")[2].split()
                except (FileNotFoundError, ProcessLookupError):
                    continue  # the process ended meanwhile
                parents[int(entry.name)], pages[int(entry.name)] = int(status[1]), int(status[21])
        tree, fresh = set(), {self._pid}
        while fresh:
            tree |= fresh
            fresh = {pid for pid, parent in parents.items() if parent in tree} - tree
        return sum(pages.get(pid, 0) for pid in tree) * os.sysconf("SC_PAGE_SIZE")


def command(*words: str) -> dict[str, Any]:
    """Run `bimedix WORDS --json`; return its document, seconds, processor seconds and peak memory."""
    started, before = time.monotonic(), children_seconds()
    line = [sys.executable, "-m", "bimedix_jax", *words, "--json"]
    with subprocess.Popen(line, stdout=subprocess.PIPE) as process, Watch(process.pid) as watch:
        output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"bimedix {' '.join(words)} failed")
    seconds, used = time.monotonic() - started, children_seconds() - before
    return {"document": json.loads(output), "seconds": seconds, "cpu_seconds": used, "peak_rss_bytes": watch.peak}


def children_seconds() -> float:
    """Processor seconds of all child processes that ended, with their descendants."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def pack(folder: Path, name: str, workers: int) -> dict[str, Any]:
    """`bimedix data pack` of a file of records in `folder`."""
    where = ("--records", str(folder / name), "--tokenizer", str(folder / "tokenizer"), "--template", "mixtral")
    how = ("--out", str(folder / "packed"), "--sequence-length", str(SEQUENCE), "--overwrite")
    return command("data", "pack", *where, *how, "--workers", str(workers))


def in_turns(folder: Path, part: int, rounds: int, workers: int) -> dict[str, Any]:
    """Tokens per second of `bimedix data pack` and of the library alone, on the same records and in turns."""
    from bimedix_jax.data.records import parse
    from bimedix_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder / "tokenizer", "mixtral")
    texts = []
    with (folder / "set" / "train.jsonl").open("rb") as file, (folder / "part.jsonl").open("wb") as out:
        for line in itertools.islice(file, part):
            out.write(line)
            turns = parse(line, "train.jsonl").conversations
            texts.append(tokenizer.template.text(turns, tokenizer.special["bos"], tokenizer.special["eos"]))
    ours, alone, cpu, tokens = [], [], [], 0
    for _ in range(rounds):
        started, used = time.monotonic(), time.process_time()
        tokens = sum(
            len(one.ids)
            for i in range(0, len(texts), 1000)
            for one in tokenizer.engine.encode_batch_fast(texts[i : i + 1000], add_special_tokens=False)
        )
        alone.append(tokens / (time.monotonic() - started))
        used = time.process_time() - used
        packed = pack(folder, "part.jsonl", workers)
        document = packed["document"]
        ours.append(document["tokens_per_s"])
        cpu.append((tokens / packed["cpu_seconds"], tokens / used))
        if not document["dropped_nothing_learned"]:  # records truncated within their question are dropped
            assert document["tokens"] + document["truncated_tokens"] == tokens, "both must give the same tokens"
    return {
        "tokens_per_s": statistics.median(ours),
        "tokenizer_tokens_per_s": statistics.median(alone),
        "ratio": statistics.median(a / b for a, b in zip(ours, alone, strict=True)),
        "ratio_of_cpu_seconds": statistics.median(a / b for a, b in cpu),
        "in_turns": {
            "records": len(texts),
            "tokens": tokens,
            "pack": ours,
            "tokenizers": alone,
            "pack_per_cpu_second": [a for a, _ in cpu],
            "tokenizers_per_cpu_second": [b for _, b in cpu],
        },
    }


def found(path: Path, planted: set[str]) -> tuple[float, int]:
    """The share of the planted records in a list of removed ones, and the number of others in it."""
    with path.open(encoding="utf-8") as file:
        names = {json.loads(line)["record"] for line in file}
    return len(planted & names) / max(1, len(planted)), len(names - planted)


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all measurements in `folder`."""
    import mistral_common

    (folder / "tokenizer").mkdir()
    model = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copy(model, folder / "tokenizer" / "tokenizer.model")
    planted = make(folder, arguments.records, arguments.seed, folder / "tokenizer", arguments.shrink)
    workers = ("--workers", str(arguments.workers))
    evaluation = [str(folder / f"evaluation_{language}.jsonl") for language in ("en", "ar")]
    sources = [str(folder / f"{language}.jsonl") for language in ("en", "ar")]
    inputs = ("--sources", *sources, "--evaluation", *evaluation)
    assembled = command("data", "assemble", *inputs, "--out", str(folder / "assembled"))
    mixed = command("data", "mix", *inputs, "--out", str(folder / "set"), *workers)
    packed = pack(folder, "set/train.jsonl", arguments.workers)
    caught, others = found(folder / "set" / "contamination.jsonl", planted["contaminated"])
    repeated, unplanned = found(folder / "set" / "duplicates.jsonl", set(planted["repeated"]) - planted["contaminated"])
    document = packed["document"]
    turns = in_turns(folder, arguments.part, arguments.rounds, arguments.workers)
    result = {
        "records": planted["records"],
        "packed_records": document["examples"],
        "tokens": document["tokens"],
        "rows": document["rows"],
        "positions_used": document["efficiency"],
        "truncated_records": document["truncated"],
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in (assembled, mixed, packed)),
        **turns,
        "assemble": _without_document(assembled),
        "mix": {**_without_document(mixed), "decisions": mixed["document"]["decisions"]},
        "pack": {**_without_document(packed), "tokens_per_s": document["tokens_per_s"]},
        "ratios": mixed["document"]["ratios"],
        "contamination": {
            "planted": planted["direct"],
            "with_families": len(planted["contaminated"]),
            "found": caught,
            "others": others,
        },
        "near_duplicates": {"planted": len(planted["repeated"]), "found": repeated, "others": unplanned},
        "workers": arguments.workers,
        "cores": len(os.sched_getaffinity(0)),
        "shrink": arguments.shrink,
    }
    passed = {
        "memory": result["peak_rss_bytes"] < BAR_RSS,
        "positions": result["positions_used"] >= BAR_USED,
        "ratio": result["ratio"] >= BAR_RATIO,
        "contamination": caught == 1.0,
    }
    return {**result, "within_bounds": passed}


def _without_document(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name != "document"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=positive, default=20_000, help="number of records to generate")
    parser.add_argument("--part", type=positive, default=100_000, help="records in the comparison with tokenizers")
    parser.add_argument("--rounds", type=positive, default=3, help="rounds of the comparison")
    parser.add_argument("--workers", type=natural, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--shrink", type=float, default=1.0, help="factor for the length of records")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--folder", type=Path, help="folder to work in, which is kept; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True)
        result = measure(arguments.folder, arguments)
    else:
        with tempfile.TemporaryDirectory(prefix="bimedix-data-") as place:
            result = measure(Path(place), arguments)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['records']:,} records, {result['packed_records']:,} of them packed: {result['tokens']:,} tokens")
    print(f"peak memory: {result['peak_rss_bytes'] / 2**20:,.0f} MiB with all workers")
    print(f"positions used: {result['positions_used']:.2%} of {result['rows']:,} rows")
    print(
        f"tokens per second: {result['tokens_per_s']:,.0f}, tokenizers alone {result['tokenizer_tokens_per_s']:,.0f}, "
        f"ratio {result['ratio']:.2f}"
    )
    for name in ("assemble", "mix", "pack"):
        print(f"{name}: {result[name]['seconds']:,.0f} s, {result[name]['peak_rss_bytes'] / 2**20:,.0f} MiB")
    print(f"planted and found: contamination {result['contamination']}, near-duplicates {result['near_duplicates']}")


if __name__ == "__main__":
    run_script(main)
