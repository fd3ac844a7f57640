"""Identifies the tensors of a PEFT file by name and shape, and checks them against the base and adapter_config.json."""

import collections
import dataclasses
import logging
import re
from collections.abc import Mapping

from bimedix_jax.adapters import linears
from bimedix_jax.checkpoint.dtypes import FLOATS
from bimedix_jax.checkpoint.hf_tensors import require_gathered, unwrapped
from bimedix_jax.checkpoint.peft import ATTENTION, FUSED, LAST_SWAPPED, LAYER, PER_EXPERT, PREFIX, PeftSettings
from bimedix_jax.checkpoint.safetensors_io import StoredTensor
from bimedix_jax.errors import BimedixError, listed
from bimedix_jax.models.mixtral import Mixtral

log = logging.getLogger(__name__)

FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.([^.]+))?\.weight")
ROUTER = re.compile(r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.gate(?:\.modules_to_save(?:\.([^.]+))?)?\.weight")
"""The last group of both is the adapter's name, which a state dict that was saved without peft has."""
TABLES = {
    f"{module}{part}.weight": path
    for module, path in {"model.embed_tokens": "embed.table", "lm_head": "lm_head.w"}.items()
    for part in ("", ".base_layer")
}
"""Copies of the base's embedding and head, which peft saves with an adapter on the head."""
FUSED_KINDS = ("gate_up", "down")
OUTER, INNER = LAYER + "mlp.experts", LAYER + "mlp.experts.base_layer"


@dataclasses.dataclass(frozen=True)
class Pair:
    """A and B of one module.

    Attributes:
      kind: one of LORA_TARGETS, or gate_up or down, which contain all experts of a layer.
      index: (), (layer,) or (layer, expert).
      rank, scale: of each of its matrices.
      swapped: whether A and B of a fused weight are swapped.
    """

    kind: str
    index: tuple[int, ...]
    a: StoredTensor
    b: StoredTensor
    rank: int
    scale: float
    swapped: bool = False


@dataclasses.dataclass(frozen=True)
class Content:
    """The content of a file: adapters; routers by layer, each under one or two names; copies of the base's tables, with
    their paths in this project's parameter tree."""

    pairs: list[Pair]
    routers: dict[int, list[StoredTensor]]
    tables: list[tuple[StoredTensor, str]]


@dataclasses.dataclass(frozen=True)
class Module:
    """A module that may have an adapter; patterns and targets are matched with `name`."""

    kind: str
    index: tuple[int, ...]
    name: str


def modules_of(model: Mixtral) -> dict[str, Module]:
    """Every module that may be in a file, by its name there, in both layouts."""
    config = model.config
    found = {} if config.tie_embeddings else {"lm_head": Module("lm_head", (), "lm_head")}
    for layer in range(config.num_layers):
        for kind, name in (*ATTENTION.items(), ("router", PER_EXPERT["router"])):
            name = name.format(layer=layer)
            found[name] = Module(kind, (layer,), name)
        name = FUSED["router"].format(layer=layer)
        found[name.removesuffix(".weight")] = Module("router", (layer,), name)
        for kind, part in (("outer", OUTER), ("inner", INNER)):
            found[part.format(layer=layer)] = Module(kind, (layer,), "")
        for kind in ("w1", "w2", "w3"):
            for expert in range(config.router.num_experts):
                name = PER_EXPERT[kind].format(layer=layer, expert=expert)
                found[name] = Module(kind, (layer, expert), name)
    return found


def content_of(tensors: Mapping[str, StoredTensor], settings: PeftSettings, model: Mixtral) -> Content:
    """Sorts the tensors of a file by their role.

    Raises:
      BimedixError: a tensor is unknown, missing or not floating point, its shape does not fit the base, its rank is not
        that of adapter_config.json, or adapter_config.json has other targets.
    """
    modules, factors = modules_of(model), collections.defaultdict[str, dict[str, StoredTensor]](dict)
    routers, tables, unknown = collections.defaultdict[int, list[StoredTensor]](list), [], []
    require_gathered(tensors, str(next(iter(tensors.values())).path) if tensors else settings.source)
    named = set()
    for full_name, tensor in tensors.items():
        name = unwrapped(full_name).removeprefix(PREFIX)
        if tensor.dtype not in FLOATS:
            raise BimedixError(f"{tensor.path} stores {full_name} as {tensor.dtype}; only floating point is supported.")
        factor, router = FACTOR.fullmatch(name), ROUTER.fullmatch(name)
        named |= {match[match.re.groups] for match in (factor, router) if match and match[match.re.groups]}
        if factor and factor[1] in modules and factor[2] not in factors[factor[1]]:
            factors[factor[1]][factor[2]] = tensor
        elif router and int(router[1]) < model.config.num_layers:
            routers[int(router[1])].append(tensor)
        elif name in TABLES:
            tables.append((tensor, TABLES[name]))
        else:
            unknown.append(full_name)
    if len(named) > 1:
        raise BimedixError(
            f"{settings.source} describes one adapter, but the weights beside it have {len(named)} "
            f"({listed(sorted(named))}); save each in a folder of its own with peft's save_pretrained."
        )
    if unknown:
        raise BimedixError(
            f"{settings.source} has {len(unknown)} tensor(s) that fit no module of this base "
            f"({listed(unknown)}); name the base that the adapter was trained on."
        )
    single = [name for name, both in factors.items() if len(both) != 2]
    if single:
        raise BimedixError(
            f"{settings.source}: of {listed(single)} only one of lora_A and lora_B is present; save the adapter again."
        )
    check_routers(routers, settings, model)
    found = [(modules[name], both["A"], both["B"]) for name, both in factors.items()]
    found = name_fused_pairs(found, settings, model)
    check_targets([module for module, _, _ in found], settings, model)
    swapped = is_swapped(found, settings, model)
    widths = {path[-1]: layer.w.get_value().shape[-2:] for path, layer in linears(model).items()}
    widths |= {kind: fused_widths(kind, model) for kind in FUSED_KINDS}
    pairs = [pair_of(*entry, widths[entry[0].kind], swapped, settings, model) for entry in found]
    return Content(pairs, routers, tables)


def name_fused_pairs(
    found: list[tuple[Module, StoredTensor, StoredTensor]], settings: PeftSettings, model: Mixtral
) -> list[tuple[Module, StoredTensor, StoredTensor]]:
    """Names every fused pair by its parameter: from the module name where a layer has both, else from the shape."""
    both = {module.index for module, _, _ in found if module.kind == "inner"}
    named = []
    for module, a, b in found:
        if module.kind in ("inner", "outer"):
            fits = [kind for kind in FUSED_KINDS if any(orientations(kind, a, b, model))]
            wanted = (
                "gate_up" if module.kind == "inner" else "down" if module.index in both else fits[0] if fits else ""
            )
            if wanted not in fits:
                raise BimedixError(
                    f"{settings.source}: {a.name} {list(a.shape)} and its B {list(b.shape)} fit no stack of experts of "
                    "this base; name the base that the adapter was trained on."
                )
            module = Module(wanted, module.index, FUSED[wanted].format(layer=module.index[0]))
        named.append((module, a, b))
    return named


def fused_widths(kind: str, model: Mixtral) -> tuple[int, int]:
    """(in, out) of a fused parameter."""
    width, ffn = model.config.hidden_size, model.config.intermediate_size
    return (width, 2 * ffn) if kind == "gate_up" else (ffn, width)


def orientations(kind: str, a: StoredTensor, b: StoredTensor, model: Mixtral) -> tuple[bool, bool]:
    """Whether the shapes fit a fused parameter: (with A and B in the right order, with A and B swapped)."""
    experts, (width_in, width_out) = model.config.router.num_experts, fused_widths(kind, model)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] % experts or not a.shape[0]:
        return False, False
    ends = (a.shape[1], b.shape[0])
    return ends == (width_in, width_out), ends == (width_out, width_in)


