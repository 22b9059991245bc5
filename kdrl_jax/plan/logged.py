"""The programs that describe the tokens of logged rollouts (`kdrl_jax.logged`), lowered as those of
`programs`."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdrl_jax import sharding
from kdrl_jax.logged import details_program, logged_rows, states_program
from kdrl_jax.models.decoder import Model
from kdrl_jax.plan.abstract import abstract_array, abstract_head, abstract_logged
from kdrl_jax.plan.model_flops import forward_flops
from kdrl_jax.plan.programs import FROZEN, HEADS, LOG, STUDENT, Planned, RunPrograms, Work, bytes_on_chip
from kdrl_jax.plan.walk import Given
from kdrl_jax.scoring import PackShape, TeacherSide
from kdrl_jax.scoring.packer import config_pack_shape
from kdrl_jax.scoring.passes import slice_size
from kdrl_jax.types import Params


def logged_names(run: RunPrograms) -> list[str]:
    """Of the programs that there will be; none where no tokens are written, or no teacher scores."""
    c = run.setup.config
    # Completions of a dataset are not logged.
    there = c.log.rollouts_tokens and c.log.rollouts_every and c.rollout.source != "dataset"
    if not (there and c.scores_teacher):
        return []
    return [f"log, {role}" for role in (*run.setup.teachers, STUDENT, "tokens")]


def lower_logged(run: RunPrograms) -> Iterator[Planned]:
    """Of each teacher and the student the final states, and then what is read from them; none where nothing
    of tokens is written, or no teacher scores. Each is lowered when it is asked for."""
    setup, c = run.setup, run.setup.config
    if not logged_names(run):
        return
    mesh, num_rows = setup.mesh, len(logged_rows(c, setup.mesh)[1])
    shape = config_pack_shape(c, mesh, num_rows)
    work = run.work_of(shape, np.arange(num_rows))
    runs = min(1.0, c.train.updates_per_iteration / c.log.rollouts_every)
    everywhere = sharding.replicated(mesh)
    bounds = (abstract_array((), jnp.int32, everywhere),) * 2
    # By then the iteration has been scored.
    scored = c.train.num_minibatches * run.states
    with jax.set_mesh(mesh):
        rollouts, packs = abstract_logged(setup, shape, num_rows)
        states: dict[str, Any] = {}

        def planned_states(role: str, model: Model, params: Params, *arguments: str) -> Planned:
            program = states_program(model, shape)
            found = jax.eval_shape(program, params, packs.rows, bounds)
            held = run.besides(*arguments) + scored + bytes_on_chip(states)
            states[role] = jax.ShapeDtypeStruct(found.shape, found.dtype, sharding=sharding.rows(mesh))
            flops = forward_flops(model.config, work.tokens, 0.0, run.seen(model.config, work))
            return Planned(
                f"log, {role}",
                LOG,
                program.lower(params, packs.rows, bounds),
                held,
                runs,
                run.given(model, shape, work),
                flops / run.chips,
            )

        for role, teacher in setup.teachers.items():
            yield planned_states(role, teacher.model, teacher.on_device(), role)
        yield planned_states(STUDENT, setup.student, run.student_params, STUDENT, FROZEN)
        heads = {role: abstract_head(teacher, mesh) for role, teacher in setup.teachers.items()}
        weights = None
        if len(heads) > 1:
            weights = abstract_array((shape.num_rows, len(heads)), jnp.float32, sharding.rows(mesh))
        side = TeacherSide(tuple(states[role] for role in heads), tuple(heads.values()), weights)
        held = run.besides(STUDENT, FROZEN, HEADS) + scored
        if not setup.parks_frozen:
            held -= bytes_on_chip(heads)  # parts of the teachers
        temperature = abstract_array((), jnp.float32, everywhere)
        models = [setup.student, *(teacher.model for teacher in setup.teachers.values())]
        flops = sum(forward_flops(m.config, 0.0, work.scored, run.seen(m.config, work)) for m in models)
        yield Planned(
            "log, tokens",
            LOG,
            details_program(setup).lower(
                run.student_params, states[STUDENT], side, packs.rows, rollouts, temperature
            ),
            held,
            runs,
            Given(loops={"head_chunks": _head_chunks(run, shape, work)}),
            flops / run.chips,
        )


def _head_chunks(run: RunPrograms, shape: PackShape, work: Work) -> int:
    """How often the loop over the vocabulary runs, which here goes over all packed rows at once."""
    rows = shape.num_rows // run.shards
    size = slice_size(shape.length, run.setup.config.train.head_chunk // rows)
    return math.ceil(work.scored / (work.passes * shape.rows_per_pass) / size)
