"""What a writer is, and the plain values that it is given."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

Status = Literal["finished", "stopped", "failed"]
"""How a session of a run ended: at its last step; asked to stop, and saved; by an error."""

ROLLOUT_COLUMNS = ("question", "answer", "completion", "reward", "finish", "source", "sample")
"""Of a logged completion, what a table of a writer shows; the file in `rollouts/` has more."""


@dataclasses.dataclass(frozen=True)
class About:
    """A run, as its writers need to know it."""

    name: str
    project: str
    group: str | None
    config: dict[str, Any]
    """Plain values, nested by section."""
    run_dir: Path
    first_step: int
    """The step that comes next; what a writer has of it and later ones is written again."""
    id: str | None
    """What `Writer.open` returned in an earlier session of the run; None in the first."""


class Writer(Protocol):
    """A program that shows runs. All calls come from one thread, and may raise whatever the library does."""

    rewrites: bool
    """Whether `open` takes back what there is of steps from `first_step` on; else those must not be given
    again."""

    def open(self, about: About) -> str:
        """Begins the run, or goes on with it; returns the id by which it is found again."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers of a step, by name."""

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Completions of a step: rows of a file in `rollouts/`."""

    def alarm(self, step: int, name: str, says: str) -> None:
        """A measure that has passed its threshold."""

    def close(self, status: Status) -> None:
        """Everything that was given is where it belongs."""


def plain_scalars(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers among nested values, by their names joined by `/`; an interval `x_ci: [low, high]`
    becomes `x_ci_low` and `x_ci_high`. Texts, nulls and the step itself are left out."""
    return {
        prefix + name: number
        for name, value in _leaves(values)
        if name != "step" and (number := _number(value)) is not None
    }


def _leaves(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", leaf) for inner, leaf in _leaves(value))
        elif name.endswith("_ci") and isinstance(value, (list, tuple)) and len(value) == 2:
            yield from zip((f"{name}_low", f"{name}_high"), value, strict=True)
        else:
            yield name, value


def _number(value: Any) -> float | None:
    number = value.item() if hasattr(value, "item") else value
    is_finite = isinstance(number, (int, float)) and math.isfinite(number)
    return float(number) if is_finite else None


def rollout_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """By row and `ROLLOUT_COLUMNS`; numbers and texts, and nothing where a row has none."""
    return [[row.get(column) for column in ROLLOUT_COLUMNS] for row in rows]
