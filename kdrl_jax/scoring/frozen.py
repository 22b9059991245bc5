"""Scores of a model that is not trained: rows of tokens to log-probabilities and states."""

import jax

from kdrl_jax.models.decoder import Model
from kdrl_jax.scoring.head import score_predictors
from kdrl_jax.scoring.types import HeadSettings
from kdrl_jax.scoring.windows import predictors, window
from kdrl_jax.types import Params


def score_tokens(
    model: Model,
    params: Params,
    tokens_BT: jax.Array,
    starts_B: jax.Array,
    temperature_B: jax.Array,
    settings: HeadSettings,
    *,
    keep_states: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """A frozen model's log-probabilities [B, N] of the completions, and the states [B, N, D] that
    predict them if they are to be kept for the exact divergence.

    Args:
        starts_B, temperature_B: as in `predictors` and `score_predictors`.
    """
    decoder = model.bind(params)
    states = predictors(decoder.hidden(tokens_BT), starts_B, settings)
    targets = window(tokens_BT, starts_B, settings)
    head = decoder.output_head()
    scores = score_predictors(states, head, targets, temperature_B, settings, train_head=False)
    return scores.logprobs, states if keep_states else None


def score_in_passes(
    model: Model,
    params: Params,
    tokens_BT: jax.Array,
    starts_B: jax.Array,
    temperature_B: jax.Array,
    settings: HeadSettings,
    *,
    rows_per_pass: int,
    keep_states: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """`score_tokens` over `rows_per_pass` rows at a time, which bounds the memory of activations."""
    b = tokens_BT.shape[0]
    num = b // rows_per_pass
    operands = (tokens_BT, starts_B, temperature_B)

    def one(rows: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
        return score_tokens(model, params, *rows, settings, keep_states=keep_states)

    if num == 1:
        return one(operands)
    # Every num-th row in a pass, so that each device's rows are split evenly and none moves.
    cut = jax.tree.map(lambda x: x.reshape(rows_per_pass, num, *x.shape[1:]).swapaxes(0, 1), operands)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(b, *x.shape[2:]), jax.lax.map(one, cut))
