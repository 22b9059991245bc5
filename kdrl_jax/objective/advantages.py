"""Group-relative advantages. They are made of the task reward alone: KD never enters them."""

import jax
import jax.numpy as jnp

KINDS = ("grpo", "grpo_no_std", "rloo")


def group_advantages(rewards_B: jax.Array, group_size: int, kind: str) -> jax.Array:
    """What each completion's reward is above that of its group.

    Args:
        rewards_B: float [P * G], group after group.
        kind: `grpo`: minus the group's mean, divided by its standard deviation (arXiv 2402.03300, section
            4.1.2; the sample's, n - 1, as in the public implementations). `grpo_no_std`: not divided (Dr.
            GRPO, arXiv 2503.20783). `rloo`: minus the mean of the others (arXiv 2402.14740), a baseline
            that leaves the gradient without bias; it is `grpo_no_std` times G / (G - 1).

    Returns:
        Float [B]. Exactly 0 in a group without signal (see `has_signal`), where dividing by a deviation
        of 1e-8 would turn noise into signal.
    """
    rewards_PG = rewards_B.reshape(-1, group_size)
    centred = rewards_PG - rewards_PG.mean(1, keepdims=True)
    unequal = has_signal(rewards_B, group_size)[:, None]
    if kind == "grpo":
        variance = jnp.sum(jnp.square(centred), 1, keepdims=True) / max(group_size - 1, 1)
        centred = centred / jnp.sqrt(jnp.where(unequal, variance, 1.0))
    elif kind == "rloo":
        centred = centred * group_size / max(group_size - 1, 1)
    elif kind != "grpo_no_std":
        raise ValueError(f"advantage {kind!r}; use one of {', '.join(KINDS)}")
    return jnp.where(unequal, centred, 0.0).reshape(-1)


def has_signal(rewards_B: jax.Array, group_size: int) -> jax.Array:
    """Whether a group's rewards differ by more than rounding, so that RL learns from it (bool [P]).

    DAPO (arXiv 2503.14476, section 3.2) draws other prompts for those that have none; its rewards are 0 or 1.
    """
    rewards_PG = rewards_B.reshape(-1, group_size)
    spread = rewards_PG.max(1) - rewards_PG.min(1)
    return spread > 1e-6 * jnp.maximum(jnp.abs(rewards_PG).max(1), 1.0)


def overlong_penalty(lengths_B: jax.Array, max_tokens: int, buffer: int) -> jax.Array:
    """DAPO's soft punishment of long completions (arXiv 2503.14476, eq. 13), added to the reward.

    Args:
        lengths_B: completion tokens, end token included.
        buffer: the penalty falls from 0 at max_tokens - buffer to -1 at max_tokens; at least 1.

    Returns:
        Float [B] in [-1, 0].
    """
    return jnp.clip((max_tokens - buffer - lengths_B) / buffer, -1.0, 0.0)


def length_reward(lengths_B: jax.Array, correct_B: jax.Array, group_size: int) -> jax.Array:
    """Kimi k1.5's reward for being shorter than the rest of the group (arXiv 2501.12599, section 2.3.3).

    With l the length and the group's shortest and longest, 0.5 - (l - shortest) / (longest - shortest) for a
    correct completion, the lower of that and 0 for a wrong one, and 0 where all are equally long.

    Args:
        lengths_B: completion tokens [P * G], group after group, end token included.
        correct_B: bool, by the verifier alone.

    Returns:
        Float [B] in [-0.5, 0.5].
    """
    lengths_PG = lengths_B.reshape(-1, group_size).astype(jnp.float32)
    shortest, longest = lengths_PG.min(1, keepdims=True), lengths_PG.max(1, keepdims=True)
    gain_PG = 0.5 - (lengths_PG - shortest) / jnp.maximum(longest - shortest, 1.0)
    gain_PG = jnp.where(correct_B.reshape(-1, group_size), gain_PG, jnp.minimum(gain_PG, 0.0))
    return jnp.where(longest > shortest, gain_PG, 0.0).reshape(-1)
