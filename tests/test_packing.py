"""Packed rows: that every token is where it should be, and how little is padding."""

import types

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import packed, shape_for

from kdrl_jax import sharding
from kdrl_jax.config import Config, MeshConfig
from kdrl_jax.models.attend import RowAttention
from kdrl_jax.scoring import PackShape, passes_needed, place
from kdrl_jax.scoring.packer import config_pack_shape, minibatch_rows, pack_shape

LONGEST = 12


@st.composite
def rollouts(draw):
    """Tokens [B, T], prompt and completion lengths of groups with one prompt each."""
    group, num = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    prompts = np.repeat(rng.integers(1, 5, num), group)
    lengths = rng.integers(0, LONGEST - 4, num * group)
    tokens = rng.integers(1, 1000, (num * group, LONGEST)).astype(np.int32)
    at = np.arange(LONGEST)
    first = np.arange(num * group) // group * group
    return group, np.where(at < prompts[:, None], tokens[first], tokens), prompts, lengths


@settings(max_examples=60, deadline=None)
@given(rollouts(), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_every_token_is_in_its_place(rows, per_pass, times, share):
    """Each completion follows its own prompt in one packed row, nothing overlaps, and the lists have each
    token once, with the state before it."""
    group, tokens, prompts, lengths = rows
    shape = shape_for(len(tokens), LONGEST, length=times * LONGEST, rows_per_pass=per_pass, share=share)
    found = packed(tokens, prompts, lengths, shape, group)
    x = jax.tree.map(np.asarray, found.rows)
    seen = {}
    for r in range(shape.num_rows):
        for n in range(x.counts_R[r]):
            b, t = x.rows_RN[r, n], x.columns_RN[r, n]
            assert (b, t) not in seen
            seen[b, t] = r
            assert x.targets_RN[r, n] == tokens[b, t]
            # Walk back through what the predicting state sees: it is the row up to t, in order.
            at, history = x.predictors_RN[r, n], []
            assert x.layout.positions_BT[r, at] == t - 1
            own = range(x.layout.begins_BT[r, at], at + 1)
            before = ()
            if x.layout.prefix_begins_BT is not None:
                before = range(x.layout.prefix_begins_BT[r, at], x.layout.prefix_ends_BT[r, at])
            history = [int(x.tokens_RT[r, i]) for i in (*before, *own)]
            assert history == tokens[b, :t].tolist()
        assert (x.rows_RN[r, x.counts_R[r] :] == len(tokens)).all()
    expected = {(b, p + j) for b, (p, n) in enumerate(zip(prompts, lengths, strict=True)) for j in range(n)}
    assert set(seen) == expected
    # Rows in use are those of the passes that are said to be.
    used = {r % shape.max_passes for r in seen.values()}
    assert used == set(range(int(found.bounds[-1])))
    # Padding sees itself alone.
    empty = x.tokens_RT == 0
    np.testing.assert_array_equal(x.layout.begins_BT[empty], np.nonzero(empty)[1])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 7)), min_size=1, max_size=40),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 2**16),
)
def test_there_is_room_whatever_the_lengths(sizes, times, per_pass, num_kinds, seed):
    prompts, lengths = np.array(sizes).T
    length = times * 12 + seed % 5
    needed = passes_needed(len(sizes), 12, length, per_pass, num_kinds)
    kinds = np.random.default_rng(seed).integers(0, num_kinds, len(sizes))
    shape = PackShape(length, per_pass, needed, share_prompts=False)
    places = place(prompts, lengths, np.arange(len(sizes)), shape, kinds, num_kinds)
    of_pass = places.row_B % shape.max_passes
    for kind in range(num_kinds):
        mine = (kinds == kind) & (lengths > 0)
        first, last = places.bounds[kind], places.bounds[kind + 1]
        assert ((of_pass[mine] >= first) & (of_pass[mine] < last)).all()


def test_a_row_that_is_too_long_is_refused():
    shape = PackShape(8, 1, 4, share_prompts=True)
    with pytest.raises(ValueError, match="row 1 has 9 tokens; a packed row has 8"):
        place(np.array([2, 4]), np.array([3, 5]), np.array([0, 1]), shape)


