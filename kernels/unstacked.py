"""Arrays whose leading axis is a tuple of separate arrays, so that no part is sliced or copied before its use."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unstacked:
    """An array, or an NF4Tensor, whose leading axis is a Python tuple.

    XLA:CPU copies a slice of a stack before it is used. For one row times one of many stacked matrices, the copy takes
    several times as long as the product. Parts may be Unstacked too: layers, then experts.

    Attributes:
      parts: one value for each index of the leading axis, all of one shape.
    """

    parts: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the parts; for NF4Tensors the name of the dtype that was quantised."""
        return self.parts[0].dtype

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Any:
        return self.parts[index]


def is_unstacked(value: Any) -> bool:
    return isinstance(value, Unstacked)


def unstack(value: Any, depth: int) -> Any:
    """An array or NF4Tensor with its first `depth` axes Unstacked; unchanged at depth 0.

    On a CPU, a part that is aligned to 64 bytes, as XLA requires, is a view of the array's memory. Other parts are
    copies. The array must not be donated while the parts are in use.

    Raises:
      ValueError: more levels than axes.
    """
    if not 0 <= depth <= value.ndim:
        raise ValueError(f"unstack needs a depth between 0 and the {value.ndim} axes of the array; got {depth}.")

    def level(index: tuple[int, ...]) -> Any:
        if len(index) == depth:
            return jax.tree.map(lambda leaf: view(leaf, index), value)
        return Unstacked(tuple(level((*index, i)) for i in range(value.shape[len(index)])))

    return level(()) if depth else value


def view(leaf: Any, index: tuple[int, ...]) -> jax.Array:
    """leaf[index]; for an array on a CPU a view of its memory if the part is aligned."""
    if isinstance(leaf, Tracer) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended) or not on_one_cpu(leaf):
        return leaf[index]
    return jax.device_put(np.asarray(leaf)[index], may_alias=True)


def on_one_cpu(leaf: jax.Array | np.ndarray) -> bool:
    if isinstance(leaf, np.ndarray):
        return True
    devices = leaf.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def stack(value: Any) -> Any:
    """Inverse of `unstack`: replaces every Unstacked in a pytree by one array or NF4Tensor. This copies the parts."""

    def stacked(leaf: Any) -> Any:
        return stack_parts([stack(part) for part in leaf.parts]) if is_unstacked(leaf) else leaf

    return jax.tree.map(stacked, value, is_leaf=is_unstacked)


def stack_parts(parts: list[Any] | tuple[Any, ...]) -> Any:
    """Pytrees of one structure stacked on a new leading axis. Not stacked as bits: that would not be differentiable."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
