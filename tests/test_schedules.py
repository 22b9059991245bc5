"""Schedules against values worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import TypeAdapter

from kdrl_jax.config import Schedule
from kdrl_jax.config.schedules import bounds
from kdrl_jax.optim import make_schedule

CASES = {
    "a number": (0.25, {0: 0.25, 1: 0.25, 1000: 0.25}),
    "constant": ({"value": 2, "warmup_steps": 4}, {0: 0, 1: 0.5, 3: 1.5, 4: 2, 5: 2, 99: 2}),
    "linear": ({"kind": "linear", "start": 1, "end": 0, "steps": 4}, {0: 1, 1: 0.75, 3: 0.25, 4: 0, 9: 0}),
    "linear, rising": ({"kind": "linear", "start": -1, "end": 1, "steps": 2}, {0: -1, 1: 0, 2: 1, 3: 1}),
    # It starts after the warmup, which rises to its first value.
    "linear after warmup": (
        {"kind": "linear", "start": 1, "end": 0, "steps": 2, "warmup_steps": 2},
        {0: 0, 1: 0.5, 2: 1, 3: 0.5, 4: 0, 5: 0},
    ),
    # 0.2 + 0.8 (1 + cos(pi step / 4)) / 2; cos(pi / 4) = 0.70710678
    "cosine": (
        {"kind": "cosine", "start": 1, "end": 0.2, "steps": 4},
        {0: 1, 1: 0.88284271, 2: 0.6, 3: 0.31715729, 4: 0.2, 9: 0.2},
    ),
    "cosine to zero": ({"kind": "cosine", "start": 3, "steps": 2}, {0: 3, 1: 1.5, 2: 0, 3: 0}),
    "cosine, rising": ({"kind": "cosine", "start": 0, "end": 4, "steps": 2}, {0: 0, 1: 2, 2: 4, 3: 4}),
    "cosine after warmup": (
        {"kind": "cosine", "start": 2, "steps": 2, "warmup_steps": 1},
        {0: 0, 1: 2, 2: 1, 3: 0},
    ),
    # 8 * 0.5 ** (step / 2); sqrt(0.5) = 0.70710678
    "exponential": (
        {"kind": "exponential", "start": 8, "rate": 0.5, "steps": 2},
        {0: 8, 1: 5.65685425, 2: 4, 4: 2, 8: 0.5},
    ),
    "exponential, bounded": (
        {"kind": "exponential", "start": 8, "rate": 0.5, "steps": 2, "end": 3},
        {0: 8, 2: 4, 4: 3, 50: 3},
    ),
    "exponential, rising": (
        {"kind": "exponential", "start": 1, "rate": 2, "steps": 1, "end": 3},
        {0: 1, 1: 2, 2: 3, 9: 3},
    ),
    "piecewise": (
        {"kind": "piecewise", "values": {0: 1, 3: 0.5, 5: 0}},
        {0: 1, 2: 1, 3: 0.5, 4: 0.5, 5: 0, 99: 0},
    ),
    "piecewise, one piece": ({"kind": "piecewise", "values": {0: 7}}, {0: 7, 99: 7}),
    "piecewise after warmup": (
        {"kind": "piecewise", "values": {0: 1, 3: 5}, "warmup_steps": 2},
        {0: 0, 1: 0.5, 2: 1, 4: 1, 5: 5},
    ),
    # KDRL's annealing, max(5e-3 - 5e-5 step, 1e-3): the bound is reached at step 80.
    "max_linear": (
        {"kind": "max_linear", "a": 5e-3, "b": 5e-5, "c": 1e-3},
        {0: 5e-3, 1: 4.95e-3, 40: 3e-3, 79: 1.05e-3, 80: 1e-3, 81: 1e-3, 280: 1e-3},
    ),
    "max_linear after warmup": (
        {"kind": "max_linear", "a": 4, "b": 1, "c": 2, "warmup_steps": 2},
        {0: 0, 1: 2, 2: 4, 3: 3, 4: 2, 5: 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_values_worked_by_hand(case):
    setting, expected = CASES[case]
    config = TypeAdapter(Schedule).validate_python(setting)
    schedule = make_schedule(config)
    plain = [schedule(step) for step in expected]
    np.testing.assert_allclose(plain, list(expected.values()), rtol=1e-6, atol=1e-7)
    # As the update uses it: made, and called on the step counter, inside a compiled function.
    compiled = jax.jit(lambda step: make_schedule(config)(step))
    traced = [compiled(jnp.int32(step)) for step in expected]
    np.testing.assert_allclose(traced, list(expected.values()), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_bounds_hold_at_every_step(case):
    config = TypeAdapter(Schedule).validate_python(CASES[case][0])
    low, high = bounds(config)
    values = np.array([make_schedule(config)(step) for step in (*range(12), 1000)])
    slack = 1e-6 * max(1.0, float(np.abs(values).max()))
    assert (values >= low - slack).all()
    assert (values <= high + slack).all()
    assert low > -np.inf
