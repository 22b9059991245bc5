"""What a run tells to programs beside its own files: TensorBoard, W&B, trackio, MLflow.

A run never waits for any of them, and none can end it.
"""

from kdrl_jax.writers.base import Status
from kdrl_jax.writers.run_writers import RunWriters, check_writers

__all__ = ["RunWriters", "Status", "check_writers"]
