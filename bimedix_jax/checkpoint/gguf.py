"""A Llama-architecture GGUF file -> a dense Hugging Face Llama folder.

Weights are dequantised piece by piece, the rows of q and k are restored to half-split order, and configuration and
tokenizer are made from the metadata.

GGUF is llama.cpp's format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); the `gguf` package
implements its block formats. The header is read through that package's memory map, the tensors with plain file reads.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bimedix_jax.checkpoint.dtypes import COMPUTE
from bimedix_jax.checkpoint.gguf_tokenizer import write_tokenizer
from bimedix_jax.checkpoint.hf_config import CONFIG_NAME, DenseConfig
from bimedix_jax.checkpoint.rope import written_rope
from bimedix_jax.checkpoint.rounding import Rounding, finite
from bimedix_jax.checkpoint.safetensors_io import TensorSpec, pieces
from bimedix_jax.checkpoint.stream import Piece, stream_to
from bimedix_jax.errors import BimedixError, listed
from bimedix_jax.files import require_content
from bimedix_jax.models.config import RopeScaling

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
UNPACKED = ("F64", "F32", "F16", "BF16")
"""Types of tensors in a GGUF file that were not quantised."""
ROTATED = (".attn_q.", ".attn_k.")

KNOWN_KEYS = frozenset(
    """block_count context_length embedding_length feed_forward_length attention.head_count attention.head_count_kv
    attention.key_length attention.value_length attention.layer_norm_rms_epsilon rope.freq_base rope.dimension_count
    rope.scaling.type rope.scaling.factor rope.scaling.attn_factor rope.scaling.original_context_length
    rope.scaling.finetuned rope.scale_linear vocab_size expert_count expert_used_count tensor_data_layout""".split()
)
"""Keys `llama.*` that are read here, or that describe only where the model comes from. Any other may change what the
network computes, and is an error unless it has a value of NEUTRAL_VALUES."""
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "expert_feed_forward_length": (0,),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "leading_dense_block_count": (0,),
    "pooling_type": (0,),
    "use_parallel_residual": (False,),
}
"""Keys that change nothing with these values; llama.cpp takes 0 for a scale that is not set."""

ROPE_FACTORS = "rope_freqs.weight"
"""The divisors of the rotary frequencies, float32 [head_dim / 2]: llama.cpp stores Llama 3.1's scaling so."""
IGNORED = re.compile(r"blk\.\d+\.attn_rot_embd(\.weight)?|blk\.\d+\.rope_freqs\.weight")
"""Buffers in old files, which llama.cpp ignores, too."""
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
RAW_PART = re.compile(
    r".+([.-]split-[a-z]|\.part-?\d*(of\d+)?|\.part[a-z])(\.gguf)?|.+\.(aria2|crdownload|incomplete|part)"
)


