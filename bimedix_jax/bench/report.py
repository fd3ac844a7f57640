"""Checks, versions and tables that the whole-model benchmarks share."""

from collections.abc import Sequence
from typing import Any

import jax

from bimedix_jax.bench.model import threads
from bimedix_jax.bench.peer import require_peer
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.process.terminal import FittedTable


def check(config: MixtralConfig, positions: int) -> None:
    """Raises BimedixError if a benchmark needs more positions than the model has."""
    if positions > config.max_position_embeddings:
        raise BimedixError(
            f"The benchmark needs {positions} positions, the model has {config.max_position_embeddings}; lower "
            "--length, --prompt-tokens, --steps or --repetitions."
        )


def versions(against: bool) -> dict[str, Any]:
    """Device, threads and versions of a measurement. Raises BimedixError if a peer is asked for and not installed."""
    return {
        "device": jax.devices()[0].device_kind,
        "threads": threads(),
        "jax": jax.__version__,
        "peer": require_peer() if against else None,
    }


def table(rows: Sequence[dict[str, Any]]) -> FittedTable:
    shown = FittedTable("row", title="tokens per second")
    for header in ("ours", "peer", "ratio", "limit", "of limit", "compiled in"):
        shown.add_column(header, justify="right")
    for row in rows:
        peer = row["peer_tokens_per_s"]
        shown.add_row(
            row["name"],
            f"{row['ours_tokens_per_s']:,.0f}",
            "-" if peer is None else f"{peer:,.0f}",
            "-" if peer is None else f"{row['ratio']:.2f}",
            f"{row['bound_tokens_per_s']:,.0f}",
            f"{row['ours_over_bound']:.2f}",
            f"{row['compile_seconds']:.1f} s",
        )
    return shown
