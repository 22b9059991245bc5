"""The policy term: losses of the sampled tokens under advantages, and what corrects and measures them.

Shapes: log-probabilities of the sampled tokens, float; advantages broadcast to them (one per row as
[B, 1], or one per token where a KD reward was added). Only `student` has a gradient. Clip bounds may be
traced scalars, so that they can follow a schedule. Each loss says per token whether its clip acts (bool),
apart for the low and the high side.
"""

import jax
import jax.numpy as jnp

from kdrl_jax.objective.kl import Bound, bounded

Clipped = tuple[jax.Array, jax.Array, jax.Array]
"""Loss, whether the low clip acts, whether the high clip acts."""
Scalar = float | jax.Array


def clipped_policy_loss(
    student: jax.Array, old: jax.Array, advantages: jax.Array, clip_low: Scalar, clip_high: Scalar
) -> Clipped:
    """PPO's clipped surrogate per token (arXiv 1707.06347, eq. 7), as a loss; GRPO's and DAPO's too.

    The ratio pi_S / pi_old is clipped to [1 - clip_low, 1 + clip_high] where that holds the policy back;
    the gradient is 0 there. DAPO's clip-higher (arXiv 2503.14476) is clip_high > clip_low.
    """
    ratio = jnp.exp(student - jax.lax.stop_gradient(old))
    return _clipped(ratio, ratio, jax.lax.stop_gradient(advantages), clip_low, clip_high)


def _clipped(
    ratio: jax.Array, judged: jax.Array, advantages: jax.Array, clip_low: Scalar, clip_high: Scalar
) -> Clipped:
    """-ratio * advantage, held where `judged` has left the range towards what the advantage wants."""
    acts_low = (judged < 1.0 - clip_low) & (advantages < 0)
    acts_high = (judged > 1.0 + clip_high) & (advantages > 0)
    held = jnp.where(acts_low, 1.0 - clip_low, 1.0 + clip_high)
    # `where` and not min(clip()): at a tie those split the gradient, and on-policy ratios of exactly 1
    # tie with a range of 0.
    return -jnp.where(acts_low | acts_high, held, ratio) * advantages, acts_low, acts_high


def gspo_loss(
    student_BN: jax.Array,
    old_BN: jax.Array,
    advantages: jax.Array,
    mask_BN: jax.Array,
    clip_low: Scalar,
    clip_high: Scalar,
) -> Clipped:
    """GSPO (arXiv 2507.18071) per token, over whole rows: one ratio per completion, clipped as one.

    s = exp(mean over the completion of log pi_S - log pi_old) stands for every token's ratio, in the
    GSPO-token form (sg[s] * pi_S / sg[pi_S]) that gives each token a loss of its own. Averaged within
    rows and then over rows (denominator `sequences`) value and gradient are those of the paper's eq. 5,
    mean of min(s A, clip(s) A), where a row has one advantage.

    Args:
        mask_BN: bool, the tokens of each completion; the loss is 0 elsewhere.
        clip_low, clip_high: the paper uses 3e-4 and 4e-4, far below a token ratio's.
    """
    gap = jnp.where(mask_BN, student_BN - jax.lax.stop_gradient(old_BN), 0.0)
    length_B1 = jnp.maximum(mask_BN.sum(1, keepdims=True), 1)
    ratio_B1 = jax.lax.stop_gradient(jnp.exp(gap.sum(1, keepdims=True) / length_B1))
    # The ratio's value at every token, with the token's own gradient.
    ratio = ratio_B1 * jnp.exp(gap - jax.lax.stop_gradient(gap))
    loss, low, high = _clipped(ratio, ratio_B1, jax.lax.stop_gradient(advantages), clip_low, clip_high)
    return jnp.where(mask_BN, loss, 0.0), low & mask_BN, high & mask_BN


def cispo_loss(
    student: jax.Array, old: jax.Array, advantages: jax.Array, clip_low: Scalar, clip_high: Scalar
) -> Clipped:
    """CISPO (arXiv 2506.13585, eq. 4 and 5): -sg[clip(ratio)] * A * log pi_S.

    The importance weight is clipped, not the update: every token keeps a gradient. A `clip_low` of 1 or
    more is no lower bound, as in the paper's runs.
    """
    ratio = jax.lax.stop_gradient(jnp.exp(student - old))
    low, high = ratio < 1.0 - clip_low, ratio > 1.0 + clip_high
    weight = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return -weight * jax.lax.stop_gradient(advantages) * student, low, high


def reinforce_loss(student: jax.Array, advantages: jax.Array) -> jax.Array:
    """-A log pi_S: the on-policy gradient and no ratio (REINFORCE; with `rloo` advantages arXiv
    2402.14740). Samples of another policy bias it, unless `truncated_weight` is put before it."""
    return -jax.lax.stop_gradient(advantages) * student


def mixture_anchor(
    old: jax.Array, teacher: jax.Array, share: Scalar, bound: Bound | None = None
) -> jax.Array:
    """What stands for `old` in the clipped loss so that its ratio is anchored to old policy and teacher
    together (trust region ratio distillation, RLAD, arXiv 2602.22495); stopped.

    share * old + (1 - share) * teacher in log-probabilities, so that the ratio is
    (pi_S / pi_old)^share * (pi_S / pi_T)^(1 - share); share 1 is GRPO. This geometric form is the one
    public summaries of the paper describe; the value of the share is our setting.

    The ratio is then not 1 on-policy. Where the advantage is negative the clip does not hold a large
    ratio, as it does not in PPO: a token the teacher finds e^-50 as likely would weigh e^(50 (1 -
    share)). `bound` bounds the log-ratio of old policy and teacher before it is mixed.
    """
    return jax.lax.stop_gradient(old + (1.0 - share) * bounded(teacher - old, bound))


def truncated_weight(old: jax.Array, sampler: jax.Array, cap: Scalar) -> jax.Array:
    """Stopped min(pi_old / pi_sampler, cap) per token: corrects for a sampler whose arithmetic is not
    the trainer's (truncated importance sampling). Without bias where the cap does not act."""
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(old - sampler), cap))


def effective_sample_sums(weights: jax.Array, ratios: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of w r and of w r^2, which add over microbatches; `effective_sample_share` takes the totals."""
    return jnp.sum(weights * ratios), jnp.sum(weights * jnp.square(ratios))


def effective_sample_share(sum_r: jax.Array, sum_r2: jax.Array) -> jax.Array:
    """Kish's effective sample size of importance ratios as a share of the samples, from 0 to 1.

    (sum w r)^2 / sum w r^2 for weights that sum to 1; 1 if all ratios are equal, 0 without any sample.
    """
    return jnp.where(sum_r2 > 0, jnp.square(sum_r) / jnp.where(sum_r2 > 0, sum_r2, 1.0), 0.0)


def signs_disagree(advantages: jax.Array, teacher: jax.Array, student: jax.Array) -> jax.Array:
    """Whether RL raises the sampled token's probability and KD lowers it, or the reverse (bool)."""
    return advantages * (teacher - student) < 0
