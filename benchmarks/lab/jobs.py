"""One run of the lab: which it is, and how it is carried out in processes of its own."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lab.protocol import CONFIGS, Models, Protocol, Settings
from kdrl_jax.config import Config, load_config


class JobError(Exception):
    """A run has failed; one line that says where to look."""


Frozen = tuple[tuple[str, str], ...]
"""Settings that can be hashed: dotted keys with their values in JSON, in the order of the keys."""


def frozen(settings: Settings) -> Frozen:
    """See `Frozen`."""
    return tuple((key, json.dumps(settings[key])) for key in sorted(settings))


@dataclasses.dataclass(frozen=True)
class Job:
    """A method's run with one teacher, seed and choice of settings."""

    method: str
    """A config of configs/lab."""
    teacher: str | None
    """`strong` or `imperfect`; None for a method without one."""
    seed: int
    settings: Frozen
    """What was chosen."""
    test: Frozen | None = None
    """Settings of the evaluation after the last update; None for none."""
    compared_with: tuple[str, ...] = ()
    """The teachers that this evaluation compares the student with."""

    @property
    def name(self) -> str:
        """A path that says all of it."""
        chosen = (
            ",".join(f"{_short(key)}={_words(json.loads(value))}" for key, value in self.settings)
            or "as it is"
        )
        return f"{self.teacher or 'no_teacher'}/{self.method}/{chosen}/seed_{self.seed}"

    def overrides(self, models: dict[str, Path]) -> list[str]:
        """Of the method's config.

        Args:
            models: the run directories of student and teachers.
        """
        found = [f"{key}={value}" for key, value in self.settings]
        found += [f"seed={self.seed}", f"student.run={models['student']}"]
        return found if self.teacher is None else [*found, f"teacher.run={models[self.teacher]}"]


def digest(job: Job, protocol: Protocol) -> str:
    """Of everything that decides what a run finds, with the configs of the models it starts from."""
    nowhere = {name: Path(name) for name in Models.model_fields}
    config = load_config(CONFIGS / f"{job.method}.yaml", job.overrides(nowhere))
    used = {"student", *job.compared_with} | ({job.teacher} if job.teacher else set())
    models = {name: model_digest(name, protocol) for name in sorted(used)}
    return _digest([_decisive(config), job.test, models])


def model_digest(name: str, protocol: Protocol) -> str:
    """Of everything that decides what a model has learned, and how it is tested."""
    file = CONFIGS / getattr(protocol.models, name)
    return _digest([_decisive(load_config(file, [f"seed={protocol.model_seed}"])), protocol.test])


def _decisive(config: Config) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    for section in ("log", "cache_dir", "alarms", "plan", "checkpoint", "name"):
        del tree[section]
    return tree


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _short(key: str) -> str:
    parts = key.split(".")
    return {"optimizer": "rate", "data": parts[-1]}.get(parts[0], ".".join(parts))


def _words(value: Any) -> str:
    """A value in a file's name."""
    if isinstance(value, dict):
        return "-".join(f"{k}:{_words(v)}" if k != "kind" else str(v) for k, v in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def carry_out(job: Job, models: dict[str, Path], runs: Path, core: int | None) -> tuple[Path, float]:
    """Trains and evaluates; a run that was interrupted begins anew.

    Args:
        models: the run directories of student and teachers.
        runs: where the job's run directory lies.
        core: to run on alone; None for all.

    Returns:
        The run directory, and the seconds it took.

    Raises:
        JobError: one of its processes failed.
    """
    run_dir = runs / job.name
    if run_dir.exists():
        shutil.rmtree(run_dir)
    start = time.monotonic()
    config = ["--config", str(CONFIGS / f"{job.method}.yaml")]
    run_main([*config, *job.overrides(models), f"log.dir={run_dir}"], run_dir, core)
    if job.test is not None:
        test = [f"{key}={value}" for key, value in job.test]
        for teacher in job.compared_with:
            options = [*test, f"teacher.run={models[teacher]}", f"out={run_dir / 'test' / teacher}"]
            run_main(["eval", "--config", str(run_dir), *options], run_dir, core)
            # The questions are answered once; a second teacher is only compared with.
            test = [*test, "eval.greedy=false", "eval.num_samples=0"]
    return run_dir, time.monotonic() - start


def run_main(words: Sequence[str], log: Path, core: int | None) -> None:
    """`python -m kdrl_jax.main`, with its output in `log`.txt.

    Raises:
        JobError: it failed.
    """
    path = log.with_name(f"{log.name}.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    if core is not None and hasattr(os, "sched_setaffinity"):
        # Of this thread, and so of what it starts: two runs that share their cores slow each other down.
        os.sched_setaffinity(0, {core})
    command = [sys.executable, "-m", "kdrl_jax.main", *words]
    with path.open("a") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            status = process.wait()
        except BaseException:
            with contextlib.suppress(OSError):
                process.terminate()
            process.wait()
            raise
    if status:
        lines = path.read_text(errors="replace").strip().splitlines()
        raise JobError(f"{log}: ended with status {status}: {lines[-1] if lines else 'no word'} (see {path})")
