"""Rollouts that a run writes down for a reader: which, and what of each of their tokens."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kdrl_jax import hosts, sharding
from kdrl_jax.config import Config
from kdrl_jax.data.tokenizer_pieces import TokenPieces
from kdrl_jax.frozen import FrozenScorer
from kdrl_jax.models.decoder import Model
from kdrl_jax.models.head import Head
from kdrl_jax.objective.advantages import group_advantages
from kdrl_jax.rounds import Round, sample_rows
from kdrl_jax.scoring import (
    Bounds,
    PackedRows,
    PackShape,
    TeacherSide,
    TokenDetails,
    describe_predictors,
    map_passes,
)
from kdrl_jax.scoring.packer import config_pack_shape, pack_rollouts
from kdrl_jax.setup import Setup
from kdrl_jax.types import Params, Rollouts

NUM_TOP = 5
"""Tokens of the teacher that are written at each position, at most."""
LEAST = 1e-3
"""Of less probability none is written, but the likeliest."""

_advantages = jax.jit(group_advantages, static_argnums=(1, 2))


class LoggedRollouts:
    """Makes records of the first groups that the first process of a job answers for. All processes take part:
    the models lie on all of them. Its programs are its own, so that an update is the same without them."""

    def __init__(self, setup: Setup, scorer: FrozenScorer, teacher_of: Mapping[str, str | None]):
        """Nothing is compiled yet.

        Args:
            scorer: whose teachers these are, and what they count.
            teacher_of: source -> the name of its teacher, if it has one of its own.
        """
        c = setup.config
        self._setup, self._config, self._scorer, self._teacher_of = setup, c, scorer, teacher_of
        self._rows, self._padded = logged_rows(c, setup.mesh)
        self._pieces = TokenPieces(setup.tokenizer)
        self.is_compiled = False
        """Whether all is compiled that it will need."""
        if scorer.teachers:
            self._shape = config_pack_shape(c, setup.mesh, len(self._padded))
            models = {"student": setup.student} | {role: t.model for role, t in scorer.teachers.items()}
            self._states = {role: states_program(model, self._shape) for role, model in models.items()}
            self._describe = details_program(setup)

    def records(
        self, sampled: Round, step: int, student_params: Params, temperature: float
    ) -> list[dict[str, Any]]:
        """Of completions that have been verified. On other processes than the first: nothing.

        Args:
            student_params: those that the completions were sampled with.
            temperature: that they were sampled at.
        """
        c = self._config
        advantages = np.asarray(_advantages(sampled.total_rewards(c), c.rollout.group_size, c.rl.advantage))
        arrays, details = None, None
        if c.log.rollouts_tokens:
            rollouts = self._take(sampled.rollouts)
            if self._scorer.teachers:
                details = hosts.whole(self._details(sampled, rollouts, student_params, temperature))
            arrays = hosts.whole(rollouts)
        self.is_compiled = True
        if not hosts.is_first():
            return []
        end_ids = self._setup.tokenizer.end_ids
        rows = sample_rows(c, sampled, step, end_ids, len(self._rows))
        for b, (row, number) in enumerate(zip(rows, self._rows, strict=True)):
            row["advantage"] = _short(advantages[number])
            row["sampler"] = c.rollout.source
            if arrays is not None:
                row["tokens"] = self._of_tokens(b, arrays, details)
        return rows

    def _take(self, rollouts: Rollouts) -> Rollouts:
        """The rows that are written, and those that fill up."""
        used = np.arange(len(self._padded)) < len(self._rows)
        mesh = self._setup.mesh
        with jax.set_mesh(mesh):
            taken: Rollouts = jax.device_put(_take(rollouts, self._padded, used), sharding.rows(mesh))
        return taken

    def _details(
        self, sampled: Round, rollouts: Rollouts, student_params: Params, temperature: float
    ) -> TokenDetails:
        """Of each position of the rows, [B, T]."""
        c, setup, scorer = self._config, self._setup, self._scorer
        own = [self._teacher_of[sampled.sources[b]] for b in self._padded]
        (packed,) = pack_rollouts(
            rollouts,
            c.rollout.group_size,
            self._shape,
            setup.mesh,
            kinds_B=scorer.kinds(own),
            num_kinds=c.num_kinds,
        )
        within = (0, packed.packs.bounds[-1])
        heads: list[Head] = []
        states: list[jax.Array] = []
        with jax.set_mesh(setup.mesh):
            for role, teacher in scorer.teachers.items():
                found = self._states[role](teacher.on_device(), packed.packs.rows, within)
                # The copy of a parked model lives until it has been used; only its head is kept.
                states.append(jax.block_until_ready(found) if teacher.is_parked else found)
                heads.append(teacher.head)
            own_states = self._states["student"](student_params, packed.packs.rows, within)
            side = TeacherSide(tuple(states), tuple(heads), scorer.weights(packed))
            return self._describe(student_params, own_states, side, packed.packs.rows, rollouts, temperature)

    def _of_tokens(self, b: int, rollouts: Rollouts, details: TokenDetails | None) -> dict[str, Any]:
        """What is written of the tokens of one row, in columns; arrays are numpy's."""
        start, length = int(rollouts.prompt_lengths_B[b]), int(rollouts.completion_lengths_B[b])
        part = slice(start, start + length)
        ids = rollouts.tokens_BT[b, part].tolist()
        texts = self._pieces.split(ids)
        out: dict[str, Any] = {
            "texts": texts,
            # What cannot be seen in the text: end tokens, and bytes of a character.
            "names": {str(i): self._pieces.name(ids[i]) for i, text in enumerate(texts) if not text},
            "logprobs": _all_short(rollouts.sampler_logprobs_BT[b, part]),
        }
        if details is not None:
            if self._config.rollout.source != "student":
                out["student_logprobs"] = _all_short(details.student_logprobs[b, part])
            out["teacher_logprobs"] = _all_short(details.teacher_logprobs[b, part])
            out["reverse_kl"] = _all_short(details.reverse_kl[b, part])
            tops = [self._top(details, b, t) for t in range(start, start + length)]
            out["teacher_top"] = tops
            out["teacher_rank"] = [
                _rank(token, details.top_ids[b, start + t], len(top))
                for t, (token, top) in enumerate(zip(ids, tops, strict=True))
            ]
        return out

    def _top(self, details: TokenDetails, b: int, t: int) -> list[tuple[str, float | None, float | None]]:
        """(token, the teacher's probability of it, the student's) at one position, the likeliest first."""
        teacher, student = np.exp(details.top_teacher[b, t]), np.exp(details.top_student[b, t])
        return [
            (self._pieces.name(int(token)), _short(p), _short(q))
            for k, (token, p, q) in enumerate(zip(details.top_ids[b, t], teacher, student, strict=True))
            if k == 0 or p >= LEAST
        ]


