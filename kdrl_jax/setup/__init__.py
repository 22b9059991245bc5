"""A config to the things it names: mesh, tokenizer, models, optimizer. Shared by all commands."""

from kdrl_jax.setup.parameters import abstract_params, record_models
from kdrl_jax.setup.run import Setup, abstract_setup, check_mesh, make_setup
from kdrl_jax.setup.single import SingleModel, make_single

__all__ = [
    "Setup",
    "SingleModel",
    "abstract_params",
    "abstract_setup",
    "check_mesh",
    "make_setup",
    "make_single",
    "record_models",
]
