"""Compares our model in lm-evaluation-harness with the harness's own Hugging Face back end, request by request.

    python scripts/measure_eval_parity.py --data ../shared/data --json

Prompts: those of our English tasks against those of the harness's own. Parity: a random Mixtral of about 1 M parameters
in float32, over whole English sets by letter and by text, and the Arabic task files over the same questions
(--limit-arabic of each; no Arabic set ships here), and generated answers. Two processes do that, in which both sides
run at the same time, so the seconds of that part are no speed. Speed: a mixture made from SmolLM2-135M, in the data
type of its checkpoint, one side after the other with the same threads: --questions of each task, by default the nine by
the options' texts, and of --shots with five solved examples. The peer gets every sixteenth of its batches of these
questions (--peer-every), and every 32nd of those with examples; its seconds for all are estimated from the tokens that
it must run. `rows[]` has one entry for each task and part: `max_loglik_diff` (and without questions in
which two experts tie, `max_loglik_diff_else`), accuracies over the questions of both, and seconds. Our seconds include
compilation; programs in $JAX_COMPILATION_CACHE_DIR, if it is set, are read.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import datasets
import lm_eval
import numpy as np
import tokenizers
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml
from tqdm import tqdm

from bimedix_jax import cli, startup
from bimedix_jax.checkpoint.hf import export_hf
from bimedix_jax.checkpoint.load import load
from bimedix_jax.data.tokenizer import load_tokenizer
from bimedix_jax.errors import BimedixError, natural, positive, run_script
from bimedix_jax.evals.documents import NINE, read
from bimedix_jax.evals.harness import HarnessModel
from bimedix_jax.evals.harness_run import load_tasks, primary_of
from bimedix_jax.evals.layouts import Document
from bimedix_jax.models.config import MixtralConfig, RouterConfig
from bimedix_jax.models.init import init_random

VOCABULARY = 4096
SMALL = MixtralConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    router=RouterConfig(num_experts=4, top_k=2),
    rope_theta=10_000.0,
    rms_norm_eps=1e-5,
    sliding_window=None,
    tie_embeddings=False,
    max_position_embeddings=2048,
)
"""0.86 M parameters."""
TOLERANCE, TIE = 1e-3, 1e-5
"""Nats that log-likelihoods may differ by, and the difference of two experts' logits that counts as a tie."""
PARTS = ["prompts", "parity", "speed"]
TEXTS = [f"{name}_en_text" for name in NINE]
"""Tasks of the speed: the nine by the options' texts."""
SECONDS = ("ours_seconds", "peer_seconds_for_all")
PEER_BATCH = 16
"""Rows of a batch of the peer; --peer-batch sets it."""


def small_model(folder: Path, data: Path) -> Path:
    """A random model with a byte-level BPE tokenizer that is trained on the questions themselves."""
    export_hf(init_random(SMALL, seed=0, std=0.2), folder)
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        " ".join((one.context, one.question, *one.choices))
        for name in NINE
        for one in read(name, "en", str(data)).questions
    ]
    engine.train_from_iterator(texts, trainer)
    engine.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return folder


def arabic_folder(folder: Path, data: Path, limit: int) -> Path:
    """English questions under the names of the Arabic tasks, whose prompts are Arabic."""
    folder.mkdir()
    for name in NINE:
        rows = [one.to_dict() for one in read(name, "en", str(data)).questions[:limit]]
        changed = [{**row, "answer": "ABCD"[row["answer"]], "language": "ar"} for row in rows]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in changed]
        (folder / f"{name}_ar.jsonl").write_text("".join(lines), "utf-8")
    return folder


def mixture(folder: Path) -> None:
    """SmolLM2-135M as four experts, two of them for each token."""
    with contextlib.redirect_stdout(sys.stderr):
        if cli.main(["upcycle", "--out", str(folder), "--experts", "4", "--top-k", "2", "--noise", "0.1"]):
            raise BimedixError("SmolLM2 could not be made a mixture; see above, or name one with --mixture")


def accuracy(task: Any, instances: list[Any], answers: list[Any]) -> float:
    """Mean of the task's primary metric."""
    primary = primary_of(task.dump_config())
    by_document: dict[int, list[Any]] = {}
    for instance, answer in zip(instances, answers, strict=True):
        by_document.setdefault(instance.doc_id, []).append(answer)
    documents = task.eval_docs
    scores = []
    for number, found in by_document.items():
        document = documents[number]
        if task.OUTPUT_TYPE == "generate_until":
            (text,) = task._filters[0].filters[0]().apply([[found[0]]], [document])
            found = [text[0]]
        scores.append(float(task.process_results(document, found)[primary]))
    return sum(scores) / len(scores)


