"""What an evaluation says, and how sure it is: estimators of single questions, intervals over questions.

numpy alone. The questions are the sample: they were drawn from all that could be asked, and answers to one
question belong together. So intervals are over questions, never over answers or tokens.
"""

from kdrl_jax.statistics.estimators import majority, pass_at_k, pass_sizes
from kdrl_jax.statistics.intervals import (
    Interval,
    difference_interval,
    mean_interval,
    share_interval,
)

__all__ = [
    "Interval",
    "difference_interval",
    "majority",
    "mean_interval",
    "pass_at_k",
    "pass_sizes",
    "share_interval",
]
