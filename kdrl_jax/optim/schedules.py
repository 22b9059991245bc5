"""Schedules, all optax."""

import jax
import jax.numpy as jnp
import optax

from kdrl_jax.config import Schedule
from kdrl_jax.config import schedules as settings


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
