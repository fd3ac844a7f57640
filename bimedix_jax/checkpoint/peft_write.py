"""Writes adapters as a PEFT folder, one tensor in memory at a time; `peft` describes the formats."""

import dataclasses
import itertools
import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bimedix_jax.adapters import factor_indices, linears
from bimedix_jax.checkpoint.hf import require_topk
from bimedix_jax.checkpoint.identity import base_record
from bimedix_jax.checkpoint.peft import (
    ATTENTION,
    CONFIG_NAME,
    FUSED,
    LAYER,
    OWN_FORMAT,
    OWN_NAME,
    PER_EXPERT,
    PREFIX,
    VERSION,
    WEIGHTS_NAME,
)
from bimedix_jax.checkpoint.safetensors_io import SINGLE_NAME, TensorSpec
from bimedix_jax.checkpoint.stream import stream_to
from bimedix_jax.errors import BimedixError
from bimedix_jax.models.config import LoraConfig
from bimedix_jax.models.linear import ExpertLinear, Linear
from bimedix_jax.models.mixtral import Mixtral

log = logging.getLogger(__name__)

PeftLayout = Literal["per_expert", "fused"]
LAYOUTS = ("per_expert", "fused")
SNAPSHOT = re.compile(r"models--([^/]+)/snapshots/([^/]+)/?$")
"""End of a folder in the hub's cache: repository, with -- for /, and revision."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor to write; `make` computes it when it is written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class StackedAdapter:
    """The adapters of one kind of layer.

    Attributes:
      lead: leading axes of the weight: (), (L,) or (L, E).
      indices: index into `lead` -> index into the leading axes of the factors.
      factor: B is multiplied by it when written; 1 unless w1 and w3 have different scales.
    """

    a: Any
    b: Any
    lead: tuple[int, ...]
    indices: dict[tuple[int, ...], tuple[int, ...]]
    factor: float = 1.0

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    @property
    def layers(self) -> list[int]:
        return sorted({index[0] for index in self.indices})

    def matrix(self, factor: Literal["a", "b"], index: tuple[int, ...]) -> np.ndarray:
        """A [r, in] or B [out, r] of one matrix, in PEFT's orientation; zeros where it has no adapter."""
        value = self.a if factor == "a" else self.b
        if index not in self.indices:
            return np.zeros((value.shape[-1], value.shape[-2]), np.float32)
        place = self.indices[index]
        # on CPU np.asarray is a view of the whole leaf; elsewhere one matrix is copied to the host
        on_host = next(iter(value.devices())).platform == "cpu"
        found = np.asarray(value)[place] if on_host else np.asarray(value[place])
        return found.T * np.float32(self.factor) if factor == "b" and self.factor != 1 else found.T


