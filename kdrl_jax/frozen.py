"""Scoring an iteration's completions with the models that are not trained: teachers and reference."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kdrl_jax import hosts, sharding
from kdrl_jax.config import Config
from kdrl_jax.models.decoder import FrozenModel, Model
from kdrl_jax.models.head import Head
from kdrl_jax.scoring import (
    Bounds,
    HeadSettings,
    PackedRows,
    PackScores,
    PackShape,
    TeacherStates,
    make_scorer,
)
from kdrl_jax.scoring.packer import Packed
from kdrl_jax.types import FrozenScores, Params, Rollouts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What frozen models say of an iteration."""

    scores: FrozenScores
    """Of the rollouts' rows."""
    teacher_states: list[TeacherStates | None]
    """Of each minibatch; None unless the update needs the teachers' distributions whole."""


class LogprobScorer:
    """Log-probabilities of a model that is trained, as it is now."""

    def __init__(self, model: Model, head: HeadSettings, shape: PackShape):
        self._score = make_scorer(model, head, shape)

    def __call__(
        self, rollouts: Rollouts, minibatches: Sequence[Packed], params: Params, temperature: float
    ) -> jax.Array:
        """Of the completions of the rollouts, [B, T]; 0 elsewhere."""
        scores = [self._score(params, m.packs.rows, temperature, _all(m)) for m in minibatches]
        return in_rows(rollouts, minibatches, [x.logprobs_RN for x in scores])


class FrozenScorer:
    """Scores packed completions with a run's teachers and its reference, one model at a time.

    One teacher, or each of a mixture, scores all rows. Where every question names its teacher, each scores
    its own rows only: they are of its kind.
    """

    def __init__(
        self,
        config: Config,
        teachers: Mapping[str, FrozenModel],
        reference: FrozenModel | None,
        head: HeadSettings,
        mesh: Mesh,
        shape: PackShape,
    ):
        self._config, self._mesh = config, mesh
        self.teachers = dict(teachers) if config.scores_teacher else {}
        """By role: those that score; none where no term needs them."""
        self._reference = reference
        self._score = {
            role: make_scorer(
                teacher.model,
                head,
                shape,
                keep_states=config.teacher_states,
                keep_entropy=config.kd.teacher_entropy_scale is not None,
            )
            for role, teacher in self.teachers.items()
        }
        if reference is not None:
            self._score_reference = make_scorer(reference.model, head, shape)
        self.heads: tuple[Head, ...] = ()
        """Of the teachers whose states are kept."""
        if config.teacher_states:
            self.heads = tuple(teacher.head for teacher in self.teachers.values())

    def kinds(self, teacher_of_row: Sequence[str | None]) -> list[int] | None:
        """The kind of each row for `pack_rollouts`: which teacher scores it; None where all do.

        Args:
            teacher_of_row: [B] name among `teachers`.
        """
        if self._config.num_kinds == 1:
            return None
        roles = list(self.teachers)
        return [roles.index(f"teachers.{name}") for name in teacher_of_row]

    def __call__(self, rollouts: Rollouts, minibatches: Sequence[Packed], temperature: float) -> Frozen:
        """Dispatches all scoring. Only a parked model is waited for, so that the next one finds room.

        Args:
            minibatches: of all rows of the rollouts.
            temperature: that the completions were sampled at.
        """
        scores = FrozenScores()
        states: list[TeacherStates | None] = [None] * len(minibatches)
        with jax.set_mesh(self._mesh):
            if self.teachers:
                scores, states = self._of_teachers(rollouts, minibatches, temperature)
            if self._reference is None:
                return Frozen(scores, states)
            params = self._reference.on_device()
            done = [self._score_reference(params, m.packs.rows, temperature, _all(m)) for m in minibatches]
            ref = in_rows(rollouts, minibatches, [x.logprobs_RN for x in _finished(self._reference, done)])
        return Frozen(dataclasses.replace(scores, ref_logprobs_BT=ref), states)

    def _of_teachers(
        self, rollouts: Rollouts, minibatches: Sequence[Packed], temperature: float
    ) -> tuple[FrozenScores, list[TeacherStates | None]]:
        each: list[list[PackScores]] = []
        for kind, (role, teacher) in enumerate(self.teachers.items()):
            params, score = teacher.on_device(), self._score[role]
            done = [score(params, m.packs.rows, temperature, self._passes(m, kind)) for m in minibatches]
            each.append(_finished(teacher, done))
        mixed = [
            _mix(of_teachers, self.weights(m)) for m, *of_teachers in zip(minibatches, *each, strict=True)
        ]
        entropies = [entropy for _, entropy, _ in mixed if entropy is not None]
        scores = FrozenScores(
            teacher_logprobs_BT=in_rows(rollouts, minibatches, [logprobs for logprobs, _, _ in mixed]),
            teacher_entropy_BT=in_rows(rollouts, minibatches, entropies) if entropies else None,
        )
        return scores, [states for _, _, states in mixed]

    def _passes(self, minibatch: Packed, teacher: int) -> Bounds:
        if self._config.num_kinds == 1:
            return _all(minibatch)
        bounds = minibatch.packs.bounds
        return bounds[teacher], bounds[teacher + 1]

    def weights(self, minibatch: Packed) -> jax.Array | None:
        """`TeacherStates.weights_RK`."""
        if len(self.teachers) == 1:
            return None
        mixture = self._config.kd.mixture
        if mixture is not None:
            share = np.array([mixture[role.removeprefix("teachers.")] for role in self.teachers], np.float32)
            weights_RK = np.tile(share / share.sum(), (len(minibatch.kind_R), 1))
        else:
            weights_RK = np.eye(len(self.teachers), dtype=np.float32)[minibatch.kind_R]
        return hosts.spread(weights_RK, sharding.rows(self._mesh))


