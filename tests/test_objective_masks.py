"""Masks and denominators: by hand, and by enumerating whole minibatches of groups (float64).

The toy: vocabulary of 3, token 0 ends, at most 2 tokens; so 7 completions of uneven length, some
truncated. Two prompts with tables of their own, groups of 2: 7^4 = 2,401 minibatches, each with its
probability. What the real functions give in expectation is held against plain loops over them.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdrl_jax.objective import masks, policy
from kdrl_jax.objective.advantages import group_advantages
from kdrl_jax.objective.divergence import Divergence, divergence
from kdrl_jax.objective.kdrl import sampled_kd_loss
from kdrl_jax.objective.masks import DENOMINATORS, KINDS, kd_mask, token_weights


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


COMPLETION = np.array([[0, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0]], bool)


def mask(kind, correct, ended=(True, True, False, True), **settings):
    return kd_mask(
        jnp.asarray(COMPLETION), jnp.array(correct), jnp.array(ended), kind=kind, group_size=2, **settings
    )


def test_kd_masks_by_hand():
    correct = [True, False, False, False]
    kept = {kind: mask(kind, correct).any(1).tolist() for kind in KINDS}
    assert kept == {
        "none": [True, True, True, True],
        "response": [False, True, True, True],
        "group": [False, False, True, True],
        "response_correct": [True, False, False, False],
        "group_solved": [True, True, False, False],
    }
    for kind in KINDS:
        np.testing.assert_array_equal(mask(kind, correct), COMPLETION & np.array(kept[kind])[:, None])
    with pytest.raises(ValueError, match="'groups'; use one of none, response, group"):
        mask("groups", correct)


def test_final_end_token_can_be_left_out_but_a_truncated_row_keeps_its_last():
    kept = mask("none", [False] * 4, end_token=False)
    assert kept.astype(int).tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]


def test_truncated_completions_can_be_left_out():
    kept = mask("none", [False] * 4, truncated=False)
    np.testing.assert_array_equal(kept, COMPLETION & np.array([1, 1, 0, 1], bool)[:, None])


@pytest.mark.parametrize("denominator", ["tokens", "sequences"])
def test_weights_sum_to_one_over_the_minibatch(denominator):
    weights = token_weights(jnp.asarray(COMPLETION), jnp.asarray(COMPLETION), denominator)
    assert float(weights.sum()) == pytest.approx(1.0)
    assert (weights[~COMPLETION] == 0).all()
    if denominator == "sequences":
        np.testing.assert_allclose(weights.sum(1), 0.25, rtol=1e-6)


def test_denominators_by_hand():
    """9 completion tokens, 6 of them kept, in 2 of the 4 rows."""
    kept = COMPLETION & np.array([1, 0, 1, 0], bool)[:, None]
    found = {
        d: token_weights(jnp.asarray(kept), jnp.asarray(COMPLETION), d, max_new_tokens=5).max(1)
        for d in DENOMINATORS
    }
    np.testing.assert_allclose(found["tokens"], np.array([1, 0, 1, 0]) / 6, rtol=1e-6)
    np.testing.assert_allclose(found["all_tokens"], np.array([1, 0, 1, 0]) / 9, rtol=1e-6)
    np.testing.assert_allclose(found["sequences"], [1 / 4, 0, 1 / 8, 0], rtol=1e-6)
    np.testing.assert_allclose(found["max_tokens"], np.array([1, 0, 1, 0]) / 20, rtol=1e-6)
    for d in DENOMINATORS:
        nothing = token_weights(jnp.zeros((2, 3), bool), jnp.zeros((2, 3), bool), d, max_new_tokens=5)
        assert (nothing == 0).all()
    with pytest.raises(ValueError, match="needs max_new_tokens"):
        token_weights(jnp.asarray(kept), jnp.asarray(COMPLETION), "max_tokens")
    with pytest.raises(ValueError, match="'token'; use one of tokens, all_tokens"):
        token_weights(jnp.asarray(kept), jnp.asarray(COMPLETION), "token")


def test_soft_weight_is_the_groups_failure_rate():
    correct = jnp.array([1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0], bool)
    np.testing.assert_allclose(masks.kd_scale(correct, 4), np.repeat([0.75, 0.0, 1.0], 4))


def test_sure_teachers_count_more():
    entropy = jnp.array([0.0, 2.0, 4.0, 50.0])
    np.testing.assert_allclose(
        masks.entropy_weight(entropy, 2.0), np.exp([0.0, -1.0, -2.0, -25.0]), rtol=1e-12
    )
    assert (jax.grad(lambda h: masks.entropy_weight(h, 2.0).sum())(entropy) == 0).all()


# The enumeration. A completion is its tokens; rows of a minibatch are prompt 0 twice, then prompt 1 twice.
V, P, G, END = 3, 2, 2, 0
COMPLETIONS = [(END,), *((a, b) for a in (1, 2) for b in range(V))]
CORRECT = [(END,), (2, 2)]  # of uneven lengths, and one of them truncated
BATCHES = np.array(list(itertools.product(range(len(COMPLETIONS)), repeat=P * G)))
PROMPT = np.repeat(np.arange(P), G)
# By completion, in 3 columns: the first is the prompt's, never scored.
TOKENS = np.array([[0, *c, *[0] * (2 - len(c))] for c in COMPLETIONS])
STATE = np.array([[0, 0, c[0]] for c in COMPLETIONS])  # 0 before the first token, then that token
SCORED = np.array([[False, True, len(c) == 2] for c in COMPLETIONS])
ENDED = np.array([END in c for c in COMPLETIONS])
RIGHT = np.array([c in CORRECT for c in COMPLETIONS])
UNIT = {"kind": "none", "denominator": "max_tokens", "end_token": True, "truncated": True}


def tables():
    """Logits [P, state, V] of student and teacher."""
    return [1.2 * jax.random.normal(jax.random.key(k), (P, V, V), jnp.float64) for k in (0, 1)]


def chances(student):
    """Of each minibatch, in plain loops."""
    logp = np.asarray(jax.nn.log_softmax(student))
    of_completion = [
        [
            np.exp(sum(logp[p, STATE[c, t], TOKENS[c, t]] for t in (1, 2) if SCORED[c, t]))
            for c in range(len(COMPLETIONS))
        ]
        for p in range(P)
    ]
    return np.array([np.prod([of_completion[p][c] for p, c in zip(PROMPT, b, strict=True)]) for b in BATCHES])


def plain_weights(batch, kind, denominator, end_token, truncated, scale=False):
    """[row][t] of one minibatch, from the words of the documentation."""
    solved = {p: any(RIGHT[c] for c, q in zip(batch, PROMPT, strict=True) if q == p) for p in range(P)}
    rate = {p: np.mean([RIGHT[c] for c, q in zip(batch, PROMPT, strict=True) if q == p]) for p in range(P)}
    kept = []
    for c, p in zip(batch, PROMPT, strict=True):
        wanted = {
            "none": True,
            "response": not RIGHT[c],
            "group": not solved[p],
            "response_correct": RIGHT[c],
            "group_solved": solved[p],
        }[kind]
        row = [t for t in range(3) if SCORED[c, t] and wanted and (truncated or ENDED[c])]
        if not end_token:
            row = [t for t in row if TOKENS[c, t] != END]
        kept.append(row)
    num_kept = sum(len(r) for r in kept)
    num_rows = sum(bool(r) for r in kept)
    num_all = sum(SCORED[c].sum() for c in batch)
    out = np.zeros((len(batch), 3))
    for i, row in enumerate(kept):
        for t in row:
            share = {
                "tokens": num_kept,
                "all_tokens": num_all,
                "sequences": num_rows * len(row),
                "max_tokens": len(batch) * 2,
            }[denominator]
            out[i, t] = (1 - rate[PROMPT[i]] if scale else 1) / share
    return out


def plain_gradient(student, teacher, estimator, weights):
    """Sum of weight x estimator's gradient over [batch, row, t], from the definitions."""
    p, q = (np.asarray(jax.nn.softmax(x)) for x in (student, teacher))
    total = np.zeros_like(p)
    mass = np.zeros((P, V, V))  # weight on (prompt, state, token)
    for t in (1, 2):
        np.add.at(mass, (PROMPT, STATE[BATCHES, t], TOKENS[BATCHES, t]), weights[..., t])
    for i, s, y in np.ndindex(P, V, V):
        d = np.log(p[i, s] / q[i, s])
        exact, sampled = p[i, s] * (d - p[i, s] @ d), d[y] * (np.eye(V)[y] - p[i, s])
        total[i, s] += mass[i, s, y] * (exact if estimator == "full" else sampled)
    return total


