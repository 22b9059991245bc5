"""Group-relative advantages. They are made of the task reward alone: KD never enters them."""

import jax
import jax.numpy as jnp


def group_advantages(rewards_B: jax.Array, group_size: int, *, divide_by_std: bool) -> jax.Array:
    """Rewards minus their group's mean, divided by the group's standard deviation or not.

    GRPO (arXiv 2402.03300, eq. 1 ff.) divides; Dr. GRPO (arXiv 2503.20783) does not. The deviation is
    the sample's (n - 1), as in the public implementations of GRPO.

    Args:
        rewards_B: float [P * G], group after group.

    Returns:
        Float [B]. Exactly 0 in a group whose rewards are equal up to rounding, where dividing by a
        deviation of 1e-8 would turn noise into signal.
    """
    rewards_PG = rewards_B.reshape(-1, group_size)
    centred = rewards_PG - rewards_PG.mean(1, keepdims=True)
    spread = rewards_PG.max(1, keepdims=True) - rewards_PG.min(1, keepdims=True)
    size = jnp.maximum(jnp.abs(rewards_PG).max(1, keepdims=True), 1.0)
    equal = spread <= 1e-6 * size
    if divide_by_std:
        variance = jnp.sum(jnp.square(centred), 1, keepdims=True) / max(group_size - 1, 1)
        centred = centred / jnp.sqrt(jnp.where(equal, 1.0, variance))
    return jnp.where(equal, 0.0, centred).reshape(-1)
