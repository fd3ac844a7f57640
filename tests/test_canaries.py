"""Canaries: each test checks one surface of JAX or its libraries that may move, and names a file that relies on it.

To upgrade JAX, Flax, Optax or Orbax, change a file in constraints/ and run `./scripts/test.sh tests/test_canaries.py`
first (with `--python 3.12` for constraints/py3.12.txt). A test that fails names the surface that moved. All of them
hold on both versions of JAX that are tested. No model runs here, and what is unstable is imported inside the tests, so
that a missing name fails one test. If your code relies on another unstable surface, add a test for it.
"""

import dataclasses
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from bimedix_jax.kernels import backends
from bimedix_jax.plan import collectives, hardware, hlo

AOT = "is not installed; `pip install bimedix_jax[aot]` brings it (Linux only)"
needs_cuda = pytest.mark.skipif(not importlib.util.find_spec("jax_cuda12_plugin"), reason=f"XLA's CUDA plugin {AOT}")
needs_tpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason=f"the TPU compiler {AOT}")
MESH = Mesh(np.array(jax.devices()[:2]), ("x",))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A pytree with a static field, as NF4Tensor is."""

    codes: Any
    scales: Any
    block_size: int = dataclasses.field(default=4, metadata={"static": True})


class Layer(nnx.Module):
    def __init__(self, value: Any, width: int = 3):
        self.width = width
        self.w = nnx.Param(value, axes=("layers", None))
        self.lora: Any = nnx.data(None)


def compiled(function: Any, *operands: Any, **options: Any) -> Any:
    return jax.jit(function).lower(*operands).compile(compiler_options=options)


def abstract(device: Any, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))


def test_vjp_args_res():
    """VJP.args_res of jax.vjp: the arguments that it needs, whose pytrees can be assigned (layer_scan/bits.py).

    JAX 0.10 mirrors each pytree in nested tuples, JAX 0.12 keeps lists and dictionaries. All leaves must be assigned,
    also those that are not needed.
    """
    x, unused = jnp.full(2, 2.0), [jnp.ones(2), None]
    layer = {"b": unused, "w": Packed(jnp.full(2, 4.0), unused)}
    pull: Any = jax.vjp(lambda constants, x, layer: x * layer["w"].codes + constants[0], unused, x, layer)[1]
    assert jax.tree.leaves(pull.args_res) == [x, layer["w"].codes]
    pull.args_res = [unused, pull.args_res[1], jax.tree.map(lambda leaf: 2 * leaf, layer)]
    _, dx, dlayer = pull(jnp.ones(2))
    assert (dx.tolist(), dlayer["w"].codes.tolist()) == ([8.0, 8.0], [2.0, 2.0])


def test_vjp_is_a_pytree():
    """lax.scan stacks a VJP whose arguments are left out; they can be assigned later (layer_scan/bits.py)."""

    def step(x: Any, w: Any) -> Any:
        pull: Any = jax.vjp(lambda w, x: w * jnp.sin(x), w, x)[1]
        pull.args_res = [None, pull.args_res[1]]
        return x + jnp.pi / 2, pull

    pull = jax.tree.map(lambda leaf: leaf[1], lax.scan(step, jnp.zeros(()), jnp.zeros(2))[1])
    pull.args_res = [jnp.float32(7.0), pull.args_res[1]]
    np.testing.assert_allclose(pull(jnp.ones(())), [1.0, 0.0], atol=1e-6)


def test_vjp_opaque_residuals():
    """VJP.opaque_residuals: a list of tracers and constants, which can be assigned (layer_scan/bits.py)."""
    from jax.core import Tracer

    table = jnp.array([2.0, 3.0])

    def gradient(x: Any) -> Any:
        pull: Any = jax.vjp(lambda x: jnp.sin(x) * table, x)[1]
        pull.opaque_residuals = [r if isinstance(r, Tracer) else 10 * r for r in pull.opaque_residuals]
        return pull(jnp.ones(2))[0]

    assert jax.jit(gradient)(jnp.zeros(2)).tolist() == [20.0, 30.0]


def test_tracer():
    """jax.core.Tracer: what arrays are inside of jit, vjp and scan only (kernels/unstacked.py, models/plans.py)."""
    from jax.core import Tracer

    seen = []

    def look(x: Any, _: Any = None) -> Any:
        seen.append(isinstance(x, Tracer))
        return x, None

    jax.jit(look)(1.0)
    jax.vjp(look, 1.0)
    lax.scan(look, 1.0, jnp.ones(2))
    look(jnp.ones(2))
    assert seen == [True, True, True, False]


def test_symbolic_zeros():
    """defvjp(symbolic_zeros=True): value and perturbed forward, SymbolicZero backward (kernels/expert_mlp/api.py)."""
    from jax.custom_derivatives import SymbolicZero

    def forward(x: Any, pair: Any) -> Any:
        assert [leaf.perturbed for leaf in jax.tree.leaves((x, pair))] == [True, False, False]
        return both(*jax.tree.map(lambda leaf: leaf.value, (x, pair))), pair["w"].value

    def backward(w: Any, douts: Any) -> Any:
        assert [isinstance(dout, SymbolicZero) for dout in douts] == [False, True]
        assert (douts[1].shape, str(douts[1].dtype)) == ((2,), "float32")
        return douts[0] * w, None

    both = jax.custom_vjp(lambda x, pair: (x * pair["w"], x))
    both.defvjp(forward, backward, symbolic_zeros=True)
    pair = {"ids": jnp.arange(2), "w": jnp.full(2, 3.0)}
    assert jax.grad(lambda x: both(x, pair)[0].sum())(jnp.ones(2)).tolist() == [3.0, 3.0]


def test_float0():
    """Cotangents of integers and PRNG keys are float0; None is zeros of a whole pytree (kernels/nf4/tensor.py)."""
    zero, zeros = np.zeros((), jax.dtypes.float0), np.zeros(3, jax.dtypes.float0)

    def backward(_: Any, douts: Any) -> Any:
        assert [(dout.dtype, dout.shape) for dout in douts[1:]] == [(zero.dtype, ()), (zero.dtype, (3,))]
        return 2 * douts[0], zero, zeros, None

    double = jax.custom_vjp(lambda x, key, ids, pair: (2 * x, key, ids))
    double.defvjp(lambda *operands: (double(*operands), None), backward)
    operands = (jnp.ones(2), jax.random.key(0), jnp.arange(3), Packed(jnp.arange(3), jnp.ones(2)))
    dx, dkey, dids, dpair = jax.vjp(double, *operands)[1]((jnp.ones(2), zero, zeros))
    assert {dkey.dtype, dids.dtype, dpair.codes.dtype} == {zero.dtype}
    assert [*dx.tolist(), *dpair.scales.tolist()] == [2.0, 2.0, 0.0, 0.0]


def sizes_kept(function: Any, policy: Any, size: int) -> set[int]:
    pull = jax.vjp(jax.checkpoint(function, prevent_cse=False, policy=policy), jnp.ones(size))[1]
    return {leaf.size for leaf in jax.tree.leaves(pull)}


def test_checkpoint_policies():
    """checkpoint_name of a pytree, and a policy that keeps the named values only (models/remat.py)."""

    def function(x: Any) -> Any:
        named = checkpoint_name(Packed(x @ jnp.ones((5, 2)), x @ jnp.ones((5, 3))), "routes")
        return sum(jnp.sum(y * y) for y in (named.codes, named.scales, x @ jnp.ones((5, 4))))

    policy = jax.checkpoint_policies.save_only_these_names("others", "routes")
    assert sizes_kept(function, policy, 5) & {2, 3, 4} == {2, 3}


def test_arguments_of_a_policy():
    """A policy is asked (primitive, values, parameters); gathers tell their axis, names theirs (models/shards.py)."""
    asked = {}

    def policy(primitive: Any, *_: Any, **params: Any) -> bool:
        asked[primitive.name] = params
        return False

    def function(x: Any) -> Any:
        gathered = checkpoint_name(lax.all_gather(x, "x", axis=0, tiled=True), "gathered")
        return jnp.sum(gathered[1:] ** 2)

    def gradient(x: Any) -> Any:
        return jax.grad(jax.checkpoint(function, prevent_cse=False, policy=policy))(x)

    jax.make_jaxpr(jax.shard_map(gradient, mesh=MESH, in_specs=P("x"), out_specs=P("x"), check_vma=False))(jnp.ones(4))
    assert asked["all_gather"]["axis_name"] in ("x", ("x",))
    assert asked["name"]["name"] == "gathered"
    assert asked.keys() & {"slice", "squeeze", "dynamic_slice"}


def test_optimization_barrier():
    """lax.optimization_barrier can be differentiated and batched (kernels/products.py, kernels/attention/xla.py)."""
    gradient = jax.grad(lambda x: jnp.sum(lax.optimization_barrier((x, x))[0] ** 2))
    assert jax.vmap(gradient)(jnp.ones((2, 2))).tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_make_user_context():
    """jax.make_user_context: a default, and a part of jit's cache key (kernels/backends.py, models/shards.py)."""
    context, traced = jax.make_user_context(()), []
    function = jax.jit(lambda x: (traced.append(context.value), x)[1])
    for _ in range(2):
        function(1.0)
        with context((("platform", "gpu"),)):
            function(1.0)
    assert traced == [(), (("platform", "gpu"),)]


