"""config.json of Hugging Face Mixtral and Llama folders, read strictly and written for transformers 4 and 5.

Each known key is used here, does not change what the network computes, or must have the one value that is implemented.
Any other key is an error, because ignoring it could silently give a different model.
"""

import dataclasses
import json
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, Field, StrictBool

from bimedix_jax import files
from bimedix_jax.checkpoint.bnb_config import KEY, is_packed
from bimedix_jax.checkpoint.hf_tensors import BIAS_KEYS, zero_biases
from bimedix_jax.checkpoint.rope import Rope, read_rope, written_rope
from bimedix_jax.errors import BimedixError, listed
from bimedix_jax.models.config import MixtralConfig, RopeScaling, RouterConfig

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
) | frozenset(
    """bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing length_penalty max_length min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_scores prefix remove_invalid_values repetition_penalty
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tokenizer_class top_k top_p torchscript typical_p use_bfloat16""".split()
)
"""Keys that do not change what the network computes; the second list, generation and training settings, is in the files
of transformers before 4.40. An export writes them back unchanged."""

REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "mlp_bias": (False,),
    "router_jitter_noise": (0.0,),
    "pretraining_tp": (1,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1.0,),
    "rotary_pct": (1.0,),
    "norm_topk_prob": (True,),
    "chunk_size_feed_forward": (0,),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "pruned_heads": ({},),
    "tie_encoder_decoder": (False,),
    "auto_map": ({},),
}
"""Keys that change what the network computes, and the only values that are implemented; null means the first of them,
or that the key is absent."""

DENSE_TYPES = ("llama", "mistral")
DEFAULT_ROPE_THETA = {"mixtral": 1e6, "llama": 1e4, "mistral": 1e4}
DEFAULT_NORM_EPS = {"mixtral": 1e-5, "llama": 1e-6, "mistral": 1e-6}
"""What transformers' configuration classes assume where a key is missing from config.json."""


Size = Annotated[int, Field(strict=True, ge=1)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
RopeBlock = Annotated[Any, AfterValidator(read_rope)]


class DenseJson(BaseModel, extra="forbid"):
    """The keys of config.json that decide what a Llama or Mistral model computes; `rope_` blocks become a `Rope`."""

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
    rope_parameters: RopeBlock = None
    rope_scaling: RopeBlock = None
    sliding_window: Size | None = None
    layer_types: list[str] | None = None
    use_sliding_window: StrictBool | None = None
    tie_word_embeddings: StrictBool | None = None
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
    rope_scaling: RopeScaling | None = None

    def with_router(self, router: RouterConfig) -> MixtralConfig:
        return MixtralConfig(router=router, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})


def raw_config(folder: Path) -> dict[str, Any]:
    """config.json as a dictionary, unchecked."""
    path = folder / CONFIG_NAME
    if not path.is_file() and (folder / "adapter_config.json").exists():
        raise BimedixError(
            f"{folder} is an adapter without a base model; name the base, and pass this folder as adapter."
        )
    gguf = sorted(folder.glob("*.gguf"))
    if gguf and not path.is_file():
        raise BimedixError(f"{folder} has no {CONFIG_NAME}; to upcycle its GGUF model, name the file: {gguf[0]}.")
    if not path.is_file():
        raise BimedixError(f"{folder} has no {CONFIG_NAME}; {files.where_instead(folder, CONFIG_NAME)}.")
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
            f"{folder} is a dense {kind} model; make it a mixture first: `bimedix upcycle --model {folder}`."
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
    if kind == "llama":
        raw.setdefault("num_key_value_heads", None)
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
        **written_rope(config.rope_theta, config.rope_scaling),
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
    if raw.get("num_key_value_heads", 0) is None:  # one for each query head, in every class of transformers
        raw["num_key_value_heads"] = raw.get("num_attention_heads")
    if any(raw.get(key) is True for key in BIAS_KEYS):
        raw |= dict.fromkeys(zero_biases(folder), False)
    require_known(raw, schema, source, ignored)
    used = {key: value for key, value in raw.items() if key in schema.model_fields}
    found = files.validate(used, schema, str(source), "correct it, or use another checkpoint")
    check_windows(found, source)
    if is_packed(raw, folder) and found.model_type in DENSE_TYPES:
        raise BimedixError(
            f"{folder} is already quantised ({KEY}); a mixture is made from unquantised weights, so name those."
        )
    return found


