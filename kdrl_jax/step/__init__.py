"""The optimizer step: `terms` per token, the loss of rows (`objective`), the compiled `update`, and the
gradients of its terms apart (`diagnostics`)."""

from kdrl_jax.step.diagnostics import make_diagnostics
from kdrl_jax.step.objective import Minibatch, Objective
from kdrl_jax.step.update import make_update

__all__ = ["Minibatch", "Objective", "make_diagnostics", "make_update"]
