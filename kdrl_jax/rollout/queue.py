"""Which slot works on which row.

A row is one completion: sample b % G of prompt b // G. Rows wait in order; a slot that is idle takes the
next one. Pure functions of a few integers, so that they can be tested against a plain loop.
"""

import jax
import jax.numpy as jnp


def take_rows(
    row_of_slot: jax.Array, next_row: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Idle slots take the next rows of the queue, the first idle slot the first row.

    Args:
        row_of_slot: int32 [slots]; `num_rows` is idle.
        next_row: int32 scalar, the first row that waits; `num_rows` when none does.

    Returns:
        Both as they are then, and bool [slots]: which slots have taken a row.
    """
    idle = row_of_slot >= num_rows
    candidates = next_row + jnp.cumsum(idle, dtype=jnp.int32) - 1
    taken = idle & (candidates < num_rows)
    row_of_slot = jnp.where(taken, candidates, row_of_slot)
    return row_of_slot, next_row + jnp.sum(taken, dtype=jnp.int32), taken
