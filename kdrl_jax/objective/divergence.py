"""Divergences between student and teacher over the whole vocabulary, exact at each visited state.

No sample of the next token enters, so that given the states the gradient has no sampling noise, and
samples of an older policy need no importance weight. S is the student, T the teacher:

| kind               | divergence                                                   | source                |
| ------------------ | ------------------------------------------------------------ | --------------------- |
| `reverse_kl`       | KL(S || T)                                                   |                       |
| `forward_kl`       | KL(T || S)                                                   |                       |
| `jsd`              | b KL(T || M) + (1 - b) KL(S || M), M = b T + (1 - b) S       | GKD, arXiv 2306.13649 |
| `skew_reverse_kl`  | KL(S || a S + (1 - a) T)                                     | DistiLLM, 2402.03898  |
| `skew_forward_kl`  | KL(T || a T + (1 - a) S)                                     | DistiLLM, 2402.03898  |

With `top_k` the vocabulary is cut into the k most likely tokens and one bucket that holds all the rest,
and the divergence is taken between the two distributions over these k + 1 buckets. Without the bucket the
sum can be negative, and falls when the student moves mass out of sight.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

KINDS = ("reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl")
SUPPORTS = ("student", "teacher")

# The log-probability of nothing. Finite, so that a difference of two of them is 0 and not nan.
_NOTHING = -1e30


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Divergence:
    """Which divergence, fixed when the update is compiled."""

    kind: str = "reverse_kl"
    """One of `KINDS`."""
    beta: float = 0.5
    """b of `jsd`, strictly between 0 and 1: near 0 it behaves like the forward KL, near 1 like the
    reverse."""
    skew: float = 0.1
    """a of the skewed kinds, strictly between 0 and 1: the share of the first distribution in the second."""
    top_k: int | None = None
    """Tokens with a bucket of their own; None is all of them."""
    support: str = "student"
    """Whose most likely tokens these are."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"divergence kind {self.kind!r}; use one of {', '.join(KINDS)}")
        for name in ("beta", "skew"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(
                    f"divergence {name}={getattr(self, name)}; it lies strictly between 0 and 1 "
                    "(at the ends use kind reverse_kl or forward_kl)"
                )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"divergence top_k={self.top_k}; use 1 or more, or None for all")
        if self.support not in SUPPORTS:
            raise ValueError(f"divergence support {self.support!r}; use student or teacher")


def divergence(settings: Divergence, student_logp: jax.Array, teacher_logp: jax.Array) -> jax.Array:
    """The divergence at each state, in nats, at least 0 up to rounding.

    Args:
        student_logp, teacher_logp: normalised log-probabilities [..., V], float32 or better, finite;
            columns masked out in both (-1e30) count nothing. Only `student_logp` has a gradient.

    Returns:
        [...]. Tokens as likely as the k-th of `top_k` (within 1e-5) keep a bucket of their own too.
    """
    teacher_logp = jax.lax.stop_gradient(teacher_logp)
    shares = _shares(settings, student_logp, teacher_logp)
    if settings.top_k is None or settings.top_k >= student_logp.shape[-1]:
        return jnp.sum(shares, -1)
    support = jax.lax.stop_gradient(student_logp) if settings.support == "student" else teacher_logp
    # A threshold instead of gathered columns: no scatter in the backward pass, and the tail is summed
    # directly, where 1 - (mass of the top k) would have no digits left once that mass is nearly 1.
    # With room for rounding: the compiler may compute the support twice, and the k-th must not fall out.
    kth = jax.lax.top_k(support, settings.top_k)[0][..., -1:]
    kept = support >= kth - 1e-5 * (1.0 + jnp.abs(kth))
    tails = (jax.nn.logsumexp(jnp.where(kept, _NOTHING, x), -1) for x in (student_logp, teacher_logp))
    return jnp.sum(jnp.where(kept, shares, 0.0), -1) + _shares(settings, *tails)


def _shares(settings: Divergence, student: jax.Array, teacher: jax.Array) -> jax.Array:
    """What each token (or bucket) adds to the divergence, from its two log-probabilities."""
    kind, skew, beta = settings.kind, settings.skew, settings.beta
    if kind == "reverse_kl":
        return _share(student, teacher)
    if kind == "forward_kl":
        return _share(teacher, student)
    if kind == "skew_reverse_kl":
        return _share(student, _mix(skew, student, teacher))
    if kind == "skew_forward_kl":
        return _share(teacher, _mix(skew, teacher, student))
    middle = _mix(beta, teacher, student)
    return beta * _share(teacher, middle) + (1.0 - beta) * _share(student, middle)


def _share(p: jax.Array, q: jax.Array) -> jax.Array:
    return jnp.exp(p) * (p - q)


def _mix(share: float, p: jax.Array, q: jax.Array) -> jax.Array:
    """log(share e^p + (1 - share) e^q)."""
    return jnp.logaddexp(p + math.log(share), q + math.log1p(-share))


def mixture(logps: Sequence[jax.Array], weights: jax.Array) -> jax.Array:
    """Log-probability under a weighted mixture of K teachers, log sum_k w_k p_k; stopped.

    Args:
        logps: K arrays of one shape, [..., V], or [...] of sampled tokens.
        weights: [..., K], about the leading dimensions of `logps`; at least 0, summing to 1 over K. A
            teacher of weight 0 counts nothing, whatever it says.
    """
    # Finite where nothing counts, so that a row without any teacher is finite too.
    log_weights = jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, weights, 1.0)), _NOTHING)

    def part(k: int, logp: jax.Array) -> jax.Array:
        w = log_weights[..., k]
        return logp + w.reshape(w.shape + (1,) * (logp.ndim - w.ndim))

    parts = [part(k, logp) for k, logp in enumerate(logps)]
    return jax.lax.stop_gradient(functools.reduce(jnp.logaddexp, parts))
