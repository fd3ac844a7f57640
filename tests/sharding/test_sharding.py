"""Sharding changes results by rounding only: gradients, loss, routes, generated tokens, for all mesh axes."""

import contextlib
import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from tiny import GROUPED, quick_kernels, tiny

from bimedix_jax.adapters import add_lora
from bimedix_jax.checkpoint import store
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import RouterTraining
from bimedix_jax.kernels.nf4 import NF4Tensor, dequantize, quantize
from bimedix_jax.kernels.nf4.units import split_units
from bimedix_jax.models.config import LoraConfig, RouterConfig
from bimedix_jax.models.init import init_random
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.quantise import quantise_base
from bimedix_jax.sharding.layout import layout_of
from bimedix_jax.sharding.placement import place
from bimedix_jax.sharding.rules import make_mesh
from bimedix_jax.training.state import split_params
from bimedix_jax.training.step import make_eval_step, make_gradient

CONFIG = tiny(GROUPED, vocab_size=48, hidden_size=64, intermediate_size=128, head_dim=32)
LORA = LoraConfig(rank=2, alpha=4.0)
SCOPES = {(1, 2, 2, 2): "global", (2, 4, 1, 1): "micro_batch", (2, 1, 4, 1): "sequence", (4, 1, 1, 2): "global"}
"""Meshes of eight devices, and the scope of the load-balancing loss that each runs with."""


def make_model(packed: bool, lora: LoraConfig = LORA, **changes) -> Mixtral:
    model = init_random(dataclasses.replace(CONFIG, **changes), dtype="float32", std=0.1)
    model = add_lora(quantise_base(model) if packed else model, lora)
    factors = list(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)))
    for number, (_, variable) in enumerate(factors):
        noise = jax.random.normal(jax.random.key(number), variable.get_value().shape)
        variable.set_value(variable.get_value() + 0.05 * noise)
    nnx.update(model, nnx.from_flat_state(factors))
    return model


def make_batch(parts: int, rows: int = 8, length: int = 12) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shape = (parts, 8, length)
    segment_ids = np.ones(shape, np.int32)
    segment_ids[0, 1, 9:], segment_ids[-1, 3:5], segment_ids[0, 2, 7:] = 0, 0, 2
    mask = (random.random(shape) < 0.6) & (segment_ids != 0)
    tokens = random.integers(0, CONFIG.vocab_size, shape, dtype=np.int32)
    batch = {"tokens_BT": tokens, "segment_ids_BT": segment_ids, "loss_mask_BT": mask}
    return {name: x[:, :rows] for name, x in batch.items()}


def gradients_of(model: Mixtral, batch: dict[str, np.ndarray], scope) -> tuple[dict, dict]:
    structure, params, frozen = split_params(model)
    router = RouterTraining(aux_loss_coef=0.1, aux_scope=scope, z_loss_coef=0.01)
    return jax.jit(make_gradient(structure, router, "none"))(params, frozen, batch)


def assert_alike(ours, theirs, tolerance=1e-5):
    def compare(path, one, other):
        scale = np.max(np.abs(np.asarray(other)))
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(scale, 1e-6), err_msg=str(path))

    jax.tree.map_with_path(compare, ours, theirs)


@pytest.mark.parametrize(("sizes", "packed"), [((1, 2, 2, 2), False), *((sizes, True) for sizes in SCOPES)], ids=str)
def test_gradients_and_sums_equal_those_of_one_device(sizes, packed):
    """The first mesh, which has all axes, with the kernels of the platform."""
    model, batch = make_model(packed), make_batch(parts=2)
    with contextlib.nullcontext() if sizes == (1, 2, 2, 2) else quick_kernels():
        expected, sums = gradients_of(model, batch, SCOPES[sizes])
        gradients, sharded_sums = gradients_of(place(model, make_mesh(*sizes)), batch, SCOPES[sizes])
    assert_alike(gradients, expected)
    assert_alike(sharded_sums, sums)


