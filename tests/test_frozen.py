"""Teachers and reference: who scores which rows, and where they wait meanwhile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdrl_jax import sharding
from kdrl_jax.config import Config, MeshConfig
from kdrl_jax.frozen import FrozenScorer
from kdrl_jax.models.attend import PLAIN
from kdrl_jax.models.decoder import DecoderConfig, FrozenModel, make_model
from kdrl_jax.objective.divergence import mixture
from kdrl_jax.scoring import HeadSettings
from kdrl_jax.scoring.packer import pack_rollouts, pack_shape
from kdrl_jax.types import Rollouts

V, B, T = 23, 8, 14
MESH = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
HEAD = HeadSettings(num_tokens=V, chunk=64)


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


class Scorer:
    """Packs and scores."""

    def __init__(self, c, teachers, reference=None, num_minibatches=1):
        self.kinds, self.num = c.num_kinds, num_minibatches
        self.shape = pack_shape(B // num_minibatches, T, MESH, PLAIN, rows_per_pass=2, num_kinds=c.num_kinds)
        self.scorer = FrozenScorer(c, teachers, reference, HEAD, MESH, self.shape)

    def __call__(self, rollouts, temperature, own):
        self.packed = pack_rollouts(
            rollouts,
            1,
            self.shape,
            MESH,
            num_minibatches=self.num,
            kinds_B=self.scorer.kinds(own),
            num_kinds=self.kinds,
        )
        return self.scorer(rollouts, self.packed, temperature)

    def states(self, scored, teacher):
        """[B, T, D] of one teacher at the completion tokens; 0 elsewhere."""
        out = 0
        for m, states in zip(self.packed, scored.teacher_states, strict=True):
            x_RND = states.states[teacher]
            rows = m.packs.rows
            whole = jnp.zeros((len(m.rows_B), T, x_RND.shape[-1])).at[rows.rows_RN, rows.columns_RN]
            out = out + jnp.zeros((B, T, x_RND.shape[-1])).at[m.rows_B].set(whole.set(x_RND, mode="drop"))
        return np.asarray(out)


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
    one = Scorer(c, {"teacher": teacher})
    found = one(rollouts(), temperature, [None] * B)
    return found.scores, one.states(found, 0)


OWN = ["math", "code", "code", "math", "code", "code", "code", "code"]


@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("own", [OWN, ["code"] * B], ids=["both", "one has none"])
@pytest.mark.parametrize("num_minibatches", [1, 4])
def test_each_teacher_scores_its_own_rows(own, parked, num_minibatches):
    c = config({"estimator": "full", "teacher_entropy_scale": 1.0})
    teachers = {"teachers.math": MATH, "teachers.code": CODE}
    if parked:
        teachers = {role: t.parked() for role, t in teachers.items()}
    score = Scorer(c, teachers, num_minibatches=num_minibatches)
    found = score(rollouts(), 0.8, own)
    for i, (name, teacher) in enumerate((("math", MATH), ("code", CODE))):
        rows = np.array([o == name for o in own])
        expected, states = alone(teacher, 0.8)
        for field in ("teacher_logprobs_BT", "teacher_entropy_BT"):
            a, b = (np.asarray(getattr(x, field))[rows] for x in (found.scores, expected))
            np.testing.assert_allclose(a, b, atol=1e-5)
        np.testing.assert_allclose(score.states(found, i)[rows], states[rows], atol=1e-5)
        for m, kept in zip(score.packed, found.teacher_states, strict=True):
            of_tokens = np.broadcast_to(np.asarray(kept.weights_RK)[:, i, None], m.packs.rows.rows_RN.shape)
            back = m.packs.rows.put_back(jnp.asarray(of_tokens), jnp.zeros((len(m.rows_B), T)))
            np.testing.assert_array_equal(back.max(1), rows[m.rows_B])


def test_a_mixture_weighs_probabilities():
    c = config({"mixture": {"math": 3.0, "code": 1.0}, "estimator": "k2"})
    found = Scorer(c, {"teachers.math": MATH, "teachers.code": CODE})(rollouts(), 1.0, [None] * B)
    each = [alone(t)[0].teacher_logprobs_BT for t in (MATH, CODE)]
    expected = np.log(0.75 * np.exp(each[0]) + 0.25 * np.exp(each[1]))
    np.testing.assert_allclose(found.scores.teacher_logprobs_BT, expected, atol=1e-5)
    np.testing.assert_allclose(mixture(each, jnp.full((B, 2), jnp.array([0.75, 0.25]))), expected, atol=1e-5)
    assert found.teacher_states == [None]


def test_what_is_scored_can_be_waited_for():
    """`jax.block_until_ready` passes by what it does not know: the teacher's seconds were the update's."""
    c = config({"estimator": "full", "mixture": {"math": 1.0, "code": 1.0}})
    found = Scorer(c, {"teachers.math": MATH, "teachers.code": CODE})(rollouts(), 1.0, [None] * B)
    leaves = jax.tree.leaves(found)
    assert len(leaves) > 2
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)


def test_a_reference_is_scored_beside_the_teachers():
    c = config({"extrapolation": 1.5, "mixture": {"math": 1.0, "code": 1.0}})
    found = Scorer(c, {"teachers.math": MATH, "teachers.code": CODE}, BASE)(rollouts(), 1.0, [None] * B)
    np.testing.assert_allclose(found.scores.ref_logprobs_BT, alone(BASE)[0].teacher_logprobs_BT, atol=1e-5)


def test_temperature_is_no_new_program():
    c = config({"mixture": {"math": 1.0, "code": 1.0}})
    score = Scorer(c, {"teachers.math": MATH, "teachers.code": CODE})
    cold, warm = (score(rollouts(), t, [None] * B).scores.teacher_logprobs_BT for t in (0.5, 2.0))
    assert np.abs(np.asarray(cold) - np.asarray(warm)).max() > 0.1
    assert all(compiled._cache_size() == 1 for compiled in score.scorer._score.values())


def test_parked_parameters_are_in_the_hosts_memory():
    parked = MATH.parked()
    assert {x.sharding.memory_kind for x in jax.tree.leaves(parked.params)} == {"pinned_host"}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(parked.on_device())} == {"device"}
    assert parked.head.kernel.sharding.memory_kind == "device"
