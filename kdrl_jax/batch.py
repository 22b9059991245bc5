"""From rollouts, rewards and the frozen models' scores to what the update takes."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kdrl_jax.config import Config
from kdrl_jax.objective.advantages import group_advantages
from kdrl_jax.objective.masks import entropy_weight, kd_mask, kd_scale
from kdrl_jax.types import FrozenScores, Rollouts, TrainBatch

BatchBuilder = Callable[..., TrainBatch]


def make_batch_builder(config: Config) -> BatchBuilder:
    """The compiled `build_batch` of a config: see there."""
    rl, kd, group_size = config.rl, config.kd, config.rollout.group_size

    def build_batch(
        rollouts: Rollouts,
        rewards_B: jax.Array,
        correct_B: jax.Array,
        temperature: jax.Array,
        old_logprobs_BT: jax.Array | None,
        frozen: FrozenScores,
        rl_rows_B: jax.Array | None = None,
    ) -> TrainBatch:
        """Advantages and masks of one iteration's rows.

        Args:
            rewards_B: float, all that is rewarded; 0 for completions of a dataset.
            correct_B: bool, the verifier's verdict alone; masks are keyed on it.
            temperature: float scalar, that the completions were sampled at.
            old_logprobs_BT: the trainer's, before the first update; None if there is one update only.
            rl_rows_B: bool, rows that RL is about; None is all of them.
        """
        completion = rollouts.completion_mask_BT
        everywhere = jnp.ones_like(rollouts.ended_B)
        rl_rows = everywhere if rl_rows_B is None else rl_rows_B
        rl_mask = completion & (rl_rows & (everywhere if rl.truncated else rollouts.ended_B))[:, None]
        mask = kd_mask(
            completion,
            correct_B,
            rollouts.ended_B,
            kind=kd.mask,
            group_size=group_size,
            end_token=kd.end_token,
            truncated=kd.truncated,
        )
        scales = []
        if kd.group_weight == "failure_rate":
            scales.append(kd_scale(correct_B, group_size)[:, None])
        if frozen.teacher_entropy_BT is not None and kd.teacher_entropy_scale is not None:
            scales.append(entropy_weight(frozen.teacher_entropy_BT, kd.teacher_entropy_scale))
        one = jnp.ones(completion.shape, jnp.float32)
        return TrainBatch(
            starts_B=rollouts.prompt_lengths_B,
            temperature=jnp.asarray(temperature, jnp.float32),
            completion_mask_BT=completion,
            rl_rows_B=rl_rows,
            rl_mask_BT=rl_mask,
            kd_mask_BT=mask,
            kd_scale_BT=functools.reduce(jnp.multiply, scales, one) if scales else None,
            advantages_B=group_advantages(rewards_B, group_size, rl.advantage),
            correct_B=correct_B,
            sampler_logprobs_BT=rollouts.sampler_logprobs_BT,
            old_logprobs_BT=old_logprobs_BT,
            frozen=frozen,
        )

    return jax.jit(build_batch)


@jax.jit
def take_rows(batch: TrainBatch, rows_B: np.ndarray) -> TrainBatch:
    """Some of the rows: a minibatch."""
    return jax.tree.map(lambda x: x[rows_B] if x.ndim else x, batch)
