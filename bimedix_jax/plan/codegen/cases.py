"""Mixtral-8x7B's products as test cases, to compile for accelerators that this machine need not have."""

from dataclasses import dataclass
from typing import Any

from bimedix_jax.costs.flops import matmul_flops
from bimedix_jax.models.config import MIXTRAL_8X7B

RANK = 128
"""Rank of the adapters: BiMediX (arXiv 2402.13253, section 4.1)."""
BLOCK = 64


@dataclass(frozen=True)
class Case:
    """One product or one of its gradients.

    With experts it is grouped_matmul: [rows, k] times [E, k, n]. Without experts it is nf4_matmul: [rows, k] times
    [k, n].

    Attributes:
      weight: "nf4" (double-quantised, stored [n, k] as in Hugging Face's checkpoints) or "dense".
      part: "forward", "rows" (gradient to the rows) or "weight" (gradient to a dense weight, float32).
      dtype: of the rows and of dense weights.
      layers: layers of the stack that NF4 weights are one of; None: they are not in a stack.
    """

    k: int
    n: int
    weight: str
    part: str
    rows: int = 4096 * MIXTRAL_8X7B.router.top_k
    dtype: str = "bfloat16"
    experts: int | None = MIXTRAL_8X7B.router.num_experts
    layers: int | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the rows and of the weights."""
        return {"x": (self.rows, self.k), "w": (*self.lead, self.k, self.n)}

    @property
    def lead(self) -> tuple[int, ...]:
        return () if self.experts is None else (self.experts,)

    @property
    def useful_flops(self) -> int:
        return matmul_flops(self.rows, self.k, self.n)

    def operands(self, sharding: Any) -> tuple[Any, ...]:
        """Abstract arguments of `call`, with this sharding."""
        import jax
        import jax.numpy as jnp

        from bimedix_jax.kernels.nf4 import NF4Tensor
        from bimedix_jax.kernels.nf4.tables import NESTED_BLOCK_SIZE
        from bimedix_jax.kernels.stacks import LayerOf

        def array(*shape: int, dtype: Any = self.dtype) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        x, dy = array(self.rows, self.k), array(self.rows, self.n)
        groups = () if self.experts is None else (array(self.experts, dtype=jnp.int32),)
        if self.part == "weight":
            return x, dy, *groups
        w = array(*self.lead, self.k, self.n)
        if self.weight == "nf4":
            blocks = self.k * self.n // BLOCK
            lead = self.lead if self.layers is None else (self.layers, *self.lead)
            packed = array(*lead, self.k * self.n // 2, dtype=jnp.uint8)
            absmax = array(*lead, blocks, dtype=jnp.uint8)
            nested_absmax = array(*lead, -(-blocks // NESTED_BLOCK_SIZE), dtype=jnp.float32)
            offset = array(*lead, dtype=jnp.float32)
            w = NF4Tensor(packed, absmax, nested_absmax, offset, (self.n, self.k), True, BLOCK)
            w = w if self.layers is None else LayerOf(w, array(dtype=jnp.int32))
        return (dy if self.part == "rows" else x), w, *groups

    def call(self, backend: str, *operands: Any) -> Any:
        """Calls a backend as the operation or its gradient does."""
        from bimedix_jax.kernels.grouped_matmul import api as grouped
        from bimedix_jax.kernels.nf4_matmul import api as single

        if self.experts is None:
            x, t = operands
            return single.load(backend).nf4_matmul(x, t.mT if self.part == "rows" else t)
        if self.part == "weight":
            return grouped.load(backend).weight_gradient(*operands)
        return grouped.load(backend).grouped_matmul(*operands, swapped=self.part == "rows")


def cases() -> dict[str, Case]:
    """Every product of a layer at 4,096 tokens, by name.

    These are the experts in NF4 and dense, their adapters, and attention's projections in NF4. w3 has the shape of w1,
    o that of q, and v that of k.
    """
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