def test_promise_in_bounds():
    """Gathers and scatters with mode="promise_in_bounds" (kernels/permute/api.py, kernels/grouped_matmul/xla.py)."""
    x, ids = jnp.arange(4.0), jnp.array([3, 1])
    assert x.at[ids].get(mode="promise_in_bounds").tolist() == [3.0, 1.0]
    assert x.at[ids].add(1.0, mode="promise_in_bounds").tolist() == [0.0, 2.0, 2.0, 4.0]


def test_ragged_dot():
    """lax.ragged_dot_general and ragged_dot, with results in float32 (grouped_matmul/ragged_dot.py, bench/moe.py)."""
    x, w, sizes = jnp.ones((3, 2), jnp.bfloat16), jnp.arange(4.0).reshape(2, 1, 2), jnp.array([1, 2])
    w, columns = w.astype(jnp.bfloat16), lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
    y = lax.ragged_dot_general(x, w, sizes, columns, preferred_element_type=jnp.float32)
    assert (y.dtype, y.tolist()) == (jnp.float32, [[1.0], [5.0], [5.0]])
    assert (lax.ragged_dot(x, w.mT, sizes, preferred_element_type=jnp.float32) == y).all()
    rows = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    assert lax.ragged_dot_general(x, y.astype(x.dtype), sizes, rows)[:, 0, 0].tolist() == [1.0, 10.0]


