"""One run of the lab: which it is, and how it is carried out."""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.lab.processes import Processes
from benchmarks.lab.protocol import CONFIGS, Models, Settings, Teacher
from kdrl_jax.config import Config, load_config

Frozen = tuple[tuple[str, str], ...]
"""Settings that can be hashed: dotted keys with their values in JSON, in the order of the keys."""
ROLES = {name: Path(name) for name in Models.model_fields}
"""The models by their names alone, where it does not matter where they lie."""


def frozen(settings: Settings) -> Frozen:
    """See `Frozen`."""
    return tuple((key, json.dumps(settings[key])) for key in sorted(settings))


def thawed(settings: Frozen) -> Settings:
    """What `frozen` was given, as far as JSON can tell."""
    return {key: json.loads(value) for key, value in settings}


def words(settings: Frozen) -> list[str]:
    """As overrides of a command line."""
    return [f"{key}={value}" for key, value in settings]


@dataclasses.dataclass(frozen=True)
class Job:
    """A method's run with one teacher, seed and choice of settings."""

    method: str
    """A config of configs/lab."""
    teacher: Teacher | None
    """None for a method without one."""
    seed: int
    settings: Frozen
    """What was chosen."""
    test: Frozen | None = None
    """Settings of the evaluation after the last update; None for none."""
    compared_with: tuple[Teacher, ...] = ()
    """The teachers that this evaluation compares the student with."""

    @property
    def name(self) -> str:
        """A path that says all of it."""
        chosen = ",".join(f"{_short(key)}={_brief(value)}" for key, value in thawed(self.settings).items())
        return f"{self.teacher or 'no_teacher'}/{self.method}/{chosen or 'as it is'}/seed_{self.seed}"

    @property
    def models(self) -> set[str]:
        """What it needs, by name."""
        return {"student", *self.compared_with} | ({self.teacher} if self.teacher else set())

    def overrides(self, models: dict[str, Path]) -> list[str]:
        """Of the method's config.

        Args:
            models: the run directories of student and teachers.
        """
        found = [*words(self.settings), f"seed={self.seed}", f"student.run={models['student']}"]
        return found if self.teacher is None else [*found, f"teacher.run={models[self.teacher]}"]

    def config(self) -> Config:
        """The run's, with the models by their names alone."""
        return load_config(CONFIGS / f"{self.method}.yaml", self.overrides(ROLES))


def decisive(config: Config) -> dict[str, Any]:
    """What of a run's settings decides what it finds, the models by their names alone. With today's defaults:
    a setting that was added since does not tell two runs apart, unless it is set."""
    tree = config.model_dump(mode="json")
    for section in ("log", "cache_dir", "alarms", "plan", "checkpoint"):
        del tree[section]
    for role in ("student", "teacher"):
        if tree[role] is not None and tree[role]["run"] is not None:
            tree[role]["run"] = Path(tree[role]["run"]).name.removesuffix(".yaml")
    return tree


def _short(key: str) -> str:
    rates = {"optimizer.learning_rate.start": "rate", "optimizer.learning_rate.end": "last rate"}
    return rates.get(key, key)


def _brief(value: Any) -> str:
    """A value in a file's name."""
    if isinstance(value, dict):
        return "-".join(str(v) if k == "kind" else f"{k}_{_brief(v)}" for k, v in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def carry_out(
    job: Job, models: dict[str, Path], runs: Path, processes: Processes, core: int | None
) -> tuple[Path, float]:
    """Trains and evaluates; a run that was interrupted begins anew.

    Args:
        models: the run directories of student and teachers.
        runs: where the job's run directory lies.
        core: to run on alone; None for all.

    Returns:
        The run directory, and the seconds it took.

    Raises:
        JobError: one of its processes failed, or was stopped.
    """
    run_dir = runs / job.name
    if run_dir.exists():
        shutil.rmtree(run_dir)
    start = time.monotonic()
    config = ["--config", str(CONFIGS / f"{job.method}.yaml")]
    processes.run([*config, *job.overrides(models), f"log.dir={run_dir}"], run_dir, core)
    if job.test is not None:
        test_all(run_dir, job.test, {t: models[t] for t in job.compared_with}, processes, core)
    return run_dir, time.monotonic() - start


def test_all(
    run_dir: Path, test: Frozen, teachers: dict[Teacher, Path], processes: Processes, core: int | None
) -> None:
    """Evaluates a run's last checkpoint into its `test/TEACHER`, one for each teacher that it is compared
    with, the first with the answers; into `test/alone` without any. Raises as `carry_out`."""
    options = words(test)
    start = ["eval", "--config", str(run_dir)]
    if not teachers:
        processes.run([*start, *options, "eval.agreement=false", f"out={run_dir}/test/alone"], run_dir, core)
    for name, teacher in teachers.items():
        to = [f"teacher.run={teacher}", f"out={run_dir}/test/{name}"]
        processes.run([*start, *options, *to], run_dir, core)
        # The questions are answered once.
        options = [*words(test), "eval.greedy=false", "eval.num_samples=0"]
