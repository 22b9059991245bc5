"""The KD estimators, proved by enumeration (float64): expected gradients, bounds, targets.

A vocabulary of 5 and one or two tokens suffice: the expectation over the student's samples is a finite
sum, so the expected gradient is exact and no tolerance hides sampling noise. Exact gradients are written
here in numpy, from the definitions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdrl_jax.config.estimators import (
    ALLOWED,
    ESTIMATORS,
    PLACEMENTS,
    REFUSED,
    REFUSED_UNNORMALISED,
    check_pair,
    check_unnormalised,
)
from kdrl_jax.objective import kl
from kdrl_jax.objective.divergence import Divergence, divergence
from kdrl_jax.objective.kdrl import LOSSES, sampled_kd_loss
from kdrl_jax.objective.kl import Bound
from kdrl_jax.objective.policy import clipped_policy_loss

V, TOP = 5, 2
WIDE = (0.999, 1e9)  # a clip that never acts


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def draw(seed, num=3, shape=(V,)):
    """Logits: student, teacher, behaviour and more."""
    return [jax.random.normal(k, shape, jnp.float64) for k in jax.random.split(jax.random.key(seed), num)]


def probs(logits):
    e = np.exp(np.asarray(logits) - np.max(logits))
    return e / e.sum()


def reverse_gradient(student, teacher):
    """Of KL(S || T) in the student's logits."""
    p, d = probs(student), np.log(probs(student) / probs(teacher))
    return p * (d - p @ d)


def forward_gradient(student, teacher):
    return probs(student) - probs(teacher)


def bucketed_gradient(student, teacher):
    """Of KL(S || T) over the student's TOP tokens and a bucket of the rest."""
    p, q = probs(student), probs(teacher)
    top = np.argsort(-p)[:TOP]
    rest = np.setdiff1d(np.arange(V), top)
    d = np.log(p / q)
    d[rest] = np.log(p[rest].sum() / q[rest].sum())
    return p * (d - p @ d)


STATED = {
    "reverse_kl": reverse_gradient,
    "forward_kl": forward_gradient,
    "divergence": reverse_gradient,
    "bucketed_divergence": bucketed_gradient,
}


def pair_loss(estimator, placement, advantages=0.0):
    """The loss of sampled tokens y [N] at states with logits [N, V], as an update would put it together."""
    check_pair(estimator, placement)

    def loss(student, teacher, old, y):
        s, t = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
        if estimator == "full":
            return divergence(Divergence(), s, t)
        if estimator == "top_k":
            return divergence(Divergence(top_k=TOP), s, t)
        s, t, o = (jnp.take_along_axis(x, y[:, None], -1)[:, 0] for x in (s, t, jax.nn.log_softmax(old)))
        if placement == "reward":
            return clipped_policy_loss(s, o, advantages + kl.k1_reward(s, t), *WIDE)[0]
        return sampled_kd_loss(estimator, s, t, o)

    return loss


def expected_gradient(loss_of_token, student, behaviour):
    """Sum over tokens of behaviour probability x gradient of the token's loss (samples held fixed)."""
    grads = jax.vmap(lambda y: jax.grad(loss_of_token)(student, y))(jnp.arange(V))
    return jax.nn.softmax(behaviour) @ grads


def of_one_token(loss, teacher, behaviour):
    """`loss` at one state, as a function of (student's logits, token)."""

    def one(student, y):
        # On-policy, old is the stopped student itself, as in the update.
        old = jax.lax.stop_gradient(student) if behaviour is None else behaviour
        return loss(student[None], teacher[None], old[None], y[None])[0]

    return one


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize(("estimator", "placement"), list(ALLOWED))
def test_expected_gradient_is_the_stated_one(estimator, placement, stale):
    for seed in range(3):
        student, teacher, behaviour = draw(seed)
        loss = of_one_token(pair_loss(estimator, placement), teacher, behaviour if stale else None)
        found = expected_gradient(loss, student, behaviour if stale else student)
        stated = STATED[ALLOWED[estimator, placement]](student, teacher)
        np.testing.assert_allclose(found, stated, atol=1e-12)
        assert np.abs(stated).max() > 1e-2  # the test is not about zeros


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize(("estimator", "placement"), list(ALLOWED))
def test_over_sequences_it_is_the_sum_over_visited_states(estimator, placement, stale):
    """Every sequence of two tokens: the gradient of sum_t D(S, T | s_t), visits of the sampler's held
    fixed."""
    first, then = draw(3), draw(4, shape=(V, V))
    student, teacher, behaviour = zip(first, then, strict=True)
    loss = pair_loss(estimator, placement)
    sampler = behaviour if stale else student
    y = jnp.stack(jnp.meshgrid(jnp.arange(V), jnp.arange(V), indexing="ij"), -1).reshape(-1, 2)
    visits = jax.nn.softmax(sampler[0])
    weight = visits[y[:, 0]] * jax.nn.softmax(sampler[1])[y[:, 0], y[:, 1]]

    def total(theta):
        old = behaviour if stale else jax.lax.stop_gradient(theta)

        def one(y):
            at = [jnp.stack([x[0], x[1][y[0]]]) for x in (theta, teacher, old)]
            return loss(*at, y).sum()

        return weight @ jax.vmap(one)(y)

    found = jax.grad(total)(student)
    stated = STATED[ALLOWED[estimator, placement]]
    np.testing.assert_allclose(found[0], stated(student[0], teacher[0]), atol=1e-12)
    wanted = [v * stated(s, t) for v, s, t in zip(visits, student[1], teacher[1], strict=True)]
    np.testing.assert_allclose(found[1], wanted, atol=1e-12)


