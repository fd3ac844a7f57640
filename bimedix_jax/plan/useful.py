"""FLOPs that a training step, a prefill and a decoding step cannot do without."""

import math

from bimedix_jax.adapters import linears
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.models.linear import TrainedParam
from bimedix_jax.models.mixtral import Mixtral

HEAD = "lm_head"
EXPERTS = ("w1", "w2", "w3")


def product_flops(config: MixtralConfig) -> dict[str, float]:
    """FLOPs for each token of one pass through the matrices that it uses, by name."""
    width, hidden, layers = config.hidden_size, config.intermediate_size, config.num_layers
    heads, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    each = 2.0 * width * layers
    found = {"q": each * heads, "k": each * keys, "v": each * keys, "o": each * heads}
    found |= dict.fromkeys(EXPERTS, each * hidden * config.router.top_k)
    return found | {"router": each * config.router.num_experts, HEAD: 2.0 * width * config.vocab_size}


def adapter_flops(model: Mixtral) -> float:
    """FLOPs for each token of one pass through the adapters, at the average number of adapted experts."""
    total, router = 0.0, model.config.router
    for path, layer in linears(model).items():
        if layer.lora is None:
            continue
        a, b = layer.lora.a.get_value().shape, layer.lora.b.get_value().shape
        used = math.prod(a[:-2]) * (router.top_k / router.num_experts if path[-1] in EXPERTS else 1)
        total += 2.0 * used * a[-1] * (a[-2] + b[-1])
    return total


def attention_flops(config: MixtralConfig, keys: float) -> float:
    """FLOPs for each token of scores and mixed values, where it sees so many keys on average."""
    seen = keys if config.sliding_window is None else min(keys, float(config.sliding_window))
    return 4.0 * seen * config.num_heads * config.head_dim * config.num_layers


def training_flops(model: Mixtral, tokens: int, length: int) -> dict[str, float]:
    """Useful FLOPs of an optimiser step over `tokens` tokens in rows of `length`, each one document.

    Frozen matrices: forward, and the gradient to their inputs. Adapters, and every matrix of a model without any: the
    gradient to the weights as well. Attention: two products forward and four backward, over the keys that causality
    leaves.
    """
    products = product_flops(model.config)
    in_full = [name for name, layer in ((path[-1], layer) for path, layer in linears(model).items())
               if model.lora is None or isinstance(layer.w, TrainedParam)]  # fmt: skip
    per_token = sum(flops * (3 if name in in_full else 2) for name, flops in products.items())
    if model.lora is None and model.lm_head is None:
        per_token += products[HEAD]
    return {
        "matrices": tokens * per_token,
        "adapters": tokens * 3 * adapter_flops(model),
        "attention": tokens * 3 * attention_flops(model.config, (length + 1) / 2),
    }


def inference_flops(model: Mixtral, rows: int, length: int, before: int = 0) -> dict[str, float]:
    """Useful FLOPs of running `length` tokens of each row behind `before` cached ones; logits for the last token."""
    tokens, products = rows * length, product_flops(model.config)
    matrices = sum(flops for name, flops in products.items() if name != HEAD)
    return {
        "matrices": tokens * matrices + rows * products[HEAD],
        "adapters": tokens * adapter_flops(model),
        "attention": tokens * attention_flops(model.config, before + (length + 1) / 2),
    }