def require_known(raw: Mapping[str, Any], schema: type[DenseJson], source: Path, ignored: Collection[str]) -> None:
    """Raises BimedixError for keys that are unknown or have values that are not implemented; the message names one
    option that ignores all of them, and those already `ignored`."""
    given = {key: value for key, value in raw.items() if value is not None}
    unknown = sorted(given.keys() - schema.model_fields.keys() - NEUTRAL - REQUIRED_VALUES.keys())
    wrong = [key for key, allowed in REQUIRED_VALUES.items() if key in given and given[key] not in allowed]
    problems = [f"has {len(unknown)} unknown key(s): {listed(unknown)}"] if unknown else []
    for key in wrong:
        only = " or ".join(map(repr, REQUIRED_VALUES[key] or (None,)))
        shown = repr(given[key])
        shown = shown if len(shown) < 80 else f"{shown[:77]}..."
        problems.append(f"sets {key} to {shown}, which is not implemented (only {only} is)")
    if problems:
        keys = " ".join(shlex.quote(key) for key in (*ignored, *unknown, *wrong))
        raise BimedixError(
            f"{source} {', and '.join(problems)}; such keys may change the mathematics. If you know that they do not, "
            f"pass --ignore-config-key {keys}."
        )


def check_windows(found: DenseJson, source: Path) -> None:
    """Raises BimedixError where layer_types or use_sliding_window contradict sliding_window, or layers differ."""
    expected = "full_attention" if found.sliding_window is None else "sliding_attention"
    other = sorted(set(found.layer_types or ()) - {expected})
    if other:
        raise BimedixError(
            f"{source} has layers of the type {listed(other)}, but with sliding_window {found.sliding_window} only "
            f"{expected} is implemented; use another checkpoint."
        )
    if found.use_sliding_window is not None and found.use_sliding_window != (found.sliding_window is not None):
        raise BimedixError(
            f"{source} has use_sliding_window {found.use_sliding_window}, which contradicts sliding_window "
            f"{found.sliding_window}; correct one of the two."
        )


def rope_of(found: DenseJson, folder: Path) -> Rope:
    """The rotary embeddings; raises BimedixError where two keys of config.json contradict each other."""
    blocks = [block for block in (found.rope_parameters, found.rope_scaling) if block is not None]
    thetas = {theta for theta in (found.rope_theta, *(block.theta for block in blocks)) if theta is not None}
    if len(thetas) > 1:
        values = " and ".join(map(str, sorted(thetas)))
        raise BimedixError(f"{folder / CONFIG_NAME} gives two different values of rope_theta ({values}); correct it.")
    scalings = {block.scaling for block in blocks}
    if len(scalings) > 1:
        raise BimedixError(
            f"{folder / CONFIG_NAME} has a rope_scaling and a rope_parameters that contradict each other; correct it."
        )
    return Rope(next(iter(thetas), DEFAULT_ROPE_THETA[found.model_type]), next(iter(scalings), None))


def fields_of(found: DenseJson, folder: Path) -> dict[str, Any]:
    """The fields MixtralConfig and DenseConfig share."""
    fields: dict[str, Any] = {field: getattr(found, key) for key, field in SIZES.items()}
    if found.head_dim is None and found.hidden_size % found.num_attention_heads:
        raise BimedixError(
            f"{folder / CONFIG_NAME} needs head_dim, because hidden_size is not a multiple of num_attention_heads."
        )
    rope = rope_of(found, folder)
    return {
        **fields,
        "head_dim": found.head_dim or found.hidden_size // found.num_attention_heads,
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        "rms_norm_eps": found.rms_norm_eps or DEFAULT_NORM_EPS[found.model_type],
        "sliding_window": found.sliding_window,
        "tie_embeddings": bool(found.tie_word_embeddings),
    }
