"""Scores of a model that is not being differentiated: rows of tokens to log-probabilities and states."""

import dataclasses
from collections.abc import Callable

import jax

from kdrl_jax.models.decoder import Model
from kdrl_jax.scoring.head import score_predictors
from kdrl_jax.scoring.types import HeadSettings
from kdrl_jax.scoring.windows import predictors, unwindow, window
from kdrl_jax.types import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowScores:
    """About each token of some rows; 0 outside the completions' windows."""

    logprobs_BT: jax.Array
    """float32."""
    entropy_BT: jax.Array | None
    """float32, nats; None unless it was asked for."""
    states_BND: jax.Array | None
    """The final hidden states that predict the completion tokens; None unless they were asked for."""


def score_tokens(
    model: Model,
    params: Params,
    tokens_BT: jax.Array,
    starts_B: jax.Array,
    temperature_B: jax.Array,
    settings: HeadSettings,
    *,
    keep_states: bool = False,
    keep_entropy: bool = False,
) -> RowScores:
    """A model's scores of the completions of right-padded rows.

    Args:
        starts_B, temperature_B: as in `predictors` and `score_predictors`.
        keep_states: for divergences over the vocabulary.
    """
    decoder = model.bind(params)
    states = predictors(decoder.hidden(tokens_BT), starts_B, settings)
    targets = window(tokens_BT, starts_B, settings)
    head = decoder.output_head()
    scores = score_predictors(states, head, targets, temperature_B, settings, train_head=False)
    return RowScores(
        unwindow(scores.logprobs, tokens_BT, starts_B),
        unwindow(scores.entropy, tokens_BT, starts_B) if keep_entropy else None,
        states if keep_states else None,
    )


def make_row_scorer(
    model: Model,
    settings: HeadSettings,
    rows_per_pass: int,
    *,
    keep_states: bool = False,
    keep_entropy: bool = False,
) -> Callable[[Params, jax.Array, jax.Array, jax.Array], RowScores]:
    """The compiled `score_tokens` of (parameters, tokens [B, T], starts [B], temperatures [B]), over
    `rows_per_pass` rows at a time, which bounds the memory of activations."""

    def score(params: Params, *operands: jax.Array) -> RowScores:
        b = operands[0].shape[0]
        num = b // rows_per_pass

        def one(rows: tuple[jax.Array, ...]) -> RowScores:
            tokens_BT, starts_B, temperature_B = rows
            return score_tokens(
                model,
                params,
                tokens_BT,
                starts_B,
                temperature_B,
                settings,
                keep_states=keep_states,
                keep_entropy=keep_entropy,
            )

        if num == 1:
            return one(operands)
        # Every num-th row in a pass, so that each device's rows are split evenly and none moves.
        cut = jax.tree.map(lambda x: x.reshape(rows_per_pass, num, *x.shape[1:]).swapaxes(0, 1), operands)
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(b, *x.shape[2:]), jax.lax.map(one, cut))

    return jax.jit(score)
