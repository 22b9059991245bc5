"""The objective, proved by enumeration (float64), and its advantages, masks and weights.

A vocabulary of 5 and one state suffice for the per-token estimators: the expectation over the student's
samples is a finite sum, so the expected gradient is exact and no tolerance hides sampling noise.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdrl_jax.config.estimators import ALLOWED, REFUSED, check_pair
from kdrl_jax.objective import kl
from kdrl_jax.objective.advantages import group_advantages
from kdrl_jax.objective.kdrl import kd_token_loss
from kdrl_jax.objective.masks import kd_mask, token_weights
from kdrl_jax.objective.policy import clipped_policy_loss

V = 5


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def draw(seed):
    """Student, teacher and behaviour logits [V]."""
    return [jax.random.normal(k, (V,), jnp.float64) for k in jax.random.split(jax.random.key(seed), 3)]


def reverse_kl(student, teacher):
    p, q = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    return jnp.sum(jnp.exp(p) * (p - q))


def forward_kl(student, teacher):
    return reverse_kl(teacher, student)


EXACT = {"reverse_kl": reverse_kl, "forward_kl": forward_kl}


def expected_gradient(loss_of_token, student, behaviour):
    """Sum over tokens of behaviour probability x gradient of the token's loss (samples held fixed)."""
    probs = jax.nn.softmax(behaviour)
    grads = jax.vmap(lambda y: jax.grad(loss_of_token)(student, y))(jnp.arange(V))
    return probs @ grads


def token_loss(estimator, teacher, behaviour):
    def loss(student, y):
        logp = jax.nn.log_softmax(student)[y]
        # On-policy, old is the stopped student itself, as in the update.
        old = jax.lax.stop_gradient(logp) if behaviour is None else jax.nn.log_softmax(behaviour)[y]
        return kd_token_loss(
            estimator,
            student=logp,
            teacher=jax.nn.log_softmax(teacher)[y],
            old=old,
            full=kl.full_reverse_kl(student, teacher),
        )

    return loss


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize(("estimator", "placement"), list(ALLOWED))
@pytest.mark.parametrize("seed", range(3))
def test_expected_gradient_is_the_stated_one(estimator, placement, stale, seed):
    student, teacher, behaviour = draw(seed)
    loss = token_loss(estimator, teacher, behaviour if stale else None)
    found = expected_gradient(loss, student, behaviour if stale else student)
    stated = jax.grad(EXACT[ALLOWED[estimator, placement]])(student, teacher)
    np.testing.assert_allclose(found, stated, atol=1e-12)
    assert jnp.abs(stated).max() > 1e-2  # the test is not about zeros


def test_reasons_of_the_refused_pairs_are_true():
    """k1 as a loss has no expected gradient; k2, k3 and the full KL as rewards are wrong or zero."""
    student, teacher, _ = draw(0)
    truth = jax.grad(reverse_kl)(student, teacher)

    def d(student, y):
        return jax.nn.log_softmax(student)[y] - jax.nn.log_softmax(teacher)[y]

    np.testing.assert_allclose(expected_gradient(d, student, student), 0, atol=1e-12)

    def as_reward(value):
        def loss(student, y):
            return jax.lax.stop_gradient(value(student, y)) * jax.nn.log_softmax(student)[y]

        return expected_gradient(loss, student, student)

    assert jnp.abs(as_reward(lambda s, y: d(s, y) ** 2 / 2) - truth).max() > 1e-2
    assert jnp.abs(as_reward(lambda s, y: jnp.expm1(-d(s, y)) + d(s, y)) - truth).max() > 1e-2
    np.testing.assert_allclose(as_reward(lambda s, y: reverse_kl(s, teacher)), 0, atol=1e-12)


@pytest.mark.parametrize("pair", list(REFUSED))
def test_refused_pairs_refuse(pair):
    with pytest.raises(ValueError, match=r"kd\.estimator=.*; "):
        check_pair(*pair)


def test_every_pair_is_either_allowed_or_refused():
    pairs = {(e, p) for e in ("k1", "k2", "k3_forward", "full") for p in ("loss", "reward")}
    assert set(ALLOWED) | set(REFUSED) == pairs
    assert not set(ALLOWED) & set(REFUSED)


def test_stale_k2_needs_its_weight_and_no_gradient_through_it():
    """What is lost without the importance weight, and with a gradient through it."""
    student, teacher, behaviour = draw(1)
    truth = jax.grad(reverse_kl)(student, teacher)

    def unweighted(s, y):
        return (jax.nn.log_softmax(s)[y] - jax.nn.log_softmax(teacher)[y]) ** 2 / 2

    def through(s, y):
        return jnp.exp(jax.nn.log_softmax(s)[y] - jax.nn.log_softmax(behaviour)[y]) * unweighted(s, y)

    for wrong in (unweighted, through):
        assert jnp.abs(expected_gradient(wrong, student, behaviour) - truth).max() > 1e-3


