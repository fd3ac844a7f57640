"""A Llama-architecture GGUF file -> a dense Hugging Face Llama folder.

Weights are dequantised piece by piece, the rows of q and k are restored to half-split order, and configuration and
tokenizer are made from the metadata.

GGUF is llama.cpp's format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); the `gguf` package
implements its block formats. The header is read through that package's memory map, the tensors with plain file reads.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bimedix_jax.checkpoint.dtypes import COMPUTE
from bimedix_jax.checkpoint.gguf_tokenizer import write_tokenizer
from bimedix_jax.checkpoint.hf_config import CONFIG_NAME, DenseConfig
from bimedix_jax.checkpoint.safetensors_io import TensorSpec, pieces
from bimedix_jax.checkpoint.stream import Piece, stream_to
from bimedix_jax.errors import BimedixError, listed

if TYPE_CHECKING:
    from gguf import ReaderTensor

TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.{layer}.attn_norm.weight": "model.layers.{layer}.input_layernorm.weight",
    "blk.{layer}.attn_q.weight": "model.layers.{layer}.self_attn.q_proj.weight",
    "blk.{layer}.attn_k.weight": "model.layers.{layer}.self_attn.k_proj.weight",
    "blk.{layer}.attn_v.weight": "model.layers.{layer}.self_attn.v_proj.weight",
    "blk.{layer}.attn_output.weight": "model.layers.{layer}.self_attn.o_proj.weight",
    "blk.{layer}.ffn_norm.weight": "model.layers.{layer}.post_attention_layernorm.weight",
    "blk.{layer}.ffn_gate.weight": "model.layers.{layer}.mlp.gate_proj.weight",
    "blk.{layer}.ffn_up.weight": "model.layers.{layer}.mlp.up_proj.weight",
    "blk.{layer}.ffn_down.weight": "model.layers.{layer}.mlp.down_proj.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ROTATED = (".attn_q.", ".attn_k.")

KNOWN_KEYS = frozenset(
    """block_count context_length embedding_length feed_forward_length attention.head_count attention.head_count_kv
    attention.key_length attention.value_length attention.layer_norm_rms_epsilon rope.freq_base rope.dimension_count
    rope.scaling.type vocab_size expert_count expert_used_count""".split()
)
"""Keys `llama.*` that are read here. Any other may change what the network computes and is an error."""


def read_metadata(path: Path) -> tuple[dict[str, Any], dict[str, "ReaderTensor"]]:
    """(metadata by key, tensors by name). Raises BimedixError for a damaged or truncated file."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except OSError as error:
        raise BimedixError(f"cannot read {path} ({error.strerror or error}); check the path.") from None
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise BimedixError(f"{path} is not a complete GGUF file ({error}); download it again.") from None
    return metadata, tensors


