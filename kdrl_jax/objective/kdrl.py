"""The terms of KDRL per token, by name. The update weighs, adds and differentiates them."""

import jax

from kdrl_jax.objective import kl


def kd_token_loss(
    estimator: str,
    *,
    student: jax.Array,
    teacher: jax.Array,
    old: jax.Array,
    full: jax.Array | None,
    bound: float | None = None,
) -> jax.Array:
    """The KD term at each token, in nats.

    Args:
        estimator: `k2`, `k1` (as a reward), `k3_forward`, or `full`.
        student, teacher, old: log-probabilities of the sampled tokens; see `kl.k2`.
        full: exact reverse KL per state, with its gradient; needed by `full` alone.
        bound: see `kl.k2`; k1 and k2 only.

    Raises:
        ValueError: for an estimator that does not exist or lacks its input.
    """
    if estimator == "k2":
        return kl.k2(student, teacher, old, bound)
    if estimator == "k1":
        return kl.k1_reward(student, teacher, old, bound)
    if estimator == "k3_forward":
        return kl.k3_forward(student, teacher, old)
    if estimator == "full" and full is not None:
        return full
    raise ValueError(f"kd estimator {estimator!r} is unknown, or its exact divergence is not given")
