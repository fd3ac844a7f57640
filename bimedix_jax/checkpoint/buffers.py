"""Host memory that becomes JAX arrays without a copy, filled a few megabytes at a time.

On CPU `jax.device_put` uses the memory of a NumPy array that starts on a 64-byte boundary, without a copy (jnp.asarray
copies); measured with jax 0.10.2 and asserted in the tests. Memory that was never written costs nothing, so a whole
model is allocated first and then filled in the order of the file.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bimedix_jax.checkpoint.rounding import Rounding, read_finite, require_finite
from bimedix_jax.checkpoint.safetensors_io import StoredTensor, TensorSpec, pieces
from bimedix_jax.kernels.nf4 import NF4Tensor
from bimedix_jax.kernels.nf4.api import flushed_blocks, mean_scale, quantize_blocks
from bimedix_jax.kernels.nf4.reference import quantize_scales

ALIGNMENT = 64
TILE = 64
"""Side of the square tiles of a transposing copy: 4 times as fast as one strided copy of a 14336 x 4096 matrix."""
NEAR_DENORMAL = np.float32(2.0**-121)
"""Blocks with a smaller scale are searched for denormals. It is 2**5 times the smallest normal float32."""
QUANTISE_BYTES = 4 << 20
"""Source bytes per quantised piece: as fast as larger pieces, with about 200 MB of float32 temporaries."""


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array that starts on a 64-byte boundary."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def allocate(abstract: Any) -> Any:
    """The same pytree with an aligned NumPy buffer for every jax.ShapeDtypeStruct."""
    return jax.tree.map(lambda leaf: aligned_empty(leaf.shape, leaf.dtype), abstract)


def copy_transposed(target: np.ndarray, source: np.ndarray) -> None:
    """target[j, i] = source[i, j] for matrices, tile by tile."""
    if source.dtype != target.dtype:
        source = source.astype(target.dtype)
    if target.dtype.itemsize == 2:  # NumPy copies a native type much faster than ml_dtypes' bfloat16
        source, target = source.view(np.uint16), target.view(np.uint16)
    rows, columns = source.shape
    for i in range(0, rows, TILE):
        for j in range(0, columns, TILE):
            target[j : j + TILE, i : i + TILE] = source[i : i + TILE, j : j + TILE].T


def fill_array(
    target: np.ndarray,
    tensor: StoredTensor,
    first_row: int,
    transposed: bool,
    rounding: Rounding,
    done: Callable[[int], Any],
) -> None:
    """Reads a matrix (out, in) or a vector, which begins at row `first_row` of `tensor`, into `target` and casts it.

    `target` is (in, out) if `transposed`. `rounding` counts the values that the cast changes. `done` is called with the
    number of bytes of every piece.

    Raises BimedixError for weights that are not finite.
    """
    rows = target.shape[1] if transposed else target.shape[0]
    span = TensorSpec(tensor.name, tensor.dtype, (rows, *tensor.shape[1:]))
    for start, count in pieces(span):
        if not transposed and tensor.dtype == target.dtype:
            read = tensor.read(first_row + start, count, out=target[start : start + count])
            require_finite(read, tensor, first_row + start)
            rounding.total += read.size
        else:
            read = rounding.cast(read_finite(tensor, first_row + start, count), target.dtype, tensor.name)
            if transposed:
                copy_transposed(target[:, start : start + count], read)
            else:
                target[start : start + count] = read
        done(count * tensor.row_bytes)


def fill_nf4(
    target: NF4Tensor, index: tuple[int, ...], tensor: StoredTensor, first_row: int, done: Callable[[int], Any]
) -> Callable[[], int]:
    """Quantises a matrix, which begins at row `first_row` of `tensor`, into entry `index` of `target`, an NF4Tensor of
    NumPy arrays, a few MB at a time.

    The result equals that of quantising the whole matrix, because every piece ends on a block boundary. Returns
    finish(), which waits for the last piece and stores it and the scales, so that the caller can read the next matrix
    meanwhile. finish() returns the number of blocks with denormals, which become zeros.

    Raises BimedixError for weights that are not finite.
    """
    rows, columns = target.unit_shape
    span = TensorSpec(tensor.name, tensor.dtype, (rows, columns))
    whole_blocks = target.block_size // math.gcd(target.block_size, columns)
    packed, flushed = target.packed[index], 0
    absmax = np.empty(target.absmax.shape[-1], np.float32)
    running: list[Callable[[], int]] = []

    def quantised(read: np.ndarray, byte: int, block: int) -> Callable[[], int]:
        codes, scales = quantize_blocks(read.reshape(-1), target.block_size)

        def store() -> int:
            packed[byte : byte + codes.size] = codes
            absmax[block : block + scales.size] = scales
            if not (absmax[block : block + scales.size] < NEAR_DENORMAL).any():
                return 0
            return int(flushed_blocks(jnp.asarray(read.reshape(-1)), target.block_size))

        return store

    for start, count in pieces(span, QUANTISE_BYTES, whole_blocks * 2):
        read = tensor.read(first_row + start, count)
        if target.dtype != str(read.dtype):
            read = read.astype(target.dtype)
        require_finite(read, tensor, first_row + start)
        running.append(quantised(read, start * columns // 2, start * columns // target.block_size))
        if len(running) > 1:
            flushed += running.pop(0)()
        done(count * tensor.row_bytes)

    def finish() -> int:
        total = flushed + sum(store() for store in running)
        if target.nested_absmax is None or target.nested_offset is None:
            target.absmax[index] = absmax
            return total
        scales = quantize_scales(absmax, lambda scales: np.asarray(mean_scale(scales)))
        for leaf, value in zip((target.absmax, target.nested_absmax, target.nested_offset), scales, strict=True):
            leaf[index] = value
        return total

    return finish
