"""Schedules and the optimizer, all optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdrl_jax.config import OptimizerConfig, Schedule
from kdrl_jax.config import schedules as settings
from kdrl_jax.types import Params


def make_schedule(config: Schedule) -> optax.Schedule:
    """The optax schedule (step -> value) of a setting."""
    schedule = _after_warmup(config)
    if config.warmup_steps == 0:
        return schedule
    # From 0 at step 0 to the schedule's first value at step `warmup_steps`.
    with jax.ensure_compile_time_eval():  # schedules are also made inside the compiled update
        first = float(schedule(0))
    rise = optax.linear_schedule(0.0, first, config.warmup_steps)
    return optax.join_schedules([rise, schedule], [config.warmup_steps])


def _after_warmup(c: Schedule) -> optax.Schedule:
    match c:
        case settings.Constant():
            return optax.constant_schedule(c.value)
        case settings.Linear():
            return optax.linear_schedule(c.start, c.end, c.steps)
        case settings.Cosine():
            # optax's cosine ends at alpha * init_value, which cannot say "rise" or start at 0.
            unit = optax.cosine_decay_schedule(1.0, c.steps)
            return lambda step: c.end + (c.start - c.end) * unit(step)
        case settings.Exponential():
            return optax.exponential_decay(c.start, c.steps, c.rate, end_value=c.end)
        case settings.Piecewise():
            values = list(c.values.values())
            return optax.join_schedules(
                [optax.constant_schedule(v) for v in values], [s for s in c.values if s > 0]
            )
        case settings.MaxLinear():
            return lambda step: jnp.maximum(c.a - c.b * step, c.c)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping and AdamW without its learning rate.

    The update multiplies by -lr(step) itself: optax's own count stops when an update is skipped, and
    the learning rate must not fall out of step with the other schedules.
    """
    parts = []
    if config.max_grad_norm is not None:
        parts.append(optax.clip_by_global_norm(config.max_grad_norm))
    parts.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=_is_matrix))
    return optax.chain(*parts)


def _is_matrix(params: Params) -> Any:
    """Norms and biases are not decayed. Layers are stacked, so a layer's vector has two dimensions."""

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        name = str(path[-1].key)
        return not (name.endswith("norm") or name.endswith("bias"))

    return jax.tree_util.tree_map_with_path(decays, params)


def opt_state_shardings(
    optimizer: optax.GradientTransformation, abstract_params: Params, param_shardings: Params, other: Any
) -> Any:
    """Shardings of the optimizer's state: moments like their parameters, the rest `other`."""
    abstract = jax.eval_shape(optimizer.init, abstract_params)
    return optax.tree.map_params(
        optimizer, lambda _, s: s, abstract, param_shardings, transform_non_params=lambda _: other
    )
