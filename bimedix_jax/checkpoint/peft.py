"""PEFT's LoRA folders: names, settings and scales, as peft 0.21 reads and writes them for a Mixtral.

    adapter_config.json          rank, alpha, which modules and parameters are adapted
    adapter_model.safetensors    <prefix>.<module>.lora_A.weight [r, in] and <prefix>.<module>.lora_B.weight [out, r]
    bimedix_adapter.json         ours, not read by peft: identity of the base, rank of w1 in the fused w1 and w3

Two layouts (`peft_write` writes both, `peft_read` reads both):

    per_expert   names of transformers 4, `block_sparse_moe.experts.5.w1`; transformers 5 + peft fuse them on loading
    fused        what peft saves under transformers 5: one pair of factors for the stacked weights of all experts of a
                 layer, A [E*r, in] with row e*r + j, B [out, r*E] with column j*E + e. If both
                 parameters are adapted, gate_up_proj (w1 rows, then w3 rows) is named `mlp.experts.base_layer` and
                 down_proj (w2) `mlp.experts`. If only one is adapted, it is named `mlp.experts`.

peft up to 0.19.0 read a fused weight [E, out, in] as [E, in, out], so that A and B were swapped; the shapes show it.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator

from bimedix_jax.errors import BimedixError
from bimedix_jax.files import peek_json, read_json, validate, where_instead

CONFIG_NAME, WEIGHTS_NAME, OWN_NAME = "adapter_config.json", "adapter_model.safetensors", "bimedix_adapter.json"
OWN_FORMAT = "bimedix peft 1"
PREFIX = "base_model.model."
VERSION = "0.21.2"
"""The version of peft whose interpretation of fused adapters is implemented here."""
LAST_SWAPPED = (0, 19, 0)
"""Last version of peft in which A and B of a fused weight were swapped (from its source; 0.19.1 is correct)."""

LAYER = "model.layers.{layer}."
ATTENTION = {kind: LAYER + f"self_attn.{kind}_proj" for kind in "qkvo"}
PER_EXPERT = {
    "router": LAYER + "block_sparse_moe.gate",
    **{kind: LAYER + "block_sparse_moe.experts.{expert}." + kind for kind in ("w1", "w2", "w3")},
}
"""Modules of transformers 4."""
FUSED = {
    "router": LAYER + "mlp.gate.weight",
    "gate_up": LAYER + "mlp.experts.gate_up_proj",
    "down": LAYER + "mlp.experts.down_proj",
}
"""Parameters of transformers 5. peft matches `target_parameters` and patterns with these names."""

NEUTRAL = {
    "use_dora": "DoRA",
    "bias": "trained biases",
    "lora_bias": "a bias on lora_B",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trained tokens",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "Megatron",
}
"""Settings that change what an adapter computes, with a description. They must be off."""
INITIAL = (True, False, None, "true", "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that do not change the base; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do."""
UNUSED = (
    "auto_mapping corda_config ensure_weight_tying eva_config inference_mode loftq_config lora_ga_config megatron_core "
    "qalora_group_size revision runtime_config task_type"
).split()
"""Settings of initialisation, training and bookkeeping. They are ignored."""
READ = (
    "alpha_pattern base_model_name_or_path exclude_modules init_lora_weights layers_pattern layers_to_transform "
    "lora_alpha lora_dropout modules_to_save peft_type peft_version r rank_pattern target_modules target_parameters "
    "use_rslora"
).split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftSettings:
    """The settings of adapter_config.json that decide what an adapter computes."""

    source: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    dropout: float
    modules: str | tuple[str, ...]
    """A regular expression, or names."""
    parameters: tuple[str, ...]
    exclude: str | tuple[str, ...]
    layers: tuple[int, ...]
    """The layers in which `modules` are adapted; empty means all."""
    layers_pattern: tuple[str, ...]
    to_save: tuple[str, ...]
    """Modules that were trained in full."""
    version: tuple[int, ...] | None
    base: str | None

    def rank_of(self, name: str) -> int:
        return self.rank_pattern.get(first_match(self.rank_pattern, name, self.source), self.rank)

    def scale_of(self, name: str) -> float:
        """The factor of B A for a module, or for a parameter of transformers 5."""
        rank, alpha = self.rank_of(name), self.alpha_pattern.get(first_match(self.alpha_pattern, name, self.source))
        return (self.alpha if alpha is None else alpha) / (rank**0.5 if self.rank_stabilised else rank)

    def targets(self, name: str) -> bool:
        """Whether `target_modules` matches this module."""
        if self.exclude and self.matches(self.exclude, name):
            return False
        if not self.matches(self.modules, name):
            return False
        if isinstance(self.modules, str) or name in self.modules or not self.layers:
            return True
        patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for pattern in patterns if (match := re.match(pattern, name))), None)
        return found is not None and int(found[1]) in self.layers

    def targets_parameter(self, name: str) -> bool:
        """Whether `target_parameters` matches this parameter."""
        return self.matches(self.parameters, name)

    def matches(self, wanted: str | tuple[str, ...], name: str) -> bool:
        if isinstance(wanted, str):
            return bool(compiled(wanted, self.source).fullmatch(name))
        return name in wanted or any(name.endswith(f".{part}") for part in wanted)


