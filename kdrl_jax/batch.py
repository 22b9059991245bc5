"""From rollouts, rewards and the teacher's scores to what the update takes."""

import functools
from collections.abc import Callable

import jax

from kdrl_jax.config import Config
from kdrl_jax.objective.advantages import group_advantages
from kdrl_jax.objective.masks import kd_mask
from kdrl_jax.types import Rollouts, TrainBatch

BatchBuilder = Callable[..., TrainBatch]


def make_batch_builder(config: Config) -> BatchBuilder:
    """The compiled `build_batch` of a config: see there."""

    def build_batch(
        rollouts: Rollouts,
        rewards_B: jax.Array,
        correct_B: jax.Array,
        old_logprobs_BT: jax.Array | None,
        teacher_logprobs_BT: jax.Array | None,
        teacher_states_BND: jax.Array | None,
    ) -> TrainBatch:
        """Advantages and masks of one iteration's rows.

        Args:
            rewards_B: float, verifier plus shaping; 0 for completions of a dataset.
            correct_B: bool, the verifier's verdict alone; masks are keyed on it.
            old_logprobs_BT: the trainer's, before the first update; None if there is one update only.
        """
        completion = rollouts.completion_mask_BT
        group_size = config.rollout.group_size
        mask = kd_mask(
            completion,
            correct_B,
            rollouts.ended_B,
            kind=config.kd.mask,
            group_size=group_size,
            end_token=config.kd.end_token,
        )
        return TrainBatch(
            tokens_BT=rollouts.tokens_BT,
            prompt_lengths_B=rollouts.prompt_lengths_B,
            completion_mask_BT=completion,
            rl_mask_BT=completion,
            kd_mask_BT=mask,
            advantages_B=group_advantages(rewards_B, group_size, config.rl.advantage),
            sampler_logprobs_BT=rollouts.sampler_logprobs_BT,
            old_logprobs_BT=old_logprobs_BT,
            teacher_logprobs_BT=teacher_logprobs_BT,
            teacher_states_BND=teacher_states_BND,
        )

    return jax.jit(build_batch)


@functools.partial(jax.jit, static_argnames="num")
def split(batch: TrainBatch, num: int) -> list[TrainBatch]:
    """`num` minibatches of every num-th row, so that every device keeps its own rows."""
    return [jax.tree.map(lambda x, i=i: x[i::num], batch) for i in range(num)]