def export_peft(model: Mixtral, folder: str | Path, layout: PeftLayout = "per_expert", overwrite: bool = False) -> Path:
    """Writes the adapters of `model` as PEFT does, float32, for transformers + peft on the same base.

    Factors that a layout requires although a matrix has no adapter are written as zeros, with a warning that counts
    them. They do not change the result.

    Args:
      layout: "per_expert" has the names of transformers 4, which transformers 5 fuses on loading. "fused" is what peft
        saves under transformers 5; it can leave out layers.
    Raises:
      BimedixError: the model has no adapters or shapes only, the layout is unknown, or the folder cannot be written.
    """
    if layout not in LAYOUTS:
        raise BimedixError(f"layout {layout!r} is unknown; choose {' or '.join(LAYOUTS)}.")
    require_topk(model, "The base of a PEFT adapter")
    config = model.lora
    if config is None:
        raise BimedixError("This model has no adapters; load it with some, or export the model itself.")
    adapters = with_zero_adapters(adapters_of(model), layout, model)
    experts = per_expert_tensors(adapters) if layout == "per_expert" else fused_tensors(adapters, model)
    tensors = [*plain_tensors(adapters), *experts]
    if config.train_router:
        log.warning("The routers were trained in full, so their weights are written as modules_to_save (gate).")
        tensors += routers(model, layout)
    dropout = config.dropout
    if dropout and adapters.keys() & {"router", "w1", "w2", "w3"}:
        log.warning("peft has no dropout on routers and experts: lora_dropout is written as 0 instead of %g.", dropout)
        dropout = 0.0
    settings = peft_config(model, config, adapters, layout, dropout)
    own: dict[str, Any] = {"format": OWN_FORMAT, "base": base_record(model)}
    if layout == "fused" and {"w1", "w3"} <= adapters.keys():
        own["w1_rank"] = adapters["w1"].rank
    specs = [TensorSpec(tensor.name, np.dtype(np.float32), tensor.shape) for tensor in tensors]
    total = sum(spec.nbytes for spec in specs)  # peft reads one file, however large

    def finish(partial: Path) -> None:
        (partial / SINGLE_NAME).rename(partial / WEIGHTS_NAME)
        (partial / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        (partial / OWN_NAME).write_text(json.dumps(own, indent=2) + "\n", "utf-8")

    made = ((tensor.name, 0, tensor.make()) for tensor in tensors)
    return stream_to(folder, specs, made, "exporting", finish, overwrite, total)


def adapters_of(model: Mixtral) -> dict[str, StackedAdapter]:
    """The adapters by kind; w3 gets the scale of w1, because PEFT fuses the two."""
    moe, found = model.layers.moe, {}
    for path, layer in linears(model).items():
        if layer.lora is not None:
            found[path[-1]] = adapter_of(layer)
    values = [moe.router.w.get_value(), *(value for adapter in found.values() for value in (adapter.a, adapter.b))]
    if any(isinstance(value, jax.ShapeDtypeStruct) for value in values):
        raise BimedixError("This model has shapes only; load weights and adapters first.")
    if moe.w1.lora is not None and moe.w3.lora is not None and moe.w1.lora.scale != moe.w3.lora.scale:
        factor = moe.w3.lora.scale / moe.w1.lora.scale
        log.warning("w1 and w3 have different scales; that of w3 is folded into its B (times %g).", factor)
        found["w3"] = dataclasses.replace(found["w3"], factor=factor)
    if not found:  # peft loads no adapter that has no target
        log.warning("Only the routers were trained, so one adapter with zero factors is written, on q of layer 0.")
        _, width_in, width_out = model.layers.attention.q.w.get_value().shape
        a, b = jnp.zeros((1, width_in, 1)), jnp.zeros((1, 1, width_out))
        found["q"] = StackedAdapter(a, b, (model.config.num_layers,), {(0,): (0,)})
    return found


def adapter_of(layer: Linear | ExpertLinear) -> StackedAdapter:
    lora = layer.lora
    assert lora is not None
    lead = tuple(layer.w.get_value().shape[:-2])
    return StackedAdapter(lora.a.get_value(), lora.b.get_value(), lead, factor_indices(layer))


def module_tensors(module: str, adapter: StackedAdapter, index: tuple[int, ...]) -> Iterator[Tensor]:
    """A and B of one matrix under the name of its module."""
    width_in, width_out, rank = adapter.a.shape[-2], adapter.b.shape[-1], adapter.rank
    yield Tensor(f"{PREFIX}{module}.lora_A.weight", (rank, width_in), lambda: adapter.matrix("a", index))
    yield Tensor(f"{PREFIX}{module}.lora_B.weight", (width_out, rank), lambda: adapter.matrix("b", index))


def plain_tensors(adapters: dict[str, StackedAdapter]) -> Iterator[Tensor]:
    """Attention and head: the same in both layouts, and only where there is an adapter."""
    for kind, adapter in adapters.items():
        for index in adapter.indices if kind in ATTENTION or kind == "lm_head" else ():
            module = ATTENTION[kind].format(layer=index[0]) if index else kind
            yield from module_tensors(module, adapter, index)


def per_expert_tensors(adapters: dict[str, StackedAdapter]) -> Iterator[Tensor]:
    """All routers and experts under their names in transformers 4; none may be missing, because transformers 5 stacks
    them."""
    for kind, module in PER_EXPERT.items():
        if kind in adapters:
            for index in np.ndindex(*adapters[kind].lead):
                name = module.format(**dict(zip(("layer", "expert"), index, strict=False)))
                yield from module_tensors(name, adapters[kind], index)


def fused_tensors(adapters: dict[str, StackedAdapter], model: Mixtral) -> Iterator[Tensor]:
    """Routers and experts as parameters of transformers 5, for every layer that has an adapter."""
    halves = gate_up(adapters)
    width = model.config.intermediate_size
    for layer in range(model.config.num_layers):
        index, down = (layer,), adapters.get("w2")
        if "router" in adapters and index in adapters["router"].indices:
            name = FUSED["router"].format(layer=layer).removesuffix(".weight")
            yield from module_tensors(name, adapters["router"], index)
        module = FUSED["down"].format(layer=layer).rpartition(".")[0]
        down = down if down is not None and layer in down.layers else None
        if any(layer in half.layers for half in halves.values()):
            parts = [(half, width if kind == "w3" else 0) for kind, half in halves.items()]
            yield from stacked_tensors(module if down is None else f"{module}.base_layer", parts, layer, 2 * width)
        if down is not None:
            yield from stacked_tensors(module, [(down, 0)], layer, model.config.hidden_size)


def stacked_tensors(
    module: str, parts: list[tuple[StackedAdapter, int]], layer: int, width_out: int
) -> Iterator[Tensor]:
    """A [E*R, in] expert-major and B [out, R*E] rank-major of a layer's experts.

    `parts` are the adapters, which are concatenated on the rank axis, each with the row of B where its outputs begin: B
    is block-diagonal.
    """
    experts, rank = parts[0][0].lead[1], sum(adapter.rank for adapter, _ in parts)

    def stacked_a() -> np.ndarray:
        return np.concatenate([part.matrix("a", (layer, e)) for e in range(experts) for part, _ in parts])

    def stacked_b() -> np.ndarray:
        b = np.zeros((width_out, rank, experts), np.float32)
        for e in range(experts):
            column = 0
            for part, row in parts:
                matrix = part.matrix("b", (layer, e))
                b[row : row + matrix.shape[0], column : column + part.rank, e] = matrix
                column += part.rank
        return b.reshape(width_out, rank * experts)

    width_in = parts[0][0].a.shape[-2]
    yield Tensor(f"{PREFIX}{module}.lora_A.weight", (experts * rank, width_in), stacked_a)
    yield Tensor(f"{PREFIX}{module}.lora_B.weight", (width_out, rank * experts), stacked_b)


def gate_up(adapters: dict[str, StackedAdapter]) -> dict[str, StackedAdapter]:
    """The adapters of w1 and w3, which PEFT fuses."""
    return {kind: adapters[kind] for kind in ("w1", "w3") if kind in adapters}


def with_zero_adapters(
    adapters: dict[str, StackedAdapter], layout: PeftLayout, model: Mixtral
) -> dict[str, StackedAdapter]:
    """Adds zero adapters for the expert matrices that the per-expert layout requires; warns with the number of matrices
    whose zeros the layout requires.

    peft fuses w1 only together with w3, and 0.21 expects the names that the pair has when w2 is adapted, too.
    """
    halves = gate_up(adapters)
    if layout == "per_expert" and halves:
        half, width, ffn = next(iter(halves.values())), model.config.hidden_size, model.config.intermediate_size
        for kind, (width_in, width_out) in {"w1": (width, ffn), "w2": (ffn, width), "w3": (width, ffn)}.items():
            if kind not in adapters:
                a, b = jnp.zeros((0, width_in, half.rank)), jnp.zeros((0, half.rank, width_out))
                adapters = {**adapters, kind: StackedAdapter(a, b, half.lead, {})}
        halves = gate_up(adapters)
    written = 0
    for kind in adapters.keys() & {"router", "w1", "w2", "w3"}:
        group = halves if kind in halves else {kind: adapters[kind]}
        layers = {layer for adapter in group.values() for layer in adapter.layers}
        lead, adapted = adapters[kind].lead, adapters[kind].indices
        if layout == "fused":
            written += sum(index[0] in layers and index not in adapted for index in np.ndindex(*lead))
        else:
            written += math.prod(lead) - len(adapted)
    if written:
        log.warning(
            "The layout %s cannot leave out %d matrices that have no adapter: factors that are zero are written.",
            layout,
            written,
        )
    return adapters


def routers(model: Mixtral, layout: PeftLayout) -> Iterator[Tensor]:
    """Routers that were trained in full. peft does not rename modules_to_save, so the layout for both transformers 4
    and 5 has them under the names of both."""
    weights = model.layers.moe.router.w.get_value()
    layers, width, experts = weights.shape
    modules = {"fused": [FUSED["router"]], "per_expert": [FUSED["router"], PER_EXPERT["router"] + ".weight"]}[layout]
    for layer, module in itertools.product(range(layers), modules):
        name = PREFIX + module.format(layer=layer)
        yield Tensor(name, (experts, width), lambda layer=layer: np.asarray(weights[layer]).T)


def peft_config(
    model: Mixtral, config: LoraConfig, adapters: dict[str, StackedAdapter], layout: PeftLayout, dropout: float
) -> dict[str, Any]:
    """adapter_config.json. The per-expert layout has only keys that the peft of transformers 4 knows."""
    base, revision = base_name(model.origin)
    modules, parameters = targets(adapters, layout, model.config.num_layers)
    ranks, alphas = patterns(config, adapters, layout)
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "r": config.rank,
        "lora_alpha": number(config.alpha),
        "lora_dropout": dropout,
        "use_rslora": config.rank_stabilised,
        "rank_pattern": ranks,
        "alpha_pattern": {key: number(alpha) for key, alpha in alphas.items()},
        "target_modules": modules,
        "modules_to_save": ["gate"] if config.train_router else None,
    }
    return (
        settings if layout == "per_expert" else {**settings, "target_parameters": parameters, "peft_version": VERSION}
    )


