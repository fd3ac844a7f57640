"""config.json of Hugging Face Mixtral and Llama folders: read loudly, written for transformers 4 and 5.

Every key is used here, or known not to change the mathematics, or must have the one value that does not; any other key
is an error, because a model that silently ignores its configuration is a different model.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from bimedix_jax.checkpoint.bnb_config import KEY, is_packed
from bimedix_jax.errors import BimedixError, listed
from bimedix_jax.models.config import MixtralConfig, RouterConfig

CONFIG_NAME = "config.json"

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "max_position_embeddings",
}
"""config.json key -> field; positive whole numbers that must be there (max_position_embeddings too: it bounds use)."""
ROUTER_SIZES = ("num_local_experts", "num_experts_per_tok")
OPTIONAL = (
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "sliding_window",
    "tie_word_embeddings",
)

NEUTRAL = frozenset(
    """_attn_implementation _name_or_path architectures bos_token_id dtype eos_token_id id2label initializer_range
    is_llama_config label2id model_type output_attentions output_hidden_states output_router_logits pad_token_id
    problem_type return_dict router_aux_loss_coef torch_dtype transformers.js_config transformers_version
    unsloth_fixed unsloth_version use_cache use_return_dict""".split()
)
"""Keys that do not change what the network computes. Written back on export as they were read."""

REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "mlp_bias": (False,),
    "router_jitter_noise": (0.0,),
    "pretraining_tp": (1, None),
    "rope_interleaved": (False,),
    "chunk_size_feed_forward": (0,),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False,),
    "auto_map": (None,),
}
"""Keys that change the mathematics unless they have one of these values, the only ones implemented."""

DENSE_TYPES = ("llama", "mistral")
DEFAULT_ROPE_THETA = {"mixtral": 1e6, "llama": 1e4, "mistral": 1e4}
DEFAULT_NORM_EPS = {"mixtral": 1e-5, "llama": 1e-6, "mistral": 1e-6}
"""What transformers' configuration classes assume where config.json is silent."""


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """A Llama-architecture model: the fields of MixtralConfig without a router."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    sliding_window: int | None
    tie_embeddings: bool
    max_position_embeddings: int

    def with_router(self, router: RouterConfig) -> MixtralConfig:
        return MixtralConfig(router=router, **dataclasses.asdict(self))


def read_json(folder: Path) -> dict[str, Any]:
    """config.json as a dictionary."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise BimedixError(f"{folder} has no {CONFIG_NAME}; name a folder in Hugging Face layout.")
    try:
        raw = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise BimedixError(f"{path} is not valid JSON ({error}); download it again.") from None
    if not isinstance(raw, dict):
        raise BimedixError(f"{path} is not a JSON object; download it again.")
    return raw


def read_config(folder: str | Path, ignore_config_keys: Collection[str] = ()) -> MixtralConfig:
    """The architecture of a Hugging Face Mixtral folder.

    Args:
        ignore_config_keys: keys of config.json to overlook although they are unknown or ask for something
          unimplemented.
    Raises:
        BimedixError: not a Mixtral, a missing size, a key that is unknown or has a value that is not implemented.
    """
    raw = read_json(Path(folder))
    kind = raw.get("model_type")
    if kind in DENSE_TYPES:
        raise BimedixError(
            f"{folder} is a dense {kind} model; make it a mixture first: `bimedix upcycle --base {folder}`."
        )
    if kind != "mixtral":
        raise BimedixError(f"{folder} has model_type {kind!r}; only 'mixtral' can be loaded.")
    raw = _without(raw, ignore_config_keys, Path(folder))
    _check(raw, Path(folder), (*SIZES, *ROUTER_SIZES, *OPTIONAL))
    experts, top_k = (_whole(raw, key, Path(folder)) for key in ROUTER_SIZES)
    try:
        return MixtralConfig(router=RouterConfig(num_experts=experts, top_k=top_k), **_fields(raw, Path(folder)))
    except ValueError as error:
        raise BimedixError(f"{Path(folder) / CONFIG_NAME}: {error}") from None


def read_dense_config(folder: str | Path, ignore_config_keys: Collection[str] = ()) -> DenseConfig:
    """The architecture of a Hugging Face Llama or Mistral folder; errors as `read_config`."""
    raw = read_json(Path(folder))
    kind = raw.get("model_type")
    if kind not in DENSE_TYPES:
        raise BimedixError(
            f"{folder} has model_type {kind!r}; upcycling starts from a dense {' or '.join(DENSE_TYPES)} model."
        )
    raw = _without(raw, ignore_config_keys, Path(folder))
    _check(raw, Path(folder), (*SIZES, *OPTIONAL))
    return DenseConfig(**_fields(raw, Path(folder)))


def write_config(
    folder: Path,
    config: MixtralConfig,
    dtype: str,
    neutral: Mapping[str, Any],
    quantisation: Mapping[str, Any] | None = None,
) -> None:
    """config.json of a Mixtral, with the spellings of transformers 4 (rope_theta, torch_dtype) and 5 side by side.

    `neutral` is the source's raw config.json: its NEUTRAL keys are kept. `quantisation` is that of packed weights.
    """
    kept = {key: value for key, value in neutral.items() if key in NEUTRAL}
    written = {
        **kept,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **{key: getattr(config, field) for key, field in SIZES.items()},
        "head_dim": config.head_dim,
        "num_local_experts": config.router.num_experts,
        "num_experts_per_tok": config.router.top_k,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "router_jitter_noise": 0.0,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": dtype,
        "torch_dtype": dtype,
        **({KEY: dict(quantisation)} if quantisation else {}),
    }
    (folder / CONFIG_NAME).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", "utf-8")


