"""The policy term."""

import jax
import jax.numpy as jnp


def clipped_policy_loss(
    student: jax.Array, old: jax.Array, advantages: jax.Array, *, clip_low: float, clip_high: float
) -> tuple[jax.Array, jax.Array]:
    """PPO's clipped surrogate per token (arXiv 1707.06347, eq. 7), as a loss.

    Args:
        student, old: log-probabilities of the sampled tokens; only `student` has a gradient.
        advantages: broadcastable to them.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].

    Returns:
        The loss per token, and whether the clip acts there (the gradient is 0).
    """
    ratio = jnp.exp(student - jax.lax.stop_gradient(old))
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = -jnp.minimum(ratio * advantages, clipped * advantages)
    acts = clipped * advantages < ratio * advantages
    return loss, acts