def is_swapped(found: list[tuple[Module, StoredTensor, StoredTensor]], settings: PeftSettings, model: Mixtral) -> bool:
    """Whether A and B of the file's fused weights are swapped: from the shapes, or from the recorded version of peft
    where all weights are square."""
    fused = [orientations(m.kind, a, b, model) for m, a, b in found if m.kind in FUSED_KINDS]
    straight, swapped = all(fit[0] for fit in fused), all(fit[1] for fit in fused)
    old = settings.version is not None and settings.version <= LAST_SWAPPED
    if not fused or (straight and not swapped):
        return False
    if not (straight or swapped):
        raise BimedixError(
            f"{settings.source}: A and B are swapped for some fused experts only; export the adapter again."
        )
    if straight and settings.version is None:
        raise BimedixError(
            f"{settings.source} records no peft_version, and the experts' weights are square, so that their shapes do "
            "not show whether A and B are swapped (as before peft 0.19.1); add the peft_version that trained it."
        )
    if not straight or old:
        log.warning("Fused experts from peft before 0.19.1 have A and B swapped; this is corrected.")
    return old if straight else True


def pair_of(
    module: Module,
    a: StoredTensor,
    b: StoredTensor,
    widths: tuple[int, ...],
    swapped: bool,
    settings: PeftSettings,
    model: Mixtral,
) -> Pair:
    """The factors of one module, after checking shape and rank; `widths` is (in, out) of the base's weight."""
    fused, (width_in, width_out) = module.kind in FUSED_KINDS, widths
    rank = a.shape[0] // (model.config.router.num_experts if fused else 1) if a.shape else 0
    if not fused and (a.shape != (rank, width_in) or b.shape != (width_out, rank) or rank < 1):
        raise BimedixError(
            f"{settings.source}: {a.name} {list(a.shape)} and its B {list(b.shape)} do not fit the base's weight "
            f"{[width_out, width_in]}; name the base that the adapter was trained on."
        )
    if rank != settings.rank_of(module.name):
        raise BimedixError(
            f"{settings.source} gives {module.name} rank {settings.rank_of(module.name)}, but its tensors have rank "
            f"{rank}; both must come from the same training."
        )
    return Pair(module.kind, module.index, a, b, rank, settings.scale_of(module.name), fused and swapped)


