"""Attention of slots over their own cache rows, at a cost that follows what each has filled.

Slots that are refilled one by one stand at very different positions, so that one window of the cache for
all of them is nearly always the largest. Here the slots are ordered by position at every step and taken in
groups of neighbours, each with the smallest of some static windows that holds its last one. No row moves:
a group reads its rows where they are.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kdrl_jax.models.attention import ScoreRules, cached_attention
from kdrl_jax.models.cache import KVCache

SMALLEST = 64


def windows(length: int) -> tuple[int, ...]:
    """Static lengths of the cache that a group may read: multiples of 64, each at most a quarter (or 64)
    more than the one before, up to all."""
    sizes, size = [], SMALLEST
    while size < length:
        sizes.append(size)
        size += max(SMALLEST, size // 4 // SMALLEST * SMALLEST)
    return (*sizes, length)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """Which slots share a window at one step, J groups of them."""

    positions_B: jax.Array
    rows_JR: jax.Array
    """int32: the slots of each group, which in turn follow one another by position."""
    which_J: jax.Array
    """int32: index of each group's window in `windows`."""


@dataclasses.dataclass(frozen=True)
class Windows:
    """Attention in groups of neighbours by position."""

    group: int
    """Slots that share a window; it divides their number."""
    length: int
    """Positions of the cache."""

    def plan(self, positions_B: jax.Array) -> Groups:
        """What all layers of a step share: each slot's new token is at its position."""
        rows_JR = jnp.argsort(positions_B).reshape(-1, self.group)
        longest_J = jnp.max(positions_B[rows_JR], axis=1) + 1
        which_J = jnp.sum(longest_J[:, None] > jnp.asarray(windows(self.length)), axis=1)
        return Groups(positions_B, rows_JR, which_J)

    def attend(
        self,
        plan: Groups,
        cache: KVCache,
        layer: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        rules: ScoreRules,
    ) -> tuple[jax.Array, KVCache]:
        """As `AttendCached` says."""
        cache = cache.write_columns(layer, plan.positions_B, k, v)

        def of_group(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            rows, which = inputs

            def within(size: int) -> jax.Array:
                held = cache.read_rows(layer, rows, size)
                positions = plan.positions_B[rows][:, None]
                return cached_attention(q[rows][:, None], held, positions, rules)[:, 0]

            sizes = windows(self.length)
            return jax.lax.switch(which, [functools.partial(within, size) for size in sizes])

        out = jax.lax.map(of_group, (plan.rows_JR, plan.which_J)).reshape(q.shape)
        return out[jnp.argsort(plan.rows_JR.reshape(-1))], cache
