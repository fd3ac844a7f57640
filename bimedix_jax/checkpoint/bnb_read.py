"""Copies the 4-bit bytes of a bitsandbytes folder into the model's stacked leaves, where that is possible.

A leaf is one NF4Tensor over all layers (and experts). Its bytes are copied unchanged if all its matrices are packed
with one block size and one dtype. The scales stay in 8 bits if each matrix has whole groups of 256 blocks. Where
experts in one tensor split a group, the scales (never the nibbles) are decoded to float32, which changes no value.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bimedix_jax.checkpoint.bnb_format import PackedTensor
from bimedix_jax.checkpoint.table import Unit
from bimedix_jax.errors import BimedixError, listed
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.tables import NESTED_BLOCK_SIZE

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PackedFormat:
    """The common format of the packed matrices of a leaf."""

    block_size: int
    dtype: str
    double_quantised: bool


def kept_formats(units: Sequence[Unit], base: str | None, quantised: frozenset[str]) -> dict[str, PackedFormat]:
    """The leaves whose packed bytes are kept, by path; warns of every other packed tensor.

    Args:
      base: None keeps the storage in the folder; "nf4" also quantises 16-bit matrices of leaves with packed ones; any
        other value dequantises everything.
      quantised: paths of the leaves that may be NF4.
    Raises:
      BimedixError: the packed matrices of a leaf differ in format.
    """
    packed: dict[str, list[Unit]] = {}
    plain: dict[str, list[Unit]] = {}
    for unit in units:
        kind = packed if isinstance(unit.tensor, PackedTensor) else plain
        kind.setdefault(unit.row.path, []).append(unit)
    if not packed or base not in (None, "nf4"):
        return {}
    formats = {}
    for path, members in packed.items():
        if path not in quantised:
            log.warning(
                "%s: %d packed matrices are dequantised exactly, because this parameter is never in 4 bits here.",
                path,
                len(members),
            )
        elif base is None and path in plain:
            log.warning(
                "%s: %d of %d matrices are packed and are dequantised exactly, because the others have 16 bits and all "
                "layers have the same storage; base nf4 quantises the others instead, which changes them.",
                path,
                len(members),
                len(members) + len(plain[path]),
            )
        else:
            formats[path] = common_format(path, members)
    warn_unpacked(plain, formats, base, quantised)
    return formats


def warn_unpacked(
    plain: dict[str, list[Unit]], formats: dict[str, PackedFormat], base: str | None, quantised: frozenset[str]
):
    """Warns of the 16-bit matrices of a packed folder, which stay in 16 bits or are packed now."""
    counts = {path: len(members) for path, members in plain.items() if path in quantised}
    if base is None:
        counts = {path: count for path, count in counts.items() if path not in formats}
    if counts:
        log.warning(
            "%d matrices are in 16 bits in the folder and %s (%s).",
            sum(counts.values()),
            "stay in 16 bits" if base is None else "are packed now",
            listed(sorted(counts)),
        )


def common_format(path: str, members: Sequence[Unit]) -> PackedFormat:
    """The common format of a leaf's matrices; raises BimedixError where they differ or share blocks."""
    tensors = [unit.tensor for unit in members if isinstance(unit.tensor, PackedTensor)]
    kinds = sorted({(tensor.state.block_size, tensor.state.dtype) for tensor in tensors})
    if len(kinds) > 1:
        raise BimedixError(
            f"{path}: packed matrices differ in block size and dtype {kinds}, but one 4-bit storage needs one of each; "
            "load with base bfloat16, which dequantises."
        )
    ((block_size, dtype),) = kinds
    size = math.prod(members[0].shape)
    shared = [tensor.name for tensor in tensors if tensor.size != size]
    if shared and size % block_size:
        raise BimedixError(
            f"{shared[0]}: matrices of {size} elements share blocks of {block_size} and cannot be separated in 4 "
            "bits; load with base bfloat16, which dequantises."
        )
    whole_groups = not shared or size // block_size % NESTED_BLOCK_SIZE == 0
    nested = [tensor for tensor in tensors if tensor.nested_absmax is not None]
    keep = len(nested) == len(tensors) and whole_groups and all(tensor.standard_map for tensor in tensors)
    if nested and not keep:
        log.warning(
            "%s: 8-bit scales of %d matrices are decoded to float32, which changes no value and needs 4.5 instead of "
            "4.13 bits per weight (%s).",
            path,
            len(nested),
            "experts split groups of 256 blocks" if not whole_groups else "they are coded in different ways",
        )
    return PackedFormat(block_size, dtype, keep)


def fill_kept(
    target: NF4Tensor, index: tuple[int, ...], tensor: PackedTensor, first_row: int, done: Callable[[int], Any]
) -> None:
    """Copies the bytes of the matrix at `first_row` of `tensor` into entry `index` of `target`, an NF4Tensor of NumPy
    arrays.

    `done` is called with the bytes that the matrix would have in 16 bits.
    """
    leaf: Any = target  # of NumPy arrays, not of JAX ones
    rows, columns = target.unit_shape
    first = first_row * columns
    tensor.nibbles.read(first // 2, leaf.packed.shape[-1], out=leaf.packed[index])
    first_block, blocks = first // target.block_size, leaf.absmax.shape[-1]
    scales = tensor.scales(
        first_block, blocks
    )  # also read where they stay coded, because this raises for values that are not finite
    if leaf.nested_absmax is None or tensor.nested_absmax is None:
        leaf.absmax[index] = scales
    else:
        tensor.absmax.read(first_block, blocks, out=leaf.absmax[index])
        groups = leaf.nested_absmax.shape[-1]
        tensor.nested_absmax.read(first_block // NESTED_BLOCK_SIZE, groups, out=leaf.nested_absmax[index])
        leaf.nested_offset[index] = np.float32(tensor.state.nested_offset)
    done(rows * tensor.row_bytes)
