"""What runs have left in their directories, and which of them are one experiment."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdrl_jax.config import Config, changes, load_run_config
from kdrl_jax.metrics import files_of_steps, read_json, read_jsonl, read_metrics
from kdrl_jax.paths import absolute
from kdrl_jax.types import Metrics

Evaluations = dict[str, dict[str, Any]]
"""Name of a model -> what its held-out evaluation has found."""


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """One run, as far as it has come."""

    name: str
    """Of its folder, and of folders around it as far as others have the same."""
    directory: Path
    config: Config
    metrics: list[Metrics]
    evaluations: Evaluations
    alarms: list[dict[str, Any]]
    """Rows of alarms.jsonl."""
    changes: list[dict[str, Any]]
    """Rows of changes.jsonl."""

    @property
    def last_step(self) -> int:
        """Of its metrics. What files have of later ones is of a branch that was given up: the run went back
        to a checkpoint, and has not come as far again."""
        return int(self.metrics[-1]["step"])

    def rollouts(self) -> dict[int, Path]:
        """Step -> the file of its samples, the first step first."""
        found = files_of_steps(self.directory / "rollouts", "jsonl")
        return {step: path for step, path in found.items() if step <= self.last_step}

    def held_out(self) -> dict[int, Path]:
        """Step -> the file of the student's held-out answers, the first step first."""
        found = files_of_steps(self.directory / "eval" / "samples", "jsonl")
        return {step: path for step, path in found.items() if step <= self.last_step + 1}


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of the same settings but for their seed."""

    runs: list[RunFiles]
    differs: list[str]
    """`setting=value` of what it has otherwise than the first group."""

    @property
    def label(self) -> str:
        first = self.runs[0].name
        return first if len(self.runs) == 1 else f"{first} and {len(self.runs) - 1} more"


def read_runs(run_dirs: Sequence[Path]) -> list[RunFiles]:
    """Each once, however often and by whatever path it is named. Raises as `read_run`."""
    paths: dict[Path, Path] = {}
    for path in run_dirs:
        paths.setdefault(absolute(path), path)
    named = zip(paths.values(), names_of(list(paths)), strict=True)
    return [dataclasses.replace(read_run(path), name=name) for path, name in named]


def names_of(places: Sequence[Path]) -> list[str]:
    """The name of each folder; of several with the same, with as many folders around it as tell them
    apart."""
    parts = [[x for x in os.fspath(place).split("/") if x] or ["/"] for place in places]
    length = [1] * len(parts)
    while True:
        names = ["/".join(p[-n:]) for p, n in zip(parts, length, strict=True)]
        longer = [
            n + 1 if names.count(name) > 1 and n < len(p) else n
            for name, p, n in zip(names, parts, length, strict=True)
        ]
        if longer == length:
            return names
        length = longer


def read_run(run_dir: Path) -> RunFiles:
    """Raises ValueError: the directory holds no metrics, or no config."""
    metrics = read_metrics(run_dir)
    if not metrics:
        raise ValueError(f"{run_dir} holds no metrics.jsonl with a whole line; train the run first")
    return RunFiles(
        names_of([absolute(run_dir)])[0],
        run_dir,
        load_run_config(run_dir),
        metrics,
        read_evaluations(run_dir, int(metrics[-1]["step"]) + 1),
        read_jsonl(run_dir / "alarms.jsonl"),
        read_jsonl(run_dir / "changes.jsonl"),
    )


def read_evaluations(run_dir: Path, last_step: int | None = None) -> Evaluations:
    """The teachers (if any), then the student by step, then what the `eval` command found, with the settings
    that it was given beside the run's own.

    Args:
        last_step: the last step that an evaluation can be of; None for any.
    """
    folder = run_dir / "eval"
    found: Evaluations = {}
    for path in sorted(folder.glob("teacher*.json")) if folder.is_dir() else []:
        found[path.stem] = read_json(path)
    for step, path in files_of_steps(folder, "json").items():
        if last_step is None or step <= last_step:
            found[f"student, step {step}"] = {"step": step} | read_json(path)
    for path in sorted(folder.glob("eval_*.json")) if folder.is_dir() else []:
        content = read_json(path)
        given = [one if len(one) <= 80 else f"{one[:77]}..." for one in content["overrides"]]
        by = f"eval with {', '.join(given)}" if given else "eval"
        for model, results in content["evaluations"].items():
            step = results.get("step")  # of a model alone there is none
            if last_step is not None and (step or 0) > last_step:
                continue
            name = model if step is None else f"step {step}"
            # Other settings may be called the same.
            by_this = f"{by} ({path.stem.removeprefix('eval_')[:6]})" if f"{by}, {name}" in found else by
            found[f"{by_this}, {name}"] = results
    return found


def group_runs(runs: Sequence[RunFiles]) -> list[Group]:
    """Runs whose updates have one meaning are seeds of one experiment: where a run lies, what is measured of
    it and on which mesh makes no difference. In the order given."""
    groups: list[Group] = []
    for run in runs:
        for group in groups:
            if not _differs(group.runs[0], run):
                group.runs.append(run)
                break
        else:
            groups.append(Group([run], _differs(runs[0], run)))
    return groups


def _differs(a: RunFiles, b: RunFiles) -> list[str]:
    before, now = (x.config.model_dump(mode="json") for x in (a, b))
    found = [x for x in changes(before, now) if not x.is_free and x.key != "seed"]
    return [f"{x.key}={x.now}" for x in found]
