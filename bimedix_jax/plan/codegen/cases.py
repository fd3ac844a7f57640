"""Mixtral-8x7B's products, as cases for compilers of accelerators that need not be here."""

from dataclasses import dataclass
from typing import Any

from bimedix_jax.models.config import MIXTRAL_8X7B

RANK = 128
"""Of the low-rank factors: BiMediX (arXiv 2402.13253, section 4.1)."""
BLOCK = 64


@dataclass(frozen=True)
class Case:
    """One product: rows [rows, k] times [E, k, n] by groups, or a gradient of it; without experts, times one [k, n].

    `weight`: "nf4" (double-quantised, stored [n, k] as Hugging Face's checkpoints are) or "dense". `part`: "forward",
    "rows" (gradient to the rows) or "weight" (gradient to a dense weight, float32). Rows and dense weights are `dtype`.
    A product without experts is that of nf4_matmul.
    """

    k: int
    n: int
    weight: str
    part: str
    rows: int = 4096 * MIXTRAL_8X7B.router.top_k
    dtype: str = "bfloat16"
    experts: int | None = MIXTRAL_8X7B.router.num_experts

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the rows and of the weights."""
        return {"x": (self.rows, self.k), "w": (*self.lead, self.k, self.n)}

    @property
    def lead(self) -> tuple[int, ...]:
        return () if self.experts is None else (self.experts,)

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

        x, dy = array(self.rows, self.k), array(self.rows, self.n)
        groups = () if self.experts is None else (array(self.experts, dtype=jnp.int32),)
        if self.part == "weight":
            return x, dy, *groups
        w = array(*self.lead, self.k, self.n)
        if self.weight == "nf4":
            blocks = self.k * self.n // BLOCK
            packed = array(*self.lead, self.k * self.n // 2, dtype=jnp.uint8)
            absmax = array(*self.lead, blocks, dtype=jnp.uint8)
            nested_absmax = array(*self.lead, -(-blocks // NESTED_BLOCK_SIZE), dtype=jnp.float32)
            offset = array(*self.lead, dtype=jnp.float32)
            w = NF4Tensor(packed, absmax, nested_absmax, offset, (self.n, self.k), True, BLOCK)
        return (dy if self.part == "rows" else x), w, *groups

    def run(self, backend: str, *operands: Any) -> Any:
        """Calls the backend as the operation and its gradients do."""
        from bimedix_jax.kernels.grouped_matmul import api as grouped
        from bimedix_jax.kernels.nf4_matmul import api as single

        if self.experts is None:
            x, t = operands
            return single.load(backend).nf4_matmul(x, t.mT if self.part == "rows" else t)
        if self.part == "weight":
            return grouped.load(backend).weight_gradient(*operands)
        return grouped.load(backend).grouped_matmul(*operands, swapped=self.part == "rows")


def cases() -> dict[str, Case]:
    """Every product of a layer at 4,096 tokens: both shapes of experts, NF4 and dense, their low-rank factors, and the
    attention's projections in NF4 (o has the shape of q, v that of k)."""
    d, f = MIXTRAL_8X7B.hidden_size, MIXTRAL_8X7B.intermediate_size
    found = {}
    for name, k, n in (("w1", d, f), ("w2", f, d)):
        for part in ("forward", "rows"):
            found[f"{name} nf4 {part}"] = Case(k, n, "nf4", part)
        for part in ("forward", "rows", "weight"):
            found[f"{name} dense {part}"] = Case(k, n, "dense", part)
            found[f"{name} lora_a {part}"] = Case(k, RANK, "dense", part)
            found[f"{name} lora_b {part}"] = Case(RANK, n, "dense", part)
    for name, heads in (("q", MIXTRAL_8X7B.num_heads), ("k", MIXTRAL_8X7B.num_kv_heads)):
        for part in ("forward", "rows"):
            found[f"{name} nf4 {part}"] = Case(d, heads * MIXTRAL_8X7B.head_dim, "nf4", part, 4096, experts=None)
    return found