def test_sequences_of_two_tokens_sum_over_visited_states():
    """Over every sequence: the gradient of sum_t KL(S || T | s_t) with the visits held fixed."""
    keys = jax.random.split(jax.random.key(3), 4)
    student = (jax.random.normal(keys[0], (V,)), jax.random.normal(keys[1], (V, V)))
    teacher = (jax.random.normal(keys[2], (V,)), jax.random.normal(keys[3], (V, V)))

    def stated(theta, visits):
        return reverse_kl(theta[0], teacher[0]) + visits @ jax.vmap(reverse_kl)(theta[1], teacher[1])

    first = jax.nn.softmax(student[0])
    truth = jax.grad(stated)(student, jax.lax.stop_gradient(first))
    total = jax.tree.map(jnp.zeros_like, student)
    for a in range(V):
        for b in range(V):
            prob = first[a] * jax.nn.softmax(student[1][a])[b]

            def loss(theta, a=a, b=b):
                logits, targets = (theta[0], theta[1][a]), (teacher[0], teacher[1][a])
                s, t = (
                    jnp.stack([jax.nn.log_softmax(x)[y] for x, y in zip(pair, (a, b), strict=True)])
                    for pair in (logits, targets)
                )
                return kl.k2(s, t, jax.lax.stop_gradient(s)).sum()

            total = jax.tree.map(lambda acc, g, p=prob: acc + p * g, total, jax.grad(loss)(student))
    for found, wanted in zip(jax.tree.leaves(total), jax.tree.leaves(truth), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_teacher_certain_of_something_else_gives_a_finite_gradient():
    student, teacher, old = jnp.array([-0.1]), jnp.array([-50.0]), jnp.array([-0.1])
    for estimator in ("k1", "k2"):
        for bound in (None, 5.0):
            grad = jax.grad(
                lambda s, e=estimator, b=bound: kd_token_loss(
                    e, student=s, teacher=teacher, old=old, full=None, bound=b
                ).sum()
            )(student)
            assert float(grad[0]) == pytest.approx(49.9 if bound is None else 5.0)
    assert kl.bound_acts(student, teacher, 5.0).all()
    assert not kl.bound_acts(student, teacher, None).any()


def test_equal_rewards_with_rounding_noise_have_no_advantage():
    noisy = jnp.array([0.1 + 0.2, 0.3, 0.3, 0.3, 1.0, 0.0, 0.0, 1.0])
    adv = group_advantages(noisy, 4, divide_by_std=True)
    assert (adv[:4] == 0).all()
    np.testing.assert_allclose(adv[4:], np.array([0.5, -0.5, -0.5, 0.5]) / np.std([1, 0, 0, 1], ddof=1))
    np.testing.assert_allclose(group_advantages(noisy, 4, divide_by_std=False)[4:], [0.5, -0.5, -0.5, 0.5])


def test_advantages_compare_within_a_group_only():
    rewards = jnp.array([0.0, 1.0, 5.0, 6.0])
    adv = group_advantages(rewards, 2, divide_by_std=False)
    np.testing.assert_allclose(adv, [-0.5, 0.5, -0.5, 0.5])


def test_clip_acts_only_where_it_holds_the_policy_back():
    old = jnp.zeros(4)
    student = jnp.log(jnp.array([1.5, 0.5, 1.5, 0.5]))
    advantages = jnp.array([1.0, 1.0, -1.0, -1.0])

    def total(s):
        return clipped_policy_loss(s, old, advantages, clip_low=0.2, clip_high=0.3)[0].sum()

    _, acts = clipped_policy_loss(student, old, advantages, clip_low=0.2, clip_high=0.3)
    assert acts.tolist() == [True, False, False, True]
    np.testing.assert_allclose(jax.grad(total)(student), [0.0, -0.5, 1.5, 0.0], atol=1e-12)


COMPLETION = jnp.array([[0, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0]], bool)


def masks(kind, correct, end_token=True, ended=(True, True, False, True)):
    return kd_mask(
        COMPLETION, jnp.array(correct), jnp.array(ended), kind=kind, group_size=2, end_token=end_token
    )


def test_kd_masks():
    correct = [True, False, False, False]
    assert (masks("none", correct) == COMPLETION).all()
    assert masks("response", correct).any(1).tolist() == [False, True, True, True]
    assert masks("group", correct).any(1).tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match="group"):
        masks("groups", correct)


def test_final_end_token_can_be_left_out_but_a_truncated_row_keeps_its_last():
    kept = masks("none", [False] * 4, end_token=False)
    assert kept.astype(int).tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("denominator", ["tokens", "sequences"])
def test_weights_sum_to_one_over_the_minibatch(denominator):
    weights = token_weights(COMPLETION, denominator)
    assert float(weights.sum()) == pytest.approx(1.0)
    assert (weights[~COMPLETION] == 0).all()
    if denominator == "sequences":
        np.testing.assert_allclose(weights.sum(1), 0.25, rtol=1e-6)
    assert (token_weights(jnp.zeros((2, 3), bool), denominator) == 0).all()
