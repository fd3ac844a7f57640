"""Dense matrices that are stored by output: [out, in] in memory, [in, out] for the products."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByOutput:
    """A dense matrix [in, out] that is stored as [out, in].

    With one row, XLA:CPU reads a bfloat16 matrix of this form at the speed of memory, and one of the other form at a
    sixth of it. Both forms are equally fast with many rows.
    """

    array: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape[::-1]

    @property
    def ndim(self) -> int:
        return self.array.ndim

    @property
    def dtype(self) -> Any:
        return self.array.dtype