def check_targets(present: list[Module], settings: PeftSettings, model: Mixtral) -> None:
    """Raises BimedixError where adapter_config.json targets a module without tensors, or tensors are not targeted."""
    found = {module.name for module in present}
    # parameters of transformers 5 are no modules; for them peft has rewritten target_modules to target_parameters
    names = {module.name for module in modules_of(model).values() if not module.name.endswith(".gate.weight")}
    expected = {name for name in names if name and settings.targets(name)}
    for layer in range(model.config.num_layers):
        parameters = [name.format(layer=layer) for name in FUSED.values()]
        expected |= {name for name in parameters if settings.targets_parameter(name)}
    if expected - found:
        raise BimedixError(
            f"{settings.source} targets {len(expected - found)} module(s) for which there are no tensors "
            f"({listed(sorted(expected - found))}); save the adapter again."
        )
    if found - expected:
        raise BimedixError(
            f"There are tensors for {len(found - expected)} module(s) that {settings.source} does not target "
            f"({listed(sorted(found - expected))}); save the adapter again."
        )


def check_routers(routers: Mapping[int, list[StoredTensor]], settings: PeftSettings, model: Mixtral) -> None:
    """Raises BimedixError unless the file has fully trained routers if and only if modules_to_save names them."""
    gates = (PER_EXPERT["router"].format(layer=0), FUSED["router"].format(layer=0).removesuffix(".weight"))
    other = [name for name in settings.to_save if not any(gate.endswith(name) for gate in gates)]
    if other:
        raise BimedixError(
            f"{settings.source} saves {listed(other)} in full; only routers (gate) may be trained in full."
        )
    layers, shape = model.config.num_layers, (model.config.router.num_experts, model.config.hidden_size)
    if len(routers) != (layers if settings.to_save else 0):
        raise BimedixError(
            f"{settings.source} has modules_to_save {list(settings.to_save)}, but there are {len(routers)} router "
            f"weights for {layers} layers; save the adapter again."
        )
    copies = [tensor for both in routers.values() for tensor in both]
    wrong = [f"{tensor.name} {list(tensor.shape)}" for tensor in copies if tensor.shape != shape]
    if wrong:
        raise BimedixError(
            f"{settings.source}: {listed(wrong)} instead of {list(shape)}; name the base of the adapter."
        )
