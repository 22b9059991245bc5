"""Divergences between student and teacher, per token.

With d = log pi_S - log pi_T at a sampled token, expectations over the student's own samples and visited
states held fixed, the expected gradients are (proved in `tests/test_objective.py` by enumeration):

| function        | differentiated as a loss                | as a stopped reward         |
| --------------- | --------------------------------------- | --------------------------- |
| `k1_reward`     | -                                       | grad KL(S || T), exact      |
| `k2`            | grad KL(S || T), exact                  | biased: refused             |
| `k3_forward`    | grad KL(T || S): the forward KL         | biased: refused             |
| `full_reverse_kl` | grad KL(S || T), exact, no sampling noise | zero: refused           |

k1 itself as a loss has zero expected gradient and is not here. Names of the estimators follow
Schulman, "Approximating KL divergence" (2020); the gradients are those of the KL at each visited state,
not of the KL between sequences.
"""

import jax
import jax.numpy as jnp


def importance_weight(student: jax.Array, old: jax.Array) -> jax.Array:
    """Stopped pi_S / pi_old per token: makes an average over stale samples one over the student's.

    A gradient through this weight would add a term that is not the divergence's.
    """
    return jax.lax.stop_gradient(jnp.exp(student - old))


def k2(student: jax.Array, teacher: jax.Array, old: jax.Array, bound: float | None = None) -> jax.Array:
    """d^2 / 2 at sampled tokens, weighted for stale samples; its gradient is d * grad log pi_S.

    Args:
        student, teacher, old: log-probabilities of the sampled tokens, any shape; `old` is the policy
            that sampled (stopped student for strictly on-policy samples). Only `student` has a gradient.
        bound: where |d| is larger, the gradient uses +-bound instead of d (Huber's loss).
    """
    d = student - jax.lax.stop_gradient(teacher)
    slope = jax.lax.stop_gradient(d if bound is None else jnp.clip(d, -bound, bound))
    return importance_weight(student, old) * _square_or_line(d, slope)


def _square_or_line(d: jax.Array, slope: jax.Array) -> jax.Array:
    # slope == d gives d^2 / 2 with derivative d; a clipped slope continues it as a straight line.
    return slope * d - slope**2 / 2


def k1_reward(
    student: jax.Array, teacher: jax.Array, old: jax.Array, bound: float | None = None
) -> jax.Array:
    """Surrogate whose gradient is d * grad log pi_S: minus d as a stopped, immediate reward.

    Arguments as in `k2`. The value is d times the ratio, so its mean over samples is the reverse KL.
    """
    d = jax.lax.stop_gradient(student - teacher)
    d = d if bound is None else jnp.clip(d, -bound, bound)
    return d * jnp.exp(student - jax.lax.stop_gradient(old))


def k3_forward(student: jax.Array, teacher: jax.Array, old: jax.Array) -> jax.Array:
    """exp(-d) - 1 + d at sampled tokens. As a loss it follows the FORWARD KL(T || S)."""
    d = student - jax.lax.stop_gradient(teacher)
    return importance_weight(student, old) * (jnp.expm1(-d) + d)


def full_reverse_kl(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """KL(S || T) over the vocabulary (last axis) at each state; float32 or better. Shape [...]."""
    student = jax.nn.log_softmax(student_logits, axis=-1)
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits), axis=-1)
    return jnp.sum(jnp.exp(student) * (student - teacher), axis=-1)


def bound_acts(student: jax.Array, teacher: jax.Array, bound: float | None) -> jax.Array:
    """Whether |d| passes the bound (bool), for counting."""
    if bound is None:
        return jnp.zeros(student.shape, bool)
    return jnp.abs(student - teacher) > bound
