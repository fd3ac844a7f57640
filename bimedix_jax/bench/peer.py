"""The peer, which is the other library: transformers + peft on the same model, with their fastest implementation.

Only this module may import torch, and only inside functions. If JAX runs on a GPU, so does the peer.
"""

import gc
import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from bimedix_jax.bench.model import ALPHA, AUX_COEF, CLIP_NORM, LEARNING_RATE, RANK, Side, threads, tokens
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.config import MixtralConfig

DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "nf4")}
"""What is tried on each device. nf4 quantises the linear layers with bitsandbytes; experts stay in bfloat16, as always
in transformers 5, where they are no linear layers."""
EXPERTS = ("eager", "grouped_mm")
"""Experts implementations of transformers."""
DECODING_EXPERTS = (*EXPERTS, "batched_mm")
"""batched_mm copies the experts of each token, so it fits in memory for a few tokens only."""
LINEAR_TARGETS = ["q_proj", "k_proj", "v_proj"]
FUSED_TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
"""Where transformers 5 keeps our targets: all experts of a layer share two parameters, up and down."""


def require_peer() -> str:
    """Versions of the peer, as text.

    Raises:
      BimedixError: torch, transformers or peft is not installed, or on a GPU bitsandbytes.
    """
    try:
        names = ("transformers", "peft", "torch", *(["bitsandbytes"] if jax.default_backend() == "gpu" else []))
        return ", ".join(f"{name} {importlib.import_module(name).__version__}" for name in names)
    except ImportError as error:
        raise BimedixError(
            f"--against transformers needs torch, transformers, peft and on a GPU bitsandbytes ({error}): "
            'pip install "bimedix_jax[bench]".'
        ) from error


def place() -> str:
    """The name of the torch device to run on.

    Raises:
      BimedixError: JAX has a GPU that torch cannot use.
    """
    import torch

    if jax.default_backend() != "gpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise BimedixError("JAX runs on a GPU, but this torch has no CUDA support; install torch with CUDA.")
    return "cuda"


def input_ids(config: MixtralConfig, batch: int, length: int) -> Any:
    import torch

    return torch.tensor(tokens(config, batch, length)).long().to(place())


def build(config: MixtralConfig, dtype: str, experts: str) -> Any:
    """A random transformers Mixtral in eval mode."""
    import torch
    import transformers

    torch.set_num_threads(threads())
    torch.manual_seed(0)
    settings = transformers.MixtralConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_local_experts=config.router.num_experts,
        num_experts_per_tok=config.router.top_k,
        max_position_embeddings=config.max_position_embeddings,
        router_aux_loss_coef=AUX_COEF,
        pad_token_id=None,
    )
    with torch.device(place()):  # random weights are drawn much faster on a GPU
        model: Any = transformers.MixtralForCausalLM(settings)
    model = model.to(getattr(torch, "bfloat16" if dtype == "nf4" else dtype)).eval()
    model.set_experts_implementation(experts)
    return pack_linear_layers(model) if dtype == "nf4" else model


def pack_linear_layers(model: Any) -> Any:
    """Quantises every linear layer except the head to double-quantised NF4, as transformers does with bitsandbytes."""
    import torch

    nn: Any = importlib.import_module("bitsandbytes").nn
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is torch.nn.Linear and name != "lm_head":
                packed = nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                packed.weight = nn.Params4bit(
                    linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
                )
                setattr(parent, name, packed.to(linear.weight.device))
    return model


def training(config: MixtralConfig, dtype: str, experts: str, batch: int, length: int) -> Side:
    """The same optimiser step. peft keeps its adapters in float32."""
    import peft
    import torch

    adapters = peft.LoraConfig(
        r=RANK, lora_alpha=int(ALPHA), target_modules=LINEAR_TARGETS, target_parameters=FUSED_TARGETS
    )
    model = peft.get_peft_model(build(config, dtype, experts), adapters)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    ids = input_ids(config, batch, length)

    def train_step() -> float:
        adamw.zero_grad()
        loss = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        adamw.step()
        return loss.item()

    return Side(train_step, dtype, f"{experts} experts, peft adapters of rank {RANK}")


def prefill(config: MixtralConfig, dtype: str, experts: str, batch: int, length: int) -> Side:
    """A forward pass with the logits of all positions."""
    import torch

    model, ids = build(config, dtype, experts), input_ids(config, batch, length)

    @torch.inference_mode()
    def all_logits() -> Any:
        logits = model(input_ids=ids, use_cache=False).logits
        if logits.is_cuda:
            torch.cuda.synchronize()
        return logits

    return Side(all_logits, dtype, f"{experts} experts")


def decoding(config: MixtralConfig, dtype: str, experts: str, batch: int, prompt: int, steps: int) -> Side:
    """Decodes `steps` greedy tokens for each row with a key-value cache, continuing where the last call ended.

    This is a bare loop, since `generate` of transformers adds work to each token.
    """
    import torch
    import transformers

    model = build(config, dtype, "eager")
    cache = transformers.DynamicCache(config=model.config)
    ids = input_ids(config, batch, prompt)

    @torch.inference_mode()
    def step(ids: Any) -> Any:
        return model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)

    last = step(ids)  # the prompt with eager experts: batched_mm would copy the experts of all its tokens
    model.set_experts_implementation(experts)

    def decode_steps() -> np.ndarray:
        nonlocal last
        chosen = []
        for _ in range(steps):
            last = step(last)
            chosen.append(last[:, 0].tolist())
        return np.array(chosen)

    return Side(decode_steps, dtype, f"{experts} experts, DynamicCache")


def release() -> None:
    """Frees the GPU memory that torch caches, so that JAX can allocate it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fastest(
    make: Callable[[str, str], Side], implementations: Sequence[str], warm_up: int = 2, repetitions: int = 3
) -> tuple[Side, list[dict[str, Any]]]:
    """(the fastest side over data types and implementations, seconds of each), from short trials.

    Args:
      make: builds the side of a dtype and an experts implementation.
    """
    trials, best = [], None
    for dtype in DTYPES[place()]:
        for experts in implementations:
            side, taken = make(dtype, experts), []
            for _ in range(warm_up + repetitions):
                began = time.perf_counter()
                side.run()
                taken.append(time.perf_counter() - began)
            seconds = float(np.median(taken[warm_up:]))
            trials.append({"dtype": dtype, "experts": experts, "seconds": seconds})
            if best is None or seconds < best[0]:
                best = seconds, side
            del side
            gc.collect()  # torch's modules are in reference cycles, and each trial takes gigabytes
            release()
    assert best is not None
    return best[1], trials
