"""Scores of a model that is not being differentiated: packed rows to log-probabilities and states."""

import dataclasses
from collections.abc import Callable

import jax

from kdrl_jax.models.decoder import Model
from kdrl_jax.scoring.head import score_predictors
from kdrl_jax.scoring.microbatches import Bounds, map_passes
from kdrl_jax.scoring.packing import PackShape
from kdrl_jax.scoring.packs import PackedRows
from kdrl_jax.scoring.types import HeadSettings
from kdrl_jax.types import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackScores:
    """About the tokens in the lists of packed rows."""

    logprobs_RN: jax.Array
    """float32."""
    entropy_RN: jax.Array | None
    """float32, nats; None unless it was asked for."""
    states_RND: jax.Array | None
    """The final hidden states that predict the tokens; None unless they were asked for."""


def score_rows(
    model: Model,
    params: Params,
    rows: PackedRows,
    temperature: jax.Array | float,
    settings: HeadSettings,
    *,
    keep_states: bool = False,
    keep_entropy: bool = False,
) -> PackScores:
    """A model's scores of some packed rows, at once.

    Args:
        temperature: as in `score_predictors`.
        keep_states: for divergences over the vocabulary.
    """
    decoder = model.bind(params)
    states = rows.predicting(decoder.hidden(rows.tokens_RT, rows.layout))
    scores = score_predictors(
        states,
        decoder.output_head(),
        rows.targets_RN,
        temperature,
        settings,
        counts_B=rows.counts_R,
        train_head=False,
    )
    return PackScores(
        scores.logprobs, scores.entropy if keep_entropy else None, states if keep_states else None
    )


def make_scorer(
    model: Model,
    settings: HeadSettings,
    shape: PackShape,
    *,
    keep_states: bool = False,
    keep_entropy: bool = False,
) -> Callable[[Params, PackedRows, jax.Array | float, Bounds], PackScores]:
    """The compiled `score_rows` of (parameters, packed rows of that shape, temperature, passes), one pass at
    a time, which bounds the memory of activations; 0 in the passes that are not asked for."""

    def score(params: Params, rows: PackedRows, temperature: jax.Array | float, within: Bounds) -> PackScores:
        def one(rows: PackedRows) -> PackScores:
            return score_rows(
                model,
                params,
                rows,
                temperature,
                settings,
                keep_states=keep_states,
                keep_entropy=keep_entropy,
            )

        scores: PackScores = map_passes(one, (rows,), shape.max_passes, within)
        return scores

    return jax.jit(score)
