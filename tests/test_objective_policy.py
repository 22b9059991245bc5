"""The policy term (float64): advantages and losses against hand-worked numbers, plain loops, and
enumeration."""

import itertools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdrl_jax.objective import kl, policy
from kdrl_jax.objective.advantages import KINDS, group_advantages, has_signal, overlong_penalty
from kdrl_jax.objective.masks import token_weights

V = 4


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def plain_advantages(rewards, size, kind):
    out = []
    for i in range(0, len(rewards), size):
        group = rewards[i : i + size]
        for j, r in enumerate(group):
            others = group[:j] + group[j + 1 :]
            out.append(
                {
                    "grpo": lambda r=r, g=group: (r - statistics.mean(g)) / statistics.stdev(g),
                    "grpo_no_std": lambda r=r, g=group: r - statistics.mean(g),
                    "rloo": lambda r=r, o=others: r - statistics.mean(o),
                }[kind]()
            )
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_are_those_of_plain_loops(kind):
    rewards = np.random.default_rng(0).normal(size=12).round(2)
    found = group_advantages(jnp.asarray(rewards), 4, kind)
    np.testing.assert_allclose(found, plain_advantages(rewards.tolist(), 4, kind), atol=1e-12)


def test_advantages_by_hand():
    rewards = jnp.array([1.0, 0.0, 0.0, 1.0, 5.0, 6.0, 5.0, 5.0])  # groups of 4, compared apart
    found = {kind: group_advantages(rewards, 4, kind).tolist() for kind in KINDS}
    assert found["grpo_no_std"] == [0.5, -0.5, -0.5, 0.5, -0.25, 0.75, -0.25, -0.25]
    np.testing.assert_allclose(found["rloo"], np.array(found["grpo_no_std"]) * 4 / 3)
    np.testing.assert_allclose(found["grpo"][:4], np.array([1, -1, -1, 1]) * math.sqrt(3) / 2)
    np.testing.assert_allclose(found["grpo"][4:], [-0.5, 1.5, -0.5, -0.5])
    with pytest.raises(ValueError, match="'gae'; use one of grpo, grpo_no_std, rloo"):
        group_advantages(rewards, 4, "gae")


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_with_rounding_noise_have_no_advantage(kind):
    noisy = jnp.array([0.1 + 0.2, 0.3, 0.3, 0.3, 1e6 + 0.1, 1e6, 1e6, 1e6, 1.0, 0.0, 0.0, 1.0])
    found = group_advantages(noisy, 4, kind)
    assert (found[:8] == 0).all()
    assert (found[8:] != 0).all()
    assert has_signal(noisy, 4).tolist() == [False, False, True]
    assert (group_advantages(jnp.ones(3), 1, kind) == 0).all()  # no group to compare in


def test_a_small_but_real_difference_is_signal():
    rewards = jnp.array([0.3, 0.3 + 1e-4, 0.0, 0.0])
    assert has_signal(rewards, 2).tolist() == [True, False]
    assert (group_advantages(rewards, 2, "grpo") != 0).tolist() == [True, True, False, False]


def test_overlong_penalty_is_dapos_eq_13():
    lengths = jnp.array([1, 12, 13, 14, 16, 20])
    assert overlong_penalty(lengths, 16, 4).tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


def policy_gradient(student, advantages):
    """Of minus the expected advantage, in the student's logits; numpy."""
    p = np.exp(np.asarray(student) - np.logaddexp.reduce(student))
    return -p * (np.asarray(advantages) - p @ np.asarray(advantages))


@pytest.mark.parametrize("kind", KINDS)
def test_rloo_is_unbiased_and_the_others_are_what_is_said(kind):
    """Over all groups of 3: the expected gradient is that of the mean reward (RLOO), 1 - 1 / G of it
    (Dr. GRPO), or something else (divided by the deviation)."""
    student, rewards, g = jnp.array([0.3, -1.0, 0.8, 0.1]), jnp.array([0.0, 1.0, 0.2, 2.0]), 3
    groups = jnp.array(list(itertools.product(range(V), repeat=g)))
    weights = token_weights(*[jnp.ones((g, 1), bool)] * 2, "max_tokens", max_new_tokens=1)[:, 0]

    def total(x):
        logp = jax.nn.log_softmax(x)

        def one(group):
            adv = group_advantages(rewards[group], g, kind)
            old = jax.lax.stop_gradient(logp[group])
            return weights @ policy.clipped_policy_loss(logp[group], old, adv, 0.2, 0.2)[0]

        chance = jnp.exp(jax.lax.stop_gradient(logp[groups].sum(1)))
        return chance @ jax.vmap(one)(groups)

    found, truth = jax.grad(total)(student), policy_gradient(student, rewards)
    if kind == "grpo":
        ratio = found / truth
        assert np.ptp(ratio) > 0.05  # no multiple of it
    else:
        np.testing.assert_allclose(found, truth * {"rloo": 1.0, "grpo_no_std": 1 - 1 / g}[kind], atol=1e-8)


