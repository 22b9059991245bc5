"""Attention of whole rows, block by block and by TPU kernels, against all scores at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdrl_jax import sharding
from kdrl_jax.config import MeshConfig
from kdrl_jax.models.attend import RowAttention
from kdrl_jax.models.attention import ScoreRules, full_attention
from kdrl_jax.models.layout import Layout, whole_rows

RNG = np.random.default_rng(0)


def sequences(num, length, *, prefixes):
    """Rows of pieces of uneven lengths, some of which share a prefix; the end of each row is padding."""
    begins, positions = (np.zeros((num, length), np.int32) for _ in range(2))
    first, last = (np.zeros((num, length), np.int32) for _ in range(2))
    for row in range(num):
        at = 0
        while at < length - length // 6:
            prompt, end = at, min(length, at + int(RNG.integers(1, length // 6)))
            begins[row, prompt:end], positions[row, prompt:end] = prompt, np.arange(end - prompt)
            at = end
            for _ in range(int(RNG.integers(1, 4)) if prefixes else 0):
                stop = min(length, at + int(RNG.integers(1, length // 4)))
                begins[row, at:stop], first[row, at:stop], last[row, at:stop] = at, prompt, end
                positions[row, at:stop] = np.arange(stop - at) + end - prompt
                at = stop
        begins[row, at:] = np.arange(at, length)
    arrays = (positions, begins, first, last) if prefixes else (positions, begins)
    return Layout(*map(jnp.asarray, arrays))


def operands(num, length, heads, kv_heads, width, dtype=jnp.float32):
    return tuple(
        jnp.asarray(RNG.normal(size=(num, length, n, width)), dtype) for n in (heads, kv_heads, kv_heads)
    )


def value_and_gradients(attend, rules, layout, qkv):
    weights = jnp.cos(jnp.arange(qkv[0].shape[-1]))

    @jax.jit
    def of(q, k, v):
        out = attend(q, k, v, rules, layout)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    (_, out), grads = jax.value_and_grad(of, (0, 1, 2), has_aux=True)(*qkv)
    return (out, *grads)


def assert_same(found, expected, rtol):
    for a, b in zip(found, expected, strict=True):
        b = np.asarray(b, np.float32)
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=rtol * np.abs(b).max(), rtol=0)


RULES = {
    "plain": ScoreRules(None, 0.3, None),
    "window": ScoreRules(jnp.int32(9), 0.3, None, 9),
    "unbounded window": ScoreRules(jnp.int32(2**31 - 1), 0.3, None, 9),
    "soft cap": ScoreRules(None, 0.3, 2.0),
    "window and soft cap": ScoreRules(jnp.int32(9), 0.3, 2.0, 9),
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("prefixes", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
def test_blocks_give_what_all_scores_at_once_give(rules, prefixes, heads):
    qkv, layout = operands(2, 48, *heads, 8), sequences(2, 48, prefixes=prefixes)
    expected = value_and_gradients(full_attention, rules, layout, qkv)
    for block in (5, 16, 48):  # 5: the largest divisor below it is taken, 4
        found = value_and_gradients(RowAttention("blockwise", block), rules, layout, qkv)
        assert_same(found, expected, 1e-5)


def test_a_prefix_is_what_its_own_copies_would_be():
    """Two completions behind one prompt see what each would see behind a copy of it."""
    prompt, one, two = 5, 4, 7
    total = prompt + one + two
    at = np.arange(total)
    begins = np.where(at < prompt, 0, np.where(at < prompt + one, prompt, prompt + one))
    behind = (at >= prompt) * prompt
    positions = np.where(at < prompt, at, at - begins + prompt)
    shared = Layout(*(jnp.asarray(x[None], jnp.int32) for x in (positions, begins, 0 * at, behind)))
    q, k, v = operands(1, total, 4, 2, 8)
    for rules in RULES.values():
        together = full_attention(q, k, v, rules, shared)
        for begin, length in ((prompt, one), (prompt + one, two)):
            own = np.r_[0:prompt, begin : begin + length]
            alone = full_attention(*(x[:, own] for x in (q, k, v)), rules, whole_rows(1, len(own)))
            np.testing.assert_allclose(together[:, own[prompt:]], alone[:, prompt:], atol=1e-6)


def test_nothing_of_size_t_squared_is_held():
    """Neither forwards nor backwards: 4,096 positions of one head, whose scores alone are 64 MiB."""
    t = 4096
    qkv, layout = operands(1, t, 1, 1, 8), whole_rows(1, t)

    def memory(attend):
        def of(q, k, v):
            return jnp.sum(attend(q, k, v, RULES["plain"], layout))

        compiled = jax.jit(jax.grad(of, (0, 1, 2))).lower(*qkv).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(RowAttention("blockwise", 64)) < 0.1 * 4 * t * t < memory(full_attention)


def test_blocks_that_see_nothing_are_not_visited():
    """Rows of many sequences: work in proportion to what is seen. Keys that no one sees may be anything."""
    layout = Layout(
        *(jnp.asarray(x[None], jnp.int32) for x in (np.arange(64) % 16, np.arange(64) // 16 * 16))
    )
    q, k, v = operands(1, 64, 2, 1, 8)
    attend = functools.partial(RowAttention("blockwise", 16), rules=RULES["plain"], layout=layout)
    whole = attend(q, k, v)
    bad = k.at[:, :16].set(jnp.nan)  # would be 0 * nan if it were multiplied by weights of 0
    np.testing.assert_array_equal(attend(q, bad, v)[:, 16:], whole[:, 16:])


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
def test_splash_gives_what_all_scores_at_once_give(rules, heads):
    """JAX's TPU kernels, interpreted."""
    qkv, layout = operands(2, 256, *heads, 64), sequences(2, 256, prefixes=False)
    expected = value_and_gradients(full_attention, rules, layout, qkv)
    found = value_and_gradients(RowAttention("splash", interpret=True), rules, layout, qkv)
    assert_same(found, expected, 2e-5)


@pytest.mark.parametrize(
    ("mesh", "heads"),
    [
        ({"fsdp": 8}, (4, 2)),
        ({"fsdp": 4, "tensor": 2}, (4, 2)),
        ({"fsdp": 2, "tensor": 4}, (8, 2)),  # more devices than kv heads, which are repeated
        ({"fsdp": 2, "tensor": 4}, (6, 3)),  # heads that no device can have alone
    ],
    ids=str,
)
@pytest.mark.parametrize("prefixes", [False, True])
def test_meshes_attend_alike(mesh, heads, prefixes):
    qkv, layout = operands(8, 32, *heads, 8), sequences(8, 32, prefixes=prefixes)
    rules = RULES["window and soft cap"]
    expected = value_and_gradients(full_attention, rules, layout, qkv)
    m = sharding.make_mesh(MeshConfig(**mesh), jax.devices()[:8])
    with jax.set_mesh(m):
        found = value_and_gradients(RowAttention("blockwise", 8), rules, layout, qkv)
    assert_same(found, expected, 1e-5)


def test_bfloat16_is_summed_in_float32():
    qkv, layout = operands(2, 64, 4, 2, 16, jnp.bfloat16), sequences(2, 64, prefixes=True)
    wide = tuple(x.astype(jnp.float32) for x in qkv)
    expected = value_and_gradients(full_attention, RULES["plain"], layout, wide)
    found = value_and_gradients(RowAttention("blockwise", 16), RULES["plain"], layout, qkv)
    assert all(x.dtype == jnp.bfloat16 for x in found)
    assert_same(found, expected, 2e-2)
