"""The text of programs, written by hand; chips, topologies and model FLOPs."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plan_programs import CHIP, TPU, compiled

from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.plan import hlo, model_flops
from kdrl_jax.plan.chips import CHIPS
from kdrl_jax.plan.cost import analyse
from kdrl_jax.plan.topology import make_topology
from kdrl_jax.plan.walk import Given

# The text


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("replica_groups={{0,1},{2,3},{4,5}}, dimensions={0}", 2),
        ("replica_groups=[4,8]<=[32]", 8),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={1}", 4),
        ("replica_groups=mesh['a'=4,'b'=8] {'a','b':(1)2}", 8),
        (
            "replica_groups=mesh['a'=16,'b'=4], device_ids=([4,16]T(1,0)) {'a'}, use_global_device_ids=true",
            16,
        ),
        ("replica_groups={}, dimensions={0}", None),
        ("source_target_pairs={{0,1},{1,0}}", None),
    ],
)
def test_sizes_of_groups(written, size):
    text = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  ROOT %a = f32[8]{{0}} all-reduce(%p), {written}\n}}"
    assert hlo.parse(text).entry.root.group_size == size


@pytest.mark.parametrize(
    ("written", "size", "space"),
    [
        ("f32[3,5]{1,0}", 60, 0),
        ("f32[3,5]{1,0:T(8,128)}", 8 * 128 * 4, 0),
        ("f32[3,5]{0,1:T(8,128)}", 8 * 128 * 4, 0),
        ("bf16[9,200]{0,1:T(8,128)(2,1)S(1)}", 200 * 128 * 2, 1),
        ("s4[4,256]{1,0:T(8,128)(8,1)E(4)}", 8 * 256 / 2, 0),
        ("pred[]", 1, 0),
        ("f8e4m3fn[16]{0}", 16, 0),
    ],
)
def test_sizes_in_memory(written, size, space):
    (shape,) = hlo.shapes_in(written)
    assert (shape.bytes, shape.space) == (size, space)


def test_notes_of_several_lines_belong_to_one_instruction():
    text = """HloModule m
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %k = (f32[8]{0}, f32[8]{0:T(128)}) custom-call(%p), custom_call_target="tpu_custom_call", notes={a={
"x":"{}"
}}, metadata={op_name="jit(f)/kernel"}, backend_config={"custom_call_config":{"n":1}}
  ROOT %r = f32[8]{0} get-tuple-element(%k), index=1
}
"""
    entry = hlo.parse(text).entry
    kernel = entry.instructions["k"]
    assert kernel.op_name == "jit(f)/kernel"
    assert kernel.config == {"custom_call_config": {"n": 1}}
    assert kernel.parts == ("f32[8]{0}", "f32[8]{0:T(128)}")
    assert (entry.root.opcode, entry.root.operands, entry.root.attribute("index")) == (
        "get-tuple-element",
        ("k",),
        "1",
    )


def test_what_runs_on_a_sparse_core_ends_like_the_rest():
    text = (
        "%sorted (p: f32[8]) -> f32[8] {\n  ROOT %n = f32[8]{0} negate(%p)\n"
        '}, execution_thread="sparsecore"\n\n'
        "ENTRY %main (p: f32[8]) -> f32[8] {\n  ROOT %a = f32[8]{0} add(%p, %p)\n}\n"
    )
    assert set(hlo.parse(text).computations) == {"sorted", "main"}


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        analyse("nothing", CHIP)


# Collectives beside other instructions

OVERLAP = """HloModule m, is_scheduled=true, num_partitions=4
ENTRY %main (p: f32[1024,1024], q: bf16[NUM,4096]) -> (f32[4096,1024], bf16[NUM,4096]) {
  %p = f32[1024,1024]{1,0} parameter(0)
  %q = bf16[NUM,4096]{1,0:S(1)} parameter(1)
  %s = (f32[1024,1024]{1,0}, f32[4096,1024]{1,0}) all-gather-start(%p), replica_groups={{0,1,2,3}}
  %d = bf16[NUM,4096]{1,0:S(1)} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %e = f32[4096,1024]{1,0} all-gather-done(%s)
  ROOT %t = (f32[4096,1024]{1,0}, bf16[NUM,4096]{1,0:S(1)}) tuple(%e, %d)
}
"""


SPREAD = """HloModule m, is_scheduled=true, num_partitions=4
%start (p0: f32[1024,1024]) -> (f32[1024,1024], f32[4096,1024], u32[]) {
  %p0 = f32[1024,1024]{1,0} parameter(0)
  %g0 = f32[4096,1024]{1,0} all-gather(%p0), channel_id=7, replica_groups={{0,1,2,3}}
  ROOT %c0 = (f32[1024,1024]{1,0}, f32[4096,1024]{1,0}, u32[]) custom-call(%g0), \
custom_call_target="AsyncCollectiveStart"
}
%middle (p1: bf16[NUM,4096], p2: f32[1024,1024]) -> (bf16[NUM,4096], f32[4096,1024]) {
  %p1 = bf16[NUM,4096]{1,0:S(1)} parameter(0)
  %p2 = f32[1024,1024]{1,0} parameter(1)
  %d1 = bf16[NUM,4096]{1,0:S(1)} dot(%p1, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %g1 = f32[4096,1024]{1,0} all-gather(%p2), channel_id=7, replica_groups={{0,1,2,3}}, \
backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %t1 = (bf16[NUM,4096]{1,0:S(1)}, f32[4096,1024]{1,0}) tuple(%d1, %g1)
}
%done (p3: f32[1024,1024]) -> f32[4096,1024] {
  %p3 = f32[1024,1024]{1,0} parameter(0)
  %g2 = f32[4096,1024]{1,0} all-gather(%p3), channel_id=7, replica_groups={{0,1,2,3}}, \
backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %c2 = f32[4096,1024]{1,0} custom-call(%p3, %g2), custom_call_target="AsyncCollectiveDone"
}
ENTRY %main (p: f32[1024,1024], q: bf16[NUM,4096]) -> (f32[4096,1024], bf16[NUM,4096]) {
  %p = f32[1024,1024]{1,0} parameter(0)
  %q = bf16[NUM,4096]{1,0:S(1)} parameter(1)
  %s = (f32[1024,1024]{1,0}, f32[4096,1024]{1,0}, u32[]) fusion(%p), kind=kCustom, calls=%start
  %m = (bf16[NUM,4096]{1,0:S(1)}, f32[4096,1024]{1,0}) fusion(%q, %p), kind=kCustom, calls=%middle
  %f = f32[4096,1024]{1,0} fusion(%p), kind=kCustom, calls=%done
  %x = bf16[NUM,4096]{1,0:S(1)} get-tuple-element(%m), index=0
  %y = bf16[NUM,4096]{1,0:S(1)} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (f32[4096,1024]{1,0}, bf16[NUM,4096]{1,0:S(1)}) tuple(%f, %y)
}
"""
"""As the TPU compiler writes it; what follows the end does not hide any of it."""


@pytest.mark.parametrize(("rows", "waits"), [(128, True), (16384, False)])
def test_a_spread_collective_runs_beside_its_fusions(rows, waits):
    cost = analyse(SPREAD.replace("NUM", str(rows)), CHIP)
    network = 0.75 * 4096 * 1024 * 4 / (2 * CHIP.link) + 2e-6
    compute = 2 * rows * 4096**2 / CHIP.flops
    assert (network > compute) == waits
    (found,) = cost.collectives
    assert (found.count, found.bytes) == (1, 4096 * 1024 * 4)
    # What a chip has is read and the whole is written, once.
    assert cost.bytes == 5 * 1024 * 1024 * 4
    assert cost.seconds == pytest.approx(max(network, compute) + compute)


@pytest.mark.parametrize(("rows", "waits"), [(128, True), (16384, False)])
def test_only_what_is_waited_for_takes_time(rows, waits):
    cost = analyse(OVERLAP.replace("NUM", str(rows)), CHIP)
    network = 0.75 * 4096 * 1024 * 4 / (2 * CHIP.link) + 2e-6
    compute = 2 * rows * 4096**2 / CHIP.flops
    assert (network > compute) == waits
    (found,) = cost.collectives
    assert (found.count, found.seconds) == (1, pytest.approx(network))
    assert cost.seconds == pytest.approx(max(network, compute))
    assert cost.seconds_by_kind.get("collective", 0.0) == pytest.approx(max(network - compute, 0.0))


@pytest.mark.parametrize(
    "start",
    [
        "(f32[1024,1024]{1,0}) all-reduce-start(%p), to_apply=%body",
        "((f32[1024,1024]{1,0}), f32[1024,1024]{1,0}, u32[]) async-start(%p), calls=%body",
    ],
)
def test_other_ways_to_start_a_collective(start):
    text = f"""HloModule m, num_partitions=4
%body (p0: f32[1024,1024]) -> f32[1024,1024] {{
  %p0 = f32[1024,1024]{{1,0}} parameter(0)
  ROOT %r = f32[1024,1024]{{1,0}} all-reduce(%p0), replica_groups={{{{0,1,2,3}}}}, to_apply=%add
}}
ENTRY %main (p: f32[1024,1024]) -> f32[1024,1024] {{
  %p = f32[1024,1024]{{1,0}} parameter(0)
  %s = {start}, replica_groups={{{{0,1,2,3}}}}
  ROOT %d = f32[1024,1024]{{1,0}} {start.split()[-2].partition("-start")[0]}-done(%s)
}}
"""
    cost = analyse(text, CHIP)
    (found,) = cost.collectives
    size = 1024 * 1024 * 4
    assert (found.kind, found.count, found.group_size, found.bytes) == ("all-reduce", 1, 4, size)
    assert found.seconds == pytest.approx(2 * (0.75 * size / (2 * CHIP.link) + 2e-6))
    assert cost.seconds == pytest.approx(found.seconds)
    assert cost.bytes == 2 * size


def test_what_no_one_waits_for_still_takes_its_time():
    text = "\n".join(line for line in OVERLAP.splitlines() if "-done" not in line)
    text = text.replace("NUM", "128").replace("tuple(%e, ", "tuple(%p, ")
    cost = analyse(text, CHIP)
    (found,) = cost.collectives
    assert cost.seconds == pytest.approx(found.seconds)


CUT = """HloModule m, num_partitions=4
%all-reduce-scatter (p0: f32[4096,1024], p1: s32[]) -> f32[1024,1024] {
  %p0 = f32[4096,1024]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %r = f32[4096,1024]{1,0} all-reduce(%p0), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %z = s32[] constant(0)
  ROOT %c = f32[1024,1024]{1,0} dynamic-slice(%r, %p1, %z), dynamic_slice_sizes={1024,1024}
}
ENTRY %main (p: f32[4096,1024], i: s32[]) -> f32[1024,1024] {
  %p = f32[4096,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = f32[1024,1024]{1,0} fusion(%p, %i), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_a_sum_that_is_cut_at_once_is_a_reduce_scatter():
    cost = analyse(CUT, CHIP)
    (found,) = cost.collectives
    size = 4096 * 1024 * 4
    assert (found.kind, found.count, found.group_size, found.bytes) == ("reduce-scatter", 1, 4, size)
    assert cost.seconds == pytest.approx(0.75 * size / (2 * CHIP.link) + 2e-6)


# Other forms of instructions


def test_a_fusion_that_ends_in_a_conversion_reads_all_of_its_operand():
    text = """HloModule m
%fused (p0: bf16[1024,1024]) -> f32[1024,1024] {
  %p0 = bf16[1024,1024]{1,0} parameter(0)
  ROOT %c = f32[1024,1024]{1,0} convert(%p0)
}
ENTRY %main (p: bf16[1024,1024]) -> f32[1024,1024] {
  %p = bf16[1024,1024]{1,0} parameter(0)
  ROOT %f = f32[1024,1024]{1,0} fusion(%p), kind=kLoop, calls=%fused
}
"""
    assert analyse(text, CHIP).bytes == (2 + 4) * 1024 * 1024


@pytest.mark.parametrize(("weights", "arrays"), [((1, 0), 3), ((0, 1), 2), (None, 3)])
def test_branches_of_a_predicate(weights, arrays):
    text = """HloModule m
%yes (p0: f32[1024]) -> f32[1024] {
  %p0 = f32[1024]{0} parameter(0)
  ROOT %n = f32[1024]{0} negate(%p0)
}
%no (p1: f32[1024]) -> f32[1024] {
  %p1 = f32[1024]{0} parameter(0)
  %c = f32[1024]{0} constant({...})
  ROOT %a = f32[1024]{0} add(%p1, %c)
}
ENTRY %main (p: pred[], x: f32[1024]) -> f32[1024] {
  %p = pred[] parameter(0)
  %x = f32[1024]{0} parameter(1)
  ROOT %f = f32[1024]{0} conditional(%p, %x, %x), true_computation=%yes, false_computation=%no, \
metadata={op_name="jit(f)/choice/cond"}
}
"""
    given = Given(branches={} if weights is None else {"choice": weights})
    assert analyse(text, CHIP, given).bytes == arrays * 4096


# Chips and topologies


@TPU
@pytest.mark.parametrize("kind", CHIPS)
def test_memory_is_the_compilers_limit(kind):
    chip = CHIPS[kind]
    shape = "x".join("1" * chip.dims)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as caught:
        compiled(lambda x: x + 1, ((2**32, 1024), jnp.bfloat16), place=f"{kind}:{shape}")
    limit = re.search(r"exceeds available HBM \(([\d.]+)G\)", str(caught.value))
    assert float(limit.group(1)) * 2**30 == chip.memory


@TPU
@pytest.mark.parametrize(
    ("name", "devices"),
    [("v4:2x2x1", 4), ("v5e:1x1", 1), ("v5p:1x1x1", 1), ("v6e:4x4", 16), ("v7x:2x2x1", 8)],
)
def test_devices_of_topologies(name, devices):
    chip, found = make_topology(name)
    assert (chip.kind, len(found)) == (name.partition(":")[0], devices)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "topology 'v9:2x2': unknown kind 'v9'; one of v4, v5e.*v5e:4x4"),
        ("v5e", "'v5e': a v5e slice has a shape of 2 sizes; for example v5e:1x1"),
        ("v5e:2x2x1", "2 sizes; for example v5e:1x1, v5e:2x2"),
        ("v5p:2x2", "3 sizes; for example v5p:1x1x1, v5p:2x2x1"),
        ("v5e:0x2", "for example"),
        pytest.param("v5e:3x3", "libtpu refuses it .*v5e:3x3.*for example v5e:1x1", marks=TPU),
    ],
)
def test_topologies_that_there_are_not(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_topology(name)
    assert "\n" not in str(caught.value)


def test_libtpu_missing(monkeypatch):
    def refuse(**_):
        raise RuntimeError("no plugin\nat all")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'jax\[tpu\]'"):
        make_topology("v5e:2x2")


# Model FLOPs


def test_model_flops_by_hand():
    config = DecoderConfig(
        vocab_size=100,
        embed_dim=8,
        mlp_dim=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        sliding_window=4,
        sliding_layers=(True, False, True),
    )
    layer = 8 * 4 * 16 + 2 * 8 * 2 * 16 + 4 * 16 * 8 + 3 * 8 * 32
    assert model_flops.layer_parameters(config) == 3 * layer
    seen = model_flops.keys_seen(config, 0, 10)
    assert seen == model_flops.KeysSeen(5.5, (1 + 2 + 3 + 7 * 4) / 10)
    attention = 4 * 4 * 16 * (5.5 + 2 * 3.4)
    forward = 10 * (2 * 3 * layer + attention) + 6 * 2 * 100 * 8
    assert model_flops.forward_flops(config, 10, 6, seen) == pytest.approx(forward)
    assert model_flops.training_flops(config, 10, 6, seen) == pytest.approx(3 * forward)


def test_keys_seen_is_the_mean_of_what_each_token_sees():
    for window, begin in itertools.product((1, 3, 7, 20, None), (0, 2, 6, 9)):
        config = DecoderConfig(1, 1, 1, 1, 1, 1, 1, sliding_window=window)
        seen = model_flops.keys_seen(config, begin, 12)
        full = [p + 1 for p in range(begin, 12)]
        assert seen.full == pytest.approx(np.mean(full))
        assert seen.sliding == pytest.approx(np.mean([min(x, window or x) for x in full]))


def test_no_tokens_see_no_keys():
    for begin, end in ((3, 3), (-1, 2)):
        with pytest.raises(ValueError, match="end must be above begin"):
            model_flops.keys_seen(DecoderConfig(1, 1, 1, 1, 1, 1, 1), begin, end)
