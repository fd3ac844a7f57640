"""The type of a field of a pytree dataclass."""

from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    Leaf = jax.Array
else:
    # tree transformations replace arrays by shapes, shardings or cotangents, which run-time type checks must accept
    Leaf = Any