RATIOS = np.array([1.5, 0.5, 1.5, 0.5, 1.1, 1.0, 3.0])
ADVANTAGES = np.array([1.0, 1.0, -1.0, -1.0, 2.0, -2.0, 0.0])
OLD = np.linspace(-2, -0.5, 7)
STUDENT = OLD + np.log(RATIOS)


def value_and_slope(loss, student=STUDENT):
    """A loss per token, and its derivative in that token's log-probability."""
    student = jnp.asarray(student)
    return np.asarray(loss(student)), np.asarray(jax.grad(lambda s: loss(s).sum())(student))


def test_clipped_loss_by_hand():
    """The clip acts only where it holds the policy back; low and high are told apart."""
    loss, low, high = policy.clipped_policy_loss(STUDENT, OLD, ADVANTAGES, 0.2, 0.3)
    np.testing.assert_allclose(loss, [-1.3, -0.5, 1.5, 0.8, -2.2, 2.0, 0.0])
    assert low.tolist() == [False, False, False, True, False, False, False]
    assert high.tolist() == [True, False, False, False, False, False, False]
    _, slope = value_and_slope(lambda s: policy.clipped_policy_loss(s, OLD, ADVANTAGES, 0.2, 0.3)[0])
    np.testing.assert_allclose(slope, [0.0, -0.5, 1.5, 0.0, -2.2, 2.0, 0.0], atol=1e-12)


def test_clipped_loss_is_ppos_minimum():
    rng = np.random.default_rng(1)
    student, old, advantages = rng.normal(size=(3, 50))
    low, high = 0.25, 0.6
    wanted = []
    for s, o, a in zip(student, old, advantages, strict=True):
        r = math.exp(s - o)
        wanted.append(-min(r * a, min(max(r, 1 - low), 1 + high) * a))
    found, acts_low, acts_high = policy.clipped_policy_loss(student, old, advantages, low, high)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    _, slope = value_and_slope(
        lambda s: policy.clipped_policy_loss(s, old, advantages, low, high)[0], student
    )
    np.testing.assert_array_equal(slope == 0, acts_low | acts_high)
    assert acts_low.any()
    assert acts_high.any()


