"""The loss of some rows, and its sum over a minibatch however it is cut.

Denominators are counted over the whole minibatch before it is cut, as weights of its tokens; every
microbatch, chunk of the head and shard then only adds its part of one sum, so how the batch is cut cannot
change it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kdrl_jax.config import Config
from kdrl_jax.models.decoder import Model
from kdrl_jax.models.head import Head
from kdrl_jax.scoring import (
    HeadSettings,
    TeacherSide,
    TokenScores,
    head_loss,
    predictors,
    score_predictors,
    window,
)
from kdrl_jax.step.terms import StepScalars, Terms, TokenInputs
from kdrl_jax.types import Metrics, Params, TrainBatch

Heads = tuple[Head, ...]
"""Of the teachers whose distributions the update needs whole, in the order of `TrainBatch.frozen`."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of some rows of a minibatch."""

    config: Config
    student: Model
    head: HeadSettings

    @property
    def terms(self) -> Terms:
        return Terms(self.config)

    @property
    def trains_head(self) -> bool:
        """Whether the vocabulary head is trained; with adapters it is frozen."""
        return self.student.holding.lora is None

    def loss(
        self, params: Params, batch: TrainBatch, inputs: TokenInputs, at: StepScalars, heads: Heads
    ) -> tuple[jax.Array, Metrics]:
        """Coefficient-weighted sum of the terms over some rows, and the metrics' sums.

        Args:
            inputs: of the same rows, from `Terms.inputs` of the whole minibatch.
            heads: needed by divergences over the vocabulary alone.
        """
        if self.terms.whole_rows:
            return self.terms.loss(self._scores(params, batch, heads), (inputs, at))
        states, head = self._states(params, batch)
        return head_loss(
            states,
            head,
            window(batch.tokens_BT, batch.starts_B, self.head),
            batch.temperature_B,
            (inputs, at),
            self.terms.loss,
            self.head,
            _teacher_side(batch, heads),
            self.terms.divergence,
            train_head=self.trains_head,
        )

    def sums(
        self, params: Params, batch: TrainBatch, inputs: TokenInputs, at: StepScalars, heads: Heads
    ) -> dict[str, jax.Array]:
        """Each term without its coefficient, over some rows; by the path that recomputes, so that each
        can be differentiated by itself."""
        return self.terms.sums(self._scores(params, batch, heads), inputs, at)

    def _states(self, params: Params, batch: TrainBatch) -> tuple[jax.Array, Head]:
        decoder = self.student.bind(params)
        hidden = decoder.hidden(
            batch.tokens_BT, segment_ids_BT=batch.segment_ids_BT, remat=self.config.train.remat
        )
        return predictors(hidden, batch.starts_B, self.head), decoder.output_head()

    def _scores(self, params: Params, batch: TrainBatch, heads: Heads) -> TokenScores:
        states, head = self._states(params, batch)
        targets = window(batch.tokens_BT, batch.starts_B, self.head)
        teacher = _teacher_side(batch, heads)
        return score_predictors(
            states,
            head,
            targets,
            batch.temperature_B,
            self.head,
            teacher,
            self.terms.divergence,
            train_head=self.trains_head,
        )


def _teacher_side(batch: TrainBatch, heads: Heads) -> TeacherSide | None:
    frozen = batch.frozen
    if not frozen.teacher_states:
        return None
    return TeacherSide(frozen.teacher_states, heads, frozen.teacher_weights_BK)


def microbatches(tree: Any, num: int) -> Any:
    """[B, ...] to [num, B / num, ...], taking every num-th row, so that each device's rows are split
    evenly and none moves."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // num, num, *x.shape[1:]).swapaxes(0, 1), tree)


def accumulate(fn: Callable[..., Any], parts: Any, num: int) -> Any:
    """Sum of `fn(*part)` over `num` microbatches, one at a time."""
    if num == 1:
        return fn(*parts)
    stacked = microbatches(parts, num)
    shapes = jax.eval_shape(fn, *jax.tree.map(lambda x: x[0], stacked))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(
        lambda total, part: (jax.tree.map(jnp.add, total, fn(*part)), None), zeros, stacked
    )
    return total


def num_microbatches(config: Config, batch: TrainBatch) -> int:
    """Into how many forward and backward passes a minibatch is cut."""
    rows = batch.tokens_BT.shape[0]
    return rows // (config.train.microbatch_rows or rows)