def number(value: float) -> int | float:
    """Whole numbers as integers: peft declares alpha as one."""
    return int(value) if float(value).is_integer() else value


def base_name(origin: str | None) -> tuple[str | None, str | None]:
    """(hub id or name of the folder, revision) of a base; never a path on this machine."""
    if origin is None:
        return None, None
    found = SNAPSHOT.search(origin.replace("\\", "/"))
    return (found[1].replace("--", "/"), found[2]) if found else (Path(origin).resolve().name, None)


def targets(adapters: dict[str, StackedAdapter], layout: PeftLayout, layers: int) -> tuple[list[str], list[str]]:
    """(target_modules, target_parameters): short names where every layer has an adapter, else full ones."""

    def names(full: str, present: list[int]) -> list[str]:
        if len(present) == layers:
            return [full.removeprefix(LAYER)]
        return [full.format(layer=layer) for layer in present]

    modules = [name for kind in ATTENTION if kind in adapters for name in names(ATTENTION[kind], adapters[kind].layers)]
    modules = [name.removeprefix("self_attn.") for name in modules] + ["lm_head"] * ("lm_head" in adapters)
    if layout == "per_expert":
        return modules + [PER_EXPERT[kind].rpartition(".")[2] for kind in PER_EXPERT if kind in adapters], []
    present = {"router": ("router",), "gate_up": ("w1", "w3"), "down": ("w2",)}
    parameters = []
    for parameter, kinds in present.items():
        found = {layer for kind in kinds if kind in adapters for layer in adapters[kind].layers}
        parameters += names(FUSED[parameter], sorted(found)) if found else []
    return modules, parameters


