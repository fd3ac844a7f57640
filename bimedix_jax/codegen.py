"""The products of Mixtral-8x7B's experts, as cases for compilers of accelerators that need not be here."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from bimedix_jax.models.config import MIXTRAL_8X7B

RANK = 128
"""Of the low-rank factors: BiMediX (arXiv 2402.13253, section 4.1)."""
BLOCK = 64


@dataclass(frozen=True)
class Case:
    """One product of experts: rows [rows, k] times [E, k, n], or a gradient of it.

    `weight`: "nf4" (double-quantised, stored [n, k] as Hugging Face's checkpoints are) or "dense". `part`: "forward",
    "rows" (gradient to the rows) or "weight" (gradient to a dense weight, float32). Rows and dense weights are `dtype`.
    """

    k: int
    n: int
    weight: str
    part: str
    rows: int = 4096 * MIXTRAL_8X7B.router.top_k
    dtype: str = "bfloat16"

    @property
    def experts(self) -> int:
        return MIXTRAL_8X7B.router.num_experts

    @property
    def useful_flops(self) -> int:
        return 2 * self.rows * self.k * self.n

    def operands(self, placed: Any) -> tuple[Any, ...]:
        """Abstract arguments of `run`, with the sharding `placed`."""
        import jax
        import jax.numpy as jnp

        from bimedix_jax.kernels.nf4 import NF4Tensor
        from bimedix_jax.kernels.nf4.tables import NESTED_BLOCK_SIZE

        def array(*shape: int, dtype: Any = self.dtype) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

        experts, blocks = self.experts, self.k * self.n // BLOCK
        x, dy, group_sizes_E = array(self.rows, self.k), array(self.rows, self.n), array(experts, dtype=jnp.int32)
        if self.part == "weight":
            return x, dy, group_sizes_E
        w = array(experts, self.k, self.n)
        if self.weight == "nf4":
            packed, absmax = (
                array(experts, self.k * self.n // 2, dtype=jnp.uint8),
                array(experts, blocks, dtype=jnp.uint8),
            )
            nested_absmax = array(experts, -(-blocks // NESTED_BLOCK_SIZE), dtype=jnp.float32)
            offset = array(experts, dtype=jnp.float32)
            w = NF4Tensor(packed, absmax, nested_absmax, offset, (self.n, self.k), True, BLOCK)
        return (dy if self.part == "rows" else x), w, group_sizes_E

    def run(self, backend: ModuleType, *operands: Any) -> Any:
        """Calls the backend, a module of kernels/grouped_matmul, as grouped_matmul and its gradient do."""
        if self.part == "weight":
            return backend.weight_gradient(*operands)
        return backend.grouped_matmul(*operands, swapped=self.part == "rows")


def cases() -> dict[str, Case]:
    """Every product of a layer at 4,096 tokens: both shapes of experts, NF4 and dense, and their low-rank factors."""
    d, f = MIXTRAL_8X7B.hidden_size, MIXTRAL_8X7B.intermediate_size
    found = {}
    for name, k, n in (("w1", d, f), ("w2", f, d)):
        for part in ("forward", "rows"):
            found[f"{name} nf4 {part}"] = Case(k, n, "nf4", part)
        for part in ("forward", "rows", "weight"):
            found[f"{name} dense {part}"] = Case(k, n, "dense", part)
            found[f"{name} lora_a {part}"] = Case(k, RANK, "dense", part)
            found[f"{name} lora_b {part}"] = Case(RANK, n, "dense", part)
    return found