def test_clip_bounds_may_follow_a_schedule():
    def acts(width):
        loss, low, high = policy.clipped_policy_loss(STUDENT, OLD, ADVANTAGES, width, 2 * width)
        return loss, (low | high).sum()

    traced = jax.jit(acts)
    for width in (0.1, 0.6):
        for a, b in zip(traced(width), acts(width), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
    assert int(traced(0.1)[1]) == 2
    assert int(traced(0.6)[1]) == 0


def test_a_range_of_nothing_keeps_the_on_policy_gradient():
    _, slope = value_and_slope(lambda s: policy.clipped_policy_loss(s, STUDENT, ADVANTAGES, 0.0, 0.0)[0])
    np.testing.assert_allclose(slope, -ADVANTAGES, atol=1e-12)


def test_cispo_by_hand():
    """The weight is clipped on both sides whatever the advantage; every token keeps its gradient."""
    loss, low, high = policy.cispo_loss(STUDENT, OLD, ADVANTAGES, 0.2, 0.3)
    weight = np.array([1.3, 0.8, 1.3, 0.8, 1.1, 1.0, 1.3])
    np.testing.assert_allclose(loss, -weight * ADVANTAGES * STUDENT, atol=1e-12)
    assert low.tolist() == [False, True, False, True, False, False, False]
    assert high.tolist() == [True, False, True, False, False, False, True]
    _, slope = value_and_slope(lambda s: policy.cispo_loss(s, OLD, ADVANTAGES, 0.2, 0.3)[0])
    np.testing.assert_allclose(slope, -weight * ADVANTAGES, atol=1e-12)
    _, low, _ = policy.cispo_loss(STUDENT - 9.0, OLD, ADVANTAGES, 1.0, 0.3)
    assert not low.any()  # no lower bound


def test_on_policy_all_losses_have_one_gradient():
    losses = {
        "clipped": lambda s: policy.clipped_policy_loss(s, STUDENT, ADVANTAGES, 0.2, 0.2)[0],
        "cispo": lambda s: policy.cispo_loss(s, STUDENT, ADVANTAGES, 0.2, 0.2)[0],
        "reinforce": lambda s: policy.reinforce_loss(s, ADVANTAGES),
    }
    for name, loss in losses.items():
        _, slope = value_and_slope(loss)
        np.testing.assert_allclose(slope, -ADVANTAGES, atol=1e-12, err_msg=name)


def test_only_the_student_has_a_gradient():
    """Neither the old policy, the advantages (a KD reward may be in them) nor a correction."""
    mask = jnp.ones((1, 7), bool)

    def total(old, advantages, sampler):
        s, o, a = jnp.asarray(STUDENT)[None], old[None], advantages[None]
        losses = [
            policy.clipped_policy_loss(s, o, a, 0.9, 9.0)[0],
            policy.cispo_loss(s, o, a, 0.9, 9.0)[0],
            policy.gspo_loss(s, o, a, mask, 0.9, 9.0)[0],
            policy.reinforce_loss(s, a),
            policy.clipped_policy_loss(s, policy.mixture_anchor(o, s, 0.5), a, 0.9, 9.0)[0],
            policy.truncated_weight(o, sampler[None], 2.0) * s,
        ]
        return sum(x.sum() for x in losses)

    inputs = (jnp.asarray(OLD), jnp.asarray(ADVANTAGES), jnp.asarray(OLD) - 0.1)
    assert (jnp.stack(jax.grad(total, (0, 1, 2))(*inputs)) == 0).all()


GSPO_MASK = np.array(
    [[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]], bool
)
GSPO_CLIP = (0.1, 0.2)


def gspo_rows():
    rng = np.random.default_rng(3)
    old = rng.normal(-1.5, 0.5, GSPO_MASK.shape)
    shift = np.array([0.15, 0.4, -0.3, -0.2, 0.0])[:, None]  # of each row's log-ratio
    student = old + shift + rng.normal(0, 0.02, GSPO_MASK.shape)
    return np.where(GSPO_MASK, student, 77.0), old, np.array([1.0, 2.0, -1.0, 0.5, 3.0])


def test_gspo_is_the_papers_sequence_objective():
    """Eq. 5, in plain loops and differences: value and gradient, rows of uneven lengths."""
    student, old, advantages = gspo_rows()
    weights = token_weights(jnp.asarray(GSPO_MASK), jnp.asarray(GSPO_MASK), "sequences")

    def paper(student):
        total, rows = 0.0, 0
        for s, o, a, m in zip(student, old, advantages, GSPO_MASK, strict=True):
            if m.any():
                ratio = math.exp(sum((s - o)[m]) / m.sum())
                total -= min(ratio * a, min(max(ratio, 1 - GSPO_CLIP[0]), 1 + GSPO_CLIP[1]) * a)
                rows += 1
        return total / rows

    def ours(student):
        loss = policy.gspo_loss(student, old, advantages[:, None], GSPO_MASK, *GSPO_CLIP)[0]
        return jnp.sum(weights * loss)

    value, grad = jax.value_and_grad(ours)(jnp.asarray(student))
    np.testing.assert_allclose(value, paper(student), rtol=1e-7)
    steps = 1e-6 * np.eye(student.size).reshape(-1, *student.shape)
    wanted = np.array([(paper(student + e) - paper(student - e)) / 2e-6 for e in steps])
    np.testing.assert_allclose(grad, wanted.reshape(student.shape), atol=1e-8)
    assert (np.abs(wanted.reshape(student.shape)).max(1) > 1e-3).tolist() == [True, False, False, True, False]


def test_gspo_clips_whole_completions():
    student, old, advantages = gspo_rows()
    loss, low, high = policy.gspo_loss(student, old, advantages[:, None], GSPO_MASK, *GSPO_CLIP)
    # Row 1: ratio 1.5 and a gain. Row 2: ratio 0.74 and a loss. The others move as they should.
    np.testing.assert_array_equal(high, GSPO_MASK & (np.arange(5) == 1)[:, None])
    np.testing.assert_array_equal(low, GSPO_MASK & (np.arange(5) == 2)[:, None])
    assert (np.asarray(loss)[~GSPO_MASK] == 0).all()


def test_gspo_on_policy_is_grpo():
    student, _, advantages = gspo_rows()

    def slopes(loss):
        return jax.grad(lambda s: jnp.where(GSPO_MASK, loss(s), 0.0).sum())(jnp.asarray(student))

    sequence = slopes(lambda s: policy.gspo_loss(s, student, advantages[:, None], GSPO_MASK, 0.1, 0.1)[0])
    token = slopes(lambda s: policy.clipped_policy_loss(s, student, advantages[:, None], 0.1, 0.1)[0])
    np.testing.assert_allclose(sequence, token, atol=1e-12)


def test_teacher_anchored_ratio():
    """RLAD's: share 1 is GRPO to the last bit; else the ratio mixes geometrically."""
    teacher = STUDENT - np.linspace(-1, 2, 7)
    np.testing.assert_array_equal(policy.mixture_anchor(OLD, teacher, 1.0), OLD)
    np.testing.assert_allclose(policy.mixture_anchor(OLD, teacher, 0.0), teacher, rtol=1e-12)
    anchor = policy.mixture_anchor(OLD, teacher, 0.7)
    ratio = np.exp(STUDENT - OLD) ** 0.7 * np.exp(STUDENT - teacher) ** 0.3
    np.testing.assert_allclose(np.exp(STUDENT - anchor), ratio, rtol=1e-12)
    found, low, high = policy.clipped_policy_loss(STUDENT, anchor, ADVANTAGES, 0.2, 0.3)
    wanted = -np.minimum(ratio * ADVANTAGES, np.clip(ratio, 0.8, 1.3) * ADVANTAGES)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert (low | high).any()
    # A token that the teacher finds likelier has a smaller ratio: what holds it back acts later.
    liked = policy.mixture_anchor(OLD, OLD + 1.0, 0.7)
    assert (np.exp(STUDENT - liked) < np.exp(STUDENT - OLD)).all()


def test_a_teacher_certain_of_something_else_can_be_bounded_in_the_anchor():
    old, teacher = jnp.array([-0.1]), jnp.array([-50.0])
    assert float(policy.mixture_anchor(old, teacher, 0.5)[0]) == pytest.approx(-25.05)
    assert float(policy.mixture_anchor(old, teacher, 0.5, kl.Bound(4.0))[0]) == pytest.approx(-2.1)


@pytest.mark.parametrize(("cap", "unbiased"), [(100.0, True), (1.2, False)])
def test_truncated_importance_sampling(cap, unbiased):
    """Samples of an engine whose probabilities are a little off: the policy gradient of the trainer's
    policy, as long as the cap does not act; also after an update (student and old apart)."""
    student, old, sampler = jax.random.normal(jax.random.key(0), (3, V))
    advantages = jnp.array([1.0, -0.5, 0.3, -2.0])
    engine = jax.nn.log_softmax(sampler)

    def total(x):
        logp, before = jax.nn.log_softmax(x), jax.nn.log_softmax(old)
        loss = policy.clipped_policy_loss(logp, before, advantages, 0.999, 1e9)[0]
        return jnp.exp(engine) @ (policy.truncated_weight(before, engine, cap) * loss)

    def reinforce(x):
        logp = jax.nn.log_softmax(x)
        weight = policy.truncated_weight(jax.lax.stop_gradient(logp), engine, cap)
        return jnp.exp(engine) @ (weight * policy.reinforce_loss(logp, advantages))

    for loss in (total, reinforce):
        off = jnp.abs(jax.grad(loss)(student) - policy_gradient(student, advantages)).max()
        assert (off < 1e-12) if unbiased else (off > 1e-2)


def test_truncated_weight_by_hand():
    old = jnp.log(jnp.array([0.5, 0.5, 0.5]))
    sampler = jnp.log(jnp.array([0.5, 0.25, 0.8]))
    np.testing.assert_allclose(policy.truncated_weight(old, sampler, 1.5), [1.0, 1.5, 0.625])


def test_effective_sample_size_adds_over_microbatches():
    rng = np.random.default_rng(5)
    mask = rng.random((6, 4)) < 0.6
    ratios = np.exp(rng.normal(0, 0.7, (6, 4)))
    weights = token_weights(jnp.asarray(mask), jnp.asarray(mask), "tokens")
    parts = [policy.effective_sample_sums(weights[i : i + 2], ratios[i : i + 2]) for i in (0, 2, 4)]
    found = policy.effective_sample_share(*(sum(x) for x in zip(*parts, strict=True)))
    kept = ratios[mask]
    np.testing.assert_allclose(found, kept.sum() ** 2 / (kept**2).sum() / kept.size, rtol=1e-7)
    one = policy.effective_sample_sums(weights, jnp.full((6, 4), 1.7))
    np.testing.assert_allclose(policy.effective_sample_share(*one), 1.0, rtol=1e-6)
    nothing = policy.effective_sample_sums(jnp.zeros((6, 4)), ratios)
    assert float(policy.effective_sample_share(*nothing)) == 0.0


def test_signs_disagree_where_the_two_gradients_pull_apart():
    student, teacher = jnp.array([-1.0, -1.0, -1.0, -1.0, -1.0]), jnp.array([-0.5, -2.0, -0.5, -2.0, -1.0])
    advantages = jnp.array([1.0, 1.0, -1.0, -1.0, 1.0])
    rl = jax.grad(lambda s: policy.clipped_policy_loss(s, student, advantages, 0.2, 0.2)[0].sum())(student)
    kd = jax.grad(lambda s: kl.k2(s, teacher, student).sum())(student)
    found = policy.signs_disagree(advantages, teacher, student)
    assert found.tolist() == (rl * kd < 0).tolist() == [False, True, True, False, False]