def timed(function: Callable[..., Any], requests: list[Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    found = function(requests, disable_tqdm=True)
    return found, time.perf_counter() - start


def lengths_of(peer: Any, requests: list[Any]) -> dict[int, list[int]]:
    """Tokens of the peer's rows, by question: requests that differ in their last token only are one row."""
    found: dict[int, set[tuple[int, ...]]] = {}
    for request in requests:
        context, continuation = request.args if isinstance(request.args[1], str) else (request.args[0], "")
        ids = peer._encode_pair(context, continuation) if continuation else (peer.tok_encode(context), [])
        found.setdefault(request.doc_id, set()).add((*ids[0], *ids[1][:-1]))
    return {number: [len(ids) for ids in rows] for number, rows in found.items()}


def every_nth_batch(lengths: dict[int, list[int]], every: int, batch: int) -> set[int]:
    """Questions of every n-th batch of the peer, which sorts by length; so their batches need no more padding."""
    if every == 1:
        return set(lengths)
    order = sorted(lengths, key=lambda number: -max(lengths[number]))
    size = max(batch // max(map(len, lengths.values())), 1)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return {number for some in batches[min(every // 2, len(batches) - 1) :: every] for number in some}


def compare(
    part: str,
    names: list[str],
    data: Path,
    limit: int | None,
    ours: HarnessModel,
    theirs: Any,
    batch: int = 1,
    every: int = 1,
    shots: int = 0,
) -> list[dict]:
    """One row for each task. The peer gets every n-th of its batches; if all, both sides run at the same time."""
    rows = []
    for name in tqdm(names, desc=part, disable=None):
        (task,) = load_tasks([name], [data], shots=shots)["tasks"].values()
        task.build_all_requests(limit=limit)
        requests = task.instances
        lengths = lengths_of(theirs, requests)
        asked = every_nth_batch(lengths, every, batch)
        common = [place for place, one in enumerate(requests) if one.doc_id in asked]
        shared = [requests[place] for place in common]
        kind = "generate_until" if task.OUTPUT_TYPE == "generate_until" else "loglikelihood"
        with ThreadPoolExecutor(1) as second:
            answering = second.submit(timed, getattr(theirs, kind), shared) if every == 1 else None
            mine, seconds = timed(getattr(ours, kind), requests)
            other, peer = answering.result() if answering else timed(getattr(theirs, kind), shared)
        mine = [mine[place] for place in common]
        row: dict[str, Any] = {"part": part, "task": name, "shots": shots}
        row |= {"questions": len(lengths), "peer_questions": len(asked)}
        if kind == "loglikelihood":
            differences = [abs(a[0] - b[0]) for a, b in zip(mine, other, strict=True)]
            row["max_loglik_diff"] = max(differences)
            if part == "parity":
                row |= ties_among(ours, shared, differences)
            row["greedy_differs"] = sum(a[1] != b[1] for a, b in zip(mine, other, strict=True))
        else:
            row["answers_differ"] = sum(a != b for a, b in zip(mine, other, strict=True))
        row |= {"ours_accuracy": accuracy(task, shared, mine), "peer_accuracy": accuracy(task, shared, other)}
        tokens = [sum(sum(lengths[number]) for number in some) for some in (lengths, asked)]
        row |= {"peer_tokens": tokens[1], "peer_tokens_for_all": tokens[0]}
        row |= {"ours_seconds": round(seconds, 2), "peer_seconds": round(peer, 2)}
        if part == "speed":
            row["peer_seconds_for_all"] = round(peer * tokens[0] / tokens[1], 2)
            row["ratio"] = round(row["peer_seconds_for_all"] / seconds, 2)
        rows.append(row)
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def ties_among(ours: HarnessModel, requests: list[Any], differences: list[float]) -> dict[str, Any]:
    """Of the questions beyond TOLERANCE, those in which two experts tie within float32's rounding: the router of either
    program may then choose the other one. `max_loglik_diff_else` is the largest difference of all other questions."""
    beyond = {one.doc_id for one, size in zip(requests, differences, strict=True) if size > TOLERANCE}
    tied = {one.doc_id for one in requests if one.doc_id in beyond and smallest_gap(ours, *one.args) < TIE}
    rest = [size for one, size in zip(requests, differences, strict=True) if one.doc_id not in tied]
    return {"questions_with_ties": len(tied), "max_loglik_diff_else": max(rest, default=0.0)}


def smallest_gap(ours: HarnessModel, context: str, continuation: str) -> float:
    """The smallest difference between the logits of the last chosen and the first other expert, over all decisions."""
    ids = ours.tok_encode(context + continuation)
    logits_LTE = np.sort(np.asarray(ours.model(np.array([ids])).routing.logits_LBTE[:, 0]))[..., ::-1]
    k = ours.model.config.router.top_k
    return float((logits_LTE[..., k - 1] - logits_LTE[..., k]).min())


def pair(folder: Path, dtype: str, batch: int) -> tuple[HarnessModel, Any]:
    """The same folder in both programs."""
    startup.reuse_memory()
    model = load(folder, base="float32" if dtype == "float32" else "bfloat16")
    ours = HarnessModel(model, load_tokenizer(folder), max_length=2048, batch_tokens=2048)
    peer: Any = HFLM  # whose decorator hides its parameters
    theirs = peer(pretrained=str(folder), dtype=dtype, device="cpu", batch_size=batch, max_length=2048)
    return ours, theirs


def names_of(language: str, *modes: str) -> list[str]:
    """Our tasks of one language; PubMedQA has no letters."""
    found = [(name, mode) for mode in modes for name in NINE if (name, mode) != ("pubmedqa", "_abjad")]
    return [f"bimedix_{name}_{language}{mode}" for name, mode in found]


def parity_of(folder: Path, names: list[str], data: Path, limit: int | None, batch: int) -> list[dict]:
    """Rows of some tasks, in a process of its own."""
    torch.set_num_threads(1)
    return compare("parity", names, data, limit, *pair(folder, "float32", batch))


def parity(pool: Executor, scratch: Path, data: Path, limit: int | None, arabic: int, batch: int) -> list[Future]:
    """Rows of the small model."""
    small, translated = small_model(scratch / "small", data), arabic_folder(scratch / "arabic", data, arabic)
    jobs: list[tuple[list[str], Path, int | None]] = [(names_of("en", mode), data, limit) for mode in ("_text", "")]
    jobs.append((names_of("ar", "", "_abjad", "_text"), translated, None))
    for name, folder in (("mmlu_anatomy_en", data), ("medqa_ar", translated), ("pubmedqa_ar", translated)):
        jobs.append(([f"bimedix_{name}_gen"], folder, min(arabic, 20)))
    return [pool.submit(parity_of, small, *job, batch) for job in jobs]


def hub_rows(name: str, data: Path) -> tuple[list[dict], list[dict]]:
    """The questions and solved examples of a benchmark as rows of the hub's data set."""

    def row(one: Document) -> dict[str, Any]:
        choices = {f"op{letter}": text for letter, text in zip("abcd", one.choices, strict=False)}
        endings = {f"ending{number}": text for number, text in enumerate(one.choices)}
        if name == "pubmedqa":
            decision = one.choices[one.answer]
            return {"QUESTION": one.question, "CONTEXTS": one.context.split("\n"), "final_decision": decision}
        if name == "medmcqa":
            return {"question": one.question, **choices, "cop": one.answer}
        if name == "medqa":
            return {"sent1": one.question, "sent2": "", **endings, "label": one.answer}
        return {"question": one.question, "choices": list(one.choices), "answer": one.answer}

    found = read(name, "en", str(data))
    return [row(one) for one in found.questions], [row(one) for one in found.solved]


def requests_of(task: Any, shots: int) -> list[Any]:
    """What a task asks, as texts."""
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    return [instance.args for instance in task.instances]


def prompts(data: Path) -> list[dict]:
    """Whether our English tasks ask what the harness's own do, byte for byte, without and with five examples."""
    found = []
    for name in tqdm(NINE, desc="prompts", disable=None):
        questions, solved = hub_rows(name, data)
        own = f"mmlu/default/{name}" if name.startswith("mmlu_") else f"{name}/{name}"
        config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / f"{own}.yaml")
        test = config["test_split"]
        splits = {config.get(f"{kind}_split") for kind in ("training", "validation", "fewshot")} - {None, test}
        made = {part: datasets.Dataset.from_list(solved or questions) for part in splits}
        made[test] = datasets.Dataset.from_list(questions)
        config |= {"custom_dataset": lambda made=made, **_: datasets.DatasetDict(made), "dataset_path": None}
        theirs = ConfigurableTask(config={**config, "dataset_name": None})
        (ours,) = load_tasks([f"bimedix_{name}_en"], [data])["tasks"].values()
        for shots in (0, 5) if solved else (0,):
            mine, other = requests_of(ours, shots), requests_of(theirs, shots)
            found.append({"part": "prompts", "task": f"bimedix_{name}_en", "shots": shots, "requests": len(mine),
                          "identical": mine == other})  # fmt: skip
    return found


def speed(
    folder: Path, data: Path, questions: int, tasks: list[str], shots: list[str], batch: int, every: int
) -> list[dict]:
    """Rows of the mixture."""
    ours, theirs = pair(folder, "bfloat16", batch)
    theirs._model_call(torch.ones((batch, 64), dtype=torch.long))  # the first call is slow
    plain, solved = ([f"bimedix_{name}" for name in names] for names in (tasks, shots))
    rows = compare("speed", plain, data, questions, ours, theirs, batch, every)
    return rows + compare("speed", solved, data, questions, ours, theirs, batch, 2 * every, shots=5)


def kinds(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows of the speed by what is asked."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        kind = "texts" if row["task"].endswith("_text") else "five_shots" if row["shots"] else "letters"
        found.setdefault(kind, []).append(row)
    return found


def summary(rows: list[dict]) -> dict[str, Any]:
    """The figures of the issue."""
    found: dict[str, Any] = {}
    asked = [row for row in rows if row["part"] == "prompts"]
    if asked:
        found["prompts_identical"] = all(row["identical"] for row in asked)
        found["requests"] = sum(row["requests"] for row in asked)
    checked = [row for row in rows if row["part"] == "parity"]
    if checked:
        found["max_loglik_diff"] = max(row["max_loglik_diff"] for row in checked if "max_loglik_diff" in row)
        found["max_loglik_diff_else"] = max(row.get("max_loglik_diff_else", 0.0) for row in checked)
        found["questions_with_ties"] = sum(row.get("questions_with_ties", 0) for row in checked)
        found["accuracies_identical"] = all(row["ours_accuracy"] == row["peer_accuracy"] for row in checked)
        found["greedy_differs"] = sum(row.get("greedy_differs", 0) for row in checked)
        found["answers_differ"] = sum(row.get("answers_differ", 0) for row in checked)
    if timed_rows := [row for row in rows if row["part"] == "speed"]:
        speeds: dict[str, float] = {key: round(sum(row[key] for row in timed_rows), 2) for key in SECONDS}
        for kind, some in {"": timed_rows, **kinds(timed_rows)}.items():
            ours, peer = (sum(row[key] for row in some) for key in SECONDS)
            speeds[f"ratio_{kind}".rstrip("_")] = round(peer / ours, 2)
        found["speed"] = speeds
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the English sets")
    parser.add_argument("--limit", type=positive, help="questions of each English task for parity; by default all")
    parser.add_argument("--limit-arabic", type=natural, default=100, help="of each Arabic task (default 100)")
    parser.add_argument("--mixture", type=Path, help="folder of a model for the speed; by default made from SmolLM2")
    parser.add_argument("--questions", type=positive, default=200, help="of each task for the speed (default 200)")
    parser.add_argument("--peer-every", type=positive, default=16, help="the peer gets one of N batches (default 16)")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--speed", nargs="*", default=TEXTS, metavar="TASK", help="tasks of the speed (nine by text)")
    parser.add_argument("--shots", nargs="*", default=[], metavar="TASK", help="more of them, with five examples")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument("--peer-batch", type=positive, default=PEER_BATCH, help=f"of a peer ({PEER_BATCH} rows)")
    args = parser.parse_args()
    if missing := [folder for folder in (args.data, args.mixture) if folder and not folder.is_dir()]:
        raise BimedixError(f"there is no folder {missing[0]}; correct --data or --mixture")
    with tempfile.TemporaryDirectory() as name:
        scratch, start = Path(name), time.perf_counter()
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            try:
                found = [pool.submit(prompts, args.data)] if "prompts" in args.parts else []
                if "speed" in args.parts and not args.mixture:
                    pool.submit(mixture, scratch / "mixture").result()
                if "parity" in args.parts:
                    found += parity(pool, scratch, args.data, args.limit, args.limit_arabic, args.peer_batch)
                rows = [row for part in found for row in part.result()]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # else it would finish its work
                _ = [child.terminate() for child in multiprocessing.active_children()]
                raise
        if "speed" in args.parts:
            folder = args.mixture or scratch / "mixture"
            rows += speed(folder, args.data, args.questions, args.speed, args.shots, args.peer_batch, args.peer_every)
        result = {**summary(rows), "seconds": round(time.perf_counter() - start, 1), "rows": rows}
    print(json.dumps(result, indent=2) if args.json else json.dumps({**result, "rows": len(rows)}, indent=2))


if __name__ == "__main__":
    run_script(main)