def compiled(pattern: str, source: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise BimedixError(
            f"{source} contains the pattern {pattern!r}, which is not valid ({error}); correct it."
        ) from None


def first_match(patterns: Mapping[str, Any], name: str, source: str) -> str:
    """The first pattern that matches `name`, as in peft; the name itself where none does."""
    return next((key for key in patterns if compiled(rf"(.*\.)?({key})$", source).match(name)), name)


def is_peft(folder: str | Path) -> bool:
    """Whether PEFT, or `export_peft`, wrote the adapter in this folder."""
    return "peft_type" in peek_json(Path(folder) / CONFIG_NAME)


def read_settings(folder: Path) -> PeftSettings:
    """Reads and checks adapter_config.json. Raises BimedixError for everything that is not implemented, and for unknown
    keys unless they are off."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise BimedixError(f"{folder} has no {CONFIG_NAME}; {where_instead(folder, CONFIG_NAME)}.")
    config = read_json(path, dict[str, Any], "name a folder that peft wrote")
    if config.get("peft_type") != "LORA":
        raise BimedixError(f"{path} is of the kind {config.get('peft_type')!r}; only LORA adapters can be read.")
    off = (None, False, "none", {}, [])
    for key, what in NEUTRAL.items():
        if config.get(key) not in off:
            raise BimedixError(
                f"{path} needs {what} ({key} = {config[key]!r}), which is not supported; train the adapter without it."
            )
    if config.get("init_lora_weights", True) not in INITIAL:
        raise BimedixError(
            f"{path} has init_lora_weights = {config['init_lora_weights']!r}, which changes the weights of the "
            "base; convert it with peft's path_initial_model_for_weight_conversion."
        )
    known = {*NEUTRAL, *UNUSED, *READ}
    unknown = [key for key, value in config.items() if key not in known and value not in off]
    if unknown:
        raise BimedixError(
            f"{path} sets {', '.join(unknown)}, which is unknown and may change the result; remove what does not."
        )
    return settings_of(validate(config, PeftJson, str(path), "save the adapter again"), str(path))


def names(value: Any) -> tuple[str, ...]:
    """A list of names, of which adapter_config.json may write one as a string and none as null."""
    value = (value,) if isinstance(value, str) else tuple(value or ())
    if not all(isinstance(name, str) for name in value):
        raise ValueError(f"a list of names is expected, found {value!r}")
    return value


def pattern_or_names(value: Any) -> str | tuple[str, ...]:
    """A string is a regular expression."""
    return value if isinstance(value, str) else names(value)


def numbers(value: Any) -> Any:
    """A list of numbers, of which adapter_config.json may write one as a number and none as null."""
    return () if value is None else (value,) if isinstance(value, int) else value


Names = Annotated[Any, AfterValidator(names)]
PatternOrNames = Annotated[Any, AfterValidator(pattern_or_names)]


class PeftJson(BaseModel):
    """The keys of adapter_config.json that decide what an adapter computes, with peft's defaults."""

    r: int = 8
    lora_alpha: float = 8.0
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: Any = None
    lora_dropout: float | None = None
    target_modules: PatternOrNames = ()
    target_parameters: Names = ()
    exclude_modules: PatternOrNames = ()
    layers_to_transform: Annotated[tuple[int, ...], BeforeValidator(numbers)] = ()
    layers_pattern: Names = ()
    modules_to_save: Names = ()
    peft_version: str | None = None
    base_model_name_or_path: str | None = None


def settings_of(config: PeftJson, source: str) -> PeftSettings:
    """The settings of a checked configuration; raises BimedixError for a rank below 1."""
    version = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", config.peft_version or "")
    settings = PeftSettings(
        source=source,
        rank=config.r,
        alpha=config.lora_alpha,
        rank_pattern=config.rank_pattern or {},
        alpha_pattern=config.alpha_pattern or {},
        rank_stabilised=bool(config.use_rslora),
        dropout=config.lora_dropout or 0.0,
        modules=config.target_modules,
        parameters=config.target_parameters,
        exclude=config.exclude_modules,
        layers=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        to_save=config.modules_to_save,
        version=tuple(int(part or 0) for part in version.groups()) if version else None,
        base=config.base_model_name_or_path,
    )
    if min([settings.rank, *settings.rank_pattern.values()]) < 1:
        raise BimedixError(f"{source} has a rank below 1; save the adapter again.")
    return settings