@jax.jit
def real_gradients(student, teacher, weights):
    """Of the sum of weights [batch, row, t] x the real losses, per estimator."""

    def losses(x):
        s, t = (jax.nn.log_softmax(y)[PROMPT[:, None], STATE[BATCHES]] for y in (x, teacher))
        sampled = [jnp.take_along_axis(y, TOKENS[BATCHES][..., None], -1)[..., 0] for y in (s, t)]
        old = jax.lax.stop_gradient(sampled[0])
        out = {e: sampled_kd_loss(e, *sampled, old) for e in ("k2", "score_function")}
        return out | {"full": divergence(Divergence(), s, t)}

    return {
        e: jax.grad(lambda x, e=e: jnp.sum(weights * losses(x)[e]))(student)
        for e in ("k2", "score_function", "full")
    }


def real_weights(kind, denominator, end_token, truncated, scale=False):
    def one(batch):
        completion = jnp.asarray(SCORED)[batch]
        right = jnp.asarray(RIGHT)[batch]
        kept = kd_mask(
            completion,
            right,
            jnp.asarray(ENDED)[batch],
            kind=kind,
            group_size=G,
            end_token=end_token,
            truncated=truncated,
        )
        weights = token_weights(kept, completion, denominator, max_new_tokens=2)
        return weights * masks.kd_scale(right, G)[:, None] if scale else weights

    return np.asarray(jax.vmap(one)(jnp.asarray(BATCHES)))


