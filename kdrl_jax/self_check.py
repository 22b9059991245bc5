"""Before a run whose teacher is the model its student starts as: their divergence, which must be 0, or as
little as their types explain.

It goes through the code that training uses, the teacher's scoring and the student's, so that a shift, a
mask, a padded column or a weight that only one of them gets wrong shows before anything is trained.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kdrl_jax import hosts, sharding
from kdrl_jax.config import Config
from kdrl_jax.models.decoder import FrozenModel, Model
from kdrl_jax.models.head import Head
from kdrl_jax.paths import absolute
from kdrl_jax.runs import run_of
from kdrl_jax.scoring import (
    HeadSettings,
    PackedRows,
    TeacherSide,
    make_scorer,
    score_predictors,
    sum_passes,
)
from kdrl_jax.scoring.packer import pack_rollouts, pack_shape
from kdrl_jax.types import Params, Rollouts, TrainingError

LIMIT = {"float32": 1e-5, "bfloat16": 0.03, "int8": 0.05}
"""Nats per token, for the coarser of the two compute types; for a teacher of int8 weights their own is added.
Measured with SmolLM2-135M (30 layers): 0 where the types are the same, 0.002 (random ids) to 0.004 (text)
where one model computes in each. With int8 weights, KL(float, int8) by `benchmarks/int8_teacher.py`:

| computed in | random ids | written answers | own greedy answers |
| --- | --- | --- | --- |
| float32 | 0.010 | 0.005 | 0.003 |
| bfloat16 | 0.014 | 0.006 | 0.004 |

Larger models are rounded with less loss, and a scale at the wrong place costs nats: five times the largest of
the first line passes all of the former and none of the latter."""

MAX_POSITIONS = 64
"""Of the rows that are compared; more would show nothing else."""


def same_model(config: Config) -> bool:
    """Whether student and teacher start with the same weights, whatever types they compute in."""
    if len(config.all_teachers) != 1:
        return False
    student, (role, teacher) = config.student, *config.all_teachers.items()
    if student.run is not None or teacher.run is not None:
        runs = [run_of(config, "student"), run_of(config, role)]
        first, second = (None if run is None else absolute(run) for run in runs)
        return first is not None and first == second
    if student.path is None or teacher.path is None:
        # Random weights follow from shape and seed, and the seed is the run's.
        return student.architecture is not None and student.architecture == teacher.architecture
    paths = [absolute(m.path or "") for m in (student, teacher)]
    same_file = paths[0] == paths[1] or (student.sha256 is not None and student.sha256 == teacher.sha256)
    return same_file and student.layer_indices() == teacher.layer_indices()


def self_check(
    config: Config,
    student: Model,
    params: Params,
    teacher: FrozenModel | None,
    head: HeadSettings,
    mesh: Mesh,
) -> str | None:
    """One line on student and teacher, or None where they are not the same model.

    Args:
        params: the student's as the run starts them.
        head: as training uses it.

    Raises:
        TrainingError: they are the same model, and their divergence is above `limit_of`.
    """
    if teacher is None or not same_model(config):
        return None
    limit = limit_of(config)
    (described,) = config.all_teachers.values()
    types: list[str] = [config.student.compute_dtype, described.compute_dtype]
    if described.weights == "int8":
        types[1] = f"int8 in {types[1]}"
    kl = self_divergence(config, student, params, teacher, head, mesh)
    if not kl <= limit:  # a nan is no agreement
        raise TrainingError(
            f"self-check: the teacher is the student's own model, but KL(student || teacher) is {kl:.3g} "
            f"nats per token, above {limit:g} (in {types[0]} and {types[1]}): the two are computed "
            "differently, by a bug or damaged weights; nothing was trained. Get the model's files again, or "
            "report it"
        )
    return f"self-check: student = teacher, KL {kl:.1g} nats per token"


def limit_of(config: Config) -> float:
    """The largest divergence, in nats per token, that the types of student and teacher explain."""
    (teacher,) = config.all_teachers.values()
    limit = max(LIMIT[config.student.compute_dtype], LIMIT[teacher.compute_dtype])
    return limit + LIMIT["int8"] if teacher.weights == "int8" else limit


def self_divergence(
    config: Config, student: Model, params: Params, teacher: FrozenModel, head: HeadSettings, mesh: Mesh
) -> float:
    """Mean exact KL(student || teacher) per token, nats at temperature 1, on rows of random ids."""
    shards = sharding.batch_shards(mesh)
    length = min(MAX_POSITIONS, config.data.max_prompt_tokens + config.rollout.max_new_tokens)
    rng = np.random.default_rng(config.seed)
    # Two rows a device, in two passes. Completions begin anywhere in the first half.
    num = 2 * shards
    tokens = rng.integers(0, head.num_tokens, (num, length))
    starts = rng.integers(1, length // 2 + 1, num)
    arrays = (
        tokens.astype(np.int32),
        starts.astype(np.int32),
        (length - starts).astype(np.int32),
        np.ones(num, bool),
        np.zeros((num, length), np.float32),
    )
    rollouts = Rollouts(*(hosts.spread(x, sharding.rows(mesh)) for x in arrays))
    shape = pack_shape(num, length, mesh, student.attention)
    (packed,) = pack_rollouts(rollouts, 1, shape, mesh)
    score_teacher = make_scorer(teacher.model, head, shape, keep_states=True)

    @jax.jit
    def divergence(
        params: Params, teacher_head: Head, teacher_states: jax.Array, rows: PackedRows
    ) -> jax.Array:
        decoder = student.bind(params)

        def of_pass(rows: PackedRows, teacher_states: jax.Array) -> jax.Array:
            scores = score_predictors(
                rows.predicting(decoder.hidden(rows.tokens_RT, rows.layout, remat=config.train.remat)),
                decoder.output_head(),
                rows.targets_RN,
                1.0,
                head,
                TeacherSide((teacher_states,), (teacher_head,)),
                train_head=False,
            )
            assert scores.reverse_kl is not None
            return jnp.sum(jnp.where(rows.is_token_RN, scores.reverse_kl, 0.0))

        parts = (rows, teacher_states)
        total: jax.Array = sum_passes(of_pass, parts, shape.max_passes, (0, shape.max_passes))
        return total / jnp.sum(rows.counts_R)

    with jax.set_mesh(mesh):
        packed_rows = packed.packs.rows
        scores = score_teacher(teacher.on_device(), packed_rows, 1.0, (0, shape.max_passes))
        assert scores.states_RND is not None
        return float(divergence(params, teacher.head, scores.states_RND, packed_rows))
