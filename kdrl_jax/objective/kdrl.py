"""The KD losses at sampled tokens, by name."""

import jax

from kdrl_jax.objective import kl

LOSSES = ("k2", "score_function", "k3_forward")


def sampled_kd_loss(
    estimator: str,
    student: jax.Array,
    teacher: jax.Array,
    old: jax.Array,
    bound: kl.Bound | None = None,
) -> jax.Array:
    """The KD loss at each sampled token, in nats; arguments as in `kl`.

    Raises:
        ValueError: for an estimator that is no loss of sampled tokens, and for a bound where there is
            no d to bound.
    """
    if estimator == "k2":
        return kl.k2(student, teacher, old, bound)
    if estimator == "score_function":
        return kl.score_function(student, teacher, old, bound)
    if estimator == "k3_forward":
        if bound is not None:
            raise ValueError(f"k3_forward has no bound on d, got {bound}; use k2 or score_function")
        return kl.k3_forward(student, teacher, old)
    raise ValueError(f"{estimator!r} is no loss of sampled tokens; use one of {', '.join(LOSSES)}")
