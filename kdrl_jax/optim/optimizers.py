"""The optimizer that the settings ask for."""

from typing import Any

import jax
import optax

from kdrl_jax.config import OptimizerConfig
from kdrl_jax.optim.adafactor import scale_by_adafactor
from kdrl_jax.optim.bfloat16 import scale_by_adam_bf16
from kdrl_jax.optim.layouts import layouts
from kdrl_jax.optim.muon import scale_by_muon
from kdrl_jax.types import Params


def make_optimizer(config: OptimizerConfig, dims: Params) -> optax.GradientTransformation:
    """Clipping, the optimizer without its learning rate, and decoupled weight decay.

    The update multiplies by -lr(step) itself: optax's own count stops when an update is skipped, and
    the learning rate must not fall out of step with the other schedules.

    Args:
        dims: letters of the dimensions of what is trained, in a tree like its parameters.
    """
    parts = []
    if config.max_grad_norm is not None:
        parts.append(optax.clip_by_global_norm(config.max_grad_norm))
    parts.append(_scale(config, dims))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=_is_matrix))
    return optax.chain(*parts)


def _scale(config: OptimizerConfig, dims: Params) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    match config.kind:
        case "adamw":
            return adam
        case "adamw_bf16":
            return scale_by_adam_bf16(config.b1, config.b2, config.eps)
        case "adafactor":
            return scale_by_adafactor(layouts(dims))
        case "muon":
            return scale_by_muon(layouts(dims), adam)


def _is_matrix(params: Params) -> Any:
    """Norms and biases are not decayed. Layers are stacked, so a layer's vector has two dimensions."""

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        name = str(path[-1].key)
        return not (name.endswith("norm") or name.endswith("bias"))

    return jax.tree_util.tree_map_with_path(decays, params)