def is_gguf(name: str) -> bool:
    """Whether this is a GGUF file, or a piece of one, by its name."""
    return name.endswith(".gguf") or (".gguf" in name and RAW_PART.fullmatch(Path(name).name) is not None)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor and the file that contains it."""

    info: "ReaderTensor"
    path: Path


def read_model(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(metadata of the first part, tensors by name) of a GGUF model, joined where `gguf-split` has divided it.

    Raises BimedixError for a damaged or truncated file, and where parts are missing or belong to different models.
    """
    metadata, found = read_part(path)
    count = metadata.get("split.count", 1)
    if count in (0, 1):
        return metadata, found
    number = metadata.get("split.no")
    match = PART.fullmatch(path.name)
    if type(count) is not int or type(number) is not int or not 0 <= number < count:
        raise BimedixError(f"{path} has split.no {number!r} and split.count {count!r}; download it again.")
    what = f"{path} is part {number + 1} of {count} of a model"
    if match is None or (int(match[2]), int(match[3])) != (number + 1, count):
        raise BimedixError(
            f"{what}, but its name does not say so; give all parts the names that gguf-split gave them "
            f"(NAME-{number + 1:05d}-of-{count:05d}.gguf), or join them with `gguf-split --merge`."
        )
    parts = [path.with_name(f"{match[1]}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    absent = [part.name for part in parts if not part.is_file()]
    if absent:
        raise BimedixError(
            f"{what}, and {listed(absent)} is missing from its folder; download all parts into one folder."
        )
    first: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for i, part in enumerate(parts):
        metadata, found = read_part(part)
        if (metadata.get("split.no"), metadata.get("split.count")) != (i, count) or tensors.keys() & found.keys():
            raise BimedixError(f"{part} is not part {i + 1} of the model of {parts[0]}; download all parts again.")
        first = first or metadata
        tensors |= found
    if first.get("split.tensors.count", len(tensors)) != len(tensors):
        raise BimedixError(
            f"{parts[0]} and its other parts have {len(tensors)} tensors instead of {first['split.tensors.count']}; "
            "download all parts again."
        )
    return first, tensors


def read_part(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(metadata by key, tensors by name) of one file. Raises BimedixError for a damaged or truncated file."""
    import gguf

    try:
        require_content(path)
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: Tensor(tensor, path) for tensor in reader.tensors}
    except OSError as error:
        raise BimedixError(f"cannot read {path} ({error.strerror or error}); check the path.") from None
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        if RAW_PART.fullmatch(path.name):
            raise BimedixError(
                f"{path} is only a piece of a file, judging by its name; join the pieces with `cat`, or finish the "
                "download, and "
                "name the whole file."
            ) from None
        raise BimedixError(f"{path} is not a complete GGUF file ({error}); download it again.") from None
    return metadata, tensors


def read_scaling(
    keys: Mapping[str, Any], factors: np.ndarray | None, head_dim: int, theta: float, path: Path
) -> RopeScaling | None:
    """The scaling of the rotary frequencies; None where it changes nothing.

    Args:
      factors: the tensor ROPE_FACTORS. Llama 3.1's formula is recognised by its values, with the constants of Llama
        3.1 to 3.3: only the factor differs among these models.
    Raises BimedixError for any other scaling.
    """
    kind = keys.get("rope.scaling.type", "linear")  # llama.cpp's default
    factor = keys.get("rope.scaling.factor") or keys.get("rope.scale_linear") or (1 if kind == "linear" else None)
    plain = kind == "none" or (kind in ("linear", "yarn", "longrope") and factor == 1)
    if not plain or keys.get("rope.scaling.attn_factor", 1) != 1:
        raise BimedixError(
            f"{path} has scaled rotary embeddings ({kind!r}, factor {factor!r}), which are implemented for Llama 3.1 "
            "only; use another model."
        )
    if factors is None or (factors == 1).all():
        return None
    found = RopeScaling(
        factor=float(factors.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    half = head_dim // 2
    frequencies = theta ** (-np.arange(half) / half)
    turns = found.original_max_position_embeddings * frequencies / (2 * np.pi)
    kept = np.clip((turns - found.low_freq_factor) / (found.high_freq_factor - found.low_freq_factor), 0, 1)
    expected = 1 / ((1 - kept) / found.factor + kept)
    if factors.shape != (half,) or not np.allclose(factors, expected, rtol=1e-4):
        raise BimedixError(
            f"{path} divides its rotary frequencies by {ROPE_FACTORS}, whose values are not those of Llama 3.1's "
            "scaling; convert from the model's safetensors folder instead."
        )
    return found


def read_config(
    metadata: Mapping[str, Any], tied: bool, path: Path, rope_factors: np.ndarray | None = None
) -> DenseConfig:
    """The architecture that GGUF metadata describe.

    Raises BimedixError for another architecture, experts, other rope scaling than Llama 3.1's, partial rotation, or an
    unknown `llama.*` key.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise BimedixError(f"{path} has the architecture {architecture!r}; only 'llama' can be upcycled.")
    keys = {key.removeprefix("llama."): alike(value) for key, value in metadata.items() if key.startswith("llama.")}
    keys = {key: value for key, value in keys.items() if value not in NEUTRAL_VALUES.get(key, ())}
    unknown = sorted(set(keys) - KNOWN_KEYS)
    if unknown:
        raise BimedixError(f"{path} sets llama.{listed(unknown)}, which is not implemented; use a model without it.")
    if keys.get("expert_count"):
        raise BimedixError(f"{path} has experts; only plain dense Llama models can be upcycled.")

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
            f"{path} rotates only a part of each head, or its values have another size, which is not implemented."
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    theta = single("rope.freq_base", 1e4)
    return DenseConfig(
        vocab_size=whole("vocab_size", len(tokens) if tokens else None),
        hidden_size=width,
        intermediate_size=whole("feed_forward_length"),
        num_layers=whole("block_count"),
        num_heads=heads,
        num_kv_heads=whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=read_scaling(keys, rope_factors, head_dim, theta, path),
        rms_norm_eps=single("attention.layer_norm_rms_epsilon"),
        sliding_window=None,
        tie_embeddings=tied,
        max_position_embeddings=whole("context_length"),
    )


def alike(value: Any) -> Any:
    """The entry of a list whose entries are all equal, as for layers that are alike; any other value unchanged."""
    return value[0] if isinstance(value, list) and value and all(entry == value[0] for entry in value) else value


def dequantised(tensor: Tensor, shape: tuple[int, ...], head_dim: int | None) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, float32 rows) over a tensor of row-major `shape`.

    Where `head_dim` is given, rows are reordered from interleaved rotary order (pairs 2i, 2i+1) to half-split order (i,
    i + head_dim/2).
    """
    import gguf

    info, path = tensor.info, tensor.path
    rows = shape[0] if len(shape) > 1 else 1
    row_bytes = int(info.n_bytes) // rows
    stored = TensorSpec(info.name, np.dtype(np.uint8), (rows, row_bytes))
    with open(path, "rb", buffering=0) as file:
        for first, count in pieces(stored, 4 << 20, head_dim or 1):
            file.seek(int(info.data_offset) + first * row_bytes)
            packed = np.fromfile(file, np.uint8, count * row_bytes)
            if packed.size != count * row_bytes:
                raise BimedixError(f"{path} ends inside tensor {info.name}; download the file again.")
            values = np.asarray(gguf.dequantize(packed.reshape(count, row_bytes), info.tensor_type), np.float32)
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
    metadata, tensors = read_model(path)
    tensors = {name: tensor for name, tensor in tensors.items() if not IGNORED.fullmatch(name)}
    factors = tensors.pop(ROPE_FACTORS, None)
    rope_factors = None if factors is None else np.array(factors.info.data, np.float32).reshape(-1)
    config = read_config(metadata, "output.weight" not in tensors, path, rope_factors)
    names = _names(config)
    missing = [name for name in names if name not in tensors]
    extra = [name for name in tensors if name not in names]
    if missing or extra:
        raise BimedixError(
            f"{path}: {len(missing)} tensor(s) missing ({listed(missing) or 'none'}), {len(extra)} not part of a "
            f"plain Llama ({listed(extra) or 'none'}); only plain dense Llama models can be upcycled."
        )
    shapes = {name: tuple(int(n) for n in reversed(tensors[name].info.shape)) for name in names}
    written = COMPUTE[dtype]
    specs = [TensorSpec(target, written, shapes[name]) for name, target in names.items()]
    rounding, unpacked = Rounding(), all(tensor.info.tensor_type.name in UNPACKED for tensor in tensors.values())

    def converted() -> Iterator[Piece]:
        for name, target in names.items():
            head_dim = config.head_dim if any(part in name for part in ROTATED) else None
            for first, rows in dequantised(tensors[name], shapes[name], head_dim):
                if not finite(rows):
                    raise BimedixError(f"{path} contains NaN or infinity in {name}; use another copy of the weights.")
                yield target, first, rounding.cast(rows, written, name)

    def finish(partial: Path) -> None:
        write_tokenizer(metadata, partial, path)
        _write_config(config, metadata, dtype, partial)

    done = stream_to(folder, specs, converted(), "converting", finish, overwrite)
    if unpacked:  # the others were rounded to few bits before
        rounding.warn(str(path), "a safetensors folder of the model keeps its precision")
    return done


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
    del fields["rope_scaling"]
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
        **written_rope(config.rope_theta, config.rope_scaling),
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