def patterns(
    config: LoraConfig, adapters: dict[str, StackedAdapter], layout: PeftLayout
) -> tuple[dict[str, int], dict[str, float]]:
    """(rank_pattern, alpha_pattern), for the modules whose rank or alpha differ from `r` and `lora_alpha`.

    In the per-expert layout transformers 4 matches w1, and transformers 5 + peft match gate_up_proj. For gate_up_proj
    peft appends a pattern with twice the rank and alpha, which is right if both halves have the usual rank and the
    scale is not rank-stabilised. The parentheses keep our pattern first where peft sorts them.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}

    def add(key: str, kind: str, rank: int, usual: int = 1) -> None:
        """`usual`: without a pattern the reader assumes this multiple of the configuration's rank and alpha."""
        times = rank / config.rank_of(kind)
        alpha = config.alpha_of(kind) * (times**0.5 if config.rank_stabilised else times)  # the same scale
        if (rank, alpha) != (usual * config.rank, usual * config.alpha):
            ranks[key], alphas[key] = rank, alpha

    halves = gate_up(adapters)
    shared = next((kind for kind, half in halves.items() if half.indices), "w1")
    for kind in ATTENTION:
        if kind in adapters:
            add(f"{kind}_proj", kind, adapters[kind].rank)
    for kind, key in (("lm_head", "lm_head"), ("router", r"mlp\.gate\.weight"), ("w2", r"mlp\.experts\.down_proj")):
        if kind in adapters:
            add(key, kind, adapters[kind].rank)
    if halves:
        rank = sum(half.rank for half in halves.values())
        add(r"(mlp\.experts\.gate_up_proj)", shared, rank, usual=2 if layout == "per_expert" else 1)
    for kind, module in PER_EXPERT.items() if layout == "per_expert" else ():
        if kind in adapters:
            add(module.rpartition(".")[2], shared if kind in halves else kind, adapters[kind].rank)
    return ranks, alphas
