"""Rows of the whole-model benchmarks: this project, transformers (the peer) and the hardware limit, alternately in one
process."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

from bimedix_jax.bench import bounds, model, peer
from bimedix_jax.bench.timing import medians
from bimedix_jax.models.config import MixtralConfig, Remat

TRIALS = 3
"""Runs that choose the fastest implementation of a side."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options that all rows share.

    Attributes:
      config: the architecture.
      against: whether the peer is measured too.
      repetitions: timings of each contestant; their median counts.
    """

    config: MixtralConfig
    against: bool
    repetitions: int


def training_row(options: Options, base: str, remat: Remat, batch: int, length: int) -> dict[str, Any]:
    """Tokens per second of whole optimiser steps."""
    ours = model.training(options.config, base, remat, batch, length)
    theirs = chosen_peer(
        options, lambda dtype, experts: peer.training(options.config, dtype, experts, batch, length), peer.EXPERTS
    )
    products = bounds.training_products(options.config, batch, length, model.RANK, model.TARGETS)
    return compute_row("train", options, ours, theirs, products, batch * length)


def prefill_row(options: Options, base: str | None, batch: int, length: int) -> dict[str, Any]:
    """Tokens per second of a forward pass."""
    ours = model.fastest(lambda base: model.prefill(options.config, base, batch, length), base)
    theirs = chosen_peer(
        options, lambda dtype, experts: peer.prefill(options.config, dtype, experts, batch, length), peer.EXPERTS
    )
    products = bounds.forward_products(options.config, batch, length)
    return compute_row("prefill", options, ours, theirs, products, batch * length)


def decoding_row(options: Options, base: str | None, batch: int, prompt: int, steps: int) -> dict[str, Any]:
    """Tokens per second of greedy decoding, all rows of the batch together, without the prefill."""
    runs = options.repetitions + 2 + TRIALS
    ours = model.fastest(lambda base: model.decoding(options.config, base, batch, prompt, steps, runs), base, TRIALS)
    used = model.base_model(options.config, ours.dtype.split()[0])
    theirs = chosen_peer(
        options,
        lambda dtype, experts: peer.decoding(options.config, dtype, experts, batch, prompt, steps),
        peer.DECODING_EXPERTS,
    )
    read = bounds.reading(bounds.bytes_of_step(used, batch))
    contestants = {"ours": ours.run, "read": read.run} | ({} if theirs is None else {"peer": theirs[0].run})
    seconds = medians(contestants, options.repetitions)
    once = seconds["read"] / bounds.PASSES
    row = compared(f"decode_b{batch}", ours, theirs, seconds, batch * steps, batch / once)
    return row | {"bytes_read_per_step": read.bytes, "read_gbytes_per_s": read.bytes / once / 1e9}


Peer = tuple[model.Side, list[dict[str, Any]]] | None
"""The peer's fastest side and the trials that chose it; None where the peer is not measured."""


def chosen_peer(options: Options, make: Callable[[str, str], model.Side], implementations: tuple[str, ...]) -> Peer:
    return peer.fastest(make, implementations) if options.against else None


def compute_row(
    name: str, options: Options, ours: model.Side, theirs: Peer, products: Counter[bounds.Product], tokens: int
) -> dict[str, Any]:
    """A row whose limit is the time of its matrix products alone."""
    alone = bounds.contestants(products)
    contestants = {"ours": ours.run} | ({} if theirs is None else {"peer": theirs[0].run})
    seconds = medians(contestants | {str(product): run for product, (run, _) in alone.items()}, options.repetitions)
    limit = sum(count * seconds[str(product)] / alone[product][1] for product, count in products.items())
    row = compared(name, ours, theirs, seconds, tokens, tokens / limit)
    work = bounds.total_flops(products)
    return row | {"useful_gflop": work / 1e9, "bound_gflops": work / limit / 1e9}


def compared(
    name: str, ours: model.Side, theirs: Peer, seconds: dict[str, float], tokens: int, limit: float
) -> dict[str, Any]:
    """The fields of every row. Those of the peer are None where it is not measured."""
    speed, other = tokens / seconds["ours"], None if theirs is None else tokens / seconds["peer"]
    row: dict[str, Any] = {
        "name": name,
        "ours_tokens_per_s": speed,
        "peer_tokens_per_s": other,
        "ratio": None if other is None else speed / other,
        "bound_tokens_per_s": limit,
        "ours_over_bound": speed / limit,
        "ours_dtype": ours.dtype,
        "ours_implementation": ours.implementation,
        "compile_seconds": ours.compile_seconds,
    }
    if theirs is not None:
        side, trials = theirs
        row |= {"peer_dtype": side.dtype, "peer_implementation": side.implementation}
        row["peer_trials"] = [
            {"dtype": t["dtype"], "experts": t["experts"], "tokens_per_s": tokens / t["seconds"]} for t in trials
        ]
    return row
