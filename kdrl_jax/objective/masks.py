"""Which tokens each term is about, and what each of them weighs."""

import jax
import jax.numpy as jnp


def kd_mask(
    completion_mask_BT: jax.Array,
    correct_B: jax.Array,
    ended_B: jax.Array,
    *,
    kind: str,
    group_size: int,
    end_token: bool,
) -> jax.Array:
    """Tokens to distil (bool [B, T]).

    Args:
        correct_B: bool, by the verifier alone (never a shaped reward).
        ended_B: bool, the completion's last token is an end token.
        kind: `none` keeps all completions, `response` only wrong ones, `group` only those of groups
            without a correct one (KDRL, arXiv 2506.02208, section on reward-guided masking).
        end_token: whether the final end token is kept.
    """
    if kind == "none":
        keep_B = jnp.ones_like(correct_B, bool)
    elif kind == "response":
        keep_B = ~correct_B
    elif kind == "group":
        solved = correct_B.reshape(-1, group_size).any(1)
        keep_B = jnp.repeat(~solved, group_size, total_repeat_length=correct_B.shape[0])
    else:
        raise ValueError(f"kd mask {kind!r}; use none, response or group")
    mask = completion_mask_BT & keep_B[:, None]
    if not end_token:
        follows = jnp.roll(completion_mask_BT, -1, axis=1).at[:, -1].set(False)
        is_last = completion_mask_BT & ~follows
        mask &= ~(is_last & ended_B[:, None])
    return mask


def token_weights(mask_BT: jax.Array, denominator: str) -> jax.Array:
    """Float weights that sum to 1 over the whole array (or are all 0 under an empty mask).

    Computed over a whole minibatch before it is cut, so that any split into microbatches, shards or
    packs gives the same sum. `tokens`: every kept token alike; `sequences`: every row that keeps any
    token alike, its tokens sharing the row's weight.
    """
    mask = mask_BT.astype(jnp.float32)
    if denominator == "tokens":
        return mask / jnp.maximum(mask.sum(), 1.0)
    if denominator == "sequences":
        per_row = mask.sum(1, keepdims=True)
        num_rows = jnp.maximum((per_row > 0).sum(), 1)
        return mask / jnp.maximum(per_row, 1.0) / num_rows
    raise ValueError(f"denominator {denominator!r}; use tokens or sequences")
