"""Parts of stacked arrays: slices, and references to a layer that need no slice."""

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bimedix_jax.kernels.nf4.rows import RowMajor
from bimedix_jax.kernels.nf4.tensor import NF4Tensor
from bimedix_jax.kernels.pytree import Leaf


def pin(operands: Any, e: jax.Array) -> tuple[Any, jax.Array]:
    """The operands and `e` behind a barrier, so that XLA assumes that the operands change in a loop over `e`.

    XLA:CPU slices 16-bit floats in float32. For loop-invariant weights it hoists the conversion out of the loop, which
    makes a float32 copy of all experts. Behind the barrier it converts the slice only.
    """
    return lax.optimization_barrier((operands, e))


def index(x: jax.Array, e: Leaf) -> jax.Array:
    return lax.dynamic_index_in_dim(x, e, keepdims=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerOf:
    """Weights of one layer, without slicing them from the stack of all layers. Slicing would copy the whole layer.

    A loop over experts reads each expert from a dense stack. A kernel takes the stack and the index of the layer.

    Attributes:
      stack: array [L, ...], or NF4Tensor or RowMajor with layers on its first batch axis.
      layer: int32, index of the layer.
    """

    stack: Any
    layer: Leaf

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    @property
    def ndim(self) -> int:
        return self.stack.ndim - 1

    @property
    def is_packed(self) -> bool:
        return isinstance(self.stack, NF4Tensor | RowMajor)

    @property
    def mT(self) -> "LayerOf":
        """The same layer, with the last two axes of packed weights swapped."""
        return dataclasses.replace(self, stack=self.stack.mT)

    def value(self) -> Any:
        """The layer's array or NF4Tensor, sliced from the stack."""
        if self.is_packed:
            return as_tensor(jax.tree.map(lambda leaf: index(leaf, self.layer), self.stack))
        return index(*pin(self.stack, self.layer))

    def expert(self, e: jax.Array) -> jax.Array:
        """[in, out] of dense experts; the stack must have been through `pin`."""
        return index(self.stack.reshape(-1, *self.stack.shape[2:]), self.layer * self.stack.shape[1] + e)


def as_tensor(w: Any) -> Any:
    """A RowMajor as NF4Tensor; other weights unchanged."""
    return w.tensor() if isinstance(w, RowMajor) else w


def as_layer(w: Any) -> Any:
    """A RowMajor as the only layer of a stack, so that a kernel takes it unchanged; other weights unchanged."""
    if not isinstance(w, RowMajor):
        return w
    return LayerOf(jax.tree.map(lambda leaf: leaf[None], w), jnp.zeros((), jnp.int32))


def is_packed_layer(w: Any) -> bool:
    return isinstance(w, LayerOf) and w.is_packed


def with_packed_sliced(weights: tuple[Any, ...]) -> tuple[Any, ...]:
    """`weights` with the packed layers among them sliced from their stacks, as NF4Tensors."""
    return tuple(w.value() if is_packed_layer(w) else as_tensor(w) for w in weights)


def operand(module: ModuleType, w: Any) -> Any:
    """Weights as a backend takes them: a layer is sliced from its stack unless `module.takes_stack(stack)` is true."""
    if not isinstance(w, LayerOf) or (hasattr(module, "takes_stack") and module.takes_stack(w.stack)):
        return w
    return w.value()