def logged_rows(config: Config, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """(rows of the rollouts that are written, the same with what fills up): whole groups of the first
    process. Rows divide over the devices; those that fill up have no completion."""
    group, shards = config.rollout.group_size, sharding.batch_shards(mesh)
    prompts = hosts.rows_of_first(mesh, config.train.prompts_per_iteration)
    prompts = prompts[: max(config.log.rollouts_rows // group, 1)]
    rows = (prompts[:, None] * group + np.arange(group)).ravel()
    return rows, np.resize(rows, -(-len(rows) // shards) * shards)


def states_program(model: Model, shape: PackShape) -> Any:
    """Compiled: (params, packed rows, bounds of the passes) -> `_states`."""
    return jax.jit(functools.partial(_states, model, shape))


def details_program(setup: Setup) -> Any:
    """Compiled: (student's params and states, teachers, packed rows, rollouts, temperature) -> `_in_rows`."""
    return jax.jit(functools.partial(_in_rows, setup))


def _in_rows(
    setup: Setup,
    params: Params,
    states: jax.Array,
    teacher: TeacherSide,
    rows: PackedRows,
    rollouts: Rollouts,
    temperature: jax.Array,
) -> TokenDetails:
    """The details of packed rows, at their tokens in the rollouts."""
    details = describe_predictors(
        states,
        setup.student.bind(params).output_head(),
        rows.targets_RN,
        temperature,
        setup.head,
        teacher,
        num_top=NUM_TOP,
        counts_B=rows.counts_R,
    )

    def put_back(x: jax.Array) -> jax.Array:
        if x.ndim == 2:
            return rows.put_back(x, rollouts.tokens_BT)
        return jnp.stack([put_back(x[..., k]) for k in range(x.shape[-1])], axis=-1)

    return jax.tree.map(put_back, details)


def _states(model: Model, shape: PackShape, params: Params, rows: PackedRows, within: Bounds) -> jax.Array:
    """A model's final states [R, N, D] that predict the tokens of packed rows, one pass at a time."""

    def one(rows: PackedRows) -> jax.Array:
        return rows.predicting(model.bind(params).hidden(rows.tokens_RT, rows.layout))

    states: jax.Array = map_passes(one, (rows,), shape.max_passes, within)
    return states


@jax.jit
def _take(rollouts: Rollouts, rows: np.ndarray, used: np.ndarray) -> Rollouts:
    taken: Rollouts = jax.tree.map(lambda x: x[rows], rollouts)
    lengths = jnp.where(used, taken.completion_lengths_B, 0)
    return dataclasses.replace(taken, completion_lengths_B=lengths)


def _rank(token: int, top_ids: Any, written: int) -> int | None:
    """The place of a token among those that are written of the teacher's, 0 the likeliest; None if it is none
    of them. Texts cannot say: tokens of half a character have another text beside the other half."""
    found = np.flatnonzero(np.asarray(top_ids)[:written] == token)
    return int(found[0]) if len(found) else None


def _short(value: Any) -> float | None:
    """Three digits, so that files stay small; None for what is not finite."""
    number = float(value)
    return float(f"{number:.3g}") if math.isfinite(number) else None


def _all_short(values: Any) -> list[float | None]:
    return [_short(x) for x in values]
