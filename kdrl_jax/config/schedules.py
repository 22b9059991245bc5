"""Settings of schedules over the optimizer step. `optim.make_schedule` turns them into optax.

In YAML a schedule is a number (constant) or a mapping with a `kind`:

    kd: {coef: {kind: max_linear, a: 5e-3, b: 5e-5, c: 1e-3}}
"""

import math
from typing import Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Discriminator, Tag, model_validator

from kdrl_jax.config.base import Count, Positive, Real, Section


class _Schedule(Section):
    warmup_steps: Count = 0
    """Steps of linear rise from 0 to the schedule's first value; the schedule starts after them."""


class Constant(_Schedule):
    kind: Literal["constant"] = "constant"
    value: Real
    """The value at every step."""


class Linear(_Schedule):
    kind: Literal["linear"]
    start: Real
    end: Real
    steps: Positive
    """Steps from `start` to `end`; `end` afterwards."""


class Cosine(_Schedule):
    kind: Literal["cosine"]
    start: Real
    end: Real = 0.0
    steps: Positive
    """Steps of the half cosine from `start` to `end`; `end` afterwards."""


class Exponential(_Schedule):
    kind: Literal["exponential"]
    start: Real
    rate: Real
    """Factor applied over every `steps` steps: start * rate ** (step / steps)."""
    steps: Positive
    end: Real | None = None
    """Bound that the value does not pass."""

    @model_validator(mode="after")
    def _check(self) -> "Exponential":
        if self.rate <= 0:
            raise ValueError(f"rate={self.rate}: an exponential schedule needs a rate above 0")
        return self


class Piecewise(_Schedule):
    kind: Literal["piecewise"]
    values: dict[int, Real]
    """`{first step: value}`; constant in between. The first key must be 0."""

    @model_validator(mode="after")
    def _check(self) -> "Piecewise":
        steps = list(self.values)
        if not steps or steps[0] != 0 or steps != sorted(set(steps)):
            raise ValueError(f"values={self.values}: steps must start at 0 and increase")
        return self


class MaxLinear(_Schedule):
    """max(a - b * step, c): the KD annealing of KDRL (arXiv 2506.02208)."""

    kind: Literal["max_linear"]
    a: Real
    b: Real
    c: Real


def _number_is_constant(value: Any) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {"kind": "constant", "value": value}
    if not isinstance(value, (dict, _Schedule)):
        raise ValueError("expected a number or a mapping with a 'kind'")
    return value


def _kind(value: Any) -> Any:
    return value.get("kind", "constant") if isinstance(value, dict) else value.kind


Schedule = Annotated[
    Union[
        Annotated[Constant, Tag("constant")],
        Annotated[Linear, Tag("linear")],
        Annotated[Cosine, Tag("cosine")],
        Annotated[Exponential, Tag("exponential")],
        Annotated[Piecewise, Tag("piecewise")],
        Annotated[MaxLinear, Tag("max_linear")],
    ],
    Discriminator(_kind),
    BeforeValidator(_number_is_constant),
]


def constant(value: float) -> Constant:
    """The schedule that a plain number in YAML means."""
    return Constant(value=value)


def is_zero(schedule: Schedule) -> bool:
    """Whether a coefficient is the constant 0, so that its term is left out altogether."""
    return isinstance(schedule, Constant) and schedule.value == 0


def bounds(schedule: Schedule) -> tuple[float, float]:
    """The smallest and the largest value over all steps, or limits that it comes near."""
    match schedule:
        case Constant():
            values = [schedule.value]
        case Linear() | Cosine():
            values = [schedule.start, schedule.end]
        case Exponential():
            far = 0.0 if schedule.rate < 1 else math.copysign(math.inf, schedule.start)
            last = schedule.end if schedule.end is not None else far
            values = [schedule.start, schedule.start if schedule.rate == 1 else last]
        case Piecewise():
            values = list(schedule.values.values())
        case MaxLinear():
            far = schedule.a if schedule.b == 0 else math.copysign(math.inf, -schedule.b)
            values = [max(schedule.a, schedule.c), max(far, schedule.c)]
    if schedule.warmup_steps:
        values.append(0.0)
    return min(values), max(values)


def value_at(schedule: Schedule, step: int) -> float:
    """The value at a step, as `optim.make_schedule` has it, without starting a device."""
    if step < schedule.warmup_steps:
        return value_at(schedule.model_copy(update={"warmup_steps": 0}), 0) * step / schedule.warmup_steps
    at = step - schedule.warmup_steps
    match schedule:
        case Constant():
            return schedule.value
        case Linear():
            return schedule.start + (schedule.end - schedule.start) * min(at / schedule.steps, 1.0)
        case Cosine():
            part = (1 + math.cos(math.pi * min(at / schedule.steps, 1.0))) / 2
            return schedule.end + (schedule.start - schedule.end) * part
        case Exponential():
            value: float = schedule.start * schedule.rate ** (at / schedule.steps)
            if schedule.end is None:
                return value
            return max(value, schedule.end) if schedule.rate < 1 else min(value, schedule.end)
        case Piecewise():
            return next(v for s, v in reversed(schedule.values.items()) if s <= at)
        case MaxLinear():
            return max(schedule.a - schedule.b * at, schedule.c)
