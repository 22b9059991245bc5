"""Carries out the lab's runs, several at a time, and keeps their records."""

import concurrent.futures
import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.lab.jobs import Job, carry_out, digest, model_digest, run_main
from benchmarks.lab.plan import Plan
from benchmarks.lab.protocol import CONFIGS, Models, Protocol
from benchmarks.lab.records import Record, Records, make_model_record, make_record

Say = Callable[[str], None]
STAGES = ("models", "first trials", "later trials", "reported runs", "ablations")


class Lab:
    """Its protocol, where its runs lie, and where its records are kept."""

    def __init__(self, protocol: Protocol, runs: Path, out: Path, num_jobs: int, say: Say):
        """
        Args:
            runs: a folder for run directories, which are removed when they have been read.
            out: `results/lab`.
            num_jobs: runs at a time; each has a core of its own, or all of them if it is alone.
            say: is told of each run that is done.
        """
        self.protocol, self.runs, self.records = protocol, runs, Records(out)
        self.plan = Plan(protocol, self.record)
        self.models = {name: (runs / "models" / name).absolute() for name in Models.model_fields}
        self._say, self._num_jobs = say, num_jobs
        self._digests: dict[Job, str] = {}
        self._cores: queue.Queue[int | None] = queue.Queue()
        for core in _cores(num_jobs):
            self._cores.put(core)

    def record(self, job: Job) -> Record | None:
        """What is known of a job with the settings it has now."""
        return self.records.read(f"runs/{job.name}", self._digest(job))

    def _digest(self, job: Job) -> str:
        if job not in self._digests:
            self._digests[job] = digest(job, self.protocol)
        return self._digests[job]

    def model_record(self, name: str) -> Record | None:
        """What is known of a model with the settings it has now."""
        return self.records.read(f"models/{name}", model_digest(name, self.protocol))

    def run(self) -> None:
        """Everything that is missing.

        Raises:
            JobError: a run failed; those at work beside it were finished.
            ValueError: models trained anew are others than those of the records.
        """
        self._all(STAGES[0], list(Models.model_fields), self._train_model)
        stages = (
            self.plan.first_trials,
            self.plan.later_trials,
            self.plan.all_finals,
            self.plan.all_ablations,
        )
        for name, jobs in zip(STAGES[1:], stages, strict=True):
            self._all(name, [job for job in jobs() if self.record(job) is None], self._run_job)

    def _all(self, stage: str, work: Sequence[object], do: Callable[..., float]) -> None:
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
                self._say(
                    f"{stage}: {done} of {len(work)}, {left:.0f} min left in this stage: "
                    f"{name} took {seconds:.0f} s"
                )

        with concurrent.futures.ThreadPoolExecutor(self._num_jobs) as pool:
            futures = [pool.submit(one, item) for item in work]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _run_job(self, job: Job, core: int | None) -> float:
        run_dir, seconds = carry_out(job, self.models, self.runs, core)
        self.records.write(f"runs/{job.name}", make_record(job, self._digest(job), run_dir, seconds))
        shutil.rmtree(run_dir)
        run_dir.with_name(f"{run_dir.name}.txt").unlink(missing_ok=True)
        return seconds

    def _train_model(self, name: str, core: int | None) -> float:
        """Trains a model if it is not there; its record must not change while runs build on it."""
        start, run_dir = time.monotonic(), self.models[name]
        of_settings = model_digest(name, self.protocol)
        mark = run_dir / "lab.json"
        if mark.exists() and json.loads(mark.read_text()) == of_settings:
            return 0.0
        if run_dir.exists():
            shutil.rmtree(run_dir)
        config = str(CONFIGS / getattr(self.protocol.models, name))
        options = [f"seed={self.protocol.model_seed}", f"log.dir={run_dir}"]
        run_main(["--config", config, *options], run_dir, core)
        test = [f"{key}={json.dumps(value)}" for key, value in self.protocol.test.items()]
        out = run_dir / "test"
        options = [*test, "eval.agreement=false", f"out={out}"]
        run_main(["eval", "--config", str(run_dir), *options], run_dir, core)
        record = make_model_record(of_settings, run_dir, out)
        before = self.model_record(name)
        if before is not None and before != record:
            raise ValueError(
                f"{name} was trained anew and is another model than the one that the records in "
                f"{self.records.out} build on (another machine, another version?); to run all of them again, "
                "remove that folder"
            )
        self.records.write(f"models/{name}", record)
        mark.write_text(json.dumps(of_settings))
        return time.monotonic() - start


def _cores(num_jobs: int) -> list[int | None]:
    """A core for each job, or none where there are too few, or one job has all."""
    if num_jobs == 1 or not hasattr(os, "sched_getaffinity"):
        return [None] * num_jobs
    cores = sorted(os.sched_getaffinity(0))
    return [*cores[:num_jobs]] if len(cores) >= num_jobs else [None] * num_jobs
