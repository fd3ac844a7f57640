"""The type of a field of a pytree dataclass."""

from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    Leaf = jax.Array
else:
    # tree transformations put shapes, shardings and cotangents where the arrays stand; run-time checks must pass them
    Leaf = Any
