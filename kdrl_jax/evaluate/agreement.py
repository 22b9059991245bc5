"""How near two models are on the same completions, exactly, question by question."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kdrl_jax import hosts
from kdrl_jax.models.decoder import Model
from kdrl_jax.objective.divergence import Divergence
from kdrl_jax.scoring import (
    HeadSettings,
    PackedRows,
    Packs,
    PackShape,
    TeacherSide,
    map_passes,
    score_predictors,
)
from kdrl_jax.scoring.packer import pack_rollouts, pack_shape
from kdrl_jax.types import Params, Rollouts


@dataclasses.dataclass(frozen=True)
class RowSums:
    """Sums over the completion tokens of each row, float64 [B], the same on every process."""

    reverse_kl_B: np.ndarray
    """Exact KL(student || teacher), nats at temperature 1."""
    forward_kl_B: np.ndarray
    """Exact KL(teacher || student), nats at temperature 1."""
    same_top_B: np.ndarray
    """Tokens at which both find the same token most likely."""
    tokens_B: np.ndarray

    @classmethod
    def joined(cls, parts: "list[RowSums]") -> "RowSums":
        """Those of several batches, one after another."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


class Agreement:
    """Student and teacher on the same completions."""

    def __init__(self, head: HeadSettings, student: Model, teacher: Model, mesh: Mesh):
        self._models, self._head, self._mesh = (student, teacher), head, mesh
        self._sums = jax.jit(self._of_packs, static_argnames="shape")

    def __call__(self, params: Params, teacher_params: Params, rollouts: Rollouts, num_rows: int) -> RowSums:
        """Of the first `num_rows` rows."""
        num, longest = rollouts.tokens_BT.shape
        lengths = jnp.where(jnp.arange(num) < num_rows, rollouts.completion_lengths_B, 0)
        rollouts = dataclasses.replace(rollouts, completion_lengths_B=lengths)
        shape = pack_shape(num, longest, self._mesh, self._models[0].attention)
        (packed,) = pack_rollouts(rollouts, 1, shape, self._mesh)
        with jax.set_mesh(self._mesh):
            sums = self._sums(params, teacher_params, packed.packs, rollouts.tokens_BT, shape=shape)
        return RowSums(*(x[:num_rows].astype(np.float64) for x in hosts.whole(sums)))

    def _of_packs(
        self, params: Params, teacher_params: Params, packs: Packs, tokens_BT: jax.Array, shape: PackShape
    ) -> tuple[jax.Array, ...]:
        ours, theirs = (m.bind(p) for m, p in zip(self._models, (params, teacher_params), strict=True))

        def of_tokens(rows: PackedRows) -> tuple[jax.Array, ...]:
            states = [rows.predicting(m.hidden(rows.tokens_RT, rows.layout)) for m in (ours, theirs)]
            scores = score_predictors(
                states[0],
                ours.output_head(),
                rows.targets_RN,
                1.0,
                self._head,
                TeacherSide((states[1],), (theirs.output_head(),)),
                Divergence("forward_kl"),
                counts_B=rows.counts_R,
                train_head=False,
            )
            assert scores.reverse_kl is not None
            assert scores.divergence is not None
            assert scores.same_top is not None
            return scores.reverse_kl, scores.divergence, scores.same_top, rows.is_token_RN

        passes = (0, packs.bounds[-1])
        tokens_RN = map_passes(of_tokens, (packs.rows,), shape.max_passes, passes)
        # First to their places, then summed: a sum into rows would add in no fixed order on GPUs.
        return tuple(
            jnp.sum(packs.rows.put_back(x.astype(jnp.float32), tokens_BT), axis=1) for x in tokens_RN
        )