@pytest.mark.parametrize("estimator", ["full", "top_k"])
def test_given_the_states_the_exact_divergences_have_no_variance(estimator):
    student, teacher, behaviour = draw(0)

    def grads(name, placement):
        loss = of_one_token(pair_loss(name, placement), teacher, behaviour)
        return jax.vmap(lambda y: jax.grad(loss)(student, y))(jnp.arange(V))

    assert np.ptp(grads(estimator, "loss"), axis=0).max() < 1e-15
    assert np.ptp(grads("k2", "loss"), axis=0).max() > 0.1


@pytest.mark.parametrize("stale", [False, True])
def test_a_k1_reward_adds_its_gradient_to_that_of_the_task(stale):
    """Policy gradient of the advantages + coef x grad KL, and doubling coef doubles the latter alone."""
    student, teacher, behaviour = draw(2)
    advantages = jnp.array([1.0, -0.5, 0.0, 2.0, -1.5])
    p = probs(student)
    rl = -p * (advantages - p @ advantages)
    kd = reverse_gradient(student, teacher)
    for coef in (0.0, 0.3, 0.6):

        def loss(student, y, coef=coef):
            s, t = jax.nn.log_softmax(student)[y], jax.nn.log_softmax(teacher)[y]
            old = jax.nn.log_softmax(behaviour)[y] if stale else jax.lax.stop_gradient(s)
            return clipped_policy_loss(s, old, advantages[y] + coef * kl.k1_reward(s, t), *WIDE)[0]

        found = expected_gradient(loss, student, behaviour if stale else student)
        np.testing.assert_allclose(found, rl + coef * kd, atol=1e-12)
    assert np.abs(kd).max() > 1e-2
    assert np.abs(rl).max() > 1e-2


def test_reasons_of_the_refused_pairs_are_true():
    student, teacher, behaviour = draw(0)
    truth = reverse_gradient(student, teacher)
    s, t, b = (jax.nn.log_softmax(x) for x in (student, teacher, behaviour))
    d = s - t

    # k1 as a loss: no expected gradient, so that it distils nothing.
    found = expected_gradient(lambda x, y: jax.nn.log_softmax(x)[y] - t[y], student, student)
    np.testing.assert_allclose(found, 0, atol=1e-12)

    def as_reward(rewards, old=None):
        """Gradient of the policy term with these rewards as its advantages."""

        def loss(x, y):
            logp = jax.nn.log_softmax(x)[y]
            before = jax.lax.stop_gradient(logp) if old is None else old[y]
            return clipped_policy_loss(logp, before, rewards[y], *WIDE)[0]

        return expected_gradient(loss, student, student if old is None else behaviour)

    np.testing.assert_allclose(as_reward(-d), truth, atol=1e-12)
    # k2 and k3 as rewards: biased.
    assert jnp.abs(as_reward(-(d**2) / 2) - truth).max() > 1e-2
    assert jnp.abs(as_reward(-(jnp.expm1(-d) + d)) - truth).max() > 1e-2
    # The score function as a reward: without stale samples it is k1, with them it is weighted twice.
    np.testing.assert_allclose(as_reward(-kl.score_function(s, t, s)), truth, atol=1e-12)
    assert jnp.abs(as_reward(-kl.score_function(s, t, b), b) - truth).max() > 1e-2
    np.testing.assert_allclose(as_reward(kl.k1_reward(s, t), b), truth, atol=1e-12)
    # The exact divergences as rewards: one number per state, no gradient.
    for settings in (Divergence(), Divergence(top_k=TOP)):
        one_number = jnp.full(V, divergence(settings, s, t))
        np.testing.assert_allclose(as_reward(-one_number), 0, atol=1e-12)