def _without(raw: dict[str, Any], ignored: Collection[str], folder: Path) -> dict[str, Any]:
    absent = [key for key in ignored if key not in raw]
    if absent:
        raise BimedixError(f"{folder / CONFIG_NAME} has no key {listed(absent)}; remove --ignore-config-key for it.")
    used = [key for key in ignored if key in (*SIZES, *ROUTER_SIZES)]
    if used:
        raise BimedixError(f"{listed(used)} in {folder / CONFIG_NAME} is an architecture size and cannot be ignored.")
    return {key: value for key, value in raw.items() if key not in ignored}


def _check(raw: Mapping[str, Any], folder: Path, used: Collection[str]) -> None:
    known = {*used, *NEUTRAL, *REQUIRED_VALUES, KEY}
    unknown = sorted(key for key in raw if key not in known)
    if unknown:
        raise BimedixError(
            f"{folder / CONFIG_NAME} has {len(unknown)} unknown key(s) that may change the mathematics: "
            f"{listed(unknown)}; if you know that one does not, pass --ignore-config-key {unknown[0]}."
        )
    if is_packed(raw, folder) and raw["model_type"] in DENSE_TYPES:
        raise BimedixError(
            f"{folder} is already quantised ({KEY}), and a mixture is made of unquantised weights; name those."
        )
    for key, allowed in REQUIRED_VALUES.items():
        if key in raw and not any(raw[key] == value for value in allowed):
            shown = repr(raw[key])
            raise BimedixError(
                f"{folder / CONFIG_NAME} sets {key} to {shown if len(shown) < 80 else shown[:77] + '...'}, which is "
                f"not implemented (only {' or '.join(map(repr, allowed))}); to go on as if it were unset, pass "
                f"--ignore-config-key {key}."
            )


def _whole(raw: Mapping[str, Any], key: str, folder: Path) -> int:
    value = raw.get(key)
    if type(value) is not int or value < 1:
        raise BimedixError(f"{folder / CONFIG_NAME} needs {key}, a positive whole number (found {value!r}).")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float, folder: Path) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise BimedixError(f"{folder / CONFIG_NAME} needs {key}, a positive number (found {value!r}).")
    return float(value)


def _rope_theta(raw: Mapping[str, Any], folder: Path) -> float:
    """The base frequency from either spelling; anything but plain rotary embeddings is an error."""
    spellings = {}
    for key in ("rope_parameters", "rope_scaling"):
        block = raw.get(key)
        if block is None:
            continue
        kind = block.get("rope_type", block.get("type", "default")) if isinstance(block, dict) else block
        extra = sorted(set(block) - {"rope_type", "type", "rope_theta"}) if isinstance(block, dict) else []
        if kind != "default" or extra:
            raise BimedixError(
                f"{folder / CONFIG_NAME} scales its rotary embeddings ({key}: {kind!r} {', '.join(extra)}), which is "
                "not implemented; use a checkpoint without rope scaling."
            )
        if "rope_theta" in block:
            spellings[key] = _number(block, "rope_theta", 0.0, folder)
    default = DEFAULT_ROPE_THETA[raw["model_type"]]
    if raw.get("rope_theta") is not None or not spellings:
        spellings["rope_theta"] = _number(raw, "rope_theta", default, folder)
    if len(set(spellings.values())) > 1:
        raise BimedixError(
            f"{folder / CONFIG_NAME} gives two different values of rope_theta ({spellings}); correct it."
        )
    return next(iter(spellings.values()))


def _fields(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The fields MixtralConfig and DenseConfig share."""
    heads_only = {"num_key_value_heads": raw.get("num_attention_heads")} if raw["model_type"] == "llama" else {}
    raw = {**raw, **{key: value for key, value in heads_only.items() if raw.get(key) is None}}
    fields: dict[str, Any] = {field: _whole(raw, key, folder) for key, field in SIZES.items()}
    tied = raw.get("tie_word_embeddings", False)
    if type(tied) is not bool:
        raise BimedixError(f"{folder / CONFIG_NAME} needs tie_word_embeddings to be true or false (found {tied!r}).")
    head_dim = None if raw.get("head_dim") is None else _whole(raw, "head_dim", folder)
    if head_dim is None and fields["hidden_size"] % fields["num_heads"]:
        raise BimedixError(f"{folder / CONFIG_NAME} needs head_dim: hidden_size is no multiple of num_attention_heads.")
    return {
        **fields,
        "head_dim": head_dim or fields["hidden_size"] // fields["num_heads"],
        "rope_theta": _rope_theta(raw, folder),
        "rms_norm_eps": _number(raw, "rms_norm_eps", DEFAULT_NORM_EPS[raw["model_type"]], folder),
        "sliding_window": None if raw.get("sliding_window") is None else _whole(raw, "sliding_window", folder),
        "tie_embeddings": tied,
    }
