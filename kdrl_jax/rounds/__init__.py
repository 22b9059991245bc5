"""Rounds of sampling: how they are drawn and verified, and which of their groups are trained on."""

from kdrl_jax.rounds.choose import Chosen, Round, choose, round_metrics, sample_rows, wants_another
from kdrl_jax.rounds.collect import Collector, Drawn

__all__ = [
    "Chosen",
    "Collector",
    "Drawn",
    "Round",
    "choose",
    "round_metrics",
    "sample_rows",
    "wants_another",
]