@pytest.mark.parametrize("experts", [2, 8])
@quick_kernels()
def test_fewer_experts_on_a_device_than_a_token_chooses(experts):
    """Also with one expert on each device."""
    router = RouterConfig(num_experts=experts, top_k=2)
    model, batch = make_model(False, router=router), make_batch(parts=1)
    expected, _ = gradients_of(model, batch, "global")
    gradients, _ = gradients_of(place(model, make_mesh(fsdp=8 // experts, expert=experts)), batch, "global")
    assert_alike(gradients, expected)


def gathers(jaxpr) -> int:
    """Number of all_gather operations in a jaxpr, including inner ones."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name == "all_gather"
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            found += gathers(inner) if hasattr(inner, "eqns") else 0
    return found


def test_gathered_parameters_are_not_kept_for_the_backward_pass():
    """Also without rematerialisation, the backward pass gathers the parameters of each layer again."""
    structure, params, frozen = split_params(place(make_model(True), make_mesh(fsdp=8)))
    batch = make_batch(1)
    evaluation = jax.make_jaxpr(make_eval_step(structure))(params, frozen, {name: x[0] for name, x in batch.items()})
    gradient = jax.make_jaxpr(make_gradient(structure, RouterTraining(), "none"))(params, frozen, batch)
    once = gathers(evaluation.jaxpr)
    assert once > 10
    assert gathers(gradient.jaxpr) > 1.5 * once


@quick_kernels()
def test_adapters_on_some_matrices_only():
    """Slots of adapters number the experts of all devices."""
    model = make_model(
        False, LoraConfig(rank=2, alpha=4.0, targets=(r"layers\.1\.moe\.experts\.[13]\.w[12]", "router"))
    )
    expected, _ = gradients_of(model, make_batch(1), "global")
    gradients, _ = gradients_of(place(model, make_mesh(fsdp=2, expert=2, tensor=2)), make_batch(1), "global")
    assert_alike(gradients, expected)


@quick_kernels()
def test_every_parameter_can_train_on_a_mesh():
    """Without adapters, with tied embeddings."""
    model = init_random(dataclasses.replace(CONFIG, tie_embeddings=True), dtype="float32", std=0.1)
    expected, _ = gradients_of(model, make_batch(1), "global")
    gradients, _ = gradients_of(place(model, make_mesh(fsdp=2, expert=2, tensor=2)), make_batch(1), "global")
    assert_alike(gradients, expected)


@pytest.mark.parametrize("rows", [8, 2, 1], ids=lambda rows: f"{rows} rows")
def test_forward_pass_on_a_mesh(rows):
    """Also with rows that the mesh cannot divide."""
    model, batch = make_model(True), make_batch(1, rows)
    sharded = place(model, make_mesh(fsdp=2, expert=2, tensor=2))
    tokens, segment_ids = batch["tokens_BT"][0], batch["segment_ids_BT"][0]
    ours, theirs = sharded(tokens, segment_ids, groups=1), model(tokens, segment_ids, groups=1)
    np.testing.assert_array_equal(ours.routing.experts_LBTK, theirs.routing.experts_LBTK)
    np.testing.assert_allclose(ours.logits_BTV, theirs.logits_BTV, atol=1e-4)
    np.testing.assert_allclose(ours.aux_loss, theirs.aux_loss, rtol=1e-5)
    np.testing.assert_allclose(ours.z_loss, theirs.z_loss, rtol=1e-5)


def test_generation_on_a_mesh():
    from bimedix_jax.inference.generate import generate

    model = make_model(True)
    prompts = [np.arange(1, 6), np.arange(3, 12)]
    sharded = place(model, make_mesh(fsdp=2, expert=2, tensor=2))
    assert list(map(list, generate(sharded, prompts, max_new_tokens=6))) == list(
        map(list, generate(model, prompts, max_new_tokens=6))
    )


@quick_kernels()
def test_the_held_out_loss_on_a_mesh():
    model, batch = make_model(False), {name: x[0] for name, x in make_batch(1).items()}
    sums = []
    for placed in (model, place(model, make_mesh(fsdp=2, expert=2, tensor=2))):
        structure, params, frozen = split_params(placed)
        sums.append(make_eval_step(structure)(params, frozen, batch))
    np.testing.assert_allclose(*sums, rtol=1e-5)


def test_packed_bytes_are_gathered_inside_the_layer_loop():
    """Base weights are gathered as packed bytes, and never more than one layer."""
    model = place(make_model(True), make_mesh(fsdp=8))
    structure, params, frozen = split_params(model)
    gradient = jax.jit(make_gradient(structure, RouterTraining(), "layer"))
    compiled = gradient.lower(params, frozen, make_batch(1)).compile()
    gathers = re.findall(r"= \(?(\w+)\[([\d,]*)\][^=]*? all-gather(?:-start)?\(", compiled.as_text() or "")
    packed = [math.prod(map(int, shape.split(","))) for kind, shape in gathers if kind == "u8"]
    layer = CONFIG.router.num_experts * CONFIG.hidden_size * CONFIG.intermediate_size // 2
    assert max(packed, default=0) == layer, "expected one matrix of all experts of a layer"
    largest = max(math.prod(map(int, shape.split(",") if shape else [])) for kind, shape in gathers if kind != "u8")
    assert largest < layer, "only adapters, embeddings and scales may be gathered unpacked"


def test_splitting_units_keeps_every_value():
    w = jax.random.normal(jax.random.key(0), (3, 256, 512))
    for transposed in (False, True):
        t = quantize(w, batch_dims=1)
        t = t.mT if transposed else t
        whole = dequantize(t)
        for axis in (-1, -2):
            parts = np.split(np.asarray(whole), 4, axis=axis)
            cut = split_units(t, axis, 4)
            for number in range(4):
                np.testing.assert_array_equal(dequantize(cut[:, number]), parts[number])


def test_splitting_a_block_raises():
    t = quantize(jax.random.normal(jax.random.key(0), (64, 128)))
    with pytest.raises(ValueError, match="splitting blocks of 64"):
        split_units(t, -1, 4)


def test_devices_store_equal_parts():
    """Each of eight devices has an eighth of every matrix, including adapters and packed bytes."""
    model = make_model(True)
    mesh = make_mesh(fsdp=8)
    places = dict(layout_of(model, mesh).places)
    assert places["layers.moe.w1.w"].specs[0] == P(None, None, "fsdp")
    by_expert = dict(layout_of(model, make_mesh(fsdp=2, expert=2, tensor=2)).places)
    assert by_expert["layers.moe.w1.w"].specs[0] == P(None, ("expert", "fsdp"), "tensor", None)
    assert by_expert["layers.moe.w1.lora.a"].specs[0][1] == ("expert", "fsdp")
    for path, variable in nnx.to_flat_state(nnx.state(place(model, mesh))):
        value = variable.get_value()
        leaf = value.packed if isinstance(value, NF4Tensor) else value
        here = math.prod(leaf.addressable_shards[0].data.shape)
        if ".".join(map(str, path)).endswith((".w", ".a", "embed.table")) and math.prod(leaf.shape) > 64:
            assert here * 8 == math.prod(leaf.shape), path


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"expert": 8}, "4 experts cannot be divided among 8"),
        ({"tensor": 8}, "heads cannot be divided among 8"),
        ({"fsdp": 3}, "needs 3 devices, there are 8"),
        ({"fsdp": 2, "tensor": 4}, "2 key heads cannot be divided among 4"),
    ],
)
def test_meshes_that_do_not_fit_raise(sizes, message):
    with pytest.raises(BimedixError, match=message):
        place(make_model(False), make_mesh(**sizes))


@pytest.mark.parametrize("folder", ["hf", "native"])
@quick_kernels()
def test_a_model_is_loaded_onto_a_mesh(folder, tmp_path):
    """With adapters, from bfloat16 weights that loading packs, and from packed ones."""
    import bimedix_jax as bmx

    plain = init_random(CONFIG, dtype="bfloat16", std=0.1)
    bmx.export_hf(plain, tmp_path / "hf")
    adapted = add_lora(bmx.load(tmp_path / "hf", base="nf4", dtype="float32"), LORA)
    store.save_adapter(adapted, tmp_path / "adapter")
    bmx.save(bmx.load(tmp_path / "hf", base="nf4", dtype="float32"), tmp_path / "native")
    options = {"base": "nf4", "dtype": "float32", "adapter": tmp_path / "adapter"}
    one = bmx.load(tmp_path / folder, **options)
    many = bmx.load(tmp_path / folder, **options, mesh=make_mesh(fsdp=2, expert=2, tensor=2))
    batch = make_batch(1)
    np.testing.assert_allclose(many(batch["tokens_BT"][0]).logits_BTV, one(batch["tokens_BT"][0]).logits_BTV, atol=1e-4)
    with pytest.raises(BimedixError, match="already sharded"):
        place(many, make_mesh())
