"""4-bit tensors as bitsandbytes stores them in safetensors files, read without bitsandbytes.

A weight W of n elements is

    W                                      its nibbles: uint8 [ceil(n/2), 1], or the same bytes as another dtype
    W.absmax                               float32 [blocks], or uint8 codes of it under double quantisation
    W.quant_map                            float32 [16], the NF4 values
    W.nested_absmax, W.nested_quant_map    float32 [ceil(blocks/256)] and [256], under double quantisation
    W.quant_state.bitsandbytes__nf4        uint8, JSON: quant_type, blocksize, dtype, shape, nested_{blocksize, dtype,
                                           offset}, in this order

(bitsandbytes.functional.QuantState.as_dict and .from_dict, 0.50.2; checked live in tests/checkpoint/test_bnb.py).
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bimedix_jax.checkpoint.dtypes import PACKED_FROM
from bimedix_jax.checkpoint.safetensors_io import StoredTensor
from bimedix_jax.errors import BimedixError, listed
from bimedix_jax.kernels.nf4 import NF4Tensor, dequantize
from bimedix_jax.kernels.nf4.tables import DYNAMIC_MAP, NESTED_BLOCK_SIZE, NF4_VALUES

STATE = "quant_state.bitsandbytes__"
PART = re.compile(rf"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|{re.escape(STATE)}\w+)")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

_dequantize = jax.jit(dequantize)


@dataclasses.dataclass(frozen=True)
class QuantState:
    """The JSON quantisation state of a packed tensor; `dtype` is that of the weights before packing and after."""

    block_size: int
    dtype: str
    shape: tuple[int, ...]
    nested_offset: float | None

    def to_json(self) -> np.ndarray:
        """Its bytes, as bitsandbytes writes them."""
        record: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": self.block_size,
            "dtype": self.dtype,
            "shape": list(self.shape),
        }
        if self.nested_offset is not None:
            record |= {
                "nested_blocksize": NESTED_BLOCK_SIZE,
                "nested_dtype": "float32",
                "nested_offset": self.nested_offset,
            }
        return np.frombuffer(json.dumps(record).encode(), np.uint8)


def parse_state(text: bytes) -> QuantState:
    """Raises ValueError, with the reason, for any text that `QuantState.to_json` cannot write."""
    record = json.loads(text)
    match record:
        case {"quant_type": "nf4", "blocksize": int(block_size), "dtype": str(dtype), "shape": [*shape]}:
            pass
        case _:
            raise ValueError("quant_type, blocksize, dtype or shape is missing or malformed")
    extra = sorted(set(record) - {"quant_type", "blocksize", "dtype", "shape"})
    offset = None
    if extra:
        if extra != ["nested_blocksize", "nested_dtype", "nested_offset"]:
            raise ValueError(f"its further keys are {', '.join(extra)}, not those of double quantisation")
        offset = record["nested_offset"]
        if (record["nested_blocksize"], record["nested_dtype"]) != (NESTED_BLOCK_SIZE, "float32"):
            raise ValueError(f"its scales are not packed in float32 groups of {NESTED_BLOCK_SIZE}")
        if type(offset) not in (int, float) or not math.isfinite(offset):
            raise ValueError(f"nested_offset is {offset!r}")
    if block_size not in BLOCK_SIZES or dtype not in PACKED_FROM:
        raise ValueError(f"blocksize {block_size} or dtype {dtype!r} is not supported by bitsandbytes")
    if not shape or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"shape is {shape}")
    return QuantState(block_size, dtype, tuple(shape), offset)


@dataclasses.dataclass(frozen=True)
class PackedTensor(StoredTensor):
    """A 4-bit tensor in a file, with the interface of the 16-bit tensor that it was packed from: `dtype` and `shape`
    are those of the weights, and `read` dequantises exactly as bitsandbytes does. `path` and `start` locate the
    nibbles."""

    state: QuantState
    nibbles: StoredTensor
    absmax: StoredTensor
    nested_absmax: StoredTensor | None
    nested_map: np.ndarray | None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def standard_map(self) -> bool:
        """Whether packed scales can be kept: they are coded with the same table as in our kernels."""
        return self.nested_map is not None and np.array_equal(self.nested_map, DYNAMIC_MAP)

    def scales(self, first: int, count: int) -> np.ndarray:
        """float32 scales of blocks [first, first + count), with double quantisation undone. Raises BimedixError for NaN
        and infinity."""
        scales = self.absmax.read(first, count)
        if self.nested_absmax is not None and self.nested_map is not None:
            group = first // NESTED_BLOCK_SIZE
            groups = self.nested_absmax.read(group, -(-(first + count) // NESTED_BLOCK_SIZE) - group)
            repeated = np.repeat(groups, NESTED_BLOCK_SIZE)[first - group * NESTED_BLOCK_SIZE :][:count]
            scales = self.nested_map[scales] * repeated + np.float32(self.state.nested_offset)
        if not np.isfinite(scales).all():
            raise BimedixError(
                f"{self.path} has scales of {self.name} that are not finite, so the weights contained NaN or infinity; "
                "use another copy."
            )
        return scales

    def read(self, first_row: int = 0, rows: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Rows [first_row, first_row + rows), dequantised."""
        rows = self.shape[0] - first_row if rows is None else rows
        width, block = math.prod(self.shape[1:]), self.state.block_size
        first, stop = first_row * width, (first_row + rows) * width
        first_block, blocks = first // block, -(-stop // block) - first // block
        start = first_block * block
        size = min(blocks * block, self.size - start)
        codes = self.nibbles.read(start // 2, (size + 1) // 2)
        scales = self.scales(first_block, blocks)
        unit = NF4Tensor(jnp.asarray(codes), jnp.asarray(scales), None, None, (size,), False, block, self.state.dtype)
        values = np.asarray(_dequantize(unit))[first - start : stop - start].reshape(rows, *self.shape[1:])
        if out is None:
            return values
        out[...] = values
        return out


def assemble(tensors: Mapping[str, StoredTensor], source: str) -> dict[str, StoredTensor]:
    """The same tensors, with every packed tensor and its quantisation state combined in one PackedTensor.

    Raises:
      BimedixError: a quantisation other than NF4, or a quant state that contradicts its tensor.
    """
    parts: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        match = PART.fullmatch(name)
        if match and match[1] in tensors:
            parts.setdefault(match[1], {})[match[2]] = tensor
    other = [name for name, found in parts.items() if any(part.startswith(STATE) for part in found.keys() - NF4_PARTS)]
    if other:
        kind = next(part for part in parts[other[0]] if part.startswith(STATE)).removeprefix(STATE)
        raise BimedixError(
            f"{source} stores {len(other)} weight(s) as bitsandbytes {kind} ({listed(other)}), which is not "
            "implemented (only nf4 is); name the unquantised checkpoint and load it with base nf4."
        )
    companions = {f"{name}.{part}" for name, found in parts.items() for part in found}
    return {
        name: packed(tensor, parts[name], source) if name in parts else tensor
        for name, tensor in tensors.items()
        if name not in companions
    }


NF4_PARTS = {"absmax", "quant_map", "nested_absmax", "nested_quant_map", f"{STATE}nf4"}


def packed(tensor: StoredTensor, parts: Mapping[str, StoredTensor], source: str) -> PackedTensor:
    """One packed tensor, after checking its header, quantisation state and tables."""

    def contradiction(why: str) -> BimedixError:
        return BimedixError(
            f"{source}: the quant state of {tensor.name} contradicts the tensor: {why}; download or export it again."
        )

    if f"{STATE}nf4" not in parts:
        raise contradiction(f"{STATE}nf4 is missing, but there are {', '.join(sorted(parts))}")
    try:
        state = parse_state(parts[f"{STATE}nf4"].read().tobytes())
    except (ValueError, RecursionError) as error:
        raise contradiction(str(error)) from None
    size = math.prod(state.shape)
    blocks = -(-size // state.block_size)
    nested = state.nested_offset is not None
    expected = {
        "absmax": (np.uint8 if nested else np.float32, blocks),
        "quant_map": (np.float32, len(NF4_VALUES)),
        **({"nested_absmax": (np.float32, -(-blocks // NESTED_BLOCK_SIZE))} if nested else {}),
        **({"nested_quant_map": (np.float32, len(DYNAMIC_MAP))} if nested else {}),
    }
    found = parts.keys() - {f"{STATE}nf4"}
    if found != expected.keys():
        raise contradiction(f"its parts are {', '.join(sorted(found))}, not {', '.join(sorted(expected))}")
    if tensor.nbytes != (size + 1) // 2:
        raise contradiction(f"{tensor.nbytes} bytes do not fit shape {list(state.shape)}")
    for part, (dtype, length) in expected.items():
        if (parts[part].dtype, parts[part].shape) != (np.dtype(dtype), (length,)):
            stored = f"{parts[part].dtype}{list(parts[part].shape)}"
            raise contradiction(f"{part} is {stored}, not {np.dtype(dtype)}[{length}]")
    if not np.array_equal(parts["quant_map"].read(), NF4_VALUES):
        raise contradiction("quant_map is not the table of NF4 values")
    nested_map = parts["nested_quant_map"].read() if nested else None
    # versions of PyTorch differ in the last bits of this table; the table in the file is the one that was used
    if nested_map is not None and not np.allclose(nested_map, DYNAMIC_MAP, rtol=0, atol=1e-6):
        raise contradiction("nested_quant_map is not the signed dynamic 8-bit table")
    return PackedTensor(
        tensor.name,
        PACKED_FROM[state.dtype],
        state.shape,
        tensor.path,
        tensor.start,
        state,
        dataclasses.replace(tensor, dtype=np.dtype(np.uint8), shape=(tensor.nbytes,)),
        parts["absmax"],
        parts.get("nested_absmax"),
        nested_map,
    )
