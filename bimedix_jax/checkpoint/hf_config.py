"""config.json of Hugging Face Mixtral and Llama folders, read strictly and written for transformers 4 and 5.

A key is used here, or does not change what the network computes, or must have the one value that is implemented. Any
other key is an error: a model that silently ignores a part of its configuration is a different model.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, Field, StrictBool, ValidationInfo

from bimedix_jax import files
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
"""config.json key -> field of MixtralConfig."""
ROUTER_SIZES = ("num_local_experts", "num_experts_per_tok")

NEUTRAL = frozenset(
    """_attn_implementation _name_or_path architectures bos_token_id dtype eos_token_id id2label initializer_range
    is_llama_config label2id model_type output_attentions output_hidden_states output_router_logits pad_token_id
    problem_type return_dict router_aux_loss_coef torch_dtype transformers.js_config transformers_version
    unsloth_fixed unsloth_version use_cache use_return_dict""".split()
)
"""Keys that do not change what the network computes. An export writes them back unchanged."""

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
"""Keys that change what the network computes, and the only values that are implemented."""

DENSE_TYPES = ("llama", "mistral")
DEFAULT_ROPE_THETA = {"mixtral": 1e6, "llama": 1e4, "mistral": 1e4}
DEFAULT_NORM_EPS = {"mixtral": 1e-5, "llama": 1e-6, "mistral": 1e-6}
"""What transformers' configuration classes assume where a key is missing from config.json."""


def unscaled_theta(block: Any, info: ValidationInfo) -> float | None:
    """rope_theta of a rope_parameters or rope_scaling block; raises ValueError for scaled rotary embeddings."""
    if block is None or block == "default":
        return None
    fields = block if isinstance(block, dict) else {"type": block}
    kind = fields.get("rope_type", fields.get("type", "default"))
    extra = sorted(set(fields) - {"rope_type", "type", "rope_theta"})
    if kind != "default" or extra:
        what = " ".join([repr(kind), *extra])
        raise ValueError(
            f"the model scales its rotary embeddings ({info.field_name}: {what}), which is not implemented"
        )
    if "rope_theta" not in fields:
        return None
    theta = fields["rope_theta"]
    if type(theta) not in (int, float) or not 0 < theta < float("inf"):
        raise ValueError(f"{info.field_name} needs rope_theta, a positive number (found {theta!r})")
    return float(theta)


