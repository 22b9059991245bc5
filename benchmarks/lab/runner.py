"""Carries out the lab's runs, several at a time, and keeps their records."""

import concurrent.futures
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lab.jobs import Job, carry_out, decisive, frozen, test_all, thawed
from benchmarks.lab.plan import Plan
from benchmarks.lab.processes import Processes
from benchmarks.lab.protocol import CONFIGS, TEACHERS, Models, Protocol, Teacher
from benchmarks.lab.records import Record, Records, made_with, make_model_record, make_record
from kdrl_jax.config import Config, load_config

Say = Callable[[str], None]


class Lab:
    """Its protocol, where its runs lie, and where its records are kept."""

    def __init__(self, protocol: Protocol, runs: Path, out: Path, num_jobs: int, say: Say):
        """
        Args:
            runs: a folder for run directories, which are removed when they have been read.
            out: `results/lab`.
            num_jobs: runs at a time; each has a core of its own if there are as many.
            say: is told of each run that is done.
        """
        self.protocol, self.runs, self.records = protocol, runs, Records(out)
        self.plan = Plan(protocol, self.record)
        self.models = {name: (runs / "models" / name).absolute() for name in Models.model_fields}
        self._say, self._num_jobs = say, num_jobs
        self._processes = Processes()
        self._known: dict[str, tuple[int | None, Record | None]] = {}
        self._cores: queue.Queue[int | None] = queue.Queue()
        for core in _cores(num_jobs):
            self._cores.put(core)

    def record(self, job: Job) -> Record | None:
        """What is known of a job, if it is of the settings that it has now, and of the models that there
        are."""
        return self._cached(f"runs/{job.name}", lambda name: self._read_record(name, job))

    def model_record(self, name: str) -> Record | None:
        """What is known of a model, if it is of the settings that it has now."""
        return self._cached(f"models/{name}", lambda path: self._read_model(path, name))

    def known_model(self, name: str) -> Record:
        """Raises LookupError: it has not been trained."""
        record = self.model_record(name)
        if record is None:
            raise LookupError(f"the model {name} has not been trained")
        return record

    def finals(self, teacher: Teacher) -> dict[str, list[Record]]:
        """Method -> its reported records beside a teacher, by seed. Raises LookupError: one is missing."""
        return self.known(self.plan.finals(teacher))

    def known(self, jobs: Mapping[str, Sequence[Job]]) -> dict[str, list[Record]]:
        """Raises LookupError: one has not run."""
        return {name: [self.plan.known(job) for job in each] for name, each in jobs.items()}

    def _cached(self, name: str, read: Callable[[str], Record | None]) -> Record | None:
        """A file is looked at again when it has changed."""
        path = self.records.path(name)
        when = path.stat().st_mtime_ns if path.exists() else None
        known = self._known.get(name)
        if when is None or known is None or known[0] != when:
            known = self._known[name] = (when, read(name))
        return known[1]

    def _read_record(self, path: str, job: Job) -> Record | None:
        record = self.records.read(path)
        if record is None or _of_today(record["config"]) != decisive(job.config()):
            return None
        if job.test is not None and (
            record.get("test_settings") != thawed(job.test)
            or record["to_teacher"].keys() != set(job.compared_with)
        ):
            return None
        models = {name: self.model_record(name) for name in job.models}
        known = {name: model["fingerprint"] for name, model in models.items() if model is not None}
        return record if record["models"] == known else None

    def _read_model(self, path: str, name: str) -> Record | None:
        record = self.records.read(path)
        if record is None or record["test_settings"] != self.protocol.test:
            return None
        return record if _of_today(record["config"]) == decisive(self._model_config(name)) else None

    def run(self) -> None:
        """Everything that is missing.

        Raises:
            JobError: a run failed, and with it those at work beside it.
            ValueError: a model that was trained anew is another one than that of the records.
        """
        plan = self.plan
        self._all("teachers", TEACHERS, self._train_model)
        self._all("student", ["student"], self._train_model)
        stages = {
            "trials": plan.all_trials,
            "reported runs": plan.all_finals,
            "ablations": plan.all_ablations,
        }
        for name, jobs in stages.items():
            self._all(name, [job for job in jobs() if self.record(job) is None], self._run_job)

    def _all(self, stage: str, work: Sequence[object], do: Callable[[Any, int | None], float]) -> None:
        start, done, lock = time.monotonic(), 0, threading.Lock()

        def one(item: object) -> None:
            nonlocal done
            core = self._cores.get()
            try:
                seconds = do(item, core)
            finally:
                self._cores.put(core)
            with lock:
                done += 1
                left = (time.monotonic() - start) / done * (len(work) - done) / 60
                name = item.name if isinstance(item, Job) else item
                self._say(f"{stage}: {done} of {len(work)}, {left:.0f} min left: {name} took {seconds:.0f} s")

        with concurrent.futures.ThreadPoolExecutor(self._num_jobs) as pool:
            futures = [pool.submit(one, item) for item in work]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            except BaseException:
                self._processes.stop()
                pool.shutdown(cancel_futures=True)
                raise

    def _run_job(self, job: Job, core: int | None) -> float:
        models, code = {name: self._fingerprint(name) for name in job.models}, made_with()
        run_dir, seconds = carry_out(job, self.models, self.runs, self._processes, core)
        record = make_record(job, models, run_dir, seconds)
        if _of_today(record["config"]) != decisive(job.config()) or record["made_with"] != code:
            raise ValueError(
                f"{job.name}: configs/lab or the code was changed while it ran; run the lab again"
            )
        self.records.write(f"runs/{job.name}", record)
        _remove(run_dir)
        return seconds

    def _fingerprint(self, name: str) -> str:
        record = self.model_record(name)
        if record is None:
            raise LookupError(f"the model {name} is not there, or its settings were changed meanwhile")
        return str(record["fingerprint"])

    def _model_config(self, name: str) -> Config:
        return load_config(
            CONFIGS / getattr(self.protocol.models, name), [f"seed={self.protocol.model_seed}"]
        )

    def _train_model(self, name: str, core: int | None) -> float:
        """Trains a model if it is not there; it must not become another one while runs build on it."""
        start, run_dir, before = time.monotonic(), self.models[name], self.model_record(name)
        mark = run_dir / "fingerprint.txt"
        if before is not None and mark.exists() and mark.read_text() == before["fingerprint"]:
            return 0.0
        _remove(run_dir)
        config = str(CONFIGS / getattr(self.protocol.models, name))
        options = [f"seed={self.protocol.model_seed}", f"log.dir={run_dir}"]
        self._processes.run(["--config", config, *options], run_dir, core)
        beside: tuple[Teacher, ...] = TEACHERS if name == "student" else ()
        test = frozen(self.protocol.test)
        test_all(run_dir, test, {teacher: self.models[teacher] for teacher in beside}, self._processes, core)
        record = make_model_record(run_dir, self.protocol.test, beside)
        if before is not None and before["fingerprint"] != record["fingerprint"]:
            raise ValueError(
                f"{name} was trained anew and is another model than the one that the records in "
                f"{self.records.out} build on (another machine, another version?); to run all of them again, "
                "remove that folder"
            )
        self.records.write(f"models/{name}", record)
        mark.write_text(record["fingerprint"])
        return time.monotonic() - start


def _of_today(config: dict[str, Any]) -> dict[str, Any]:
    """A record's settings, with the defaults of those that there were none of then."""
    return decisive(Config.model_validate(config))


def _remove(run_dir: Path) -> None:
    """With the output beside it."""
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.with_name(f"{run_dir.name}.txt").unlink(missing_ok=True)


def _cores(num_jobs: int) -> list[int | None]:
    """A core for each job; None where a job has all, or the system cannot tell them apart."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [*cores[:num_jobs]] if 1 < num_jobs <= len(cores) else [None] * num_jobs
