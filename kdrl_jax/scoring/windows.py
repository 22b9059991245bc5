"""Between positions of a row [B, T] and completion tokens [B, N]: the only shift of the repository.

Entry n of a window is about the row's token at `starts + n`. The state that predicts it is the one
before it; `predictors` alone knows that.
"""

import jax
import jax.numpy as jnp

from kdrl_jax.scoring.types import HeadSettings


def predictors(hidden_BTD: jax.Array, starts_B: jax.Array, settings: HeadSettings) -> jax.Array:
    """The hidden states [B, N, D] that predict each row's completion tokens: the shift by one.

    Only these ever meet the vocabulary; what predicts prompt and most padding never does.

    Args:
        starts_B: position of each completion's first token, at least 1 (the prompt's length).
    """
    at = _positions(starts_B, settings.max_new_tokens) - 1
    return jnp.take_along_axis(hidden_BTD, at[:, :, None], axis=1, mode="clip")


def window(x_BT: jax.Array, starts_B: jax.Array, settings: HeadSettings) -> jax.Array:
    """The values [B, N] at each row's completion tokens; 0 (False) past the end of the row.

    Args:
        starts_B: as in `predictors`.
    """
    at = _positions(starts_B, settings.max_new_tokens)
    return jnp.take_along_axis(x_BT, at, axis=1, mode="fill", fill_value=0)


def unwindow(x_BN: jax.Array, like_BT: jax.Array, starts_B: jax.Array) -> jax.Array:
    """`window` undone: each value at its token, 0 elsewhere; what lies past the end of the row is dropped.

    Args:
        like_BT: of the rows' shape.
        starts_B: as in `predictors`.

    Returns:
        [B, T], in the type of `x_BN`.
    """
    at = _positions(starts_B, x_BN.shape[1])
    rows = jnp.arange(x_BN.shape[0])[:, None]
    return jnp.zeros(like_BT.shape, x_BN.dtype).at[rows, at].set(x_BN, mode="drop")


def _positions(starts_B: jax.Array, num: int) -> jax.Array:
    """[B, N] positions of the completion tokens; past a row's end for some of a short buffer."""
    return starts_B[:, None] + jnp.arange(num)
