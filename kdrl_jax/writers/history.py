"""What a run directory says of the steps before, for writers that may have missed some."""

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path

from kdrl_jax.metrics import ALARMS, files_of_steps, read_json, read_jsonl, read_metrics
from kdrl_jax.types import Metrics
from kdrl_jax.writers.background import Entry, State


def settle(run_dir: Path) -> None:
    """`State.settle` of every writer that the run has ever had."""
    folder, on_disk = run_dir / "writers", functools.cache(lambda: last_steps(run_dir))
    for file in folder.glob("*.json") if folder.is_dir() else ():
        # One that cannot be read is told by its writer, when it is asked for.
        with contextlib.suppress(ValueError, LookupError, TypeError):
            State(run_dir, file.stem).settle(on_disk)


def last_steps(run_dir: Path) -> dict[str, int]:
    """By kind of entry, the last step that the files have."""
    found = {kind: list(files_of_steps(run_dir / name, end)) for kind, (name, end) in _FOLDERS.items()}
    found["metrics"] = [row["step"] for row in read_metrics(run_dir)]
    found["alarm"] = [row["step"] for row in read_jsonl(run_dir / ALARMS)]
    found |= {file.stem: [0] for file in _teachers(run_dir)}
    return {kind: max(steps) for kind, steps in found.items() if steps}


def entries(run_dir: Path, before: Sequence[Metrics], first_step: int, last_eval: int) -> list[Entry]:
    """Everything that the files have of the steps before, and that a run which goes on will not write again.

    Args:
        before: the metrics of those steps.
        first_step: the step that comes next.
        last_eval: the last evaluation of the student that counts.
    """
    later, alarms = functools.partial, read_jsonl(run_dir / ALARMS)
    evals, rollouts = (files_of_steps(run_dir / name, end).items() for name, end in _FOLDERS.values())
    return [
        *(Entry(file.stem, 0, later(read_json, file)) for file in _teachers(run_dir)),
        *(Entry("metrics", row["step"], later(dict, row)) for row in before),
        *(Entry("evaluation", step, later(read_json, file)) for step, file in evals if step <= last_eval),
        *(Entry("rollouts", step, later(read_jsonl, file)) for step, file in rollouts if step < first_step),
        *(Entry("alarm", row["step"], later(dict, row)) for row in alarms if row["step"] < first_step),
    ]


_FOLDERS = {"evaluation": ("eval", "json"), "rollouts": ("rollouts", "jsonl")}


def _teachers(run_dir: Path) -> list[Path]:
    folder = run_dir / "eval"
    return sorted(folder.glob("teacher*.json")) if folder.is_dir() else []
