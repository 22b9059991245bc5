"""Whole recipes on problems small enough to know the answer: trained from samples by the real functions.

A table of logits (vocabulary of 4, 3 tokens, every prefix its own state) can become its teacher, and does
under every reverse-KL recipe. A student with two parameters cannot, and ends at the optimum of the
divergence it was given.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdrl_jax.objective import kl
from kdrl_jax.objective.divergence import Divergence, divergence
from kdrl_jax.objective.kdrl import sampled_kd_loss
from kdrl_jax.objective.masks import token_weights
from kdrl_jax.objective.policy import clipped_policy_loss

V, N, ROWS, STEPS = 4, 3, 512, 200


def token_loss(recipe, student_logp, teacher_logp, tokens, old):
    """Loss per token of a recipe, as the update would put it together; log-probabilities [..., V]."""
    if recipe.startswith("full"):
        kind = recipe.partition(" ")[2] or "reverse_kl"
        return divergence(Divergence(kind), student_logp, teacher_logp)
    s, t = (jnp.take_along_axis(x, tokens[..., None], -1)[..., 0] for x in (student_logp, teacher_logp))
    old = jax.lax.stop_gradient(s) if old is None else old
    if recipe == "k1 reward":
        return clipped_policy_loss(s, old, kl.k1_reward(s, t), 0.2, 0.2)[0]
    if recipe == "k1 loss":  # what is refused
        return s - t
    return sampled_kd_loss(recipe, s, t, old)


def train(recipe, params, logits, teacher_logits, sample, learning_rate, updates=1):
    """Parameters after STEPS updates, `updates` of them on each draw of samples.

    Args:
        logits: function of (params, tokens) to the logits that predict each token, [ROWS, ..., V].
        teacher_logits: function of tokens to the teacher's.
        sample: function of (params, key) to tokens.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, STEPS))

    def iteration(carry, key):
        tokens = sample(carry[0], key)
        kept = jnp.ones(tokens.reshape(ROWS, -1).shape, bool)
        weights = token_weights(kept, kept, "tokens").reshape(tokens.shape)
        teacher = jax.nn.log_softmax(teacher_logits(tokens))
        drawn_from = jax.nn.log_softmax(logits(carry[0], tokens))
        old = jnp.take_along_axis(drawn_from, tokens[..., None], -1)[..., 0] if updates > 1 else None

        def loss(params):
            student = jax.nn.log_softmax(logits(params, tokens))
            return jnp.sum(weights * token_loss(recipe, student, teacher, tokens, old))

        for _ in range(updates):
            step, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
            carry = optax.apply_updates(carry[0], step), state
        return carry, None

    keys = jax.random.split(jax.random.key(0), STEPS // updates)
    run = jax.jit(lambda params: jax.lax.scan(iteration, (params, optimizer.init(params)), keys)[0][0])
    return run(params)


# The table: logits [N, prefix, V], of which position t uses the first V^t prefixes.
def prefixes(tokens):
    """Row of the table that predicts each token, [..., N]."""
    before = [jnp.zeros_like(tokens[..., 0])]
    for t in range(N - 1):
        before.append(before[-1] * V + tokens[..., t])
    return jnp.stack(before, -1)


def table_logits(table, tokens):
    return table[jnp.arange(N), prefixes(tokens)]


def table_sample(table, key):
    tokens = jnp.zeros((ROWS, N), jnp.int32)
    for t, k in enumerate(jax.random.split(key, N)):
        drawn = jax.random.categorical(k, table_logits(table, tokens)[:, t])
        tokens = tokens.at[:, t].set(drawn)
    return tokens


def sequence_kl(student, teacher):
    """KL(S || T) over all 64 sequences, nats."""
    every = jnp.stack(jnp.meshgrid(*[jnp.arange(V)] * N, indexing="ij"), -1).reshape(-1, N)

    def logp(table):
        of_tokens = jax.nn.log_softmax(table_logits(table, every))
        return jnp.take_along_axis(of_tokens, every[..., None], -1)[..., 0].sum(-1)

    s, t = logp(student), logp(teacher)
    return float(jnp.sum(jnp.exp(s) * (s - t)))


STUDENT, TEACHER = (1.2 * jax.random.normal(jax.random.key(k), (N, V ** (N - 1), V)) for k in (0, 1))


def trained_table(recipe, updates=1):
    teacher = functools.partial(table_logits, TEACHER)
    return train(recipe, STUDENT, table_logits, teacher, table_sample, 0.1, updates)


@pytest.mark.parametrize("recipe", ["k1 reward", "k2", "score_function", "full"])
def test_recipes_reach_the_teacher(recipe):
    assert sequence_kl(STUDENT, TEACHER) > 1.0
    assert sequence_kl(trained_table(recipe), TEACHER) < 1e-3


def test_several_updates_per_draw_reach_the_teacher_too():
    assert sequence_kl(trained_table("k2", updates=4), TEACHER) < 1e-3


def test_k1_as_a_loss_does_not():
    assert sequence_kl(trained_table("k1 loss"), TEACHER) > 0.5


# The student that cannot: a bell over 12 tokens with one parameter, its middle; its teacher has two peaks.
PLACES = jnp.arange(12.0)
START = 4.5


def bell(middle, width=1.5):
    return -((PLACES - jnp.asarray(middle)[..., None]) ** 2) / (2 * width**2)


PEAKS = jnp.log(0.65 * jax.nn.softmax(bell(2.0, 1.0)) + 0.35 * jax.nn.softmax(bell(8.0, 1.0)))


def both_kls(middle):
    """KL(S || T) and KL(T || S) of bells."""
    s = jax.nn.log_softmax(bell(middle))
    return jnp.sum(jnp.exp(s) * (s - PEAKS), -1), jnp.sum(jnp.exp(PEAKS) * (PEAKS - s), -1)


def optima():
    """Middles of least reverse and of least forward KL, the best of a fine grid."""
    grid = jnp.linspace(0, 11, 2201)
    return [float(grid[k.argmin()]) for k in both_kls(grid)]


@pytest.mark.parametrize(
    ("recipe", "forward"),
    [
        ("k1 reward", False),
        ("k2", False),
        ("score_function", False),
        ("full", False),
        ("k3_forward", True),
        ("full forward_kl", True),
    ],
)
def test_a_student_that_cannot_follow_ends_at_its_divergences_optimum(recipe, forward):
    """Reverse: the larger peak. Forward: between the two. Found beforehand on a grid."""
    found = train(
        recipe,
        jnp.asarray(START),
        lambda middle, tokens: jnp.broadcast_to(bell(middle), (*tokens.shape, 12)),
        lambda tokens: jnp.broadcast_to(PEAKS, (*tokens.shape, 12)),
        lambda middle, key: jax.random.categorical(key, bell(middle), shape=(ROWS, 1)),
        0.1,
    )
    assert abs(float(found) - optima()[forward]) < 0.05


def test_the_two_optima_are_where_they_are_known_to_be():
    """The reverse KL's is at the larger peak; the forward KL's has the teacher's mean, as in any
    exponential family, and so lies where the teacher has next to nothing."""
    reverse, forward = optima()
    assert abs(reverse - 2.0) < 0.2
    np.testing.assert_allclose(jax.nn.softmax(bell(forward)) @ PLACES, jnp.exp(PEAKS) @ PLACES, atol=0.01)
    assert float(jnp.exp(PEAKS)[round(forward)]) < 0.05
