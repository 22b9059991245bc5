"""Which KD estimator may be used where, and what gradient it then has. A table, and no arrays.

With d = log pi_S - log pi_T at the sampled token, expectations over the student's own samples (visited
states held fixed) and unit weights, the expected gradient of each allowed pair is the one stated; see
`tests/test_objective.py` for the proof by enumeration.
"""

import typing
from typing import Literal

Estimator = Literal["k1", "k2", "k3_forward", "score_function", "full", "top_k"]
Placement = Literal["loss", "reward"]
ESTIMATORS: tuple[str, ...] = typing.get_args(Estimator)
PLACEMENTS: tuple[str, ...] = typing.get_args(Placement)

SAMPLED = ("k1", "k2", "k3_forward", "score_function")
"""Estimators that look at the sampled token alone; the others see the whole vocabulary."""

BOUNDED = ("k1", "k2", "score_function")
"""Those of them whose d kd.max_abs_logratio bounds."""

ALLOWED: dict[tuple[str, str], str] = {
    ("k1", "reward"): "reverse_kl",
    ("k2", "loss"): "reverse_kl",
    ("score_function", "loss"): "reverse_kl",
    ("k3_forward", "loss"): "forward_kl",
    # Of the chosen kind over the whole vocabulary, or over k tokens and a bucket with all the rest.
    ("full", "loss"): "divergence",
    ("top_k", "loss"): "bucketed_divergence",
}

_PER_STATE = "it is one number per state whatever was sampled, and such a reward has zero expected gradient"

REFUSED: dict[tuple[str, str], str] = {
    ("k1", "loss"): (
        "its expected gradient is zero, so it distils nothing; use k2 as a loss or k1 as a reward"
    ),
    ("k2", "reward"): "its gradient is biased; use k2 as a loss or k1 as a reward",
    ("k3_forward", "reward"): "its gradient is biased; use k1 as a reward",
    ("score_function", "reward"): (
        "it carries an importance weight, and the policy term would apply a second one; "
        "use k1 as a reward, which is the same without the weight"
    ),
    ("full", "reward"): f"{_PER_STATE}; use full as a loss",
    ("top_k", "reward"): f"{_PER_STATE}; use top_k as a loss",
}

_VOCABULARY = "it compares with one teacher's distribution over the vocabulary; use k2 or score_function"

REFUSED_UNNORMALISED: dict[str, str] = {
    "k3_forward": (
        "the target beyond the teacher is not normalised at a sampled token, and the missing constant "
        "scales its pull; use k2 or score_function"
    ),
    "full": _VOCABULARY,
    "top_k": _VOCABULARY,
}


def check_pair(estimator: str, placement: str) -> None:
    """Raises ValueError, with the reason and the alternative, unless the pair is allowed."""
    if (estimator, placement) in ALLOWED:
        return
    reason = REFUSED[estimator, placement]
    raise ValueError(f"kd.estimator={estimator} with kd.placement={placement}: {reason}")


def check_unnormalised(estimator: str) -> None:
    """Raises ValueError unless the estimator may follow a target that is normalised up to a constant per
    state (`objective.kl.extrapolate`)."""
    if estimator in REFUSED_UNNORMALISED:
        raise ValueError(
            f"kd.estimator={estimator} with an extrapolated teacher: {REFUSED_UNNORMALISED[estimator]}"
        )
