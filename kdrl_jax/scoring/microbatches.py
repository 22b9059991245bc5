"""Loops over the passes of packed rows that are in use. How many these are is data, so that nothing is
compiled again. Rows of a pass are every num-th, so that each device's rows are split evenly and none moves.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Bounds = tuple[jax.Array | int, jax.Array | int]
"""The passes [first, last)."""


def take_pass(tree: Any, number: jax.Array | int, num: int) -> Any:
    """The rows of one of `num` passes, of arrays [R, ...]."""

    def take(x: jax.Array) -> jax.Array:
        cut = x.reshape(x.shape[0] // num, num, *x.shape[1:])
        return jax.lax.dynamic_index_in_dim(cut, number, axis=1, keepdims=False)

    return jax.tree.map(take, tree)


def sum_passes(fn: Callable[..., Any], parts: Any, num: int, within: Bounds) -> Any:
    """The sum of `fn(*part)` over passes, one at a time.

    Args:
        parts: arguments of arrays [R, ...], of `num` passes.
    """
    zeros = _zeros(fn, parts, num)

    def step(number: jax.Array, total: Any) -> Any:
        return jax.tree.map(jnp.add, total, fn(*take_pass(parts, number, num)))

    with jax.named_scope("microbatches"):
        return jax.lax.fori_loop(*within, step, zeros)


def map_passes(fn: Callable[..., Any], parts: Any, num: int, within: Bounds) -> Any:
    """`fn(*part)` of each pass, arrays of whose rows become arrays [R, ...]; 0 in the other passes."""
    of_pass = _zeros(fn, parts, num)
    start = jax.tree.map(lambda x: jnp.zeros((x.shape[0], num, *x.shape[1:]), x.dtype), of_pass)

    def step(number: jax.Array, total: Any) -> Any:
        return jax.tree.map(
            lambda whole, x: jax.lax.dynamic_update_index_in_dim(whole, x, number, axis=1),
            total,
            fn(*take_pass(parts, number, num)),
        )

    with jax.named_scope("microbatches"):
        done = jax.lax.fori_loop(*within, step, start)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), done)


def _zeros(fn: Callable[..., Any], parts: Any, num: int) -> Any:
    shapes = jax.eval_shape(lambda parts: fn(*take_pass(parts, 0, num)), parts)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