def read_config(metadata: Mapping[str, Any], tied: bool, path: Path) -> DenseConfig:
    """The architecture that GGUF metadata describe.

    Raises BimedixError for another architecture, experts, rope scaling, partial rotation, or an unknown `llama.*` key.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise BimedixError(f"{path} has the architecture {architecture!r}; only 'llama' can be upcycled.")
    keys = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    unknown = sorted(set(keys) - KNOWN_KEYS)
    if unknown:
        raise BimedixError(f"{path} sets llama.{listed(unknown)}, which is not implemented; use a model without it.")
    if keys.get("expert_count") or keys.get("rope.scaling.type", "none") != "none":
        raise BimedixError(
            f"{path} has experts or scaled rotary embeddings; only plain dense Llama models can be upcycled."
        )

    def whole(key: str, default: int | None = None) -> int:
        value = keys.get(key, default)
        if type(value) is not int or value < 1:
            raise BimedixError(f"{path} needs llama.{key}, one positive whole number (found {value!r}).")
        return value

    def single(key: str, default: float | None = None) -> float:
        """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
        value = keys.get(key, default)
        if not isinstance(value, float) or not 0 < value < math.inf:
            raise BimedixError(f"{path} needs llama.{key}, a positive number (found {value!r}).")
        return float(str(np.float32(value)))

    width, heads = whole("embedding_length"), whole("attention.head_count")
    head_dim = whole("attention.key_length", width // heads)
    if {whole("attention.value_length", head_dim), whole("rope.dimension_count", head_dim)} != {head_dim}:
        raise BimedixError(
            f"{path} rotates a part of each head or has values of another size, which is not implemented."
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    return DenseConfig(
        vocab_size=whole("vocab_size", len(tokens) if tokens else None),
        hidden_size=width,
        intermediate_size=whole("feed_forward_length"),
        num_layers=whole("block_count"),
        num_heads=heads,
        num_kv_heads=whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_theta=single("rope.freq_base", 1e4),
        rms_norm_eps=single("attention.layer_norm_rms_epsilon"),
        sliding_window=None,
        tie_embeddings=tied,
        max_position_embeddings=whole("context_length"),
    )


def dequantised(
    tensor: "ReaderTensor", shape: tuple[int, ...], head_dim: int | None, path: Path
) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, float32 rows) over a tensor of row-major `shape`.

    Where `head_dim` is given, rows are reordered from interleaved rotary order (pairs 2i, 2i+1) to half-split order (i,
    i + head_dim/2).
    """
    import gguf

    rows = shape[0] if len(shape) > 1 else 1
    row_bytes = int(tensor.n_bytes) // rows
    stored = TensorSpec(tensor.name, np.dtype(np.uint8), (rows, row_bytes))
    with open(path, "rb", buffering=0) as file:
        for first, count in pieces(stored, 4 << 20, head_dim or 1):
            file.seek(int(tensor.data_offset) + first * row_bytes)
            packed = np.fromfile(file, np.uint8, count * row_bytes)
            if packed.size != count * row_bytes:
                raise BimedixError(f"{path} ends inside tensor {tensor.name}; download the file again.")
            values = np.asarray(gguf.dequantize(packed.reshape(count, row_bytes), tensor.tensor_type), np.float32)
            values = values.reshape(count, -1) if len(shape) > 1 else values.reshape(-1)
            if head_dim is not None:
                pairs = values.reshape(-1, head_dim // 2, 2, values.shape[-1])
                values = pairs.swapaxes(1, 2).reshape(values.shape)
            yield first, values


def convert(path: str | Path, folder: str | Path, dtype: str = "bfloat16", overwrite: bool = False) -> Path:
    """Writes the GGUF file at `path` as a dense Hugging Face Llama folder in `dtype` (bfloat16 or float32).

    Raises BimedixError and leaves nothing behind where the file is damaged, or not a plain dense Llama model.
    """
    path = Path(path)
    metadata, tensors = read_metadata(path)
    config = read_config(metadata, "output.weight" not in tensors, path)
    names = _names(config)
    missing = [name for name in names if name not in tensors]
    extra = [name for name in tensors if name not in names]
    if missing or extra:
        raise BimedixError(
            f"{path}: {len(missing)} tensor(s) missing ({listed(missing) or 'none'}), {len(extra)} not part of a "
            f"plain Llama ({listed(extra) or 'none'}); only plain dense Llama models can be upcycled."
        )
    shapes = {name: tuple(int(n) for n in reversed(tensors[name].shape)) for name in names}
    written = COMPUTE[dtype]
    specs = [TensorSpec(target, written, shapes[name]) for name, target in names.items()]

    def converted() -> Iterator[Piece]:
        for name, target in names.items():
            head_dim = config.head_dim if any(part in name for part in ROTATED) else None
            for first, rows in dequantised(tensors[name], shapes[name], head_dim, path):
                yield target, first, rows.astype(written)

    def finish(partial: Path) -> None:
        write_tokenizer(metadata, partial, path)
        _write_config(config, metadata, dtype, partial)

    return stream_to(folder, specs, converted(), "converting", finish, overwrite)


def _names(config: DenseConfig) -> dict[str, str]:
    """GGUF name -> Hugging Face name of every tensor the model has."""
    per_layer = {name: target for name, target in TENSORS.items() if "{layer}" in name}
    names = {name: target for name, target in TENSORS.items() if "{layer}" not in name}
    if config.tie_embeddings:
        del names["output.weight"]
    for layer in range(config.num_layers):
        names |= {name.format(layer=layer): target.format(layer=layer) for name, target in per_layer.items()}
    return names


def _write_config(config: DenseConfig, metadata: Mapping[str, Any], dtype: str, folder: Path) -> None:
    fields = dataclasses.asdict(config)
    ids = {
        f"{kind}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id")
        for kind, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    written = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": fields.pop("num_layers"),
        "num_attention_heads": fields.pop("num_heads"),
        "num_key_value_heads": fields.pop("num_kv_heads"),
        "tie_word_embeddings": fields.pop("tie_embeddings"),
        **{key: value for key, value in fields.items() if key != "sliding_window"},
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": dtype,
        "torch_dtype": dtype,
        **ids,
    }
    (folder / CONFIG_NAME).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", "utf-8")
    generation = {key: value for key, value in ids.items() if value is not None}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", "utf-8")
