"""evaluation.json: the held-out loss of each record after training, and the cost of the run.

Groups and intervals are computed from the records when a report is made, so the file decides nothing. It has no time in
it: two machines that compute the same write the same bytes.
"""

from typing import Any

from bimedix_jax.adapters import coverage
from bimedix_jax.costs.flops import training_flops
from bimedix_jax.data.records import Record
from bimedix_jax.data.tokenizer import load_tokenizer
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.heldout import example_of, losses
from bimedix_jax.experiment import Experiment
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import RoutingPlan, checked_plan

BATCH_TOKENS = 4096


def evaluate(model: Mixtral, folder: str, records: list[Record], plan: RoutingPlan | None = None) -> dict[str, Any]:
    """The loss of each record under `model`, whose tokenizer is in `folder`.

    Returns: `records`, a list of {id, language, kind, nats, tokens, bytes} in the order of `records`, and `too_long`,
    the number of those that exceed the model's context and are left out.
    """
    tokenizer = load_tokenizer(folder)
    examples = [example_of(record, tokenizer) for record in records]
    longest = model.config.max_position_embeddings
    fitting = {number: example for number, example in enumerate(examples) if len(example.ids) <= longest}
    if not fitting:
        raise BimedixError(f"no held-out record has at most {longest} tokens; name other records.")
    plan = checked_plan(plan, model.config, len(examples), max(len(example.ids) for example in fitting.values()))
    nats = {number: loss for number, loss, _ in losses(model, fitting, BATCH_TOKENS, plan, "none")}
    rows = [
        {
            "id": records[number].id,
            "language": records[number].language,
            "kind": records[number].kind,
            "nats": nats[number],
            "tokens": sum(example.learned),
            "bytes": example.text_bytes,
        }
        for number, example in fitting.items()
    ]
    return {"records": rows, "too_long": len(examples) - len(fitting)}


def cost(model: Mixtral, experiment: Experiment, tokens: int) -> dict[str, Any]:
    """What the run trained and computed: useful FLOPs, as costs/flops.py counts them."""
    flops = training_flops(model, tokens, experiment.data.sequence_length)
    return {
        "trainable_parameters": coverage(model).trainable_parameters,
        "tokens": tokens,
        "training_flops": sum(flops.values()),
    }