Size = Annotated[int, Field(strict=True, ge=1)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
RopeTheta = Annotated[Any, AfterValidator(unscaled_theta)]


class DenseJson(BaseModel, extra="forbid"):
    """The keys of config.json that decide what a Llama or Mistral model computes; `rope_*` become their rope_theta."""

    model_type: str
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    max_position_embeddings: Size
    head_dim: Size | None = None
    rms_norm_eps: Positive | None = None
    rope_theta: Positive | None = None
    rope_parameters: RopeTheta = None
    rope_scaling: RopeTheta = None
    sliding_window: Size | None = None
    tie_word_embeddings: StrictBool = False
    quantization_config: Any = None


class MixtralJson(DenseJson):
    """The same of a Mixtral."""

    num_local_experts: Size
    num_experts_per_tok: Size


@dataclasses.dataclass(frozen=True, kw_only=True)
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


def raw_config(folder: Path) -> dict[str, Any]:
    """config.json as a dictionary, unchecked."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise BimedixError(f"{folder} has no {CONFIG_NAME}; name a folder in Hugging Face layout.")
    return files.read_json(path, dict[str, Any], "download it again")


def read_config(folder: str | Path, ignore_config_keys: Collection[str] = ()) -> MixtralConfig:
    """The architecture of a Hugging Face Mixtral folder.

    Args:
        ignore_config_keys: keys of config.json to ignore although they are unknown or not implemented.
    Raises:
        BimedixError: not a Mixtral, a missing size, a key that is unknown or has a value that is not implemented.
    """
    folder = Path(folder)
    raw = raw_config(folder)
    kind = raw.get("model_type")
    if kind in DENSE_TYPES:
        raise BimedixError(
            f"{folder} is a dense {kind} model; make it a mixture first: `bimedix upcycle --base {folder}`."
        )
    if kind != "mixtral":
        raise BimedixError(f"{folder} has model_type {kind!r}; only 'mixtral' can be loaded.")
    found = check(raw, MixtralJson, folder, ignore_config_keys)
    try:
        router = RouterConfig(num_experts=found.num_local_experts, top_k=found.num_experts_per_tok)
        return MixtralConfig(router=router, **fields_of(found, folder))
    except ValueError as error:
        raise BimedixError(f"{folder / CONFIG_NAME}: {error}") from None


def read_dense_config(folder: str | Path, ignore_config_keys: Collection[str] = ()) -> DenseConfig:
    """The architecture of a Hugging Face Llama or Mistral folder; errors as `read_config`."""
    folder = Path(folder)
    raw = raw_config(folder)
    kind = raw.get("model_type")
    if kind not in DENSE_TYPES:
        raise BimedixError(
            f"{folder} has model_type {kind!r}; upcycling starts from a dense {' or '.join(DENSE_TYPES)} model."
        )
    if kind == "llama" and raw.get("num_key_value_heads") is None:
        raw["num_key_value_heads"] = raw.get("num_attention_heads")
    return DenseConfig(**fields_of(check(raw, DenseJson, folder, ignore_config_keys), folder))


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


Checked = TypeVar("Checked", bound=DenseJson)


def check(raw: dict[str, Any], schema: type[Checked], folder: Path, ignored: Collection[str]) -> Checked:
    """The keys that decide what the model computes, after every key of config.json was checked.

    Raises:
      BimedixError: a key is unknown, is missing, or has a value that is not implemented, unless it is `ignored`.
    """
    source = folder / CONFIG_NAME
    absent = [key for key in ignored if key not in raw]
    if absent:
        raise BimedixError(f"{source} has no key {listed(absent)}; remove --ignore-config-key for it.")
    sizes = [key for key in ignored if key in (*SIZES, *ROUTER_SIZES)]
    if sizes:
        raise BimedixError(f"{listed(sizes)} in {source} is an architecture size and cannot be ignored.")
    raw = {key: value for key, value in raw.items() if key not in ignored}
    elsewhere = (NEUTRAL | REQUIRED_VALUES.keys()) - {"model_type"}
    used = {key: value for key, value in raw.items() if key not in elsewhere}
    found = files.validate(
        used,
        schema,
        str(source),
        "correct it, or use another checkpoint",
        "such keys may change the mathematics; if you know that {key} does not, pass --ignore-config-key {key}",
    )
    if is_packed(raw, folder) and found.model_type in DENSE_TYPES:
        raise BimedixError(
            f"{folder} is already quantised ({KEY}); a mixture is made from unquantised weights, so name those."
        )
    for key, allowed in REQUIRED_VALUES.items():
        if key in raw and not any(raw[key] == value for value in allowed):
            shown = repr(raw[key])
            raise BimedixError(
                f"{source} sets {key} to {shown if len(shown) < 80 else shown[:77] + '...'}, which is not implemented "
                f"(only {' or '.join(map(repr, allowed))}); to ignore this key, pass --ignore-config-key {key}."
            )
    return found


def rope_theta(found: DenseJson, folder: Path) -> float:
    """The base frequency of the rotary embeddings; raises BimedixError where two keys give two values."""
    given = {"rope_parameters": found.rope_parameters, "rope_scaling": found.rope_scaling}
    given = {key: theta for key, theta in {**given, "rope_theta": found.rope_theta}.items() if theta is not None}
    if len(set(given.values())) > 1:
        raise BimedixError(f"{folder / CONFIG_NAME} gives two different values of rope_theta ({given}); correct it.")
    return next(iter(given.values()), DEFAULT_ROPE_THETA[found.model_type])


def fields_of(found: DenseJson, folder: Path) -> dict[str, Any]:
    """The fields MixtralConfig and DenseConfig share."""
    fields: dict[str, Any] = {field: getattr(found, key) for key, field in SIZES.items()}
    if found.head_dim is None and found.hidden_size % found.num_attention_heads:
        raise BimedixError(
            f"{folder / CONFIG_NAME} needs head_dim, because hidden_size is not a multiple of num_attention_heads."
        )
    return {
        **fields,
        "head_dim": found.head_dim or found.hidden_size // found.num_attention_heads,
        "rope_theta": rope_theta(found, folder),
        "rms_norm_eps": found.rms_norm_eps or DEFAULT_NORM_EPS[found.model_type],
        "sliding_window": found.sliding_window,
        "tie_embeddings": found.tie_word_embeddings,
    }
