"""The loss of some packed rows, and its sum over a minibatch however it is cut.

Denominators are counted over the whole minibatch before it is cut, as weights of its tokens; every
microbatch, chunk of the head and shard then only adds its part of one sum, so how the batch is cut cannot
change it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from kdrl_jax.config import Config
from kdrl_jax.models.decoder import Model
from kdrl_jax.models.head import Head
from kdrl_jax.scoring import (
    HeadSettings,
    PackedRows,
    Packs,
    PackShape,
    TeacherSide,
    TeacherStates,
    TokenScores,
    head_loss,
    score_predictors,
    sum_passes,
)
from kdrl_jax.step.terms import StepScalars, Terms, TokenInputs
from kdrl_jax.types import Metrics, Params, TrainBatch

Heads = tuple[Head, ...]
"""Of the teachers whose distributions the update needs whole, in the order of `TeacherStates.states`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Minibatch:
    """What the compiled update takes."""

    batch: TrainBatch
    packs: Packs
    teacher: TeacherStates | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """Some packed rows of a minibatch."""

    rows: PackedRows
    inputs: TokenInputs
    """Of the lists of these rows, from `Terms.inputs` of the whole minibatch."""
    teacher: TeacherStates | None


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What all parts of a minibatch share; beside it, what is differentiated."""

    at: StepScalars
    heads: Heads
    batch: TrainBatch


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of some rows of a minibatch."""

    config: Config
    student: Model
    head: HeadSettings
    shape: PackShape

    @property
    def terms(self) -> Terms:
        return Terms(self.config)

    @property
    def trains_head(self) -> bool:
        """Whether the vocabulary head is trained; with adapters it is frozen."""
        return self.student.holding.lora is None

    def loss(self, params: Params, part: Part, shared: StepInputs) -> tuple[jax.Array, Metrics]:
        """Coefficient-weighted sum of the terms over some rows, and the metrics' sums."""
        rows, inputs = part.rows, (part.inputs, shared.at)
        if self.terms.whole_rows:
            scores, of_tokens = self._whole(self._scores(params, part, shared), part, shared)
            return self.terms.loss(scores, (of_tokens, shared.at))
        states, head = self._states(params, rows)
        with jax.named_scope("head"):
            return head_loss(
                states,
                head,
                rows.targets_RN,
                shared.batch.temperature,
                inputs,
                self.terms.loss,
                self.head,
                _teacher_side(part.teacher, shared.heads),
                self.terms.divergence,
                counts_B=rows.counts_R,
                train_head=self.trains_head,
            )

    def sums(self, params: Params, part: Part, shared: StepInputs) -> dict[str, jax.Array]:
        """Each term without its coefficient, over some rows; by the path that recomputes, so that each
        can be differentiated by itself."""
        scores, inputs = self._scores(params, part, shared), part.inputs
        if self.terms.whole_rows:
            scores, inputs = self._whole(scores, part, shared)
        return self.terms.sums(scores, inputs, shared.at)

    def accumulate(self, fn: Callable[[Part], Any], minibatch: Minibatch) -> Any:
        """The sum of `fn(part)` over a minibatch, one microbatch at a time."""
        packs = minibatch.packs
        with jax.named_scope("weights"):
            inputs = self.terms.inputs(minibatch.batch, packs.rows)
        part = Part(packs.rows, inputs, minibatch.teacher)
        return sum_passes(fn, (part,), self.shape.max_passes, (0, packs.bounds[-1]))

    def _states(self, params: Params, rows: PackedRows) -> tuple[jax.Array, Head]:
        decoder = self.student.bind(params)
        hidden = decoder.hidden(rows.tokens_RT, rows.layout, remat=self.config.train.remat)
        return rows.predicting(hidden), decoder.output_head()

    def _scores(self, params: Params, part: Part, shared: StepInputs) -> TokenScores:
        states, head = self._states(params, part.rows)
        with jax.named_scope("head"):
            return score_predictors(
                states,
                head,
                part.rows.targets_RN,
                shared.batch.temperature,
                self.head,
                _teacher_side(part.teacher, shared.heads),
                self.terms.divergence,
                counts_B=part.rows.counts_R,
                train_head=self.trains_head,
            )

    def _whole(self, scores: TokenScores, part: Part, shared: StepInputs) -> tuple[TokenScores, TokenInputs]:
        """Scores and inputs about the rows of the rollouts [B, T], each completion in one of them, for terms
        that look at whole completions; 0 at those that are not in this part."""
        like = shared.batch.completion_mask_BT
        back: tuple[TokenScores, TokenInputs] = jax.tree.map(
            lambda x: part.rows.put_back(x, like), (scores, part.inputs)
        )
        return back


def _teacher_side(teacher: TeacherStates | None, heads: Heads) -> TeacherSide | None:
    return None if teacher is None else TeacherSide(teacher.states, heads, teacher.weights_RK)
