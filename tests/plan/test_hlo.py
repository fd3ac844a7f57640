"""Costs parsed from compiled programs: loops, matrix products, bytes, collectives and their overlap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bimedix_jax.costs import devices
from bimedix_jax.errors import BimedixError
from bimedix_jax.plan import collectives, hlo, roofline, traffic, work

A100 = devices.DEVICES["a100-80gb"]
SCHEDULED = """HloModule jit_f, is_scheduled=true

%cond (c: (s32[], bf16[64,64])) -> pred[] {
  %c = (s32[]{:T(128)}, bf16[64,64]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %end = s32[] constant(12)
  ROOT %lt = pred[] compare(%i, %end), direction=LT
}

%body (b: (s32[], bf16[64,64])) -> (s32[], bf16[64,64]) {
  %b = (s32[], bf16[64,64]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %x = bf16[64,64]{1,0} get-tuple-element(%b), index=1
  %one = s32[] constant(STEP)
  %next = s32[] add(%j, %one)
  %start = (bf16[64,64]{1,0}, bf16[512,64]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %y = bf16[64,64]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %done = bf16[512,64]{1,0} all-gather-done(%start)
  ROOT %t = (s32[], bf16[64,64]{1,0}) tuple(%next, %y)
}

ENTRY %main (p: bf16[64,64]) -> bf16[64,64] {
  %p = bf16[64,64]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[64,64]{1,0}) tuple(%zero, %p)
  %loop = (s32[], bf16[64,64]{1,0}) while(%init), condition=%cond, body=%body
  ROOT %out = bf16[64,64]{1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(("step", "trips"), [("1", 12), ("5", 3)])
def test_a_loop_counts_as_often_as_it_runs(step, trips):
    program = hlo.parse(SCHEDULED.replace("STEP", step))
    costs = roofline.costs_of(program, A100)
    assert costs.total_flops == trips * 2 * 64**3
    assert costs.exchanges == {"all-gather": trips}
    assert costs.collectives["all-gather"] == trips * 512 * 64 * 2 * 7 / 8
    assert costs.bytes == trips * (3 * 64 * 64 * 2 + 2 * 3 * 4 - 12), "the product, and the counter's addition"


def test_kernels_between_start_and_done_hide_a_collective():
    late = SCHEDULED.replace("STEP", "1")
    [product] = [line for line in late.splitlines() if " dot(" in line]
    [done] = [line for line in late.splitlines() if "all-gather-done" in line]
    early = late.replace(f"{product}\n{done}", f"{done}\n{product}")
    hidden, exposed = (roofline.costs_of(hlo.parse(text), A100) for text in (late, early))
    assert hidden.device_seconds == pytest.approx(exposed.device_seconds)
    assert hidden.network_seconds == exposed.network_seconds > 0
    assert exposed.step_seconds == pytest.approx(exposed.device_seconds + exposed.network_seconds)
    assert hidden.step_seconds < exposed.step_seconds


def test_a_collective_split_over_tpu_fusions_counts_once():
    """One fusion starts it, one continues it beside a product, one waits for it. Each contains a copy."""
    inside = """
%NAME (a: f32[128,512]) -> f32[1024,512] {
  %a = f32[128,512] parameter(0)
  ROOT %g = f32[1024,512] all-gather(%a), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}
"""
    text = f"""HloModule m
{inside.replace("NAME", "begin")}{inside.replace("NAME", "carry")}{inside.replace("NAME", "end")}
ENTRY %main (p: f32[128,512]) -> f32[1024,512] {{
  %p = f32[128,512] parameter(0)
  %async-collective-start.1 = f32[1024,512] fusion(%p), kind=kCustom, calls=%begin
  %fusion.2 = f32[1024,512] fusion(%p), kind=kOutput, calls=%carry
  ROOT %async-collective-done.1 = f32[1024,512] fusion(%p), kind=kCustom, calls=%end
}}
"""
    v5e = devices.DEVICES["v5e"]
    costs = roofline.costs_of(hlo.parse(text), v5e)
    assert costs.exchanges == {"all-gather": 1}
    assert costs.collectives["all-gather"] == 1024 * 512 * 4 * 7 / 8
    assert max(costs.network_seconds, costs.device_seconds) == pytest.approx(costs.step_seconds)


def test_a_loop_with_an_unknown_trip_count_raises():
    text = SCHEDULED.replace("STEP", "1").replace("direction=LT", "direction=NE")
    with pytest.raises(BimedixError, match="The trip count of the loop loop depends on data"):
        roofline.costs_of(hlo.parse(text), A100)
    with pytest.raises(BimedixError, match="does not print the compiled program"):
        hlo.parse(None)


def compiled_text(function, *operands):
    return jax.jit(function).lower(*operands).compile().as_text()


def test_products_of_a_compiled_program():
    """5 layers of [B, D] x [D, D] compiled by XLA, and their gradient, which adds twice as many FLOPs."""
    x, w = jnp.zeros((8, 33)), jnp.zeros((5, 33, 33))

    def loss(w):
        y, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
        return jnp.sum(y)

    forward = roofline.costs_of(hlo.parse(compiled_text(loss, w)), A100).total_flops
    both = roofline.costs_of(hlo.parse(compiled_text(jax.grad(loss), w)), A100).total_flops
    assert forward == 5 * 2 * 8 * 33 * 33
    assert both == 3 * forward


def test_collectives_of_a_compiled_program():
    """A scan over 3 layers on 8 devices: one gather for each layer, and one sum at the end."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def body(w_LDF, x_BD):
        def layer(x, w):
            return jnp.tanh(x @ lax.all_gather(w, "x", tiled=True)), None

        y, _ = lax.scan(layer, x_BD, w_LDF)
        return lax.psum(jnp.sum(y), "x")

    run = jax.shard_map(body, mesh=mesh, in_specs=(P(None, "x"), P("x")), out_specs=P(), check_vma=False)
    w = jax.ShapeDtypeStruct((3, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "x")))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    costs = roofline.costs_of(hlo.parse(jax.jit(run).lower(w, x).compile().as_text()), A100)
    assert costs.exchanges == {"all-gather": 3, "all-reduce": 1}
    assert costs.collectives == {"all-gather": 3 * 64 * 64 * 4 * 7 / 8, "all-reduce": 2 * 4 * 7 / 8}


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", ((0, 2), (1, 3))),
        ("replica_groups=[2,2]<=[4], dimensions={0}", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, use_global_device_ids=true", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, channel_id=1", ((0, 1, 2, 3),)),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
    ],
)
def test_groups_of_devices(written, groups):
    instruction = hlo.parse_instruction(f"%a = f32[4]{{0}} all-gather(%x), {written}")
    assert instruction is not None
    assert collectives.groups_of(instruction) == groups


def test_a_group_across_nodes_is_as_fast_as_the_network():
    near, far = (collectives.Collective("all-gather", 2**30, (tuple(range(start, start + 8)),)) for start in (0, 4))
    assert roofline.network_seconds(far, A100) == pytest.approx(12 * roofline.network_seconds(near, A100))


CONVOLUTIONS = {
    "a plain product": ("f32[16,32]", "f32[8,16]", "f32[8,32]", "dim_labels=bf_io->bf", 2 * 8 * 16 * 32),
    "a product with two output axes": (
        "f32[4,16,32]",
        "f32[8,16,1]",
        "f32[8,4,32]",
        "window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_0io->b0f",
        2 * 8 * 16 * 32 * 4,
    ),
    "a stride with padding": (
        "f32[3,5,6]",
        "f32[2,5,8]",
        "f32[2,6,4]",
        "window={size=3 stride=2 pad=1_1}, dim_labels=bf0_0io->bf0",
        2 * 2 * 5 * 6 * 11,
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_products_that_the_tpu_compiler_turns_into_convolutions(name):
    right, left, out, how, flops = CONVOLUTIONS[name]
    text = f"""HloModule m
ENTRY %main (a: {left}, b: {right}) -> {out} {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %c = {out} convolution(%a, %b), {how}
}}
"""
    program = hlo.parse(text)
    assert work.flops_of(program, program.entry, program.entry.root).total == flops


def test_slices_and_updates_count_the_touched_bytes():
    """A slice of stacked weights reads one layer, and an in-place update writes one layer."""
    text = """HloModule m
%inside (a: f32[32,1024], b: s32[], c: f32[1,1024]) -> f32[32,1024] {
  %a = f32[32,1024]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %c = f32[1,1024]{1,0} parameter(2)
  %z = s32[] constant(0)
  %d = f32[1,1024]{1,0} dynamic-slice(%a, %b, %z), dynamic_slice_sizes={1,1024}
  %s = f32[1,1024]{1,0} add(%d, %c)
  ROOT %u = f32[32,1024]{1,0} dynamic-update-slice(%a, %s, %b, %z)
}
ENTRY %main (a: f32[32,1024], b: s32[], c: f32[1,1024]) -> f32[32,1024] {
  %a = f32[32,1024]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %c = f32[1,1024]{1,0:S(1)} parameter(2)
  ROOT %f = f32[32,1024]{1,0} fusion(%a, %b, %c), kind=kLoop, calls=%inside
}
"""
    program = hlo.parse(text)
    moved = traffic.bytes_of(program, program.entry, program.entry.root)
    assert moved == 2 * 4096 + 4, "read and write one layer, and the index; c is not in HBM"


def test_unknown_kernels_raise():
    call = 'ROOT %c = f32[4,4] custom-call(%a), custom_call_target="TARGET"'
    text = "HloModule m\nENTRY %main (a: f32[4,4]) -> f32[4,4] {\n  %a = f32[4,4] parameter(0)\n  " + call + "\n}\n"
    for target in ("__cublas$gemm", "__cudnn$conv", "__gpu$xla.gpu.triton", "tpu_custom_call"):
        with pytest.raises(BimedixError, match=r"not counted|states no FLOPs|names no contracted axes"):
            roofline.costs_of(hlo.parse(text.replace("TARGET", target)), A100)
    assert roofline.costs_of(hlo.parse(text.replace("TARGET", "AllocateBuffer")), A100).total_flops == 0


def test_products_of_cublas():
    """XLA emits this on a present GPU, if cuBLAS was the fastest. The second result is scratch memory."""
    config = '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0","2"],"x":["1"]}}}'
    text = """HloModule m
ENTRY %main (a: bf16[3,5,7], b: bf16[21,11]) -> (bf16[5,11], s8[1024]) {
  %a = bf16[3,5,7]{2,1,0} parameter(0)
  %b = bf16[21,11]{1,0} parameter(1)
  ROOT %c = (bf16[5,11]{1,0}, s8[1024]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", CONFIG
}
""".replace("CONFIG", f"backend_config={config}")
    assert roofline.costs_of(hlo.parse(text), A100).total_flops == 2 * 5 * 11 * 21


def test_parsing_of_targets():
    assert devices.target("a100-80gb:8") == devices.Target(A100, 8)
    assert devices.target("v5e").count == 1
    for wrong, reason in (
        ("a100", "a100 is no target; write NAME:COUNT"),
        ("v5e:0", "0 in v5e:0 is no number of devices; write v5e:COUNT"),
        ("v5e:x", "x in v5e:x is no number of devices"),
        ("v5e:", "is no number of devices"),
    ):
        with pytest.raises(BimedixError, match=reason):
            devices.target(wrong)
    assert np.all([device.memory_bytes > 2**33 for device in devices.DEVICES.values()])
