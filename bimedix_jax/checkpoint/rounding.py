"""Reading weights that must be finite, and casts that count the values which a narrower dtype changes."""

import dataclasses
import logging
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from bimedix_jax.checkpoint.safetensors_io import StoredTensor, TensorSpec, pieces
from bimedix_jax.errors import BimedixError

log = logging.getLogger(__name__)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BFLOAT16_EXPONENT = np.uint16(0x7F80)
"""These bits are all 1 in NaN and infinity only."""
LOW_HALF = np.uint32(0xFFFF)
"""The bits of a float32 that are 0 where it is a bfloat16."""


def finite(values: np.ndarray) -> bool:
    # for bfloat16, checking the bits with NumPy is 16 times as fast as isfinite of XLA:CPU or ml_dtypes
    if values.dtype == BFLOAT16:
        return bool(((values.view(np.uint16) & BFLOAT16_EXPONENT) != BFLOAT16_EXPONENT).all())
    return bool(np.isfinite(values).all())


def require_finite(read: np.ndarray, tensor: StoredTensor, first_row: int) -> None:
    """Raises BimedixError for NaN or infinity in `read`, the rows of a tensor that begin at `first_row`."""
    if not finite(read):
        raise BimedixError(
            f"{tensor.path} contains NaN or infinity in {tensor.name} "
            f"(rows {first_row} to {first_row + len(read) - 1}); use another copy of the weights."
        )


def read_finite(tensor: StoredTensor, first_row: int, rows: int) -> np.ndarray:
    """Rows of a tensor; raises BimedixError for NaN and infinity."""
    read = tensor.read(first_row, rows)
    require_finite(read, tensor, first_row)
    return read


def read_pieces(tensor: StoredTensor, first_row: int, shape: tuple[int, ...]) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of the matrix or vector of this shape that begins at `first_row` of a tensor, a few MB at a
    time; raises BimedixError for NaN and infinity."""
    for first, count in pieces(TensorSpec(tensor.name, tensor.dtype, shape)):
        yield first, read_finite(tensor, first_row + first, count)


def holds(wide: np.dtype, narrow: np.dtype) -> bool:
    """Whether `wide` represents every value of `narrow`."""
    ours, theirs = ml_dtypes.finfo(wide), ml_dtypes.finfo(narrow)
    return ours.nmant >= theirs.nmant and ours.maxexp >= theirs.maxexp and ours.minexp <= theirs.minexp


def count_changed(values: np.ndarray, cast: np.ndarray) -> int:
    """How many finite values a cast changed."""
    if cast.dtype == BFLOAT16 and holds(np.dtype(np.float32), values.dtype):
        return int(np.count_nonzero(values.astype(np.float32, copy=False).view(np.uint32) & LOW_HALF))
    return int(np.count_nonzero(cast.astype(values.dtype) != values))


@dataclasses.dataclass
class Rounding:
    """Counts the values that casts change."""

    changed: int = 0
    total: int = 0
    dtypes: tuple[str, str] = ("", "")

    def cast(self, values: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
        """`values`, which are finite, in `dtype`. Raises BimedixError where `what` has values beyond its range."""
        if values.dtype == dtype:
            self.total += values.size
            return values
        with np.errstate(over="ignore"):  # checked below
            cast = values.astype(dtype)
        self.total += values.size
        if not holds(dtype, values.dtype):
            if not finite(cast):
                raise BimedixError(f"{what} has values beyond the range of {dtype}; use a wider dtype.")
            self.changed += count_changed(values, cast)
            self.dtypes = (str(values.dtype), str(dtype))
        return cast

    def warn(self, what: str, remedy: str) -> None:
        """Warns if any value changed."""
        if self.changed:
            log.warning(
                "%s: %s of %s values change, because %s becomes %s; %s.",
                what,
                f"{self.changed:,}",
                f"{self.total:,}",
                *self.dtypes,
                remedy,
            )