@pytest.mark.parametrize("pair", list(REFUSED))
def test_refused_pairs_refuse(pair):
    with pytest.raises(ValueError, match=r"kd\.estimator=.*; use "):
        check_pair(*pair)


def test_every_pair_is_either_allowed_or_refused():
    assert set(ALLOWED) | set(REFUSED) == {(e, p) for e in ESTIMATORS for p in PLACEMENTS}
    assert not set(ALLOWED) & set(REFUSED)
    assert set(LOSSES) == {e for e, p in ALLOWED if p == "loss"} - {"full", "top_k"}


def test_names_that_are_no_sampled_loss_are_refused():
    x = jnp.zeros(1)
    for name in ("k1", "full", "k4"):
        with pytest.raises(ValueError, match="use one of k2"):
            sampled_kd_loss(name, x, x, x)
    with pytest.raises(ValueError, match="no bound"):
        sampled_kd_loss("k3_forward", x, x, x, Bound(1.0))


def test_stale_k2_needs_its_weight_and_no_gradient_through_it():
    """What is lost without the importance weight, and with a gradient through it."""
    student, teacher, behaviour = draw(1)
    truth = reverse_gradient(student, teacher)

    def unweighted(s, y):
        return (jax.nn.log_softmax(s)[y] - jax.nn.log_softmax(teacher)[y]) ** 2 / 2

    def through(s, y):
        return jnp.exp(jax.nn.log_softmax(s)[y] - jax.nn.log_softmax(behaviour)[y]) * unweighted(s, y)

    for wrong in (unweighted, through):
        assert jnp.abs(expected_gradient(wrong, student, behaviour) - truth).max() > 1e-3


def test_values_of_the_estimators():
    """Means over samples: the score function's and minus the reward's are the reverse KL; k3's too."""
    student, teacher, behaviour = draw(6)
    s, t, b = (jax.nn.log_softmax(x) for x in (student, teacher, behaviour))
    exact = probs(student) @ np.log(probs(student) / probs(teacher))
    np.testing.assert_allclose(probs(behaviour) @ kl.score_function(s, t, b), exact, rtol=1e-12)
    np.testing.assert_allclose(probs(behaviour) @ kl.k3_forward(s, t, b), exact, rtol=1e-12)
    np.testing.assert_allclose(-probs(student) @ kl.k1_reward(s, t), exact, rtol=1e-12)
    np.testing.assert_allclose(kl.k2(s, t, s), (s - t) ** 2 / 2, rtol=1e-12)


@pytest.mark.parametrize("estimator", [*LOSSES, "k1"])
def test_only_the_student_has_a_gradient(estimator):
    def total(s, t, o):
        if estimator == "k1":
            return clipped_policy_loss(s, o, 1.0 + kl.k1_reward(s, t), *WIDE)[0].sum()
        return sampled_kd_loss(estimator, s, t, o).sum()

    inputs = [jax.nn.log_softmax(x) for x in draw(7)]
    grads = jax.grad(total, (0, 1, 2))(*inputs)
    assert jnp.abs(grads[0]).min() > 1e-6
    assert (jnp.stack(grads[1:]) == 0).all()
    # What is stopped is stopped where it is made, not by the good grace of who takes it.
    for stopped in (kl.k1_reward, kl.importance_weight, lambda s, t: kl.extrapolate(s, t, 1.5)):
        assert (jnp.stack(jax.grad(lambda *x, f=stopped: f(*x).sum(), (0, 1))(*inputs[:2])) == 0).all()


D = np.array([-30.0, -3.0, -0.4, 0.0, 0.4, 3.0, 49.9])


@pytest.mark.parametrize("bound", [None, Bound(2.0), Bound(2.0, "tanh")])
def test_bounds(bound):
    """Both losses pull with the bounded d; k2's value is the integral of its pull."""
    held = {
        None: D,
        Bound(2.0): np.clip(D, -2, 2),
        Bound(2.0, "tanh"): 2 * np.tanh(D / 2),
    }[bound]
    teacher, old = jnp.asarray(-1.0 - D), jnp.full(7, -1.3)
    student = jnp.full(7, -1.0)
    weight = np.exp(0.3)
    for loss in (kl.k2, kl.score_function):
        grad = jax.grad(lambda s, loss=loss: loss(s, teacher, old, bound).sum())(student)
        np.testing.assert_allclose(grad, weight * held, atol=1e-12)
    np.testing.assert_allclose(kl.bounded(jnp.asarray(D), bound), held, atol=1e-12)
    np.testing.assert_allclose(kl.k1_reward(student, teacher, bound), -held, atol=1e-12)
    np.testing.assert_allclose(kl.score_function(student, teacher, old, bound), weight * held, atol=1e-12)
    values = kl.k2(student, teacher, old, bound)
    grid = np.linspace(0, 1, 200_001)
    integrals = [np.trapezoid(np.asarray(kl.bounded(d * grid, bound)) * d, grid) for d in D]
    np.testing.assert_allclose(values, weight * np.array(integrals), rtol=1e-6, atol=1e-12)
    acts = kl.bound_acts(student, teacher, bound)
    assert acts.tolist() == ([False] * 7 if bound is None else [abs(d) > 2 for d in D.tolist()])


