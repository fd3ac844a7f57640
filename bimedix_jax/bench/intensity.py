"""The least FLOPs and memory traffic of each operation in one layer of Mixtral-8x7B, for a roofline.

Traffic counts every operand and every result once. Weights of experts that no row chose are not read. Activations are
bfloat16 and weights NF4 with double quantisation. Adapters have rank RANK; they are multiplied in bfloat16, and their
gradients are float32. `costs/flops.py` counts the FLOPs.
"""

import dataclasses

from bimedix_jax.costs import flops
from bimedix_jax.kernels.nf4.tables import NESTED_BLOCK_SIZE
from bimedix_jax.models.config import MIXTRAL_8X7B
from bimedix_jax.plan.codegen.cases import BLOCK, RANK

ITEM = 2
"""Bytes of a bfloat16."""
NF4 = (4 + 8 / BLOCK + 32 / BLOCK / NESTED_BLOCK_SIZE) / 8
"""Bytes of a weight: its code, its share of an 8-bit scale, and its share of the scale of scales."""

D, F = MIXTRAL_8X7B.hidden_size, MIXTRAL_8X7B.intermediate_size
EXPERTS, TOP_K = MIXTRAL_8X7B.router.num_experts, MIXTRAL_8X7B.router.top_k
HEADS, KV_HEADS, HEAD = MIXTRAL_8X7B.num_heads, MIXTRAL_8X7B.num_kv_heads, MIXTRAL_8X7B.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A use of the layer: `tokens` new tokens in each of `sequences`, each token with `keys` keys.

    Where the keys are those of the new tokens, causality halves them. `train` adds the gradients.
    """

    name: str
    sequences: int
    tokens: int
    keys: int
    train: bool = False

    @property
    def rows(self) -> int:
        return self.sequences * self.tokens

    @property
    def pairs(self) -> int:
        """Token-expert pairs."""
        return self.rows * TOP_K

    @property
    def active(self) -> float:
        """Expected number of experts that some token chooses, under a uniform router."""
        return EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** self.rows)


PHASES = (
    Phase(name="train, 4,096 tokens", sequences=1, tokens=4096, keys=4096, train=True),
    Phase(name="prefill, 2,048 tokens", sequences=1, tokens=2048, keys=2048),
    Phase(name="decode, 32 sequences", sequences=32, tokens=1, keys=2048),
    Phase(name="decode, 1 sequence", sequences=1, tokens=1, keys=2048),
)


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs and bytes of an operation in a phase."""

    operation: str
    phase: str
    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes

    def seconds(self, peak: float, bandwidth: float) -> float:
        """A lower bound of the time, on hardware with this many FLOP/s and bytes/s."""
        return max(self.flops / peak, self.bytes / bandwidth)


def experts(phase: Phase, bytes_per_weight: float) -> tuple[float, float]:
    """w1, w3 and w2. In training also the gradients to their inputs, which read the weights again."""
    passes, weights = flops.FROZEN if phase.train else flops.FORWARD, flops.weights(MIXTRAL_8X7B, flops.EXPERTS)
    moved = phase.active * weights * bytes_per_weight + ITEM * phase.pairs * 3 * (D + F)
    return passes * float(flops.matmul_flops(phase.pairs, 1, weights)), passes * moved


def adapters(phase: Phase) -> tuple[float, float]:
    """The adapters of w1, w3 and w2. In training also the gradients to their inputs and factors."""
    passes = flops.TRAINED if phase.train else flops.FORWARD
    shapes = flops.linear_shapes(MIXTRAL_8X7B)
    work = sum(flops.low_rank_flops(phase.pairs, *shapes[name], RANK) for name in flops.EXPERTS)
    factors = phase.active * 3 * RANK * (D + F)
    moved = ITEM * (factors + phase.pairs * 3 * (D + F + 2 * RANK))
    gradients = 4 * EXPERTS * 3 * RANK * (D + F) if phase.train else 0
    return passes * float(work), passes * moved + gradients


def projections(phase: Phase) -> tuple[float, float]:
    """q, k, v and o. In training also the gradients to their inputs."""
    passes, weights = flops.FROZEN if phase.train else flops.FORWARD, flops.weights(MIXTRAL_8X7B, flops.ATTENTION)
    shapes = flops.linear_shapes(MIXTRAL_8X7B)
    rows = phase.rows * sum(sum(shapes[name]) for name in flops.ATTENTION)
    return passes * float(flops.matmul_flops(phase.rows, 1, weights)), passes * (NF4 * weights + ITEM * rows)


def attention(phase: Phase, stored_scores: bool) -> tuple[float, float]:
    """Scores, softmax and the mean of the values.

    Training has seven products: two forward, the scores again, and four gradients. With `stored_scores` the scores are
    written and read in float32, and once more in bfloat16 after the softmax.
    """
    seen = phase.sequences * phase.tokens * phase.keys / (2 if phase.tokens == phase.keys else 1)
    work = (7 if phase.train else 2) * flops.attention_product_flops(MIXTRAL_8X7B, seen)
    queries, keys = 2 * phase.rows * HEADS * HEAD, 2 * phase.sequences * phase.keys * KV_HEADS * HEAD
    moved = (3 if phase.train else 1) * ITEM * (queries + keys)
    scores = (4 + ITEM) * 2 * seen * HEADS
    return work, moved + ((3 if phase.train else 1) * scores if stored_scores else 0)


def permutation(phase: Phase) -> tuple[float, float]:
    """Dispatch and combine. In training also their gradients, which are each other."""
    passes = 2 if phase.train else 1
    return passes * 2.0 * phase.pairs * D, passes * ITEM * 2 * D * (phase.rows + phase.pairs)


def works() -> list[Work]:
    """Every operation in every phase."""
    found = []
    for phase in PHASES:
        needs = {
            "experts, NF4 (grouped_matmul)": experts(phase, NF4),
            "experts, bfloat16 (grouped_matmul)": experts(phase, ITEM),
            "experts' adapters (grouped_low_rank)": adapters(phase),
            "q, k, v, o, NF4 (nf4_matmul)": projections(phase),
            "attention": attention(phase, stored_scores=False),
            "attention, scores in memory": attention(phase, stored_scores=True),
            "dispatch and combine (permute)": permutation(phase),
        }
        found += [Work(operation, phase.name, *need) for operation, need in needs.items()]
    return found
