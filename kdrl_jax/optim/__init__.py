"""Schedules and optimizers, of optax's parts."""

from kdrl_jax.optim.optimizers import make_optimizer
from kdrl_jax.optim.places import opt_state_shardings
from kdrl_jax.optim.schedules import make_schedule

__all__ = ["make_optimizer", "make_schedule", "opt_state_shardings"]