def test_bounds_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match=r"limit=0\.0; it is above 0"):
        Bound(0.0)
    with pytest.raises(ValueError, match="'soft'; use clip or tanh"):
        Bound(1.0, "soft")


@pytest.mark.parametrize("kind", ["clip", "tanh"])
def test_a_teacher_certain_of_something_else_gives_a_finite_gradient(kind):
    """Log-probability -50 of the sampled token, in float32 as on the device."""
    student, teacher, old = (jnp.array([x], jnp.float32) for x in (-0.1, -50.0, -0.1))
    for bound, pull in ((None, 49.9), (Bound(5.0, kind), 5.0)):
        for estimator in ("k2", "score_function"):
            grad = jax.grad(lambda s, e=estimator, b=bound: sampled_kd_loss(e, s, teacher, old, b).sum())(
                student
            )
            assert float(grad[0]) == pytest.approx(pull)
        assert float(kl.k1_reward(student, teacher, bound)[0]) == pytest.approx(-pull)
    forward = jax.grad(lambda s: kl.k3_forward(s, teacher, old).sum())(student)
    assert float(forward[0]) == pytest.approx(1.0)
    assert kl.bound_acts(student, teacher, Bound(5.0)).all()


def test_a_target_beyond_the_teacher_needs_no_normaliser_but_for_k3():
    student, teacher, reference, behaviour = draw(8, 4)
    t, r = jax.nn.log_softmax(teacher), jax.nn.log_softmax(reference)
    target = kl.extrapolate(t, r, 1.7)
    constant = float(jax.nn.logsumexp(target))
    assert abs(constant) > 0.05
    np.testing.assert_allclose(target - r, 1.7 * (t - r), atol=1e-12)
    np.testing.assert_array_equal(kl.extrapolate(t, r, 0.0), r)

    def gradient(estimator, placement, goal, bound=None):
        def loss(x, y):
            s, o = jax.nn.log_softmax(x)[y], jax.nn.log_softmax(behaviour)[y]
            if placement == "reward":
                return clipped_policy_loss(s, o, kl.k1_reward(s, goal[y]), *WIDE)[0]
            return sampled_kd_loss(estimator, s, goal[y], o, bound)

        return expected_gradient(loss, student, behaviour)

    for estimator, placement in (("k2", "loss"), ("score_function", "loss"), ("k1", "reward")):
        found = gradient(estimator, placement, target)
        # The stated target is the maximiser of factor * log(T / ref) - KL(S || ref).
        np.testing.assert_allclose(found, reverse_gradient(student, target), atol=1e-12)
        check_unnormalised(estimator)
    p, s = probs(student), jax.nn.log_softmax(student)
    objective = jax.grad(lambda x: -jax.nn.softmax(x) @ (1.7 * (t - r) - (jax.nn.log_softmax(x) - r)))(
        student
    )
    np.testing.assert_allclose(objective, reverse_gradient(student, target), atol=1e-12)

    # The forward KL's gradient scales the target's share, so the constant matters; hence the refusal.
    off = gradient("k3_forward", "loss", target) - gradient("k3_forward", "loss", target - constant)
    assert jnp.abs(off).max() > 1e-2
    with pytest.raises(ValueError, match=r"k3_forward with an extrapolated teacher: .*; use k2"):
        check_unnormalised("k3_forward")
    # Over the vocabulary it would take the reference's distribution too, which the head does not have.
    assert set(REFUSED_UNNORMALISED) == {"k3_forward", "full", "top_k"}

    # Nor does it drop out of a bounded d.
    both = [gradient("k2", "loss", x, Bound(0.5)) for x in (target, target - constant)]
    assert jnp.abs(both[0] - both[1]).max() > 1e-3

    # The mean of d is the target's reverse KL minus the constant.
    exact = p @ np.log(p / probs(target))
    np.testing.assert_allclose(-p @ kl.k1_reward(s, target), exact - constant, rtol=1e-12)
