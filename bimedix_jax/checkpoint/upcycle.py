"""A dense Llama-architecture model -> a Mixtral whose experts start from its feed-forward layers (Sparse Upcycling,
arXiv 2212.05055), optionally made different from each other (Drop-Upcycling, arXiv 2502.19261).

With equal experts, and router weights that sum to 1, the mixture computes exactly the dense layer for any choice of
experts. The drawback is that the router then gets no gradient from the language-model loss until experts differ.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Collection, Generator, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel

from bimedix_jax import files
from bimedix_jax.checkpoint import hub, table
from bimedix_jax.checkpoint.hf_config import raw_config, read_dense_config, write_config
from bimedix_jax.checkpoint.hf_tensors import read_tensors
from bimedix_jax.checkpoint.rounding import read_finite, read_pieces
from bimedix_jax.checkpoint.safetensors_io import StoredTensor, TensorSpec, pieces
from bimedix_jax.checkpoint.stream import Piece, stream_to
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.config import MixtralConfig, RouterConfig

REPORT_NAME = "upcycle.json"

DENSE_NAMES = {
    "layers.moe.w1.w": table.LAYER + "mlp.gate_proj.weight",
    "layers.moe.w3.w": table.LAYER + "mlp.up_proj.weight",
    "layers.moe.w2.w": table.LAYER + "mlp.down_proj.weight",
}
"""Expert matrix -> the dense model's."""
ROUTER = "layers.moe.router.w"
KEPT_CONFIG_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpcycleRecipe:
    """How experts and routers are initialised."""

    experts: int
    top_k: int
    drop_rate: float = 0.0
    """Share r of the FFN's inner dimensions that are drawn at random for each expert: rows of w1 and w3, columns of w2,
    normal with mean and standard deviation of what they replace (arXiv 2502.19261, section 3). 0 copies exactly."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on every expert weight, in units of its matrix's own."""
    router_init: Literal["normal", "zero"] = "normal"
    router_std: float = 0.02
    seed: int = 0

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise BimedixError(f"top-k must be between 1 and the {self.experts} experts, got {self.top_k}.")
        if not 0 <= self.drop_rate <= 1 or self.noise < 0:
            raise BimedixError(
                f"drop-rate must be in [0, 1] and noise must be >= 0, got {self.drop_rate} and {self.noise}."
            )
        if self.router_init not in ("normal", "zero") or self.router_std <= 0:
            raise BimedixError(f"router-init must be normal (with a positive std) or zero, got {self.router_init!r}.")

    @property
    def identical(self) -> bool:
        return self.experts == 1 or (self.drop_rate == 0 and self.noise == 0)

    def draws(self, name: str) -> np.random.Generator:
        """Random numbers that depend only on the seed and the name, not on the order of the calls."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


@dataclasses.dataclass(frozen=True)
class Source:
    """A dense model on disk and the mixture it becomes."""

    folder: Path
    config: MixtralConfig
    tensors: dict[str, StoredTensor]

    def dense(self, row: table.Row, index: tuple[int, ...]) -> StoredTensor:
        return self.tensors[table.named(DENSE_NAMES.get(row.path, row.name), index)]


def open_source(folder: Path, recipe: UpcycleRecipe, ignore_config_keys: Collection[str] = ()) -> Source:
    """Reads and checks a dense Hugging Face folder. Raises BimedixError for a model that cannot be upcycled."""
    dense = read_dense_config(folder, ignore_config_keys)
    try:
        config = dense.with_router(RouterConfig(num_experts=recipe.experts, top_k=recipe.top_k))
    except ValueError as error:
        raise BimedixError(f"{folder} cannot become a Mixtral: {error}") from None
    hub.require_safetensors(folder)
    hub.check_companions(folder)
    source = Source(folder, config, read_tensors(folder, config))
    expected = {
        table.named(DENSE_NAMES.get(row.path, row.name), index): table.unit_shape(row, config)
        for row, index in table.named_entries(config).values()
        if row.path != ROUTER
    }
    table.check_names(source.tensors, expected, str(folder))
    return source


def upcycle(
    folder: Path,
    output: str | Path,
    recipe: UpcycleRecipe,
    base: str | None = None,
    overwrite: bool = False,
    ignore_config_keys: Collection[str] = (),
) -> dict[str, Any]:
    """Writes the mixture as a Hugging Face Mixtral folder, streaming, and returns the content of upcycle.json.

    Args:
      folder: dense Hugging Face folder (Llama or Mistral architecture, safetensors).
      base: name of the dense model in upcycle.json; by default the folder.
    Raises:
      BimedixError: the source cannot be upcycled, or the output cannot be written; nothing is left behind.
    """
    source = open_source(folder, recipe, ignore_config_keys)
    config = source.config
    names = table.named_entries(config)
    router_dtype = source.tensors[table.named(DENSE_NAMES["layers.moe.w1.w"], (0,))].dtype
    specs = [
        TensorSpec(
            name, router_dtype if row.path == ROUTER else source.dense(row, index).dtype, table.unit_shape(row, config)
        )
        for name, (row, index) in names.items()
    ]
    distances: list[float] = []

    def upcycled() -> Iterator[Piece]:
        for spec in specs:
            row, index = names[spec.name]
            if row.path == ROUTER:
                yield spec.name, 0, router_weights(spec, recipe)
            elif row.path not in DENSE_NAMES:
                for first, rows in read_pieces(source.dense(row, index), 0, spec.shape):
                    yield spec.name, first, rows
        for layer in range(config.num_layers):
            distances.append((yield from expert_pieces(source, layer, recipe)))

    def finish(partial: Path) -> None:
        raw = raw_config(folder)
        hub.copy_companions(folder, partial)
        write_config(partial, config, str(router_dtype), {k: raw[k] for k in KEPT_CONFIG_KEYS if k in raw})
        found = report(base or str(folder), recipe, distances)
        (partial / REPORT_NAME).write_text(json.dumps(found, indent=2) + "\n", "utf-8")

    stream_to(output, specs, upcycled(), "upcycling", finish, overwrite)
    return report(base or str(folder), recipe, distances)


def router_weights(spec: TensorSpec, recipe: UpcycleRecipe) -> np.ndarray:
    if recipe.router_init == "zero":
        return np.zeros(spec.shape, spec.dtype)
    return (recipe.router_std * recipe.draws(spec.name).standard_normal(spec.shape, np.float32)).astype(spec.dtype)


def expert_pieces(source: Source, layer: int, recipe: UpcycleRecipe) -> Generator[Piece, None, float]:
    """Yields the weights of a layer's experts; returns the experts' mean pairwise distance, relative to the norm of the
    dense weights.

    One dense matrix at a time is in memory.
    """
    experts = range(recipe.experts)
    dropped = [dropped_dimensions(layer, expert, source.config.intermediate_size, recipe) for expert in experts]
    gram = np.zeros((recipe.experts, recipe.experts))
    norm = 0.0
    for row in (row for row in table.TABLE if row.path in DENSE_NAMES):
        dense = source.dense(row, (layer,))
        names = [table.named(row.name, (layer, expert)) for expert in experts]
        if recipe.identical:
            for first, rows in read_pieces(dense, 0, dense.shape):
                for name in names:
                    yield name, first, rows
            continue
        whole = read_finite(dense, 0, dense.shape[0]).astype(np.float32)
        norm += float(np.vdot(whole, whole))
        axis = 1 if row.path == "layers.moe.w2.w" else 0
        streams = [perturbed(whole, dense, dropped[e], axis, names[e], recipe) for e in experts]
        for parts in zip(*streams, strict=True):
            first, count = parts[0][0], len(parts[0][1])
            for name, (_, rows) in zip(names, parts, strict=True):
                yield name, first, rows
            # Gram matrix of the differences from the dense weights: exact zeros stay exact
            moved = np.stack([rows.astype(np.float32) - whole[first : first + count] for _, rows in parts])
            flat = moved.reshape(recipe.experts, -1)
            gram += flat @ flat.T
    pairs = list(itertools.combinations(experts, 2))
    if recipe.identical or not pairs:
        return 0.0
    return float(np.mean([np.sqrt(max(gram[i, i] + gram[j, j] - 2 * gram[i, j], 0.0) / norm) for i, j in pairs]))


def dropped_dimensions(layer: int, expert: int, width: int, recipe: UpcycleRecipe) -> np.ndarray:
    """bool [F]: the inner dimensions of this expert that are drawn at random, the same in w1, w3 and w2."""
    draws = recipe.draws(f"layers.{layer}.experts.{expert}.dropped")
    dropped = np.zeros(width, bool)
    dropped[draws.permutation(width)[: round(recipe.drop_rate * width)]] = True
    return dropped


def perturbed(
    whole: np.ndarray, spec: TensorSpec, dropped: np.ndarray, axis: int, name: str, recipe: UpcycleRecipe
) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows in the stored dtype) of one expert's matrix: the dense matrix, with the `dropped` dimensions
    along `axis` drawn at random."""
    replaced = np.compress(dropped, whole, axis)
    mean, std = (replaced.mean(), replaced.std()) if replaced.size else (np.float32(0), np.float32(0))
    del replaced
    redraw, jitter = recipe.draws(name), recipe.draws(f"{name}.noise")
    scale = np.float32(recipe.noise) * whole.std()
    for first, count in pieces(spec):
        rows = whole[first : first + count].copy()
        place = (slice(None), dropped) if axis == 1 else (dropped[first : first + count],)
        shape = rows[place].shape
        rows[place] = mean + std * redraw.standard_normal(shape, np.float32)
        if recipe.noise:
            rows += scale * jitter.standard_normal(rows.shape, np.float32)
        yield first, rows.astype(spec.dtype)


def report(base: str, recipe: UpcycleRecipe, distances: list[float]) -> dict[str, Any]:
    warnings = []
    if recipe.identical:
        warnings.append(
            "the experts are identical: until training has made them differ, the router gets no gradient from the "
            "language-model loss and expert load only shows its random initialisation (drop_rate or noise makes them "
            "differ from the start)"
        )
    if recipe.router_init == "zero":
        warnings.append(
            "a zero router scores all experts equally: every token goes to the first experts until training changes it"
        )
    return {
        "base": base,
        **dataclasses.asdict(recipe),
        "experts_identical": recipe.identical,
        "expert_distance": float(np.mean(distances)),
        "expert_distance_by_layer": distances,
        "expert_distance_is": "mean over pairs of |Wi - Wj| / |W dense|, Frobenius norms over w1, w2 and w3",
        "warnings": warnings,
    }


class UpcycleFacts(BaseModel):
    """The part of upcycle.json that other commands read."""

    warnings: list[str]
    expert_distance: float


def read_report(folder: Path) -> UpcycleFacts:
    """Reads upcycle.json of a mixture; raises BimedixError where it is missing or damaged."""
    return files.read_json(folder / REPORT_NAME, UpcycleFacts, "upcycle the dense model again")
