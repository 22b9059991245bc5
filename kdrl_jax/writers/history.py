"""What a run directory says of the steps before, for writers that may have missed some."""

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path

from kdrl_jax.metrics import ALARMS, read_json, read_jsonl, read_metrics
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
    found = {kind: [step for step, _ in _numbered(run_dir, kind)] for kind in _FOLDERS}
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
    evals, rollouts = (_numbered(run_dir, kind) for kind in _FOLDERS)
    return [
        *(Entry(file.stem, 0, later(read_json, file)) for file in _teachers(run_dir)),
        *(Entry("metrics", row["step"], later(dict, row)) for row in before),
        *(Entry("evaluation", step, later(read_json, file)) for step, file in evals if step <= last_eval),
        *(Entry("rollouts", step, later(read_jsonl, file)) for step, file in rollouts if step < first_step),
        *(Entry("alarm", row["step"], later(dict, row)) for row in alarms if row["step"] < first_step),
    ]


_FOLDERS = {"evaluation": ("eval", "step_*.json"), "rollouts": ("rollouts", "step_*.jsonl")}


def _numbered(run_dir: Path, kind: str) -> list[tuple[int, Path]]:
    """The files of a kind that has one for a step, by step."""
    name, pattern = _FOLDERS[kind]
    folder = run_dir / name
    files = folder.glob(pattern) if folder.is_dir() else ()
    return sorted((int(file.stem.removeprefix("step_")), file) for file in files)


def _teachers(run_dir: Path) -> list[Path]:
    folder = run_dir / "eval"
    return sorted(folder.glob("teacher*.json")) if folder.is_dir() else []
