"""Scoring an iteration's completions with the models that are not trained: teachers and reference."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kdrl_jax.config import Config
from kdrl_jax.models.decoder import FrozenModel
from kdrl_jax.models.head import Head
from kdrl_jax.scoring import HeadSettings, RowScores, make_row_scorer
from kdrl_jax.sharding import rows as row_sharding
from kdrl_jax.types import FrozenScores, Rollouts

_Rows = tuple[jax.Array, jax.Array, jax.Array]
"""Tokens [B, T], starts [B], temperatures [B]."""


class FrozenScorer:
    """Scores completions with a run's teachers and its reference, one model at a time.

    One teacher, or each of a mixture, scores all rows. Where every question names its teacher, each scores
    its own rows only, in passes of a fixed size, so that nothing is compiled again.
    """

    def __init__(
        self,
        config: Config,
        teachers: Mapping[str, FrozenModel],
        reference: FrozenModel | None,
        head: HeadSettings,
        mesh: Mesh,
        rows_per_pass: int,
    ):
        self._config, self._mesh, self._rows_per_pass = config, mesh, rows_per_pass
        self._teachers = dict(teachers) if config.scores_teacher else {}
        self._reference = reference
        self._score = {
            role: make_row_scorer(
                teacher.model,
                head,
                rows_per_pass,
                keep_states=config.teacher_states,
                keep_entropy=config.kd.teacher_entropy_scale is not None,
            )
            for role, teacher in self._teachers.items()
        }
        if reference is not None:
            self._score_reference = make_row_scorer(reference.model, head, rows_per_pass)
        self.heads: tuple[Head, ...] = ()
        """Of the teachers whose states are kept."""
        if config.teacher_states:
            self.heads = tuple(teacher.head for teacher in self._teachers.values())

    def __call__(
        self, rollouts: Rollouts, temperature: float, teacher_of_row: Sequence[str | None]
    ) -> FrozenScores:
        """Dispatches all scoring. Only a parked model is waited for, so that the next one finds room.

        Args:
            temperature: that the completions were sampled at.
            teacher_of_row: [B] name among `teachers` where each question names its own.
        """
        temperatures = np.full(rollouts.ended_B.shape, temperature, np.float32)
        rows = (
            rollouts.tokens_BT,
            rollouts.prompt_lengths_B,
            jax.device_put(temperatures, row_sharding(self._mesh)),
        )
        scores = FrozenScores()
        with jax.set_mesh(self._mesh):
            if self._teachers:
                scores = self._of_teachers(rows, teacher_of_row)
            if self._reference is None:
                return scores
            reference = _finished(self._reference, self._score_reference(self._reference.on_device(), *rows))
        return dataclasses.replace(scores, ref_logprobs_BT=reference.logprobs_BT)

    def _of_teachers(self, rows: _Rows, teacher_of_row: Sequence[str | None]) -> FrozenScores:
        if len(self._teachers) == 1:
            (role,) = self._teachers
            scores = self._score_all(role, rows)
            states = () if scores.states_BND is None else (scores.states_BND,)
            return FrozenScores(scores.logprobs_BT, scores.entropy_BT, states)
        names = [role.removeprefix("teachers.") for role in self._teachers]
        if (mixture := self._config.kd.mixture) is not None:
            share = np.array([mixture[name] for name in names], np.float32)
            weights_BK = np.tile(share / share.sum(), (len(teacher_of_row), 1))
            each = [self._score_all(role, rows) for role in self._teachers]
        else:
            weights_BK = np.array([[name == own for name in names] for own in teacher_of_row], np.float32)
            each = [
                self._score_some(role, rows, np.flatnonzero(mine))
                for role, mine in zip(self._teachers, weights_BK.T, strict=True)
            ]
        return _mix(each, jax.device_put(weights_BK, row_sharding(self._mesh)))

    def _score_all(self, role: str, rows: _Rows) -> RowScores:
        teacher = self._teachers[role]
        return _finished(teacher, self._score[role](teacher.on_device(), *rows))

    def _score_some(self, role: str, rows: _Rows, chosen: np.ndarray) -> RowScores:
        """One teacher's scores of some rows; 0 in the others."""
        teacher, size = self._teachers[role], self._rows_per_pass
        num_rows = rows[0].shape[0]
        params = teacher.on_device()
        # The first pass also gives the shapes, so there is one even for a teacher without rows. Rows past
        # the end are read as the last one, and not written.
        total = None
        for first in range(0, max(len(chosen), 1), size):
            some = np.full(size, num_rows, np.int32)
            taken = chosen[first : first + size]
            some[: len(taken)] = taken
            scores = self._score[role](params, *_take(rows, some, row_sharding(self._mesh)))
            total = _put(total, scores, some, num_rows)
        assert total is not None
        return _finished(teacher, total)


def _finished(frozen: FrozenModel, scores: RowScores) -> RowScores:
    """The scores; of a parked model once they are there, since its copy on the devices lives until then."""
    return jax.block_until_ready(scores) if frozen.is_parked else scores


@functools.partial(jax.jit, static_argnums=2)
def _take(rows: _Rows, some: np.ndarray, place: Any) -> _Rows:
    def take(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(jnp.take(x, some, axis=0, mode="clip"), place)

    return jax.tree.map(take, rows)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _put(total: RowScores | None, scores: RowScores, some: np.ndarray, num_rows: int) -> RowScores:
    if total is None:
        total = jax.tree.map(lambda x: jnp.zeros((num_rows, *x.shape[1:]), x.dtype), scores)
    return jax.tree.map(lambda t, x: t.at[some].set(x, mode="drop"), total, scores)


@jax.jit
def _mix(each: Sequence[RowScores], weights_BK: jax.Array) -> FrozenScores:
    """The mixture's probability of each sampled token."""
    logprobs_BTK = jnp.stack([s.logprobs_BT for s in each], -1)
    entropy = None
    if each[0].entropy_BT is not None:
        # Where one teacher has all the weight; the entropy of a mixture does not follow from its parts.
        entropies = [s.entropy_BT for s in each if s.entropy_BT is not None]
        entropy = jnp.einsum("btk,bk->bt", jnp.stack(entropies, -1), weights_BK)
    return FrozenScores(
        jax.nn.logsumexp(logprobs_BTK, axis=-1, b=weights_BK[:, None, :]),
        entropy,
        tuple(s.states_BND for s in each if s.states_BND is not None),
        weights_BK,
    )