def in_rows(rollouts: Rollouts, minibatches: Sequence[Packed], values_RN: Sequence[jax.Array]) -> jax.Array:
    """What is known of the tokens of each minibatch's lists, at these tokens in the rollouts [B, T]; 0
    elsewhere."""
    whole = jnp.zeros_like(rollouts.sampler_logprobs_BT)
    for minibatch, values in zip(minibatches, values_RN, strict=True):
        whole = _put_back(whole, minibatch.packs.rows, minibatch.rows_B, values)
    return whole


@functools.partial(jax.jit, donate_argnums=0)
def _put_back(whole_BT: jax.Array, packed: PackedRows, rows_B: np.ndarray, x_RN: jax.Array) -> jax.Array:
    of_minibatch = packed.put_back(x_RN, whole_BT[rows_B])
    return whole_BT.at[rows_B].set(of_minibatch.astype(whole_BT.dtype))


def _all(minibatch: Packed) -> Bounds:
    """The passes that hold anything."""
    return 0, minibatch.packs.bounds[-1]


def _finished(frozen: FrozenModel, scores: list[PackScores]) -> list[PackScores]:
    """The scores; of a parked model once they are there, since its copy on the devices lives until then."""
    return jax.block_until_ready(scores) if frozen.is_parked else scores


@jax.jit
def _mix(
    each: Sequence[PackScores], weights_RK: jax.Array | None
) -> tuple[jax.Array, jax.Array | None, TeacherStates | None]:
    """Log-probabilities [R, N] of the mixture, its entropy if it was asked for, and what the update needs."""
    states = tuple(s.states_RND for s in each if s.states_RND is not None)
    kept = TeacherStates(states, weights_RK) if states else None
    if weights_RK is None:
        (only,) = each
        return only.logprobs_RN, only.entropy_RN, kept
    logprobs_RNK = jnp.stack([s.logprobs_RN for s in each], -1)
    entropy = None
    if each[0].entropy_RN is not None:
        # Where one teacher has all the weight; the entropy of a mixture does not follow from its parts.
        entropies = [s.entropy_RN for s in each if s.entropy_RN is not None]
        entropy = jnp.einsum("rnk,rk->rn", jnp.stack(entropies, -1), weights_RK)
    return jax.nn.logsumexp(logprobs_RNK, axis=-1, b=weights_RK[:, None, :]), entropy, kept