def differ(found):
    return float(jnp.abs(found["k2"] - found["full"]).max())


CASES = [
    *itertools.product(KINDS, DENOMINATORS, [(True, True, False)]),
    *itertools.product(("none", "response"), DENOMINATORS, [(False, True, False), (True, False, False)]),
    *itertools.product(("none", "group"), ("tokens", "max_tokens"), [(True, True, True)]),
]


@pytest.mark.parametrize(("kind", "denominator", "rest"), CASES)
def test_expected_gradient_under_every_mask_and_denominator(kind, denominator, rest):
    """The enumerated expectation of weight x estimator's gradient, for each estimator; and k2 and the
    full divergence are one objective under unit weights alone."""
    student, teacher = tables()
    chance = chances(student)
    np.testing.assert_allclose(chance.sum(), 1.0, rtol=1e-12)
    settings = (kind, denominator, *rest)
    wanted = chance[:, None, None] * np.array([plain_weights(b, *settings) for b in BATCHES])
    weights = chance[:, None, None] * real_weights(*settings)
    found = real_gradients(student, teacher, weights)
    for estimator, gradient in found.items():
        np.testing.assert_allclose(
            gradient, plain_gradient(student, teacher, estimator, wanted), atol=1e-8, err_msg=estimator
        )
    unit = settings == (*UNIT.values(), False)
    assert differ(found) < 1e-8 if unit else differ(found) > 1e-3
    np.testing.assert_allclose(found["score_function"], found["k2"], atol=1e-8)


@pytest.mark.parametrize("advantage", ["rloo", "grpo_no_std"])
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_only_a_constant_denominator_leaves_the_policy_gradient_unbiased(advantage, denominator):
    """RLOO exactly, Dr. GRPO up to its constant 1 - 1 / G; sampled lengths in the denominator tilt it."""
    student, _ = tables()
    chance = chances(student)
    weights = chance[:, None, None] * real_weights("none", denominator, True, True)
    advantages = jax.vmap(lambda b: group_advantages(jnp.asarray(RIGHT)[b].astype(float), G, advantage))(
        jnp.asarray(BATCHES)
    )

    def sampled(x):
        logp = jax.nn.log_softmax(x)[PROMPT[:, None], STATE[BATCHES]]
        return jnp.take_along_axis(logp, TOKENS[BATCHES][..., None], -1)[..., 0]

    def total(x):
        s = sampled(x)
        loss, _, _ = policy.clipped_policy_loss(s, jax.lax.stop_gradient(s), advantages[..., None], 0.2, 0.2)
        return jnp.sum(weights * loss)

    def mean_reward(x):
        p = jax.nn.softmax(x)
        return sum(p[i, 0, END] + p[i, 0, 2] * p[i, 2, 2] for i in range(P)) / P

    found, truth = jax.grad(total)(student), -jax.grad(mean_reward)(student) / 2  # of 2 tokens at most
    if advantage == "grpo_no_std":
        truth = truth * (1 - 1 / G)
    if denominator == "max_tokens":
        np.testing.assert_allclose(found, truth, atol=1e-8)
        assert jnp.abs(truth).max() > 1e-2
    else:
        aligned = jnp.vdot(found, truth) / jnp.vdot(truth, truth)  # at the best common length
        assert jnp.abs(found - aligned * truth).max() > 1e-2 * jnp.abs(truth).max()