def test_random_keys():
    """Keys are stacked by scan, have an extended dtype, and keep their numbers (layer_scan/bits.py, tests/golden)."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 7), 2)
    assert (lax.scan(lambda count, key: (count + 1, key), 0, keys)[1] == keys).all()
    assert jnp.issubdtype(keys.dtype, jax.dtypes.extended)
    assert keys.dtype not in (jnp.bfloat16, jnp.float16)
    assert jax.random.bits(keys[1], (2,)).tolist() == [59793856, 3252567191]


def test_may_alias():
    """device_put(may_alias=True) of a view of a CPU array shares its memory (kernels/unstacked.py)."""
    x = jnp.arange(64.0).reshape(2, 32)
    part = jax.device_put(np.asarray(x)[1], may_alias=True)
    assert part.unsafe_buffer_pointer() == x.unsafe_buffer_pointer() + x[0].nbytes


@pytest.mark.parametrize("options", [{"donate_argnames": ("cache",)}, {"donate_argnums": 0}])
def test_donation(options: dict[str, Any]):
    """A donated array is updated in place (bimedix_jax/inference/generate.py, bimedix_jax/training/step.py)."""
    step = jax.jit(lambda cache, x: lax.dynamic_update_slice_in_dim(cache, x, 1, 0), **options)
    cache = jnp.arange(64.0).reshape(2, 32)
    pointer = cache.unsafe_buffer_pointer()
    assert step(cache, jnp.ones((1, 32))).unsafe_buffer_pointer() == pointer


def test_default_device():
    """Within jax.default_device(jax.local_devices(backend=...)[i]), arrays are made there (bimedix_jax/sharding)."""
    device = jax.local_devices(backend="cpu")[1]
    with jax.default_device(device):
        assert {device} == jnp.ones(2).devices() == jax.jit(lambda: jnp.ones(2))().devices()


def test_varying_axes():
    """shard_map(check_vma=True), typeof(...).manual_axis_type, and pcast, whose transpose sums (manual_axes.py)."""

    def loss(w: Any, x: Any) -> Any:
        marked = lax.pcast(w, ("x",), to="varying")
        assert [jax.typeof(y).manual_axis_type.varying for y in (x, w, marked)] == [{"x"}, set(), {"x"}]
        return jnp.sum(x * marked)

    run = jax.shard_map(jax.grad(loss), mesh=MESH, in_specs=(P(), P("x")), out_specs=P(), check_vma=True)
    assert run(jnp.ones(()), jnp.arange(4.0)) == 6.0
    assert jax.typeof(np.ones(2)).manual_axis_type.varying == frozenset()


def test_unchecked_sums():
    """Under shard_map(check_vma=False), psum transposes to psum and all_gather to psum_scatter (models/shards.py)."""

    def loss(x: Any) -> Any:
        return lax.psum(3 * x, ("x",))[0] + 10 * jnp.sum(lax.all_gather(x, ("x",), axis=0, tiled=True))

    run = jax.shard_map(jax.grad(loss), mesh=MESH, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    assert run(jnp.ones(2)).tolist() == [26.0, 26.0]


def test_axis_size():
    """lax.axis_size of several axes of a Mesh, which are Auto by default (models/shards.py, sharding.py)."""
    square = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    assert square.axis_types == 2 * (jax.sharding.AxisType.Auto,)
    run = jax.shard_map(lambda: jnp.array([lax.axis_size(("x", "y"))]), mesh=square, in_specs=(), out_specs=P())
    assert run().tolist() == [4]


def test_multihost_utils():
    """How several processes start, and exchange values, here one by itself (bimedix_jax/distributed.py)."""
    from jax.experimental import multihost_utils

    options = {"heartbeat_timeout_seconds", "initialization_timeout"}
    assert options < set(inspect.signature(jax.distributed.initialize).parameters)
    multihost_utils.sync_global_devices("canary")
    assert np.max(multihost_utils.process_allgather(np.int32(3))) == 3
    assert bytes(np.asarray(multihost_utils.broadcast_one_to_all(np.frombuffer(b"ab", np.uint8)))) == b"ab"
    each = multihost_utils.host_local_array_to_global_array(np.arange(2), MESH, P("x"))
    assert np.asarray(multihost_utils.process_allgather(each, tiled=True)).tolist() == [0, 1]


def test_memory_analysis():
    """Fields of memory_analysis() (bimedix_jax/plan/step.py, bimedix_jax/training/loop.py)."""
    memory: Any = jax.jit(lambda x: x + 1, donate_argnums=0).lower(jnp.ones(8)).compile().memory_analysis()
    assert (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.alias_size_in_bytes) == (32, 32, 32)
    assert memory.peak_memory_in_bytes >= 32
    assert {memory.temp_size_in_bytes, memory.generated_code_size_in_bytes} == {0}


def test_compiler_options():
    """compile(compiler_options=...), and a JaxRuntimeError for what XLA refuses (plan/step.py, distributed.py)."""
    assert issubclass(jax.errors.JaxRuntimeError, RuntimeError)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        compiled(jnp.sin, 1.0, xla_no_such_option=True)


def test_text_of_loops():
    """How compiled loops and their products are printed, and where they come from (plan/hlo.py, plan/saved.py)."""
    loop = jax.named_scope("scope")(lambda x: lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, length=5)[0].sum())
    program = hlo.parse(compiled(jax.grad(loop), jnp.ones((8, 8))).as_text())
    found = [(body, line) for body in program.computations.values() for line in body.instructions.values()]
    loops = [(body, line) for body, line in found if line.opcode == "while"]
    assert [hlo.trip_count(program, body, line) for body, line in loops] == [5, 5]
    assert sorted("transpose(" in line.op_name for _, line in loops) == [False, True]
    assert all("scope" in line.op_name and "jvp(" in line.op_name for _, line in loops)
    assert {line.attribute("lhs_contracting_dims") for _, line in found if line.opcode == "dot"} == {"0", "1"}


def test_text_of_collectives():
    """How a compiled exchange and its groups of devices are printed (bimedix_jax/plan/collectives.py)."""
    run = jax.shard_map(lambda x: lax.psum(x, "x"), mesh=MESH, in_specs=P("x"), out_specs=P())
    lines = hlo.parse(compiled(run, jnp.ones(2)).as_text()).entry.instructions.values()
    assert [collectives.groups_of(line) for line in lines if line.opcode == "all-reduce"] == [((0, 1),)]


def test_graphdef():
    """A GraphDef is a static argument of jit, equal for equal structures only (models/base.py, generate.py)."""
    traced = []
    run = jax.jit(lambda graph, state: (traced.append(graph), nnx.merge(graph, state).w[...])[1], static_argnums=0)
    for value, width in ((1.0, 3), (2.0, 3), (2.0, 4)):
        assert run(*nnx.split(Layer(jnp.full(2, value), width))).tolist() == [value, value]
    assert len(traced) == 2


def test_flat_state():
    """to_flat_state gives sorted (path, Variable), from_flat_state takes any order (training/state.py, shards.py)."""
    layer = Layer(jnp.ones(2))
    layer.lora = Layer(jnp.zeros(3))
    graph, state = nnx.split(layer)
    flat = list(nnx.to_flat_state(state))
    assert [(path, type(variable)) for path, variable in flat] == [(("lora", "w"), nnx.Param), (("w",), nnx.Param)]
    assert nnx.merge(graph, nnx.from_flat_state(flat[::-1])).lora.w.get_value().shape == (3,)


def test_variable_replace():
    """Variable.replace keeps type and metadata, and leaves the original alone (sharding.py, training/state.py)."""
    [(_, variable)] = nnx.to_flat_state(nnx.state(Layer(jax.ShapeDtypeStruct((2,), jnp.float32))))
    hollow = variable.replace(None)
    assert (type(hollow), hollow.get_metadata("axes"), hollow.get_value()) == (nnx.Param, ("layers", None), None)
    assert variable.get_value().shape == (2,)


def test_variable_value():
    """A Variable holds a pytree, whose leaves lax.scan slices in a State (models/linear.py, models/layer_loop.py)."""
    graph, state = nnx.split(Layer(Packed(jnp.arange(2), jnp.arange(2.0))))
    _, layers = lax.scan(lambda _, state: (None, nnx.merge(graph, state).w.get_value()), None, state)
    assert (type(layers), layers.codes.tolist(), layers.scales.tolist()) == (Packed, [0, 1], [0.0, 1.0])


def test_nnx_data_and_filterlib_any():
    """What was nnx.data(None) can be assigned; nnx.split takes filterlib.Any (models/linear.py, adapters.py)."""
    layer = Layer(jnp.ones(2))
    layer.lora = nnx.LoRAParam(jnp.ones(3))
    _, trained, rest = nnx.split(layer, nnx.filterlib.Any(nnx.LoRAParam, nnx.BatchStat), ...)
    assert [[path for path, _ in nnx.to_flat_state(part)] for part in (trained, rest)] == [[("lora",)], [("w",)]]


def test_orbax(tmp_path: Path):
    """StandardCheckpointer restores a pytree sharded as asked; keystr is in manifests (checkpoint/steps.py)."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"a.w": Packed(jnp.int32(7), jnp.arange(2.0))})
    asked = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=NamedSharding(MESH, P("x")))
    with ocp.StandardCheckpointer() as checkpointer:
        like = {"a.w": Packed(jax.ShapeDtypeStruct((), jnp.int32), asked)}
        found = checkpointer.restore(tmp_path / "state", like)["a.w"]
    assert (found.codes, found.scales.tolist(), found.scales.sharding) == (7, [0.0, 1.0], asked.sharding)
    assert jax.tree_util.keystr(jax.tree.flatten_with_path([like])[0][1][0]) == "[0]['a.w'].scales"


