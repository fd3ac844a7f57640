"""Bytes that compiled programs read: known counts of small programs, and decoding compiled for absent devices."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bimedix_jax.adapters import add_lora
from bimedix_jax.experiment import override
from bimedix_jax.inference.decoding_layout import store_factors
from bimedix_jax.kernels import backends
from bimedix_jax.kernels.grouped_matmul import grouped_matmul
from bimedix_jax.kernels.layer_scan import InPlace, layer_scan
from bimedix_jax.kernels.nf4 import NF4Tensor, quantize
from bimedix_jax.kernels.nf4.rows import RowMajor
from bimedix_jax.models import shards
from bimedix_jax.models.config import MIXTRAL_8X7B, LoraConfig
from bimedix_jax.models.mixtral import Mixtral
from bimedix_jax.plan import hardware, hlo, reads, traffic, work
from bimedix_jax.plan.step import decoding_step, for_inference, on_one_device, training_arguments
from bimedix_jax.presets import smoke
from bimedix_jax.quantise import quantise_base
from bimedix_jax.sharding.layout import place_packed
from bimedix_jax.sharding.rules import make_mesh


def compiled_text(function, *operands) -> str:
    return jax.jit(function).lower(*operands).compile().as_text() or ""


def test_a_loop_reads_one_slice_a_trip():
    """Five layers of w [5, 64, 64], each read once by the product with x [8, 64]; the rest is much smaller."""
    x, w = jnp.ones((8, 64)), jnp.ones((5, 64, 64))
    found = reads.readings(hlo.parse(compiled_text(lambda x, w: lax.scan(lambda x, w: (x @ w, None), x, w)[0], x, w)))
    slices = [reading for reading in found if "slice" in reading.instruction or reading.opcode == "dynamic-slice"]
    assert sum(reading.total for reading in slices) == pytest.approx(5 * 64 * 64 * 4, rel=0.01)
    [product] = [reading for reading in found if "dot" in reading.operation and reading.times == 5]
    assert product.bytes == (8 * 64 + 64 * 64) * 4


COPIED = """HloModule m
%copied (i: u8[5,64]) -> u8[5,64] {
  %i = u8[5,64]{1,0} parameter(0)
  ROOT %c = u8[5,64]{1,0} copy(%i)
}
%fused (w: u8[5,64], j: s32[]) -> u8[1,64] {
  %w = u8[5,64]{1,0} parameter(0)
  %f = u8[5,64]{1,0} fusion(%w), kind=kLoop, calls=%copied
  %j = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %d = u8[1,64]{1,0} dynamic-slice(%f, %j, %z), dynamic_slice_sizes={1,64}
}
ENTRY %main (v: u8[5,64], k: s32[]) -> u8[1,64] {
  %v = u8[5,64]{1,0} parameter(0)
  %k = s32[] parameter(1)
  ROOT %s = u8[1,64]{1,0} fusion(%v, %k), kind=kLoop, calls=%fused
}
"""
"""As for a TPU: the layout changes inside of the fusion that slices."""


def test_a_slice_of_a_fused_copy_reads_its_part():
    program = hlo.parse(COPIED)
    assert traffic.read(program, program.entry, program.entry.root) == 64 + 4
    whole = hlo.parse(COPIED.replace("dynamic-slice(%f, %j, %z), dynamic_slice_sizes={1,64}", "negate(%f)"))
    assert traffic.read(whole, whole.entry, whole.entry.root) == 5 * 64


KERNEL = """HloModule m
ENTRY %main (u: s32[TILES], x: bf16[ROWS,64], w: u8[24,128,1,32], c: u8[24,128,1], n: f32[24,1], o: f32[24]) -> OUT {
  %u = s32[TILES]{0} parameter(0)
  %x = bf16[ROWS,64]{1,0} parameter(1)
  %w = u8[24,128,1,32]{3,2,1,0} parameter(2)
  %c = u8[24,128,1]{2,1,0} parameter(3)
  %n = f32[24,1]{1,0} parameter(4)
  %o = f32[24]{0} parameter(5)
  %t = f32[TABLE]{0} constant({...})
  ROOT %k = OUT custom-call(%u, %u, %u, %x, %w, %c, %n, %o, %t), custom_call_target="__gpu$xla.gpu.triton", OPERATION
}
"""
"""A grouped product with one of three layers of eight experts [128, 64], in tiles of 16 rows."""
EXPERT = 128 * 32 + 128 + 4 + 4


def kernel(rows: int, tiles: int, table: int) -> hlo.Program:
    text = KERNEL.replace("TILES", str(tiles)).replace("ROWS", str(rows)).replace("TABLE", str(table))
    types = (
        f"s32[{tiles}]{{0}}, s32[{tiles}]{{0}}, s32[{tiles}]{{0}}, bf16[{rows},64]{{1,0}}, u8[24,128,1,32]{{3,2,1,0}}"
    )
    name = 'metadata={op_name="jit(f)/grouped_matmul_16x64x64/pallas_call"}'
    grid = f"backend_config={{grid_x = {2 * tiles} : i32, grid_y = 1 : i32}}"
    operation = f"operand_layout_constraints={{{types}}}, {name}, {grid}"
    return hlo.parse(text.replace("OUT", f"bf16[{rows},128]{{1,0}}").replace("OPERATION", operation))


def kernel_bytes(rows: int, tiles: int, table: int) -> float:
    program = kernel(rows, tiles, table)
    return traffic.read(program, program.entry, program.entry.root) - 3 * 4 * tiles - 2 * rows * 64 - 4 * table


@pytest.mark.parametrize("table", [256, 24])
def test_a_kernel_reads_the_experts_that_own_rows(table):
    """A table as long as there are experts is read whole all the same."""
    assert kernel_bytes(2, 1 + 8, table) == 2 * EXPERT
    assert kernel_bytes(40, 3 + 8, table) == 8 * EXPERT
    assert kernel_bytes(1, 1 + 8, table) == EXPERT
    assert kernel_bytes(40, 3, table) == EXPERT, "a projection: all tiles are of one matrix"


def test_tiles_without_rows_do_no_flops():
    """Two columns of tiles of 16 x 64, which contract 64, and eight groups, but for the last case. The last tile of a
    large group is half full on average."""
    for rows, tiles, busy in ((2, 9, 2), (40, 11, 8), (320, 28, 24), (40, 3, 3)):
        program = kernel(rows, tiles, 256)
        assert work.flops_of(program, program.entry, program.entry.root).total == busy * 2 * (2 * 16 * 64 * 64)


SMALL = dataclasses.replace(
    MIXTRAL_8X7B, num_layers=3, hidden_size=4096, intermediate_size=7168, num_heads=8, num_kv_heads=2, vocab_size=1024
)


@pytest.mark.parametrize(("name", "rank"), [("a100-80gb", 0), ("a100-80gb", 128), ("v5e", 128)])
def test_decoding_reads_little_more_than_it_needs(name, rank):
    """On a TPU, scales are padded to 128 in a row: with narrower rows than here, it would read more. Adapters that are
    not merged are read in bfloat16, those of the experts in use."""
    [device] = hardware.devices(name)
    model = quantise_base(Mixtral(SMALL, "bfloat16"))
    if rank:
        model = add_lora(model, LoraConfig(rank=rank, alpha=64.0, targets=("q", "k", "v", "w1", "w2", "w3", "router")))
    placed = for_inference(on_one_device(model, device), [device])
    step = decoding_step(placed, [device], rows=1, length=100)
    program = hlo.parse(step.text)
    plain = on_one_device(model, device).model  # without the padding of weights stored by rows
    store_factors(plain)
    needed = reads.needed(plain, 1, 101)
    weights = 3 * 3 * 2 * 4096 * 7168 * (0.5 + 1 / 64 + 4 / 64 / 256)
    assert needed["experts"] == pytest.approx(weights + 3 * 3 * 2 * 2 * rank * (4096 + 7168), rel=1e-3)
    assert 1 <= reads.total(reads.readings(program)) / sum(needed.values()) <= 1.15


@pytest.mark.parametrize(("name", "count"), [("a100-80gb", 1), ("v5e", 1), ("v5e", 4)])
def test_a_gradient_copies_no_packed_weights(name, count):
    """Of the rows, through a loop over layers that are computed again. On one device, no instruction but kernels has
    packed bytes. On several, each gathers a layer from its own parts, and only the gather has a whole layer."""
    devices = hardware.devices(name, count)
    layers, experts, width, rows = 3, 4, 256, 4096
    t = jax.eval_shape(lambda w: quantize(w, batch_dims=2), jax.ShapeDtypeStruct((layers, experts, width, width), "f4"))
    t = t if name == "a100-80gb" else jax.eval_shape(RowMajor.of, t)
    mesh = make_mesh(devices=devices)
    place = place_packed(t, False, mesh)

    def loss(x, t, sizes):
        def body(sizes, x, layer, slot):
            return jnp.sin(grouped_matmul(x, shards.gather_parameter("w", layer), sizes)), None, slot

        given = t if place.gathered else InPlace(t)
        return jnp.sum(layer_scan(jax.checkpoint(body, prevent_cse=False), sizes, x, given)[0].astype("f4"))

    def gradient(*operands):
        with shards.split(shards.Split((), () if place.storage is None else (("w", place.storage),))):
            return jax.grad(loss)(*operands)

    specs = (P(), jax.tree.unflatten(jax.tree.structure(t), place.specs), P())
    operands = (jax.ShapeDtypeStruct((rows, width), "bfloat16"), t, jax.ShapeDtypeStruct((experts,), np.int32))
    operands = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), operands, specs
    )
    with backends.use(device=devices[0]):
        function = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False))
        text = function.lower(*operands).compile().as_text() or ""
    passed = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "custom-call", "constant")
    holders = {
        (instruction.opcode, math.prod(shape.dims))
        for computation in hlo.parse(text).computations.values()
        for instruction in computation.instructions.values()
        for shape in instruction.shapes
        if shape.dtype == "u8" and instruction.opcode not in passed
    }
    layer = experts * width * width // 2  # on a TPU the scales, padded to 128 a row, are as large
    if count == 1:
        assert not holders
    else:
        assert [opcode for opcode, size in holders if size == layer] == ["all-gather"]
        assert all(size <= layer // count * layers for opcode, size in holders if opcode != "all-gather")
    kernel = "/unpack_" if name == "a100-80gb" else "/grouped_nf4_rows/pallas_call"
    assert text.count(kernel) >= 2, "the kernels of the forward pass and of the gradient dequantise it"


@pytest.mark.parametrize("count", [1, 4])
def test_a_tpu_trains_on_weights_stored_by_rows(count):
    """The step that `bimedix train` and `bimedix plan` compile. Devices divide the experts and the rows of matrices."""
    small = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 2, "head_dim": 64}
    changes = {f"model.random.{name}": size for name, size in small.items()} | {"model.dtype": "bfloat16"}
    experiment = override(smoke(), changes | {"batch.rows": 4})
    config, devices = experiment.model.random, hardware.devices("v5e", count)
    assert config is not None
    (_, frozen, _), _ = training_arguments(config, experiment, devices)
    w1 = frozen["layers.moe.w1.w"]
    assert isinstance(w1, RowMajor)
    assert w1.packed.shape == (2, 4, 512, 128)
    if count > 1:
        assert {leaf.sharding.spec[1] for leaf in jax.tree.leaves(w1)} == {"fsdp"}
        specs = [leaf.sharding.spec for leaf in jax.tree.leaves(frozen["layers.attention.q.w"])]
        assert specs == [P(None, "fsdp", None), P(None, "fsdp", None), P(None, None, "fsdp"), P(None)]
    assert isinstance(frozen["layers.attention.k.w"], RowMajor)
    (_, frozen, _), _ = training_arguments(config, experiment, jax.devices()[:count])
    assert isinstance(frozen["layers.moe.w1.w"], NF4Tensor), "a CPU reads bytes in their order"
