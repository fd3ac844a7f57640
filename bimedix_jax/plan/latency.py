"""Time to generate text at batch 1 by the planner's model of a device, without compiling: the paper's Table 6.

A step of decoding takes the longer of two times, its products at MATMUL_SHARE of the peak and its memory traffic at
MEMORY_SHARE of the bandwidth, plus the time between kernels. It reads the weights that its token uses once, and the
keys and values so far. These are the assumptions of `bimedix plan` (devices.py) for an ideal program: kernels are as
few as in LAYER_KERNELS, and no padding, scores or intermediate results are stored. So it is a floor under what
`bimedix plan` finds in the compiled program.
"""

import dataclasses

from bimedix_jax.costs import devices
from bimedix_jax.costs.devices import Device
from bimedix_jax.costs.flops import (
    EXPERTS,
    HEAD,
    attention_flops,
    linear_flops,
    linear_shapes,
    matrices_per_token,
)
from bimedix_jax.models.config import MixtralConfig, RouterConfig

LAYER_KERNELS = 12
"""Kernels of a layer in an ideal step: 2 norms, the products q-k-v, o, w1-w3 and w2, rotation and cache update, the two
products of attention and its softmax, routing, and the sum of the experts."""
REDUCTIONS = 2
"""All-reduces of a layer in tensor parallelism: after o and after w2."""
LINK_SECONDS = 8e-6
"""Shortest time of a collective over NVLink (llm-analysis, `intra_node_min_message_latency` of its A100)."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """Time of one answer.

    Attributes:
      weights: parameters of the model, `active` of them used by a token.
      bytes: of the weights on each device.
      fits: whether the weights and the cache fit the device.
      prefill_seconds, decode_seconds: of the prompt, and of all tokens of the answer.
    """

    weights: int
    active: int
    bytes: int
    fits: bool
    tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def architecture(
    *, layers: int, width: int, hidden: int, heads: int, kv_heads: int, vocabulary: int, experts: int, top_k: int
) -> MixtralConfig:
    """A gated decoder by its sizes; a dense one has one expert. Positions change no time, so theirs is Mixtral's."""
    return MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        router=RouterConfig(num_experts=experts, top_k=top_k),
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_embeddings=False,
        max_position_embeddings=32_768,
    )


def parameters(config: MixtralConfig) -> tuple[int, int]:
    """(weights of all matrices and of the embeddings, those that a token is multiplied with)."""
    shapes, used = linear_shapes(config), matrices_per_token(config)
    active = sum(used[name] * rows * columns for name, (rows, columns) in shapes.items())
    idle = config.num_layers * (config.router.num_experts - config.router.top_k)
    experts = idle * sum(shapes[name][0] * shapes[name][1] for name in EXPERTS)
    return active + experts + config.vocab_size * config.hidden_size, active


def cache_bytes(config: MixtralConfig, tokens: int) -> int:
    """Keys and values of this many tokens in 16 bits."""
    return 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * tokens


def generation(
    config: MixtralConfig, device: Device, count: int = 1, bits: float = 16, prompt: int = 512, tokens: int = 512
) -> Generation:
    """Time of one prompt and the greedy answer to it.

    Args:
      count: devices, in tensor parallelism.
      bits: of a stored weight of attention and experts; embeddings, routers and the head have 16.
    """
    weights, active = parameters(config)
    packed, plain = packed_weights(config)
    stored = packed * bits / 8 + plain * 2
    read = active_packed(config) * bits / 8 + (active - active_packed(config)) * 2
    decode = sum(
        step_seconds(config, device, count, 1, read, before) for before in range(prompt, prompt + tokens)
    )  # fmt: skip
    # a prompt of some length uses every expert, so it reads all weights once
    prefill = step_seconds(config, device, count, prompt, stored, 0)
    held = (stored + cache_bytes(config, prompt + tokens)) / count
    fits = held <= device.memory_bytes
    return Generation(weights, active, int(stored / count), fits, tokens, prefill, decode)


def packed_weights(config: MixtralConfig) -> tuple[int, int]:
    """(weights that a 4-bit base packs, all others)."""
    weights, _ = parameters(config)
    shapes, layers = linear_shapes(config), config.num_layers
    attention = sum(shapes[name][0] * shapes[name][1] for name in ("q", "k", "v", "o"))
    experts = config.router.num_experts * sum(shapes[name][0] * shapes[name][1] for name in EXPERTS)
    packed = layers * (attention + experts)
    return packed, weights - packed


def active_packed(config: MixtralConfig) -> int:
    """The packed weights that a token is multiplied with."""
    shapes, used = linear_shapes(config), matrices_per_token(config)
    return sum(used[name] * rows * n for name, (rows, n) in shapes.items() if name not in (HEAD, "router"))


def step_seconds(
    config: MixtralConfig, device: Device, count: int, new: int, weight_bytes: float, before: int
) -> float:
    """One pass over `new` tokens after `before` cached ones. Only the last token has logits."""
    per_token = linear_flops(config)
    flops = new * (sum(per_token.values()) - per_token[HEAD] + attention_flops(config, before + (new + 1) / 2))
    flops += per_token[HEAD]
    moved = weight_bytes + cache_bytes(config, before + new)
    computing = flops / count / (device.bfloat16_flops * devices.MATMUL_SHARE)
    moving = moved / count / (device.bandwidth * devices.MEMORY_SHARE)
    kernels = config.num_layers * LAYER_KERNELS + 2
    return max(computing, moving) + kernels * device.launch_seconds + reduction_seconds(config, device, count, new)


def reduction_seconds(config: MixtralConfig, device: Device, count: int, new: int) -> float:
    """All-reduces of a pass as rings, in 16 bits."""
    if count == 1:
        return 0.0
    sent = 2 * (count - 1) / count * new * config.hidden_size * 2
    one = max(sent / (device.link_bandwidth * devices.NETWORK_SHARE), LINK_SECONDS)
    return config.num_layers * REDUCTIONS * one
