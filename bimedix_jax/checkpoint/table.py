"""The conversion table: Hugging Face tensor names <-> this project's parameter tree, checked on both sides.

One row is one stacked parameter: `{layer}` and `{expert}` in the Hugging Face name are its leading axes. Hugging Face
stores linear weights as (out, in) and the tree as (in, out), so these rows are `transposed`.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from bimedix_jax.checkpoint.dtypes import FLOATS
from bimedix_jax.checkpoint.safetensors_io import StoredTensor
from bimedix_jax.errors import BimedixError, listed
from bimedix_jax.models.config import MixtralConfig

LAYER = "model.layers.{layer}."
MOE = LAYER + "block_sparse_moe."


@dataclasses.dataclass(frozen=True)
class Row:
    """`name`: Hugging Face's; `path`: attributes in `models.mixtral.Mixtral`; `transposed`: (out, in) <-> (in, out)."""

    name: str
    path: str
    transposed: bool = False


TABLE = (
    Row("model.embed_tokens.weight", "embed.table"),
    Row(LAYER + "input_layernorm.weight", "layers.attention_norm.scale"),
    Row(LAYER + "self_attn.q_proj.weight", "layers.attention.q.w", transposed=True),
    Row(LAYER + "self_attn.k_proj.weight", "layers.attention.k.w", transposed=True),
    Row(LAYER + "self_attn.v_proj.weight", "layers.attention.v.w", transposed=True),
    Row(LAYER + "self_attn.o_proj.weight", "layers.attention.o.w", transposed=True),
    Row(LAYER + "post_attention_layernorm.weight", "layers.moe_norm.scale"),
    Row(MOE + "gate.weight", "layers.moe.router.w", transposed=True),
    Row(MOE + "experts.{expert}.w1.weight", "layers.moe.w1.w", transposed=True),
    Row(MOE + "experts.{expert}.w3.weight", "layers.moe.w3.w", transposed=True),
    Row(MOE + "experts.{expert}.w2.weight", "layers.moe.w2.w", transposed=True),
    Row("model.norm.weight", "norm.scale"),
    Row("lm_head.weight", "lm_head.w", transposed=True),
)
"""The hub layout, in the order in which an export writes it."""

FUSED_NAMES = {
    MOE + "gate.weight": LAYER + "mlp.gate.weight",
    MOE + "experts.{expert}.w1.weight": LAYER + "mlp.experts.gate_up_proj",
    MOE + "experts.{expert}.w3.weight": LAYER + "mlp.experts.gate_up_proj",
    MOE + "experts.{expert}.w2.weight": LAYER + "mlp.experts.down_proj",
}
"""Hub name -> name in the layout transformers 5 uses in memory: gate_up_proj [E, 2F, D] (w1 rows, then w3 rows) and
down_proj [E, D, F]."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """One matrix or vector of the model: entry `index` (layer; layer, expert; or none) of the leaf at `row.path`, and
    the rows [first_row, first_row + shape[0]) of the stored tensor, in Hugging Face orientation."""

    row: Row
    index: tuple[int, ...]
    shape: tuple[int, ...]
    tensor: StoredTensor
    first_row: int


def rows_of(config: MixtralConfig) -> tuple[Row, ...]:
    """The rows for this configuration: with tied embeddings there is no lm_head."""
    return tuple(row for row in TABLE if not (config.tie_embeddings and row.path == "lm_head.w"))


def indices(row: Row, config: MixtralConfig) -> Iterator[tuple[int, ...]]:
    """The (), (layer,) or (layer, expert) of a row's Hugging Face tensors."""
    counts = {"{layer}": config.num_layers, "{expert}": config.router.num_experts}
    return itertools.product(*(range(count) for field, count in counts.items() if field in row.name))


def named(name: str, index: tuple[int, ...]) -> str:
    return name.format(**dict(zip(("layer", "expert"), index, strict=False)))


def named_entries(config: MixtralConfig) -> dict[str, tuple[Row, tuple[int, ...]]]:
    """Every tensor of the hub layout by name, with its row and (layer, expert), in the order of the table."""
    return {named(row.name, index): (row, index) for row in rows_of(config) for index in indices(row, config)}


def unit_shape(row: Row, config: MixtralConfig) -> tuple[int, ...]:
    """Shape of one Hugging Face tensor of the hub layout, (out, in) for linear weights."""
    width, ffn = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "embed.table": (config.vocab_size, width),
        "layers.attention.q.w": (queries, width),
        "layers.attention.k.w": (keys, width),
        "layers.attention.v.w": (keys, width),
        "layers.attention.o.w": (width, queries),
        "layers.moe.router.w": (config.router.num_experts, width),
        "layers.moe.w1.w": (ffn, width),
        "layers.moe.w3.w": (ffn, width),
        "layers.moe.w2.w": (width, ffn),
        "lm_head.w": (config.vocab_size, width),
    }.get(row.path, (width,))


def units(tensors: Mapping[str, StoredTensor], config: MixtralConfig, source: str) -> list[Unit]:
    """The position of every matrix of the model in the files, in the order of the bytes.

    Raises:
      BimedixError: a tensor is missing, unknown, not floating point, or its shape differs from the configuration.
    """
    fused = any(".mlp.experts." in name for name in tensors)
    found: list[Unit] = []
    expected: dict[str, tuple[int, ...]] = {}
    for row, index in named_entries(config).values():
        shape = unit_shape(row, config)
        name = named(FUSED_NAMES.get(row.name, row.name) if fused else row.name, index)
        stored_shape, first_row = shape, 0
        if fused and len(index) == 2:
            halves = 2 if row.path != "layers.moe.w2.w" else 1
            stored_shape = (config.router.num_experts, halves * shape[0], shape[1])
            first_row = (index[1] * halves + (row.path == "layers.moe.w3.w")) * shape[0]
        expected[name] = stored_shape
        if name in tensors:
            tensor = tensors[name]
            if len(stored_shape) == 3:
                tensor = dataclasses.replace(tensor, shape=(stored_shape[0] * stored_shape[1], stored_shape[2]))
            found.append(Unit(row, index, shape, tensor, first_row))
    check_names(tensors, expected, source)
    return sorted(found, key=lambda unit: (str(unit.tensor.path), unit.tensor.start, unit.first_row))


def check_names(tensors: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raises BimedixError unless `tensors` have exactly the expected names and shapes and are floating point."""
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    shapes = [
        f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if missing == ["lm_head.weight"] and not extra:
        raise BimedixError(
            f"{source} has no lm_head.weight, and tie_word_embeddings is not true; if the model is tied, set it to "
            "true in config.json, else save the whole model with its output head."
        )
    problems = [
        f"{len(names)} tensor(s) {what} ({listed(names)})"
        for what, names in (("missing", missing), ("unknown", extra), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise BimedixError(
            f"{source} does not fit its config.json: {'; '.join(problems)}. Check that both come from the same model."
        )
    packed = [name for name in expected if np.dtype(tensors[name].dtype) not in FLOATS]
    if packed:
        raise BimedixError(
            f"{source} stores {len(packed)} weight(s) as {tensors[packed[0]].dtype} ({listed(packed)}), a quantised "
            "format that this loader does not read; use the unquantised checkpoint."
        )
