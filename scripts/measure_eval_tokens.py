"""Tokens that an evaluation of the nine tasks runs, against those that its questions have.

    python scripts/measure_eval_tokens.py --data DIR --tokenizer FOLDER --json

`rows[]` has one entry for each set: `questions`, `needed` (tokens of the prompts, and of the options without their last
ones), `run` (tokens of all batches of `bimedix eval run`, padding included) and `shapes` (how many different ones these
batches have). Nothing is run, so the model is a tiny one with the tokenizer's vocabulary.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from bimedix_jax.errors import positive, run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the English sets")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a model's tokenizer")
    parser.add_argument("--context", type=positive, default=8192, help="context of the model (default 8192)")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    args = parser.parse_args()

    from bimedix_jax import startup

    startup.prepare()
    from bimedix_jax.data.tokenizer import load_tokenizer
    from bimedix_jax.evals.multiple_choice import question_of
    from bimedix_jax.evals.tasks import read_tasks
    from bimedix_jax.inference.continuations import Continuations, Group
    from bimedix_jax.models.config import MixtralConfig, RouterConfig
    from bimedix_jax.models.init import init_random

    tokenizer = load_tokenizer(args.tokenizer)
    config = MixtralConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        router=RouterConfig(num_experts=2, top_k=1),
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_embeddings=True,
        max_position_embeddings=args.context,
    )
    model = init_random(config)

    def row(name: str, records: Any) -> dict[str, Any]:
        asked = [question_of(record, tokenizer) for record in records]
        groups = [Group(tuple(one.prompt), tuple(map(tuple, one.candidates))) for one in asked]
        needed = sum(len(one.context) + sum(len(ids) - 1 for ids in one.continuations) for one in groups)
        batches = Continuations(model, groups).batches
        shapes = len({batch.tokens_BT.shape for batch in batches})
        prefixes = {batch.prefix for batch in batches if batch.prefix is not None}
        run = sum(batch.tokens_BT.size for batch in batches) + sum(prefix.slots for prefix in prefixes)
        return {"set": name, "questions": len(groups), "needed": needed, "run": run, "shapes": shapes}

    rows = [row(name, records) for name, (records, _) in read_tasks(["all"], args.data).items()]
    totals = {key: sum(one[key] for one in rows) for key in ("questions", "needed", "run")}
    result = {**totals, "rows": rows}
    print(json.dumps(result, indent=2) if args.json else json.dumps(totals))


if __name__ == "__main__":
    run_script(main)
