"""Divergences between student and teacher, estimated at the sampled tokens.

With d = log pi_S - log pi_T at a sampled token, expectations over the student's own samples (or over an
older policy's: every function here carries its importance weight) and visited states held fixed, the
expected gradients are (proved by enumeration in `tests/test_objective.py`):

| function         | used as                            | its expected gradient           |
| ---------------- | ---------------------------------- | ------------------------------- |
| `k2`             | a loss                             | grad KL(S || T), exact          |
| `score_function` | a loss                             | grad KL(S || T), exact          |
| `k1_reward`      | a reward, added to the advantage   | grad KL(S || T), exact          |
| `k3_forward`     | a loss                             | grad KL(T || S): the forward KL |

k1 itself as a loss has zero expected gradient and is not here. Names of the estimators follow Schulman,
"Approximating KL divergence" (2020); the gradients are those of the KL at each visited state, not of the
KL between sequences. `divergence` has the exact ones over the vocabulary.

Shapes: log-probabilities of the sampled tokens, float, any one shape; the result has the same. Only
`student` has a gradient. `old` is the policy that sampled (for strictly on-policy samples the stopped
student itself).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Bound:
    """How far one token may pull: a bound on d, fixed when the update is compiled."""

    limit: float
    """Nats, above 0."""
    kind: str = "clip"
    """`clip` cuts d off at +-limit; `tanh` bends it, limit * tanh(d / limit)."""

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"bound limit={self.limit}; it is above 0 nats")
        if self.kind not in ("clip", "tanh"):
            raise ValueError(f"bound kind {self.kind!r}; use clip or tanh")


def bounded(d: jax.Array, bound: Bound | None) -> jax.Array:
    """d within the bound; d itself without one."""
    if bound is None:
        return d
    if bound.kind == "clip":
        return jnp.clip(d, -bound.limit, bound.limit)
    return bound.limit * jnp.tanh(d / bound.limit)


def bound_acts(student: jax.Array, teacher: jax.Array, bound: Bound | None) -> jax.Array:
    """Whether |d| passes the limit (bool), for counting. (`tanh` also bends smaller d, the less the
    smaller.)"""
    if bound is None:
        return jnp.zeros(student.shape, bool)
    return jnp.abs(student - teacher) > bound.limit


def importance_weight(student: jax.Array, old: jax.Array) -> jax.Array:
    """Stopped pi_S / pi_old per token: makes an average over stale samples one over the student's.

    A gradient through this weight would add a term that is not the divergence's.
    """
    return jax.lax.stop_gradient(jnp.exp(student - old))


def k2(student: jax.Array, teacher: jax.Array, old: jax.Array, bound: Bound | None = None) -> jax.Array:
    """d^2 / 2, weighted for stale samples; its gradient is weight * d * grad log pi_S.

    With a bound its gradient has the bounded d, and its value is what that integrates to: Huber's loss
    for `clip`, limit^2 log cosh(d / limit) for `tanh`.
    """
    d = student - jax.lax.stop_gradient(teacher)
    return importance_weight(student, old) * _integral(d, bound)


def _integral(d: jax.Array, bound: Bound | None) -> jax.Array:
    """The integral of `bounded` from 0 to d."""
    if bound is not None and bound.kind == "tanh":
        x = jnp.abs(d / bound.limit)
        return bound.limit**2 * (x + jnp.log1p(jnp.exp(-2.0 * x)) - math.log(2.0))
    # A slope that is d itself gives d^2 / 2; a clipped one continues it as a straight line.
    slope = bounded(d, bound)
    return slope * d - slope**2 / 2


def score_function(
    student: jax.Array, teacher: jax.Array, old: jax.Array, bound: Bound | None = None
) -> jax.Array:
    """Stopped (bounded) d times the ratio pi_S / pi_old, the ratio differentiated: a loss of its own.

    Its gradient is `k2`'s at every sample; its value's mean over samples is the reverse KL itself. The
    policy's clip never touches it.
    """
    d = jax.lax.stop_gradient(bounded(student - teacher, bound))
    return d * jnp.exp(student - jax.lax.stop_gradient(old))


def k1_reward(student: jax.Array, teacher: jax.Array, bound: Bound | None = None) -> jax.Array:
    """Minus the (bounded) d, stopped: an immediate reward of each token.

    To be multiplied by its coefficient and ADDED TO THE ADVANTAGE of the policy term after all
    normalisation, so that nothing whitens it: doubling the coefficient doubles the KD part of the
    gradient. The policy term then differentiates it; where its clip acts, both rewards are cut off
    together, and it is the sum of both that says on which side the clip acts.
    """
    return -jax.lax.stop_gradient(bounded(student - teacher, bound))


def k3_forward(student: jax.Array, teacher: jax.Array, old: jax.Array) -> jax.Array:
    """exp(-d) - 1 + d, weighted for stale samples. As a loss it follows the FORWARD KL(T || S).

    Its gradient, weight * (1 - pi_T / pi_S) * grad log pi_S, has no bound: a token the teacher finds
    e^20 times as likely weighs that much.
    """
    d = student - jax.lax.stop_gradient(teacher)
    return importance_weight(student, old) * (jnp.expm1(-d) + d)


def extrapolate(teacher: jax.Array, reference: jax.Array, factor: float | jax.Array) -> jax.Array:
    """Log-probability, up to a constant of each state, of a target beyond the teacher; stopped.

    reference + factor * (teacher - reference): the target whose reverse KL the student minimises when it
    maximises factor * log(pi_T / pi_ref) - KL(S || ref) (G-OPD, and ExOPD for factor > 1; arXiv
    2602.12125). Factor 1 is the teacher, 0 the reference, between them an interpolation.

    The result is not normalised: it lies above the target's log-probability by one constant per state,
    c = log sum_v ref_v (T_v / ref_v)^factor. A constant in d drops out of the expected gradients of `k2`,
    `score_function` and `k1_reward` (it adds noise, no bias) as long as no `Bound` acts and no weight
    depends on the outcome. It does not drop out of `k3_forward`'s, so that pair is refused. The mean of
    d over samples is then the target's reverse KL minus c. Over the whole vocabulary take
    `log_softmax` of the result, and there is no constant.
    """
    return jax.lax.stop_gradient(reference + factor * (teacher - reference))
