"""4-bit models -> folders in bitsandbytes' format, with the 4-bit bytes of the model unchanged.

The layouts, and what loads them in 4 bits (transformers 5.23, bitsandbytes 0.50.2; tests/checkpoint/test_bnb.py):

    layout        experts on disk                        loaded in 4 bits by
    per_expert    packed, one quant state each           transformers 4 + bitsandbytes, this project
    fused         packed, one quant state for all        transformers 5 + bitsandbytes by scripts/load_bnb_fused.py
    attention     16 bits, dequantised exactly           plain `from_pretrained` of transformers 5: attention only

The quantiser of transformers 5 ignores fused parameters, which its experts are. So `from_pretrained` fails there on the
first two layouts, and quantising an unpacked Mixtral silently leaves the experts in 16 bits. The script packs them
after loading with bitsandbytes.nn.parametrize. The router is never packed here; `llm_int8_skip_modules` in config.json
keeps transformers 4 from packing it.
"""

import dataclasses
import logging
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bimedix_jax.checkpoint import table
from bimedix_jax.checkpoint.bnb_config import written_settings
from bimedix_jax.checkpoint.bnb_format import BLOCK_SIZES, STATE, QuantState
from bimedix_jax.checkpoint.hf import (
    QUANTISED,
    companion_folder,
    parameters,
    require_topk,
    stored_pieces,
    write_companions,
)
from bimedix_jax.checkpoint.safetensors_io import TensorSpec
from bimedix_jax.checkpoint.stream import MAX_SHARD_BYTES, Piece, stream_to
from bimedix_jax.errors import BimedixError, listed
from bimedix_jax.kernels.nf4 import NF4Tensor, reference
from bimedix_jax.kernels.nf4.tables import DYNAMIC_MAP, NESTED_BLOCK_SIZE, NF4_VALUES
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.models.mixtral import Mixtral

log = logging.getLogger(__name__)

BnbLayout = Literal["per_expert", "fused", "attention"]
LAYOUTS = ("per_expert", "fused", "attention")
EXPERTS = ("layers.moe.w1.w", "layers.moe.w3.w", "layers.moe.w2.w")
U8, F32 = np.dtype(np.uint8), np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Group:
    """The matrices of one packed tensor `name`: (stacked parameter, index) in the order of their bytes."""

    name: str
    members: tuple[tuple[NF4Tensor, tuple[int, ...]], ...]
    shape: tuple[int, ...]