def geometric_lengths(seed, num=128, mean=190, most=512):
    return np.minimum(np.random.default_rng(seed).geometric(1 / mean, num), most)


@pytest.mark.parametrize("share", [True, False])
def test_little_is_padding_at_usual_lengths(share):
    """16 prompts of 64 tokens, 8 completions of 190 on average: the shared workload."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    shape = pack_shape(128, 576, mesh, RowAttention("blockwise"), share_prompts=share)
    fracs = []
    for seed in range(10):
        lengths = geometric_lengths(seed)
        prompts = np.arange(128) // 8
        places = place(np.full(128, 64), lengths, prompts, shape)
        copies = len(set(zip(places.row_B, places.prompt_B, strict=True)))
        tokens = lengths.sum() + 64 * copies
        fracs.append(1 - tokens / (places.bounds[-1] * shape.rows_per_pass * shape.length))
        assert copies < (40 if share else 129)
    assert np.mean(fracs) < 0.05


def test_packed_rows_follow_the_config():
    tree = {
        "name": "t",
        "student": {"path": "x"},
        "teacher": {"path": "y"},
        "data": {"train": [{"kind": "task", "task": "chain_sum"}], "max_prompt_tokens": 64},
        "rollout": {"group_size": 8, "max_new_tokens": 512},
        "train": {"num_steps": 10, "prompts_per_iteration": 16},
    }
    mesh = sharding.make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    shape = config_pack_shape(Config.model_validate(tree), mesh)
    assert shape.share_prompts
    assert (shape.length, shape.rows_per_pass) == (1792, 2)  # three of the longest, in tiles of 128
    tree["train"] |= {"pack_length": 640, "microbatch_rows": 4, "num_minibatches": 2, "attention": "splash"}
    shape = config_pack_shape(Config.model_validate(tree), mesh)
    assert shape == PackShape(640, 4, 16, share_prompts=False)


def test_minibatches_have_whole_groups_where_they_divide():
    assert [list(rows) for rows in minibatch_rows(8, 2, 2)] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert [list(rows) for rows in minibatch_rows(6, 2, 2)] == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize(
    ("kind", "longest", "tile"),
    [("blockwise", 100, 8), ("blockwise", 576, 128), ("splash", 100, 128), ("splash", 1152, 512)],
)
def test_rows_divide_into_the_blocks_of_their_attention(kind, longest, tile):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    length = pack_shape(4, longest, mesh, RowAttention(kind)).length
    assert (length % tile, length - longest < tile) == (0, True)


def test_teachers_with_rows_of_their_own_have_room():
    """Each may leave a row and a pass unfilled."""
    tree = {
        "name": "t",
        "student": {"path": "x"},
        "teachers": {"a": {"path": "y"}, "b": {"path": "z"}},
        "data": {"train": [{"kind": "task", "task": "chain_sum", "teacher": "a"}], "max_prompt_tokens": 4},
        "rollout": {"group_size": 2, "max_new_tokens": 8},
        "kd": {"coef": 1.0},
        "train": {"num_steps": 1, "prompts_per_iteration": 4, "microbatch_rows": 8},
    }
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    shape = config_pack_shape(Config.model_validate(tree), mesh)
    longest, kinds = np.full(8, 8), np.arange(8) % 2
    assert place(np.full(8, 4), longest, np.arange(8), shape, kinds, 2).bounds.tolist() == [0, 1, 2]


def test_prompts_are_not_shared_where_attention_cannot():
    """On TPUs `auto` is splash, which a check of the config alone cannot know."""
    tree = {
        "name": "t",
        "student": {"path": "x"},
        "data": {"train": [{"kind": "task", "task": "chain_sum"}]},
        "train": {"num_steps": 1, "share_prompts": "always"},
    }
    device = types.SimpleNamespace(platform="tpu")
    mesh = types.SimpleNamespace(devices=np.array([device]), shape={"data": 1, "fsdp": 1, "tensor": 1})
    with pytest.raises(ValueError, match="attention=auto is splash here"):
        config_pack_shape(Config.model_validate(tree), mesh)
