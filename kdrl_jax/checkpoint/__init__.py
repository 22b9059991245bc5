"""Exact save and resume: the state, and where the data stood, in one orbax checkpoint.

The teacher's parameters are never in a checkpoint. Keys are not either: they follow from the seed and
the step. `sealed` says what is written beside the arrays so that no damaged number is ever used; `store` has
the folder of a run's checkpoints; `keep` which of them stay; `copies` those in buckets that orbax does not
reach.
"""

from kdrl_jax.checkpoint.keep import Keep, best_steps
from kdrl_jax.checkpoint.sealed import MisfitError
from kdrl_jax.checkpoint.store import Checkpoints

__all__ = ["Checkpoints", "Keep", "MisfitError", "best_steps"]
