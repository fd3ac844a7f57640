"""Writes a tiny random dense model, for runs without a download."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from bimedix_jax import files
from bimedix_jax.data.tokenizer import byte_tokenizer


def tiny_dense(folder: Path) -> None:
    """Writes a random Llama with 0.1 M parameters and a byte-level tokenizer."""
    # widths are multiples of the block size, so that the fused kernel takes them in NF4
    width, hidden, layers, heads, kv_heads, head = 64, 128, 2, 4, 2, 16
    with files.new_folder(folder, overwrite=True) as partial:
        vocab = byte_tokenizer(partial).vocab_size
        rng = np.random.default_rng(0)
        shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
        for i in range(layers):
            at = f"model.layers.{i}."
            shapes |= {f"{at}self_attn.{n}_proj.weight": (heads * head, width) for n in "q"}
            shapes |= {f"{at}self_attn.{n}_proj.weight": (kv_heads * head, width) for n in "kv"}
            shapes |= {f"{at}self_attn.o_proj.weight": (width, heads * head)}
            shapes |= {f"{at}mlp.{n}_proj.weight": (hidden, width) for n in ("gate", "up")}
            shapes |= {f"{at}mlp.down_proj.weight": (width, hidden)}
            shapes |= {f"{at}{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
        tensors = {
            name: np.ones(shape, np.float32) if len(shape) == 1 else rng.normal(0, 0.1, shape).astype(np.float32)
            for name, shape in shapes.items()
        }
        save_file(tensors, partial / "model.safetensors", {"format": "pt"})
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": vocab,
            "hidden_size": width,
            "intermediate_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
        }
        files.write_text(partial / "config.json", json.dumps(config, indent=2) + "\n")
