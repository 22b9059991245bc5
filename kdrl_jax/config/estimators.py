"""Which KD estimator may be used where, and what gradient it then has. A table, and no arrays.

With d = log pi_S - log pi_T at the sampled token and expectations over the student's own samples
(visited states held fixed), the expected gradient of each allowed pair is the one stated; see
`tests/test_objective.py` for the proof by enumeration.
"""

ALLOWED: dict[tuple[str, str], str] = {
    ("k1", "reward"): "reverse_kl",
    ("k2", "loss"): "reverse_kl",
    ("k3_forward", "loss"): "forward_kl",
    ("full", "loss"): "reverse_kl",
}

REFUSED: dict[tuple[str, str], str] = {
    (
        "k1",
        "loss",
    ): "its expected gradient is zero, so it distils nothing; use k2 as a loss or k1 as a reward",
    ("k2", "reward"): "its gradient is biased; use k2 as a loss or k1 as a reward",
    ("k3_forward", "reward"): "its gradient is biased; use k1 as a reward",
    ("full", "reward"): "a per-state reward has zero gradient; use full as a loss",
}


def check_pair(estimator: str, placement: str) -> None:
    """Raises ValueError, with the reason and the alternative, unless the pair is allowed."""
    if (estimator, placement) in ALLOWED:
        return
    reason = REFUSED.get((estimator, placement), "there is no such pair")
    raise ValueError(f"kd.estimator={estimator} with kd.placement={placement}: {reason}")
