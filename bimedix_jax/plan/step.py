"""Compiles the real training, prefill and decoding steps for absent devices."""

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from bimedix_jax.adapters import add_lora
from bimedix_jax.checkpoint.load import requested_router
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import Experiment, MeshConfig
from bimedix_jax.inference.decoding_layout import store_for_decoding
from bimedix_jax.inference.generate import Sampling, State, _prefill, _step
from bimedix_jax.inference.padding import bucket
from bimedix_jax.kernels import backends
from bimedix_jax.models.attention import KVCache
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.models.routers import RoutingPlan
from bimedix_jax.quantise import quantise_base
from bimedix_jax.routing.parts import PartLayout, needs_wide
from bimedix_jax.routing.watch import Kept, Watch, record_step
from bimedix_jax.sharding.by_rows import store_for_training
from bimedix_jax.sharding.placement import place
from bimedix_jax.sharding.rules import BATCH_AXES, COMPILER_OPTIONS, make_mesh
from bimedix_jax.training.feed import batch_kinds
from bimedix_jax.training.optimiser import make_optimiser
from bimedix_jax.training.state import TrainState, split_params
from bimedix_jax.training.step import make_train_step

STEPS = 10_000
"""Steps of the learning-rate schedule; its length does not change the program."""
OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory|exceeds the memory|Ran out of memory")
USED = re.compile(r"Used (?P<size>[\d.]+)(?P<unit>[KMGT]?)i?B? of")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A step compiled for the devices of a target.

    Attributes:
      text: of the compiled program; None if the compiler ran out of the device's memory.
      argument_bytes: bytes of the arguments on each device, by kind.
      peak_bytes: peak of arguments, results and temporaries. If the compiler ran out of memory, the size that its
        message names, or None if it names none.
      seconds: time to lower and compile.
    """

    text: str | None
    argument_bytes: dict[str, int]
    peak_bytes: int | None
    seconds: float

    @property
    def compiles(self) -> bool:
        return self.text is not None


def abstract_model(config: MixtralConfig, experiment: Experiment) -> Mixtral:
    """The model of the experiment with its base, precision and adapters, as shapes only."""
    source, router = experiment.model, requested_router(experiment.router, config.router)
    config = dataclasses.replace(config, router=router)
    model = Mixtral(config, source.dtype or ("bfloat16" if source.base == "nf4" else source.base))
    model = quantise_base(model) if source.base == "nf4" else model
    return model if experiment.lora is None else add_lora(model, experiment.lora)


def local_bytes(tree: Any) -> int:
    """Bytes of abstract arrays on each device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Placed:
    """An abstract model on absent devices, with the shardings of replicated arrays and of the batch."""

    model: Mixtral
    replicated: Any
    batch: Any


def on_one_device(model: Mixtral, device: Any) -> Placed:
    single = SingleDeviceSharding(device)
    graph, state = nnx.split(model)
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=single), state)
    return Placed(nnx.merge(graph, whole), single, single)


def on_devices(model: Mixtral, experiment: Experiment, devices: list[Any]) -> Placed:
    """Places the model on the mesh of the experiment, or on a single device if the experiment has no mesh.

    Raises:
      BimedixError: the mesh does not fit the devices, the rows or the model.
    """
    if len(devices) == 1 and experiment.mesh is None:
        return on_one_device(model, devices[0])
    sizes = experiment.mesh or MeshConfig()  # by default everything is sharded over all devices
    mesh = make_mesh(sizes.data, sizes.fsdp, sizes.expert, sizes.tensor, devices)
    parts = math.prod(mesh.shape[name] for name in BATCH_AXES)
    if experiment.batch.rows % parts:
        raise BimedixError(
            f"{experiment.batch.rows} rows of a micro-batch cannot be divided among {parts} devices; set batch.rows to "
            f"a multiple of {parts} (and batch.accumulation to match), or set mesh.tensor."
        )
    return Placed(place(model, mesh), NamedSharding(mesh, P()), NamedSharding(mesh, P(None, BATCH_AXES)))


def optimiser_state(optimiser: optax.GradientTransformation, params: dict[str, Any], replicated: Any) -> Any:
    """The abstract state of an optimiser. State of a parameter's shape is sharded like the parameter."""

    def shard(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = next((key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in params), None)
        same = name is not None and params[name].shape == leaf.shape
        sharding = params[name].sharding if name is not None and same else replicated
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(shard, jax.eval_shape(optimiser.init, params))


def training_arguments(
    config: MixtralConfig, experiment: Experiment, devices: list[Any]
) -> tuple[tuple[TrainState, dict[str, Any], dict[str, Any]], Any]:
    """((state, frozen parameters, batch), the jitted step). The arguments are shapes without storage."""
    placed = on_devices(abstract_model(config, experiment), experiment, devices)
    with backends.use(device=devices[0]):
        store_for_training(placed.model)
    structure, params, frozen = split_params(placed.model)
    optimiser = make_optimiser(experiment.optimiser, STEPS)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=placed.replicated)
    router = structure.router_state(frozen)
    state = TrainState(params, optimiser_state(optimiser, params, placed.replicated), count, router)
    shape = (experiment.batch.accumulation, experiment.batch.rows, experiment.data.sequence_length)
    named = len(experiment.router.languages)  # the kinds of the data are not known
    kinds = batch_kinds(named > 0)
    batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=placed.batch) for name, kind in kinds.items()}
    return (state, frozen, batch), make_train_step(structure, experiment, STEPS, optimiser, named)


