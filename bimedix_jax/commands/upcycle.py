"""`bimedix upcycle`: a Mixtral from a dense model of the Llama architecture."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from rich.console import Console


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Make a mixture of experts that computes the same as a dense model of the Llama architecture."""

    out: Path
    """Folder to write (Hugging Face Mixtral layout, with upcycle.json)."""
    model: str = "smollm2-135m"
    """Dense model: smollm2-135m (fetched with pip, 92.9 MB), a Hugging Face folder, a .gguf file, or a hub id."""
    revision: str | None = None
    """Revision of a hub id; by default the main branch."""
    experts: int = 4
    """Experts in each layer."""
    top_k: int = 2
    """Experts that each token uses."""
    drop_rate: float = 0.0
    """Share of the FFN's inner dimensions that are drawn at random for each expert (Drop-Upcycling, arXiv 2502.19261,
    uses 0.5). 0 keeps the dense model's logits exactly; a higher value makes experts differ."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on expert weights, relative to that of each matrix."""
    router_init: Literal["normal", "zero"] = "normal"
    """Initial router weights. With zero, all experts tie, and every token is routed to the first ones."""
    router_std: float = 0.02
    """Standard deviation of the weights of a normal router."""
    seed: int = 0
    """Seed of all random weights."""
    overwrite: bool = False
    """Replace --out if it is not empty."""
    ignore_config_key: tuple[str, ...] = ()
    """Keys of config.json to ignore; by default a key that is unknown or not implemented is an error."""


def run(config: Config, console: Console) -> dict[str, Any]:
    from bimedix_jax.checkpoint import upcycle
    from bimedix_jax.files import check_replaceable
    from bimedix_jax.quickstart.base_model import dense_source

    check_replaceable(config.out, config.overwrite)

    recipe = upcycle.UpcycleRecipe(
        experts=config.experts,
        top_k=config.top_k,
        drop_rate=config.drop_rate,
        noise=config.noise,
        router_init=config.router_init,
        router_std=config.router_std,
        seed=config.seed,
    )
    with dense_source(config.model, config.revision, config.out.resolve().parent, console) as folder:
        report = upcycle.upcycle(folder, config.out, recipe, config.model, config.overwrite, config.ignore_config_key)
    console.print(
        f"{config.out}: {config.experts} experts, top-{config.top_k}, mean distance between experts "
        f"{report['expert_distance']:.3f} of the dense weights' norm"
    )
    for warning in report["warnings"]:
        console.print(f"[yellow]warning:[/] {warning}")
    return {"output": str(config.out), **report}
