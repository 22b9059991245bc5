"""The `eval` command."""

from kdrl_jax.eval.command import evaluate

__all__ = ["evaluate"]
