"""Configurations of models, routers and adapters. No JAX here: the command line reads these before importing JAX."""

import dataclasses
import re
from typing import Literal

LORA_TARGETS = ("q", "k", "v", "o", "w1", "w2", "w3", "router", "lm_head")
"""Linear layers that can carry an adapter, by their attribute names in `models/`."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
    """How the base of an adapter is stored."""

    base: str
    """Of attention and experts: a dtype, nf4, or MIXED."""
    dtype: str
    """Of the computation."""


MIXED = "nf4 in part"
"""`Storage.base` where only some of the matrices that base nf4 quantises are in 4 bits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens choose experts."""

    num_experts: int
    """Experts in each layer."""
    top_k: int
    """Experts that each token uses."""
    variant: str = "topk"
    """Name in the table of models/routers.py."""
    scale: float = 1.0
    """Multiplies the weights of the variants softmax_topk and sigmoid_bias."""
    bias_rate: float = 1e-3
    """Step of the balancing bias of the variant sigmoid_bias after each optimiser step."""

    def __post_init__(self) -> None:
        require(self.num_experts >= 1, f"num_experts must be at least 1, got {self.num_experts}.")
        require(
            1 <= self.top_k <= self.num_experts,
            f"top_k must be between 1 and num_experts={self.num_experts}, got {self.top_k}.",
        )
        require(0 < self.scale < float("inf"), f"scale must be positive and finite, got {self.scale}.")
        require(0 <= self.bias_rate < float("inf"), f"bias_rate must be finite and not negative, got {self.bias_rate}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's scaling of the rotary frequencies for longer contexts (arXiv 2407.21783; `rope_type` "llama3").

    A frequency whose wavelength exceeds original_max_position_embeddings / low_freq_factor is divided by `factor`, one
    below original_max_position_embeddings / high_freq_factor is kept, and between the two the result is interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    """Context of the pretraining before the extension (8,192 in Llama 3.1)."""

    def __post_init__(self) -> None:
        require(1 <= self.factor < float("inf"), f"factor of rope_scaling must be at least 1, got {self.factor}.")
        require(
            0 < self.low_freq_factor < self.high_freq_factor < float("inf"),
            "rope_scaling needs 0 < low_freq_factor < high_freq_factor, got "
            f"{self.low_freq_factor} and {self.high_freq_factor}.",
        )
        require(
            self.original_max_position_embeddings >= 1,
            "original_max_position_embeddings of rope_scaling must be at least 1, got "
            f"{self.original_max_position_embeddings}.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtralConfig:
    """Architecture of a Mixtral; sizes have no defaults since a wrong one is a different model."""

    vocab_size: int
    hidden_size: int
    """Model width D."""
    intermediate_size: int
    """Width F of one expert (14,336 in Mixtral-8x7B)."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """Key and value heads; each serves num_heads / num_kv_heads query heads."""
    head_dim: int
    router: RouterConfig
    rope_theta: float
    """Base of the rotary frequencies."""
    rms_norm_eps: float
    sliding_window: int | None
    """Keys that a query sees, itself included; None for all earlier ones."""
    tie_embeddings: bool
    """Whether the output head is the embedding table."""
    max_position_embeddings: int
    """Longest context that the weights were trained for; longer inputs are refused."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary frequencies; None for none."""

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        )
        for name in (*sizes, "max_position_embeddings"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}.")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}.",
        )
        require(self.head_dim % 2 == 0, f"head_dim must be even for rotary embeddings, got {self.head_dim}.")
        require(
            self.sliding_window is None or self.sliding_window >= 1,
            f"sliding_window must be positive or None, got {self.sliding_window}.",
        )
        require(self.rope_theta > 0, f"rope_theta must be positive, got {self.rope_theta}.")
        require(self.rms_norm_eps > 0, f"rms_norm_eps must be positive, got {self.rms_norm_eps}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraOverride:
    """Another rank or alpha for the adapters of one kind of linear layer."""

    target: str
    """One of LORA_TARGETS."""
    rank: int | None = None
    """None keeps the rank of the others."""
    alpha: float | None = None
    """None keeps the alpha of the others."""

    def __post_init__(self) -> None:
        require(self.target in LORA_TARGETS, f"An override is for one of {', '.join(LORA_TARGETS)}, not {self.target}.")
        require(self.rank is not None or self.alpha is not None, f"The override of {self.target} changes nothing.")
        require(self.rank is None or self.rank >= 1, f"rank of {self.target} must be at least 1, got {self.rank}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: W x + scale * B A x, B zero at the start (LoRA, arXiv 2106.09685)."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("q", "k", "v", "w1", "w2", "w3", "router")
    r"""Linear layers to adapt: q k v o w1 w2 w3 router lm_head, or regular expressions matched in full against names
    such as layers.3.attention.q, layers.3.moe.router, layers.3.moe.experts.5.w1 and lm_head; `layers\.[0-3]\..*\.w2`
    adapts w2 of every expert of the first four layers. Experts get one adapter each."""
    rank_stabilised: bool = False
    """scale = alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732) instead of alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that training sets to zero."""
    overrides: tuple[LoraOverride, ...] = ()
    """Targets with a rank or alpha of their own."""
    train_router: bool = False
    """Train the routers' own weights, in float32, instead of adapters on them. A router that is neither this nor a
    target is frozen."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"rank must be at least 1, got {self.rank}.")
        require(bool(self.targets) or self.train_router, f"targets is empty; choose among {', '.join(LORA_TARGETS)}.")
        require(len(set(self.targets)) == len(self.targets), f"targets has duplicates: {', '.join(self.targets)}.")
        unknown = [target for target in self.targets if target not in LORA_TARGETS and re.fullmatch(r"\w*", target)]
        require(
            not unknown,
            f"Unknown target {', '.join(unknown)}; choose among {', '.join(LORA_TARGETS)}, or give a pattern such as "
            r"layers\.0\..*",
        )
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(f"Target {target} is not a regular expression ({error}); correct it.") from error
        require(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}.")
        require(
            not (self.train_router and "router" in self.targets),
            "train_router trains the routers' own weights, so router cannot be a target as well; drop one of the two.",
        )
        names = [override.target for override in self.overrides]
        require(len(set(names)) == len(names), f"overrides names a target twice: {', '.join(names)}.")

    def rank_of(self, target: str) -> int:
        """Rank of the adapters of one kind of layer, by its name in LORA_TARGETS."""
        return next((o.rank for o in self.overrides if o.target == target and o.rank is not None), self.rank)

    def alpha_of(self, target: str) -> float:
        """Alpha of the adapters of one kind of layer, by its name in LORA_TARGETS."""
        return next((o.alpha for o in self.overrides if o.target == target and o.alpha is not None), self.alpha)

    def scale_of(self, target: str | None = None) -> float:
        """What multiplies B A x in one kind of layer, by its name in LORA_TARGETS; None: where nothing overrides it."""
        rank, alpha = (self.rank, self.alpha) if target is None else (self.rank_of(target), self.alpha_of(target))
        return alpha / (rank**0.5 if self.rank_stabilised else rank)

    def selects(self, name: str) -> tuple[str, ...]:
        """The targets that mean the matrix of this full name, such as layers.3.moe.experts.5.w1."""
        kind = name.rpartition(".")[2]
        return tuple(target for target in self.targets if target == kind or re.fullmatch(target, name))


QUANTISED = ("q", "k", "v", "o", "w1", "w2", "w3")
"""Linear layers that a 4-bit base packs; the router, norms, embeddings and the output head stay in high precision."""

MIXTRAL_8X7B = MixtralConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    router=RouterConfig(num_experts=8, top_k=2),
    rope_theta=1e6,
    rms_norm_eps=1e-5,
    sliding_window=None,
    tie_embeddings=False,
    max_position_embeddings=32_768,
)
"""mistralai/Mixtral-8x7B-v0.1 and -Instruct-v0.1 (arXiv 2401.04088, table 1)."""

ARCHITECTURES = {"mixtral-8x7b": MIXTRAL_8X7B}
"""Named sizes, for planning and counting without weights."""

Remat = Literal["none", "experts", "layer"]
"""What the backward pass recomputes: nothing; each layer but the products of its experts, which are most of its work;
or each layer from its input."""
