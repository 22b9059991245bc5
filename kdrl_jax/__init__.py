"""KDRL for JAX: knowledge distillation and reinforcement learning in one on-policy update.

Importing this package imports no submodule and starts no accelerator backend.
"""

__version__ = "0.1.0"
