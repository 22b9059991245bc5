"""What goes into the compiled programs of a run, as shapes, types and places."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kdrl_jax import sharding
from kdrl_jax.batch import make_batch_builder, take_rows
from kdrl_jax.models.decoder import FrozenModel
from kdrl_jax.models.head import Head
from kdrl_jax.scoring import Packs, PackShape, Places, TeacherStates, pack
from kdrl_jax.scoring.packer import minibatch_rows
from kdrl_jax.setup import Setup
from kdrl_jax.step import Minibatch
from kdrl_jax.types import FrozenScores, Rollouts


def abstract_array(shape: tuple[int, ...], dtype: Any, place: Any = None) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


_ints, _floats, _flags = (
    functools.partial(abstract_array, dtype=dtype) for dtype in (jnp.int32, jnp.float32, bool)
)


def abstract_minibatch(setup: Setup, shape: PackShape) -> Minibatch:
    """What an update takes, made as the training loop makes it. On the mesh of `jax.set_mesh`."""
    c, mesh = setup.config, setup.mesh
    b = c.groups_per_batch * c.rollout.group_size
    t = c.data.max_prompt_tokens + c.rollout.max_new_tokens
    rollouts = _rollouts(b, t)
    rows_B = minibatch_rows(b, c.rollout.group_size, c.train.num_minibatches)[0]
    packs = _packs(rollouts, rows_B, shape, c.num_kinds)
    asked = _floats((b, t))
    frozen = FrozenScores(
        asked if c.scores_teacher else None,
        asked if c.kd.teacher_entropy_scale is not None else None,
        asked if c.uses_reference else None,
    )
    old = asked if c.train.updates_per_iteration > 1 else None
    of_row = (_floats((b,)), _flags((b,)))
    batch = jax.eval_shape(make_batch_builder(c), rollouts, *of_row, _floats(()), old, frozen, of_row[1])
    batch = jax.eval_shape(take_rows, batch, rows_B)
    teacher = None
    if c.teacher_states:
        models = [t.model for t in setup.teachers.values()]
        states = tuple(
            abstract_array((shape.num_rows, shape.length, m.config.embed_dim), m.compute_dtype)
            for m in models
        )
        weights = _floats((shape.num_rows, len(models))) if len(models) > 1 else None
        teacher = TeacherStates(states, weights)
    minibatch: Minibatch = _over(mesh, Minibatch(batch, packs, teacher))
    return minibatch


def abstract_logged(setup: Setup, shape: PackShape, num_rows: int) -> tuple[Rollouts, Packs]:
    """The rollouts of which tokens are written, and their packed rows. On the mesh of `jax.set_mesh`."""
    c = setup.config
    rollouts = _rollouts(num_rows, c.data.max_prompt_tokens + c.rollout.max_new_tokens)
    packs = _packs(rollouts, np.arange(num_rows), shape, c.num_kinds)
    over: tuple[Rollouts, Packs] = _over(setup.mesh, (rollouts, packs))
    return over


def _rollouts(num_rows: int, longest: int) -> Rollouts:
    b, t = num_rows, longest
    return Rollouts(_ints((b, t)), _ints((b,)), _ints((b,)), _flags((b,)), _floats((b, t)))


def _packs(rollouts: Rollouts, rows_B: np.ndarray, shape: PackShape, num_kinds: int) -> Packs:
    of_rows = _ints((len(rows_B),))
    places = Places(of_rows, of_rows, of_rows, of_rows, of_rows, _ints((num_kinds + 1,)))
    packs: Packs = jax.eval_shape(
        functools.partial(pack, shape=shape),
        rollouts.tokens_BT,
        rollouts.prompt_lengths_B,
        rollouts.completion_lengths_B,
        rows_B,
        places,
    )
    return packs


def _over(mesh: Mesh, tree: Any) -> Any:
    """With rows over the devices, where they divide."""
    shards = sharding.batch_shards(mesh)

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        divides = x.ndim and x.shape[0] % shards == 0
        place = sharding.rows(mesh) if divides else sharding.replicated(mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(placed, tree)


def abstract_head(frozen: FrozenModel, mesh: Mesh) -> Head:
    """The vocabulary head of abstract parameters."""
    head: Head = jax.eval_shape(lambda params: frozen.model.bind(params).output_head(), frozen.params)

    def placed(x: jax.Array, dims: str) -> Any:
        return abstract_array(x.shape, x.dtype, sharding.sharding(dims, x.shape, mesh))

    scale = None if head.scale_V is None else placed(head.scale_V, "V")
    return dataclasses.replace(head, kernel=placed(head.kernel, head.dims), scale_V=scale)