def training_step(config: MixtralConfig, experiment: Experiment, devices: list[Any]) -> CompiledStep:
    """Compiles the optimiser step of an experiment for these devices."""
    (state, frozen, batch), step = training_arguments(config, experiment, devices)
    kinds = {"base": frozen, "adapters": state.params, "optimiser": state.optimiser, "batch": batch}
    return compile_for(devices[0], kinds, step, state, frozen, batch)


def for_inference(placed: Placed, devices: list[Any]) -> Placed:
    """The model as `bimedix chat` stores it on these devices."""
    model = nnx.merge(*nnx.split(placed.model), copy=True)
    with backends.use(device=devices[0]):
        store_for_decoding(model)
    return dataclasses.replace(placed, model=model)


def inference_steps(
    config: MixtralConfig, experiment: Experiment, devices: list[Any], rows: int, length: int
) -> tuple[CompiledStep, CompiledStep]:
    """(prefill of `rows` prompts of `length` tokens, one decoding step after it), greedy, with unmerged adapters."""
    placed = for_inference(on_devices(abstract_model(config, experiment), experiment, devices), devices)
    graph, weights = nnx.split(placed.model)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=placed.replicated)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=placed.replicated)
    slots, plan = min(bucket(length + 1), config.max_position_embeddings), RoutingPlan()
    arguments = (graph, weights, ids, ids, Sampling.of(), key, plan, slots, "none")
    prefill = compile_for(devices[0], {"base": weights}, _prefill, *arguments)
    return prefill, decoding_step(placed, devices, rows, length)


def decoding_step(placed: Placed, devices: list[Any], rows: int, length: int) -> CompiledStep:
    """A step of greedy decoding after `rows` prompts of `length` tokens."""
    model, replicated = placed.model, placed.replicated
    graph, weights = nnx.split(model)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=replicated)
    slots = min(bucket(length + 1), model.config.max_position_embeddings)
    cache = jax.eval_shape(lambda: KVCache.zeros(model.config, rows, slots, model.dtype))
    token, count = jax.eval_shape(lambda: (jnp.zeros(rows, jnp.int32), jnp.zeros((), jnp.int32)))
    state: Any = State(cache, token, None, count, token)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), state)
    kinds: dict[str, Any] = {"base": weights, "cache": state.cache}
    rest, donated = dataclasses.replace(state, cache=None), (state.cache, None)
    arguments = (graph, weights, rest, donated, Sampling.of(), key, RoutingPlan(), "none")
    return compile_for(devices[0], kinds, _step, *arguments)


def recording_step(
    config: MixtralConfig, experiment: Experiment, devices: list[Any], rows: int, length: int
) -> CompiledStep:
    """The step of `bimedix routes record` on `rows` rows of `length` tokens, with margins, entropies and losses."""
    placed = on_devices(abstract_model(config, experiment), experiment, devices)
    graph, weights = nnx.split(placed.model)
    layout = PartLayout(
        layers=config.num_layers,
        top_k=config.router.top_k,
        columns=("nll", "experts", "weights", "margin", "entropy"),
        wide=needs_wide(config.router.num_experts, gaps=False),
    )
    kept, ids = (
        Kept(layout, Watch(scores=True)),
        jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=placed.replicated),
    )
    arguments = (graph, weights, ids, ids, ids, RoutingPlan(), None, kept)
    return compile_for(devices[0], {"base": weights}, record_step, *arguments)


def compile_for(device: Any, kinds: dict[str, Any], function: Any, *arguments: Any) -> CompiledStep:
    """Lowers and compiles a jitted function for a kind of device.

    Args:
      kinds: the arguments to report in `argument_bytes`, by kind.
    """
    began = time.perf_counter()
    sizes = {name: local_bytes(tree) for name, tree in kinds.items()}
    with backends.use(device=device):
        lowered = function.lower(*arguments)
        try:
            compiled = lowered.compile(compiler_options=COMPILER_OPTIONS.get(device.platform))
        except jax.errors.JaxRuntimeError as error:
            if not OUT_OF_MEMORY.search(str(error)):
                raise
            used = USED.search(str(error))
            needed = int(float(used["size"]) * UNITS[used["unit"]]) if used else None
            return CompiledStep(None, sizes, needed, time.perf_counter() - began)
    memory = compiled.memory_analysis()
    if memory is None:
        raise BimedixError("XLA reports no memory analysis for this program, so its memory cannot be estimated.")
    # the TPU compiler reports its own peak; the sum in `peak` would include arrays in other memories
    needed = memory.peak_memory_in_bytes if device.platform == "tpu" else peak(memory)
    return CompiledStep(compiled.as_text(), sizes, needed, time.perf_counter() - began)


def peak(memory: Any) -> int:
    """Peak bytes. Results that reuse donated arguments count once."""
    whole = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return int(whole)
