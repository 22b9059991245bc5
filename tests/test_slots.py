"""The parts of the sampling engine: the queue, the two ways to read the cache, prefill, memory, and what
is compiled."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import plain_cache
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kdrl_jax import sharding
from kdrl_jax.config import MeshConfig
from kdrl_jax.models.attention import ScoreRules
from kdrl_jax.models.cache import KVCache, bytes_per_position, empty_cache, quantize_vectors
from kdrl_jax.models.decoder import DecoderConfig, make_model
from kdrl_jax.models.head import head_logits
from kdrl_jax.rollout import prefill as prefill_module
from kdrl_jax.rollout.decode import Call
from kdrl_jax.rollout.engine import Engine, Programs
from kdrl_jax.rollout.kernel import Kernel, block_size
from kdrl_jax.rollout.memory import choose_slots
from kdrl_jax.rollout.prefill import prefill, prefix_length
from kdrl_jax.rollout.queue import take_rows
from kdrl_jax.rollout.sampling import SamplerSettings
from kdrl_jax.rollout.settings import EngineSettings, cache_length, cache_type
from kdrl_jax.rollout.weights import decode_layout
from kdrl_jax.rollout.windows import Windows, windows
from kdrl_jax.types import Prompts

CONFIG = DecoderConfig(40, 16, 32, 2, 4, 2, 8, qkv_bias=True)
MODEL = make_model(CONFIG)
PARAMS = MODEL.init(jax.random.key(0))
MESH = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
KEY = jax.random.key(7)


def engine_settings(**changes):
    shape = {
        "num_prompts": 4,
        "group_size": 2,
        "max_prompt_tokens": 9,
        "max_new_tokens": 20,
        "num_tokens": 37,
        "end_ids": (),
        "pad_id": 0,
        "decode_chunk": 16,
        "sampler": SamplerSettings(),
    }
    return EngineSettings(**shape | changes)


# ---- The queue


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=30),
    num_slots=st.integers(1, 12),
)
@settings(deadline=None, max_examples=200)
def test_every_row_is_taken_once_and_in_order(lengths, num_slots):
    """Against a plain loop over slots, with completions of given lengths."""
    num_rows = len(lengths)
    row_of_slot, next_row = np.full(num_slots, num_rows), 0
    left = list(lengths)
    waiting, plain = list(range(num_rows)), [None] * num_slots
    order = []
    for _ in range(sum(lengths) + 1):
        row_of_slot, next_row, taken = (
            np.asarray(x) for x in take_rows(jnp.asarray(row_of_slot), jnp.int32(next_row), num_rows)
        )
        for slot in range(num_slots):
            assert taken[slot] == (plain[slot] is None and bool(waiting))
            if plain[slot] is None and waiting:
                plain[slot] = waiting.pop(0)
                order.append(plain[slot])
        assert row_of_slot.tolist() == [num_rows if row is None else row for row in plain]
        assert next_row == num_rows - len(waiting)
        row_of_slot = row_of_slot.copy()
        for slot, row in enumerate(plain):
            if row is not None:
                left[row] -= 1
                if not left[row]:
                    plain[slot], row_of_slot[slot] = None, num_rows
    assert order == list(range(num_rows))
    assert not any(left)


# ---- The engine over random shapes

WIDTH, NEW, MOST, GROUP = 11, 24, 12, 3


def drawn_prompts(lengths, draws):
    """Prompts whose tokens follow from their draw."""
    tokens = np.zeros((len(draws), WIDTH), np.int32)
    for i, (length, draw) in enumerate(zip(lengths, draws, strict=True)):
        tokens[i, :length] = np.random.default_rng(draw).integers(3, 37, WIDTH)[:length]
    return Prompts(tokens, np.asarray(lengths, np.int32), np.asarray(draws, np.int32), (), (), (), ())


@functools.cache
def streams(length):
    """Tokens [MOST * GROUP, NEW] and log-probabilities of completions that never end, of prompts of one
    length with draws 0, 1, ...; each in a slot of its own."""
    e = Engine(MODEL, engine_settings(
        num_prompts=MOST, group_size=GROUP, max_prompt_tokens=WIDTH, max_new_tokens=NEW, end_ids=()
    ), MESH)  # fmt: skip
    r = e.generate(PARAMS, drawn_prompts([length] * MOST, range(MOST)), KEY)
    return tuple(np.asarray(x)[:, length : length + NEW] for x in (r.tokens_BT, r.sampler_logprobs_BT))


@given(data=st.data())
@settings(
    deadline=None,
    max_examples=10,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.generate],  # each example compiles: shrinking one would take minutes
)
def test_every_completion_comes_back_once_and_in_order(data):
    """Prompts and completions of random lengths, through random numbers of slots: each row is the stream of
    its own (prompt, sample), up to the first end token or the limit."""
    draw = data.draw
    num_prompts, group = draw(st.integers(1, MOST), "prompts"), draw(st.integers(1, GROUP), "group")
    draws = draw(st.permutations(range(MOST)), "draws")[:num_prompts]
    lengths = [draw(st.sampled_from([1, 2, 7, WIDTH]), "length") for _ in draws]
    ends = draw(st.sets(st.integers(0, 36), max_size=12), "ends")
    limit = draw(st.sampled_from([1, 2, NEW - 1, NEW]), "limit")
    e = Engine(MODEL, engine_settings(
        num_prompts=num_prompts,
        group_size=group,
        max_prompt_tokens=WIDTH,
        max_new_tokens=NEW,
        end_ids=tuple(sorted(ends)),
        slots=draw(st.integers(1, 2 * num_prompts * group), "slots"),
        decode_chunk=draw(st.sampled_from([1, 5, 64]), "chunk"),
        attention=draw(st.sampled_from(["windows", "kernel"]), "attention"),
    ), MESH)  # fmt: skip
    r = e.generate(PARAMS, drawn_prompts(lengths, draws), KEY, max_new_tokens=limit)
    for b in range(num_prompts * group):
        length, prompt = lengths[b // group], draws[b // group]
        tokens, logprobs = (x[prompt * GROUP + b % group] for x in streams(length))
        end = next((i for i, token in enumerate(tokens[:limit]) if token in ends), None)
        count = limit if end is None else end + 1
        assert int(r.prompt_lengths_B[b]) == length
        assert int(r.completion_lengths_B[b]) == count
        assert bool(r.ended_B[b]) == (end is not None)
        row = np.asarray(r.tokens_BT[b])
        np.testing.assert_array_equal(row[length : length + count], tokens[:count])
        np.testing.assert_array_equal(row[:length], drawn_prompts([length], [prompt]).tokens_PT[0, :length])
        assert not row[length + count :].any()
        got = np.asarray(r.sampler_logprobs_BT[b])
        np.testing.assert_allclose(got[length : length + count], logprobs[:count], atol=1e-4)
        assert not got[:length].any()
        assert not got[length + count :].any()


# ---- Reading the cache


def cache_and_step(dtype, length, softcap=None, sees=None, num_rows=6):
    """A full cache, and what a step gives one of its layers."""
    keys = jax.random.split(jax.random.key(3), 5)
    empty = empty_cache(CONFIG, num_rows, length, jnp.dtype(dtype))
    full = [jax.random.normal(k, empty.keys.shape) for k in keys[:2]]
    cache = KVCache(*(x.astype(dtype) for x in full))
    if dtype == "int8":
        (k, k_scales), (v, v_scales) = map(quantize_vectors, full)
        cache = KVCache(k, v, k_scales, v_scales)
    shapes = [(num_rows, CONFIG.num_heads, CONFIG.head_dim)] + [(num_rows, 2, CONFIG.head_dim)] * 2
    qkv = [jax.random.normal(k, shape) for k, shape in zip(keys[2:], shapes, strict=True)]
    rules = ScoreRules(None if sees is None else jnp.int32(sees), 0.35, softcap)
    return cache, qkv, rules


WAYS = {
    "one by one": lambda length: Windows(1, length),
    "in groups": lambda length: Windows(3, length),
    "all in one": lambda length: Windows(6, length),
    "kernel": lambda length: Kernel(length, min(length, 256), interpret=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(("softcap", "sees"), [(None, None), (2.0, 70), (None, 1), (None, 200)])
@pytest.mark.parametrize("length", [256, 1024])
def test_slots_read_what_the_plain_way_reads(way, dtype, softcap, sees, length):
    cache, qkv, rules = cache_and_step(dtype, length, softcap, sees)
    at = jnp.array([length - 1, 0, 63, 64, 130, 1])
    layer = jnp.int32(1)
    wanted, written = plain_cache.attend_plainly(at)(cache, layer, *qkv, rules)
    how_it_reads = WAYS[way](length)
    attend = jax.jit(
        lambda cache, *qkv: how_it_reads.attend(how_it_reads.plan(at), cache, layer, *qkv, rules)
    )
    out, ours = attend(cache, *qkv)
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, ours, written)
    # What lies after a row's position is not seen, whatever it is.
    after = (jnp.arange(length) > at[:, None])[None, :, None]

    def spoil(x):
        return jnp.where(after[..., None] if x.ndim == 5 else after, jnp.asarray(99, x.dtype), x)

    np.testing.assert_allclose(attend(jax.tree.map(spoil, cache), *qkv)[0], wanted, atol=1e-5)


def test_the_kernel_reads_the_filled_blocks_alone():
    at = jnp.array([0, 511, 512, 1535])
    plan = Kernel(1536, 512, interpret=True).plan(at)
    assert int(plan.num_pieces) == 1 + 1 + 2 + 3
    assert plan.rows_W[:7].tolist() == [0, 1, 2, 2, 3, 3, 3]
    assert plan.blocks_W[:7].tolist() == [0, 0, 0, 1, 0, 1, 2]
    assert int(plan.blocks_W.max()) < 3  # those that mean nothing are no wild addresses
    assert int(plan.rows_W.max()) < 4


@pytest.mark.parametrize(
    ("length", "heads", "width", "dtype", "wanted"),
    [
        (8192, 2, 128, "bfloat16", 512),
        (8192, 2, 128, "int8", 512),
        (64, 2, 64, "int8", 64),
        (640, 2, 128, "bfloat16", 128),  # divides
        (8192, 32, 128, "bfloat16", 256),  # Llama 2 7B
        (8192, 16, 256, "bfloat16", 256),  # Gemma 7B
        (8192, 16, 64, "float32", 256),  # padded to 128
        (8192, 64, 256, "float32", 128),
    ],
)
def test_blocks_fit_the_chip_and_the_cache(length, heads, width, dtype, wanted):
    assert block_size(length, heads, width, dtype) == wanted


@pytest.mark.parametrize("new", [1, 50, 120, 300, 4000, 5000, 30_000])
def test_any_cache_has_whole_windows_and_blocks(new):
    length = cache_length(engine_settings(max_new_tokens=new))
    assert length >= 9 + new - 1
    assert length <= 9 + new - 1 + (512 if new > 4000 else 128)
    assert length % 64 == 0
    assert length % block_size(length, 2, 64, "int8") == 0
    assert new < 4000 or block_size(length, 2, 64, "int8") >= 128


@pytest.mark.parametrize("length", [10, 64, 65, 700, 8192])
def test_windows_cover_the_cache(length):
    sizes = windows(length)
    assert sizes[-1] == length
    assert list(sizes) == sorted(set(sizes))
    assert all(b <= max(a + 64, a * 1.25) for a, b in itertools.pairwise(sizes))


def test_groups_share_the_smallest_window():
    plan = Windows(2, 300).plan(jnp.array([299, 3, 130, 63, 64, 127]))
    assert plan.rows_JR.tolist() == [[1, 3], [4, 5], [2, 0]]
    assert plan.which_J.tolist() == [0, 1, 4]


def test_int8_vectors_are_near():
    x = jax.random.normal(jax.random.key(0), (50, 64)) * jnp.logspace(-3, 3, 50)[:, None]
    q, scale = quantize_vectors(x)
    assert q.dtype == jnp.int8
    assert int(jnp.abs(q).max(axis=1).min()) == 127
    assert bool((jnp.abs(q * scale[:, None] - x) <= scale[:, None] * 0.5001).all())
    zero, scale = quantize_vectors(jnp.zeros((2, 8)))
    assert not zero.any()
    assert jnp.isfinite(scale).all()


@pytest.mark.parametrize(("dtype", "gap"), [("bfloat16", 0.02), ("int8", 0.02), ("float32", 1e-5)])
def test_a_smaller_cache_changes_the_logprobs_a_little(dtype, gap):
    e = Engine(MODEL, engine_settings(cache_dtype=dtype, max_new_tokens=60), MESH)
    prompts = drawn_prompts([9, 1, 4, 7], range(4))
    prompts = dataclasses.replace(prompts, tokens_PT=prompts.tokens_PT[:, :9])
    r = e.generate(PARAMS, prompts, KEY)
    assert e.programs().start(PARAMS, *prompts_of(prompts)).cache.keys.dtype == dtype
    decoder = MODEL.bind(PARAMS)
    logits = head_logits(decoder.hidden(r.tokens_BT), decoder.output_head(), num_tokens=37, temperature=1.0)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], r.tokens_BT[:, 1:, None], 2)[..., 0]
    mask = r.completion_mask_BT[:, 1:]
    measured = float(jnp.sum(jnp.abs(logprobs - r.sampler_logprobs_BT[:, 1:]) * mask) / mask.sum())
    assert measured < gap
    assert dtype == "float32" or measured > 1e-5


def prompts_of(prompts):
    return prompts.tokens_PT, prompts.lengths_P, prompts.draws_P


# ---- Prefill


@pytest.mark.parametrize("chunk", [4, 16, 512])
@pytest.mark.parametrize("num_prompts", [1, 5, 6, 8])
def test_prefill_is_one_pass_over_each_prompt(chunk, num_prompts, monkeypatch):
    monkeypatch.setattr(prefill_module, "CHUNK", chunk)
    monkeypatch.setattr(prefill_module, "TOKENS", 4 * chunk)
    rng = np.random.default_rng(0)
    width, lengths = 13, np.resize([13, 1, 4, 5, 12, 8], num_prompts).astype(np.int32)
    tokens = rng.integers(3, 37, (num_prompts, width)).astype(np.int32)
    decoder = MODEL.bind(PARAMS)
    length = prefix_length(width)
    assert length == -(-13 // min(chunk, 13)) * min(chunk, 13)
    got = jax.jit(
        lambda t, n: prefill(MODEL.bind(PARAMS), t, n, empty_cache(CONFIG, num_prompts, length, jnp.float32))
    )(tokens, lengths)
    _, wanted = plain_cache.prefill(decoder, tokens, lengths, length)
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(got.keys[:, i, :, :n], wanted.keys[:, i, :, :n], atol=1e-5)
        np.testing.assert_allclose(got.values[:, i, :, :n], wanted.values[:, i, :, :n], atol=1e-5)


def test_prompts_at_once():
    assert prefill_module.prefill_rows(15, 64, 12) == 15
    assert prefill_module.prefill_rows(100, 64, 12) == 64
    assert prefill_module.prefill_rows(64, 1024, 12) == 8
    assert prefill_module.prefill_rows(64, 8192, 12) == 1  # its scores


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}, {"fsdp": 4}], ids=str)
def test_shards_with_prompts_of_other_lengths_prefill_them_whole(axes, monkeypatch):
    """In chunks, of which shards have different numbers."""
    prompts = drawn_prompts([WIDTH, 10, 1, 2, 7, 3, 1, 1], range(8))
    s = engine_settings(num_prompts=8, max_prompt_tokens=WIDTH, end_ids=(1, 2))
    plain = Engine(MODEL, s, MESH).generate(PARAMS, prompts, KEY)
    monkeypatch.setattr(prefill_module, "CHUNK", 4)
    monkeypatch.setattr(prefill_module, "TOKENS", 8)
    mesh = sharding.make_mesh(MeshConfig(**axes), jax.devices()[: math.prod(axes.values())])
    params = jax.tree.map(
        lambda x, dims: jax.device_put(x, sharding.sharding(dims, x.shape, mesh)), PARAMS, MODEL.dims
    )
    for attention in ("windows", "kernel"):
        r = Engine(MODEL, dataclasses.replace(s, attention=attention), mesh).generate(params, prompts, KEY)
        np.testing.assert_array_equal(r.tokens_BT, plain.tokens_BT)


def test_prefill_does_not_grow_with_the_group():
    """No product of the program that prefills has another shape with twice the completions."""

    def products(group):
        programs = Programs(MODEL, engine_settings(group_size=group), MESH, slots=4)
        arrays = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((4, 9), (4,), (4,))]
        text = str(programs.start.trace(PARAMS, *arrays).jaxpr)
        return sorted(re.findall(r"(\S+) = dot_general", text))

    assert products(2) == products(4)
    assert len(products(2)) > 5


# ---- What is compiled


DEEP = make_model(dataclasses.replace(CONFIG, num_layers=12))


def compiled_chunk(mesh, slots, **changes):
    """The state of a decode chunk over a cache of 2,048 positions, and its program."""
    s = engine_settings(num_prompts=8, max_prompt_tokens=256, max_new_tokens=1792, **changes)
    programs = Programs(DEEP, s, mesh, slots)
    weights = decode_layout(DEEP, DEEP.abstract(), mesh)
    rows = sharding.rows(mesh)
    prompts = [jax.ShapeDtypeStruct(x, jnp.int32, sharding=rows) for x in ((8, 256), (8,), (8,))]
    call = Call(KEY, np.float32(1), np.int32(1792))
    with jax.set_mesh(mesh):
        carry = programs.abstract_carry(weights, *prompts)
        return carry, programs.chunk.lower(weights, carry, call).compile()


def copies_of(text, shape):
    """Instructions of a compiled program that copy an array of this shape."""
    wanted = ",".join(map(str, shape))
    moves = rf"\[{wanted}\]\S* (copy|copy-start|all-gather|all-to-all|collective-permute)\("
    return [line.strip() for line in text.splitlines() if re.search(moves, line)]


@pytest.mark.parametrize(
    "axes", [{"fsdp": 1}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "tensor": 4}], ids=str
)
@pytest.mark.parametrize(
    "changes",
    [{}, {"cache_dtype": "int8"}],
    ids=str,
)
def test_the_cache_is_written_in_place_and_never_copied(axes, changes):
    num = axes["fsdp"] * axes.get("tensor", 1)
    mesh = sharding.make_mesh(MeshConfig(**axes), jax.devices()[:num])
    slots = 24
    carry, compiled = compiled_chunk(mesh, slots, **changes)
    # The part of one device: what its program says.
    layers, _, heads, positions, width = carry.cache.keys.shape
    divided = math.gcd(heads, axes.get("tensor", 1)) if axes.get("tensor", 1) <= heads else 1
    local = (layers, slots, heads // divided, positions, width)
    text = compiled.as_text()
    assert ",".join(map(str, local)) in text
    assert copies_of(text, local) == []
    assert copies_of(text, local[:4]) == []
    arrays = jax.tree.leaves(carry.cache)
    size = sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in arrays)
    stats = compiled.memory_analysis()
    assert stats.alias_size_in_bytes > size
    assert stats.temp_size_in_bytes < 0.1 * size


def test_a_copy_would_be_found():
    shape = (12, 24, 2, 2048, 8)
    text = jax.jit(lambda x: (x.at[0].add(1), x)).lower(jnp.zeros(shape)).compile().as_text()
    assert copies_of(text, shape)


# ---- Memory


GIB = 2**30


def test_slots_are_as_many_as_fit():
    s = engine_settings(num_prompts=64, group_size=8, max_new_tokens=500)
    each = cache_length(s) * bytes_per_position(CONFIG, jnp.float32) + 12 * 40
    assert choose_slots(CONFIG, s, MESH, free=GIB) == 32  # on a CPU more buy nothing
    enough, fixed = None, None
    for free in range(0, 40_000_000, 10_000):
        try:
            enough = choose_slots(CONFIG, s, MESH, free=free)
        except ValueError as error:
            fixed, message = free, str(error)
            continue
        break
    assert enough == 1
    assert "for each slot of 512 positions in float32" in message
    assert "one slot does not fit" in message
    assert "use rollout.cache_dtype=int8" in message
    for slots in (2, 3, 4, 9, 31):
        free = fixed + 10_000 + (slots - 1) * each + 2000
        assert choose_slots(CONFIG, s, MESH, free=free) == 1 << (slots.bit_length() - 1)


def test_slots_that_were_asked_for_fit_or_are_refused():
    s = engine_settings(slots=5)
    assert choose_slots(CONFIG, s, MESH, free=GIB) == 5
    assert choose_slots(CONFIG, dataclasses.replace(s, slots=100), MESH, free=GIB) == 8  # all rows
    assert choose_slots(CONFIG, s, MESH) == 5  # of this machine
    with pytest.raises(ValueError, match=r"104.9 KiB are free, and rollout.slots_per_device=5 does not fit"):
        choose_slots(CONFIG, s, MESH, free=GIB // 10_000)


def test_tensor_takes_its_share_of_the_heads():
    def slots(tensor, devices):
        mesh = sharding.make_mesh(MeshConfig(fsdp=1, tensor=tensor), jax.devices()[:devices])
        s = engine_settings(max_new_tokens=400_000, num_prompts=8)
        return choose_slots(CONFIG, s, mesh, free=4 * 10**8)

    assert (slots(1, 1), slots(2, 2), slots(4, 4)) == (2, 4, 2)  # 4 does not divide 2 kv heads


@pytest.mark.parametrize(
    ("setting", "compute", "wanted"),
    [("auto", "float32", "float32"), ("auto", "bfloat16", "bfloat16"), ("int8", "float32", "int8")],
)
def test_type_of_the_cache_on_a_cpu(setting, compute, wanted):
    assert cache_type(setting, compute, MESH) == wanted