def test_optax():
    """optax.tree.norm, apply_updates, and a state that names parameters by DictKey (training/step.py, plan/step.py)."""
    import optax

    params: Any = {"a.w": jnp.array([3.0, 4.0])}
    updated: Any = optax.apply_updates(params, params)
    assert (optax.tree.norm(params), updated["a.w"].tolist()) == (5.0, [6.0, 8.0])
    paths = [path for path, _ in jax.tree.flatten_with_path(optax.adamw(0.1).init(params))[0]]
    assert sum(jax.tree_util.DictKey("a.w") in path for path in paths) == 2


def mosaic(ids: Any, x: Any, interpret: bool) -> Any:
    """Blocks ids[i] of x [3, 16, 128] with their lanes reversed; zeros for block 0."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def kernel(ids_ref: Any, x_ref: Any, y_ref: Any, scratch_ref: Any) -> None:
        @pl.loop(0, 2)
        def _(half: Any) -> None:
            here, lanes = pl.ds(pl.multiple_of(8 * half, 8), 8), 127 - lax.broadcasted_iota(jnp.int32, (8, 128), 1)
            scratch_ref[here, :] = jnp.take_along_axis(x_ref[here, :], lanes, axis=1, mode="promise_in_bounds")

        y_ref[...] = jnp.zeros_like(y_ref)

        @pl.when(ids_ref[pl.program_id(0)] > 0)
        def _() -> None:
            y_ref[...] = scratch_ref[...]

    read, write = (
        pl.BlockSpec((None, 16, 128), lambda i, ids: (ids[i], 0, 0)),
        pl.BlockSpec((16, 128), lambda i, _: (i, 0)),
    )
    spec: Any = {"num_scalar_prefetch": 1, "grid": (2,), "scratch_shapes": (pltpu.VMEM((16, 128), jnp.float32),)}
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((32, 128), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(in_specs=[read], out_specs=write, **spec),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=2**24),
        cost_estimate=pl.CostEstimate(flops=77, bytes_accessed=5, transcendentals=0),
        interpret=interpret,
        name="canary",
    )(ids, x)


def test_pallas_tpu_interpreted():
    """What the kernels for TPUs are made of, interpreted (grouped_matmul/mosaic_tpu.py, nf4/mosaic_tile.py)."""
    x = jnp.arange(3.0 * 16 * 128).reshape(3, 16, 128)
    expected = jnp.concatenate([x[2, :, ::-1], jnp.zeros((16, 128))])
    np.testing.assert_array_equal(mosaic(jnp.array([2, 0]), x, True), expected)


def triton(x: Any, w: Any, interpret: bool) -> Any:
    """x [30, 16] @ w [16, 16] in tiles of 16 rows."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plt
    from jax.sharding import ManualAxisType

    def kernel(x_ref: Any, w_ref: Any, y_ref: Any) -> None:
        rows, columns = 16 * pl.program_id(0) + jnp.arange(16), jnp.arange(pl.next_power_of_2(13))
        mask = jnp.broadcast_to((rows < 30)[:, None], (16, 16))
        x = plt.load(x_ref.at[rows[:, None], columns[None]], mask=mask, other=0)
        if not interpret:  # there is no interpreter for PTX
            asm: Any = {
                "constraints": "=f,f",
                "pack": 1,
                "result_shape_dtypes": [jax.ShapeDtypeStruct(x.shape, x.dtype)],
            }
            [x] = plt.elementwise_inline_asm("mov.b32 $0, $1;", args=[x], **asm)
        exact: Any = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        y = lax.dot_general(x, w_ref[...], (((1,), (0,)), ((), ())), precision=exact)
        plt.store(y_ref.at[rows[:, None], columns[None]], y, mask=mask)

    out = jax.ShapeDtypeStruct((30, 16), x.dtype, manual_axis_type=ManualAxisType(varying=frozenset()))
    params = plt.CompilerParams(num_warps=4, num_stages=2)
    return pl.pallas_call(kernel, out, grid=(2,), compiler_params=params, interpret=interpret, name="canary")(x, w)


