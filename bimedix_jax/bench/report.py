"""What the whole-model benchmarks say about themselves."""

from collections.abc import Sequence
from typing import Any

import jax
from rich.table import Table

from bimedix_jax.bench.model import threads
from bimedix_jax.bench.peer import require_peer
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.config import MixtralConfig


def check(config: MixtralConfig, positions: int) -> None:
    """Raises BimedixError where a run would need more positions than the model has."""
    if positions > config.max_position_embeddings:
        raise BimedixError(
            f"The run needs {positions} positions, the model has {config.max_position_embeddings}; lower --length, "
            "--prompt, --steps or --repetitions."
        )


def versions(against: bool) -> dict[str, Any]:
    """Where and with what it was measured; also the check that the peer is installed."""
    return {
        "device": jax.devices()[0].device_kind,
        "threads": threads(),
        "jax": jax.__version__,
        "peer": require_peer() if against else None,
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table("", "ours", "peer", "ratio", "limit", "of limit", "compiled in", title="tokens per second")
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
