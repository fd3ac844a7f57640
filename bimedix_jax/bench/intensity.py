"""FLOPs and memory traffic that each operation of a layer of Mixtral-8x7B needs at least, to hold against hardware.

Traffic counts every operand and every result once, as if caches held the rest; weights of experts that no row chose are
not read. Activations are bfloat16, weights NF4 under double quantisation, adapters of rank RANK bfloat16 as they are
multiplied, their gradients float32.
"""

import dataclasses

from bimedix_jax.kernels.nf4.tables import NESTED_BLOCK_SIZE
from bimedix_jax.models.config import MIXTRAL_8X7B
from bimedix_jax.plan.codegen.cases import BLOCK, RANK

ITEM = 2
"""Bytes of a bfloat16."""
NF4 = (4 + 8 / BLOCK + 32 / BLOCK / NESTED_BLOCK_SIZE) / 8
"""Bytes of a weight: its code, its share of an 8-bit scale, and of that scale's scale."""

D, F = MIXTRAL_8X7B.hidden_size, MIXTRAL_8X7B.intermediate_size
EXPERTS, TOP_K = MIXTRAL_8X7B.router.num_experts, MIXTRAL_8X7B.router.top_k
HEADS, KV_HEADS, HEAD = MIXTRAL_8X7B.num_heads, MIXTRAL_8X7B.num_kv_heads, MIXTRAL_8X7B.head_dim


@dataclasses.dataclass(frozen=True)
class Phase:
    """`sequences` times `tokens` new tokens that see `keys` keys each, of which causality leaves half where they are
    the same tokens; with the gradients of training or without."""

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
        """Experts that some token is expected to choose, if all are equally likely."""
        return EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** self.rows)


PHASES = (
    Phase("train, 4,096 tokens", 1, 4096, 4096, train=True),
    Phase("prefill, 2,048 tokens", 1, 2048, 2048),
    Phase("decode, 32 sequences", 32, 1, 2048),
    Phase("decode, 1 sequence", 1, 1, 2048),
)


@dataclasses.dataclass(frozen=True)
class Work:
    """What an operation needs in a phase."""

    operation: str
    phase: str
    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes

    def seconds(self, peak: float, bandwidth: float) -> float:
        """At least, on hardware with this many FLOP/s and bytes/s."""
        return max(self.flops / peak, self.bytes / bandwidth)


def experts(phase: Phase, bytes_per_weight: float) -> tuple[float, float]:
    """w1, w3 and w2; in training also the gradients to the rows, which read the weights again."""
    passes = 2 if phase.train else 1
    weights = phase.active * 3 * D * F * bytes_per_weight
    return passes * 2.0 * phase.pairs * 3 * D * F, passes * (weights + ITEM * phase.pairs * 3 * (D + F))


def adapters(phase: Phase) -> tuple[float, float]:
    """The deltas of w1, w3 and w2; in training also the gradients to rows and factors."""
    passes = 3 if phase.train else 1
    factors = phase.active * 3 * RANK * (D + F)
    moved = ITEM * (factors + phase.pairs * 3 * (D + F + 2 * RANK))
    gradients = 4 * EXPERTS * 3 * RANK * (D + F) if phase.train else 0
    return passes * 2.0 * phase.pairs * 3 * RANK * (D + F), passes * moved + gradients


def projections(phase: Phase) -> tuple[float, float]:
    """q, k, v and o."""
    passes, kv = 2 if phase.train else 1, KV_HEADS * HEAD
    columns = HEADS * HEAD + 2 * kv
    weights = D * columns + HEADS * HEAD * D
    rows = phase.rows * (3 * D + columns + HEADS * HEAD + D)
    return passes * 2.0 * phase.rows * weights, passes * (NF4 * weights + ITEM * rows)


def attention(phase: Phase, stored_scores: bool) -> tuple[float, float]:
    """Scores, softmax and mixing; `stored_scores` as float32 and, after the softmax, bfloat16, each written and read.

    In training seven products: two forward, the scores again, and four gradients.
    """
    seen = phase.sequences * phase.tokens * phase.keys / (2 if phase.tokens == phase.keys else 1)
    flops = (7 if phase.train else 2) * 2.0 * seen * HEADS * HEAD
    queries, keys = 2 * phase.rows * HEADS * HEAD, 2 * phase.sequences * phase.keys * KV_HEADS * HEAD
    moved = (3 if phase.train else 1) * ITEM * (queries + keys)
    scores = (4 + ITEM) * 2 * seen * HEADS
    return flops, moved + ((3 if phase.train else 1) * scores if stored_scores else 0)


def permutation(phase: Phase) -> tuple[float, float]:
    """Dispatch and combine, which are each other's gradients."""
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