def test_pallas_triton_interpreted():
    """What the kernels for GPUs are made of, interpreted (grouped_matmul/triton.py, nf4/triton_tile.py)."""
    x = jnp.arange(30.0 * 16).reshape(30, 16)
    np.testing.assert_array_equal(triton(x, jnp.eye(16), True), x)


@needs_cuda
def test_absent_gpu(tmp_path: Path):
    """Text and files of a loop over a Triton kernel, compiled for a GPU (plan/hardware.py, plan/codegen/gpu.py)."""
    from jax.experimental import topologies

    from bimedix_jax.plan import work
    from bimedix_jax.plan.codegen.gpu import LAUNCH, PTX

    target = {"target_config": hardware.TARGETS["a100-80gb"], "topology_name": "a100-80gb", "topology": "1x1x1"}
    [device] = topologies.get_topology_desc(platform="cuda", **target).devices
    x, w = (abstract(device, jnp.float32, rows, 16) for rows in (30, 16))
    options = {"xla_dump_to": str(tmp_path), "xla_gpu_enable_latency_hiding_scheduler": True, **PTX}
    with backends.use(device=device):
        done = compiled(lambda *xw: lax.fori_loop(0, 5, lambda _, x: triton(x, xw[1], False), xw[0]), x, w, **options)
    text = done.as_text()
    assert (hlo.TRIP_COUNT.findall(text), work.GRID.findall(text)) == (["5"], [("2", "1")])
    assert f'custom_call_target="{work.TRITON}"' in text
    [launches] = (LAUNCH.findall(path.read_text()) for path in tmp_path.glob("*thunk_sequence.txt"))
    assert [launch[:2] for launch in launches if launch[0] == "canary"] == [("canary", "2, 1, 1")]
    assert any("canary" in path.read_text() for path in tmp_path.glob("*.ptx"))


@needs_tpu
def test_absent_tpu(monkeypatch: pytest.MonkeyPatch):
    """FLOPs, VMEM and mesh of a Mosaic kernel, compiled for a TPU (plan/hardware.py, plan/codegen/tpu.py)."""
    from jax.experimental import mesh_utils, topologies

    from bimedix_jax.plan.codegen.tpu import KERNEL

    for name, value in hardware.NO_TPU.items():
        monkeypatch.setenv(name, value)
    [one], four = (topologies.get_topology_desc(**hardware.tpu_slice("v5e", count)).devices for count in (1, 4))
    assert mesh_utils.create_device_mesh((1, 4), four, allow_split_physical_axes=True).shape == (1, 4)
    ids, x = abstract(one, jnp.int32, 2), abstract(one, jnp.float32, 3, 16, 128)
    done = compiled(lambda ids, x: mosaic(ids, x, False), ids, x)
    assert done.cost_analysis()["flops"] == 77.0
    assert [kernel["name"] for kernel in KERNEL.finditer(done.as_text())] == ["canary"]
