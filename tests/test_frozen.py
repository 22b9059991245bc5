"""Teachers and reference: who scores which rows, and where they wait meanwhile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdrl_jax import sharding
from kdrl_jax.config import Config, MeshConfig
from kdrl_jax.frozen import FrozenScorer
from kdrl_jax.models.decoder import DecoderConfig, FrozenModel, make_model
from kdrl_jax.objective.divergence import mixture
from kdrl_jax.scoring import HeadSettings
from kdrl_jax.types import Rollouts

V, B, T = 23, 8, 14
MESH = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
HEAD = HeadSettings(num_tokens=V, chunk=64, max_new_tokens=8)


def frozen(seed, dim):
    model = make_model(DecoderConfig(V, dim, 24, 1, 2, 1, 8, tie_embeddings=True))
    place = sharding.replicated(MESH)
    return FrozenModel(model, jax.device_put(model.init(jax.random.key(seed)), place))


MATH, CODE, BASE = frozen(1, 12), frozen(2, 16), frozen(3, 12)


def config(kd, **sections):
    tree = {
        "name": "t",
        "student": {"path": "x"},
        "teachers": {"math": {"path": "y"}, "code": {"path": "z"}},
        "data": {"train": [{"kind": "task", "task": "chain_sum"}]},
        "kd": {"coef": 1.0, **kd},
        "train": {"num_steps": 10},
        **sections,
    }
    if "mixture" not in kd:
        tree["data"]["train"][0]["teacher"] = "math"
    return Config.model_validate(tree)


def rollouts():
    rng = np.random.default_rng(0)
    starts, lengths = rng.integers(1, 6, B), rng.integers(1, 9, B)
    tokens = rng.integers(3, V, (B, T))
    arrays = (tokens, starts, lengths, np.ones(B, bool), np.zeros((B, T), np.float32))
    return Rollouts(*map(jnp.asarray, arrays))


def scorer(c, teachers, reference=None, rows_per_pass=4):
    return FrozenScorer(c, teachers, reference, HEAD, MESH, rows_per_pass)


def alone(teacher, temperature=1.0):
    c = Config.model_validate(
        {
            "name": "t",
            "student": {"path": "x"},
            "teacher": {"path": "y"},
            "data": {"train": [{"kind": "task", "task": "chain_sum"}]},
            "kd": {"coef": 1.0, "estimator": "full", "teacher_entropy_scale": 1.0},
            "train": {"num_steps": 10},
        }
    )
    return scorer(c, {"teacher": teacher})(rollouts(), temperature, [None] * B)


OWN = ["math", "code", "code", "math", "code", "code", "code", "code"]


@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("own", [OWN, ["code"] * B], ids=["both", "one has none"])
def test_each_teacher_scores_its_own_rows(own, parked):
    c = config({"estimator": "full", "teacher_entropy_scale": 1.0})
    teachers = {"teachers.math": MATH, "teachers.code": CODE}
    if parked:
        teachers = {role: t.parked() for role, t in teachers.items()}
    found = scorer(c, teachers)(rollouts(), 0.8, own)
    for i, (name, teacher) in enumerate((("math", MATH), ("code", CODE))):
        rows = np.array([o == name for o in own])
        expected = alone(teacher, 0.8)
        for field in ("teacher_logprobs_BT", "teacher_entropy_BT"):
            a, b = (np.asarray(getattr(x, field))[rows] for x in (found, expected))
            np.testing.assert_allclose(a, b, atol=1e-5)
        np.testing.assert_allclose(
            np.asarray(found.teacher_states[i])[rows], np.asarray(expected.teacher_states[0])[rows], atol=1e-5
        )
        np.testing.assert_array_equal(np.asarray(found.teacher_weights_BK)[:, i], rows)


def test_a_mixture_weighs_probabilities():
    c = config({"mixture": {"math": 3.0, "code": 1.0}, "estimator": "k2"})
    found = scorer(c, {"teachers.math": MATH, "teachers.code": CODE})(rollouts(), 1.0, [None] * B)
    each = [alone(t).teacher_logprobs_BT for t in (MATH, CODE)]
    expected = np.log(0.75 * np.exp(each[0]) + 0.25 * np.exp(each[1]))
    np.testing.assert_allclose(found.teacher_logprobs_BT, expected, atol=1e-5)
    np.testing.assert_allclose(mixture(each, jnp.full((B, 2), jnp.array([0.75, 0.25]))), expected, atol=1e-5)
    assert found.teacher_states == ()


def test_a_reference_is_scored_beside_the_teachers():
    c = config({"extrapolation": 1.5, "mixture": {"math": 1.0, "code": 1.0}})
    found = scorer(c, {"teachers.math": MATH, "teachers.code": CODE}, BASE)(rollouts(), 1.0, [None] * B)
    np.testing.assert_allclose(found.ref_logprobs_BT, alone(BASE).teacher_logprobs_BT, atol=1e-5)


def test_temperature_is_no_new_program():
    c = config({"mixture": {"math": 1.0, "code": 1.0}})
    score = scorer(c, {"teachers.math": MATH, "teachers.code": CODE})
    cold, warm = (score(rollouts(), t, [None] * B).teacher_logprobs_BT for t in (0.5, 2.0))
    assert np.abs(np.asarray(cold) - np.asarray(warm)).max() > 0.1
    assert all(compiled._cache_size() == 1 for compiled in score._score.values())


def test_parked_parameters_are_in_the_hosts_memory():
    parked = MATH.parked()
    assert {x.sharding.memory_kind for x in jax.tree.leaves(parked.params)} == {"pinned_host"}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(parked.on_device())} == {"device"}
    assert parked.head.kernel.sharding.memory_kind == "device"