def export_bnb(
    model: Mixtral,
    folder: str | Path,
    layout: BnbLayout = "per_expert",
    tokenizer_from: str | Path | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Writes a 4-bit model for bitsandbytes. Neither nibbles nor values change.

    Args:
      layout: see the table above. "fused" has one offset for the scales of all experts of a layer. Where the offsets of
        the experts differ (always, unless they come from such a folder) a warning is logged, and the scales are written
        in float32: 4.5 instead of 4.13 bits per weight.
      tokenizer_from: folder whose tokenizer and licence files are copied; None takes the folder the model was loaded
        from.
    Raises:
      BimedixError: the model is not in 4 bits, has adapters, or cannot be written in this layout; nothing is left
        behind.
    """
    if layout not in LAYOUTS:
        raise BimedixError(f"layout {layout!r} is unknown; choose {', '.join(LAYOUTS)}.")
    require_topk(model, "A checkpoint for bitsandbytes")
    if model.lora is not None:
        raise BimedixError(
            "the model has adapters, which do not fit in a 4-bit checkpoint of the base; export the base without "
            "them, and save the adapters separately."
        )
    values = {path: variable.get_value() for path, variable in parameters(model).items()}
    check_packing(values, model.config)
    source = companion_folder(model, tokenizer_from)
    groups, plain = entries(values, model.config, layout)
    warn_decoded(groups.values())
    specs = [spec for name in (*groups, *plain) for spec in specs_of(name, groups, plain, values, model.config)]

    def exported() -> Iterator[Piece]:
        for group in groups.values():
            yield from packed_pieces(group)
        for spec in specs:
            if spec.name in plain:
                row, index = plain[spec.name]
                for first, rows in stored_pieces(values[row.path], index, spec, row.transposed):
                    yield spec.name, first, rows

    def finish(partial: Path) -> None:
        settings = written_settings(model.dtype, any(map(shared_offset, groups.values())), unpacked_modules(plain))
        write_companions(partial, model.config, str(np.dtype(values["embed.table"].dtype)), source, settings)

    return stream_to(folder, specs, exported(), "exporting", finish, overwrite, max_shard_bytes)


def check_packing(values: dict[str, Any], config: MixtralConfig) -> None:
    """Raises BimedixError unless some leaf is NF4 and all NF4 leaves are stored in the order of Hugging Face."""
    packed = {path: value for path, value in values.items() if isinstance(value, NF4Tensor)}
    if not packed:
        raise BimedixError(
            "the model is not in 4 bits; load it with base nf4, or quantise it with quantise_base, and export that."
        )
    shapes = {row.path: table.unit_shape(row, config) for row in table.rows_of(config)}
    for path, value in packed.items():
        if not value.transposed or value.unit_shape != shapes[path]:
            raise BimedixError(
                f"{path} is not packed in the order (out, in), which bitsandbytes' layers need; load the model "
                "with base nf4 instead."
            )
        if value.block_size not in BLOCK_SIZES:
            raise BimedixError(
                f"{path} is packed in blocks of {value.block_size}, which bitsandbytes lacks; load the model "
                "with base nf4 instead."
            )


def entries(
    values: dict[str, Any], config: MixtralConfig, layout: str
) -> tuple[dict[str, Group], dict[str, tuple[table.Row, tuple[int, ...]]]]:
    """(packed tensors, all others) by name, in the order in which they are written."""
    fused = layout == "fused"
    collected: dict[str, list[tuple[NF4Tensor, tuple[int, ...]]]] = {}
    plain: dict[str, tuple[table.Row, tuple[int, ...]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for row, index in table.named_entries(config).values():
        value, shape = values[row.path], table.unit_shape(row, config)
        name = table.named(table.FUSED_NAMES.get(row.name, row.name) if fused else row.name, index)
        if not isinstance(value, NF4Tensor) or (layout == "attention" and row.path in EXPERTS):
            if fused and row.path in EXPERTS:
                raise BimedixError(
                    f"{row.path} is not in 4 bits, which layout fused needs; choose layout per_expert or attention."
                )
            plain[name] = (row, index)
            continue
        collected.setdefault(name, []).append((value, index))
        fused_shape = (config.router.num_experts, shape[0] * (2 if "gate_up" in name else 1), shape[1])
        shapes[name] = fused_shape if fused and row.path in EXPERTS else shape
    groups = {}
    for name, members in collected.items():
        # gate_up_proj interleaves the matrices of two parameters: w1 and w3 of expert 0, of expert 1, ...
        members.sort(key=lambda member: member[1])
        groups[name] = Group(name, tuple(members), shapes[name])
        check_fusable(groups[name])
    return groups, plain


def check_fusable(group: Group) -> None:
    """Raises BimedixError where the matrices cannot be stored as one bitsandbytes tensor."""
    if len(group.members) == 1:
        return
    kinds = {(value.block_size, value.dtype) for value, _ in group.members}
    block_size = group.members[0][0].block_size
    if len(kinds) > 1 or any(math.prod(value.unit_shape) % block_size for value, _ in group.members):
        raise BimedixError(
            f"{group.name} cannot be one packed tensor: its matrices differ in block size or dtype, or do not fill "
            f"whole blocks of {block_size}; choose layout per_expert."
        )


def shared_offset(group: Group) -> bool:
    """Whether one tensor can have the unchanged 8-bit scales of all matrices."""
    if not all(value.double_quantised for value, _ in group.members):
        return False
    offsets = {on_host(value.nested_offset, index).tobytes() for value, index in group.members}
    whole = all(value.absmax.shape[-1] % NESTED_BLOCK_SIZE == 0 for value, _ in group.members)
    return len(group.members) == 1 or (len(offsets) == 1 and whole)


def warn_decoded(groups: Collection[Group]) -> None:
    """Warns of fused tensors whose 8-bit scales are written in float32."""
    decoded = [
        group.name
        for group in groups
        if not shared_offset(group) and any(value.double_quantised for value, _ in group.members)
    ]
    if decoded:
        log.warning(
            "scales of %d fused tensors are written in float32 instead of 8 bits, because the offsets of the "
            "experts differ (%s); no value changes.",
            len(decoded),
            listed(decoded),
        )


def unpacked_modules(plain: dict[str, tuple[table.Row, tuple[int, ...]]]) -> Sequence[str]:
    """Modules that transformers must not pack, with its default, lm_head, which is lost when others are named."""
    names = {
        name.removesuffix(".weight").rpartition(".")[2]
        for name, (row, _) in plain.items()
        if row.path in QUANTISED or row.path == "layers.moe.router.w"
    }
    return ["lm_head", *sorted(names)]


def on_host(leaf: Any, index: tuple[int, ...]) -> np.ndarray:
    """Entry `index` of a leaf: a view if the leaf is in host memory, else copied from the device."""
    if isinstance(leaf, np.ndarray) or all(device.platform == "cpu" for device in leaf.devices()):
        return np.asarray(leaf)[index]
    return np.asarray(leaf[index])


def specs_of(
    name: str,
    groups: dict[str, Group],
    plain: dict[str, tuple[table.Row, tuple[int, ...]]],
    values: dict[str, Any],
    config: MixtralConfig,
) -> list[TensorSpec]:
    """Dtypes and shapes of one weight and of its quantisation state."""
    if name in plain:
        row, _ = plain[name]
        return [TensorSpec(name, np.dtype(values[row.path].dtype), table.unit_shape(row, config))]
    group = groups[name]
    count = len(group.members)
    value = group.members[0][0]
    nested = shared_offset(group)
    blocks = count * value.absmax.shape[-1]
    state = quant_state(group).to_json()
    specs = [
        TensorSpec(name, U8, (count * value.packed.shape[-1], 1)),
        TensorSpec(f"{name}.absmax", U8 if nested else F32, (blocks,)),
        TensorSpec(f"{name}.quant_map", F32, NF4_VALUES.shape),
    ]
    if nested:
        specs += [
            TensorSpec(f"{name}.nested_absmax", F32, (-(-blocks // NESTED_BLOCK_SIZE),)),
            TensorSpec(f"{name}.nested_quant_map", F32, DYNAMIC_MAP.shape),
        ]
    return [*specs, TensorSpec(f"{name}.{STATE}nf4", U8, state.shape)]


def quant_state(group: Group) -> QuantState:
    value, index = group.members[0]
    offset = float(on_host(value.nested_offset, index)) if shared_offset(group) else None
    return QuantState(value.block_size, value.dtype, group.shape, offset)


def packed_pieces(group: Group) -> Iterator[Piece]:
    """The nibbles, scales and tables of one packed weight."""
    nested = shared_offset(group)
    for number, (value, index) in enumerate(group.members):
        codes, absmax = on_host(value.packed, index), on_host(value.absmax, index)
        yield group.name, number * codes.size, codes[:, None]
        if nested:
            groups = on_host(value.nested_absmax, index)
            yield f"{group.name}.nested_absmax", number * groups.size, groups
        elif value.double_quantised:
            parts = (on_host(leaf, index) for leaf in (value.nested_absmax, value.nested_offset))
            absmax = reference.block_scales(reference.PackedUnit(codes, absmax, *parts))
        yield f"{group.name}.absmax", number * absmax.size, absmax
    yield f"{group.name}.quant_map", 0, NF4_VALUES
    if nested:
        yield f"{group.name}.nested_quant_map", 0, DYNAMIC_MAP
    yield f"{group.name}.{STATE}nf4", 0, quant_state(group).to_json()
