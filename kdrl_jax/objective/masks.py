"""Which tokens each term is about, and what each of them weighs."""

import jax
import jax.numpy as jnp

KINDS = ("none", "response", "group", "response_correct", "group_solved")
DENOMINATORS = ("tokens", "all_tokens", "sequences", "max_tokens")


def kd_mask(
    completion_mask_BT: jax.Array,
    correct_B: jax.Array,
    ended_B: jax.Array,
    *,
    kind: str,
    group_size: int,
    end_token: bool = True,
    truncated: bool = True,
) -> jax.Array:
    """Tokens to distil (bool [B, T]).

    Args:
        correct_B: bool, by the verifier alone (never a shaped reward).
        ended_B: bool, the completion's last token is an end token.
        kind: `none` keeps all completions, `response` only wrong ones, `group` only those of groups
            without a correct one (KDRL, arXiv 2506.02208, reward-guided masking); `response_correct`
            and `group_solved` keep what these two leave out.
        end_token: whether the final end token is kept.
        truncated: whether completions that did not end are kept.
    """
    if kind == "none":
        keep_B = jnp.ones_like(correct_B, bool)
    elif kind in ("response", "response_correct"):
        keep_B = correct_B
    elif kind in ("group", "group_solved"):
        solved = correct_B.reshape(-1, group_size).any(1)
        keep_B = jnp.repeat(solved, group_size, total_repeat_length=correct_B.shape[0])
    else:
        raise ValueError(f"kd mask {kind!r}; use one of {', '.join(KINDS)}")
    if kind in ("response", "group"):
        keep_B = ~keep_B
    if not truncated:
        keep_B &= ended_B
    mask = completion_mask_BT & keep_B[:, None]
    if not end_token:
        follows = jnp.roll(completion_mask_BT, -1, axis=1).at[:, -1].set(False)
        is_last = completion_mask_BT & ~follows
        mask &= ~(is_last & ended_B[:, None])
    return mask


def kd_scale(correct_B: jax.Array, group_size: int) -> jax.Array:
    """The soft mask: 1 - success rate of each completion's group (float [B]), 1 where all failed and 0
    where all are correct. It multiplies weights, and leaves their denominator alone."""
    failed = 1.0 - correct_B.reshape(-1, group_size).astype(jnp.float32).mean(1)
    return jnp.repeat(failed, group_size, total_repeat_length=correct_B.shape[0])


def entropy_weight(teacher_entropy: jax.Array, scale: float | jax.Array) -> jax.Array:
    """exp(-H_T / scale), stopped: tokens at which the teacher is sure count more.

    Args:
        teacher_entropy: nats, any shape.
        scale: nats, above 0; at this entropy a token counts 1 / e.

    Returns:
        Float in (0, 1]. It multiplies weights, and leaves their denominator alone.
    """
    return jax.lax.stop_gradient(jnp.exp(-teacher_entropy / scale))


def token_weights(
    mask_BT: jax.Array,
    completion_mask_BT: jax.Array,
    denominator: str,
    *,
    max_new_tokens: int | None = None,
) -> jax.Array:
    """What each kept token weighs (float32 [B, T]); 0 at the others.

    Computed over a whole minibatch before it is cut, so that any split into microbatches, shards or
    packs gives the same sum. k2 and the exact divergence are the same objective only under weights that
    do not depend on what was sampled: under a mask keyed on correctness, or a denominator made of
    sampled lengths, they are two (see `tests/test_objective_masks.py`).

    Args:
        mask_BT: bool, the tokens of a term; a part of `completion_mask_BT`.
        completion_mask_BT: bool, the tokens that the term could be about; rows without any count nowhere.
        denominator: `tokens`: every kept token alike, summing to 1 (DAPO's token mean, arXiv 2503.14476).
            `all_tokens`: divided by all completion tokens, kept or not, so that a mask takes weight away
            and moves none. `sequences`: every row that keeps any token alike, its kept tokens sharing the
            row's weight, summing to 1 (GRPO's, arXiv 2402.03300). `max_tokens`: divided by the constant
            rows * max_new_tokens (Dr. GRPO, arXiv 2503.20783), the only one that no sample moves.
        max_new_tokens: longest completion; needed by `max_tokens` alone.
    """
    mask = mask_BT.astype(jnp.float32)
    if denominator == "tokens":
        return mask / jnp.maximum(mask.sum(), 1.0)
    if denominator == "all_tokens":
        return mask / jnp.maximum(completion_mask_BT.sum().astype(jnp.float32), 1.0)
    if denominator == "sequences":
        per_row = mask.sum(1, keepdims=True)
        num_rows = jnp.maximum((per_row > 0).sum(), 1)
        return mask / jnp.maximum(per_row, 1.0) / num_rows
    if denominator == "max_tokens":
        if max_new_tokens is None:
            raise ValueError("denominator 'max_tokens' needs max_new_tokens, the longest completion")
        num_rows = completion_mask_BT.any(1).sum().astype(jnp.float32)
        return mask / (jnp.maximum(num_rows, 1.0) * max_new_tokens)
    raise ValueError(f"denominator {denominator!r}; use one of {', '.join(DENOMINATORS)}")
