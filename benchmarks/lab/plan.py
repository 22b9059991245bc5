"""Which runs the lab consists of, and what was chosen from its trials."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from benchmarks.lab.jobs import Frozen, Job, frozen
from benchmarks.lab.protocol import TEACHERS, Protocol, Teacher
from benchmarks.lab.records import Record

LAST = 3
"""Evaluations that a trial is judged by."""

Read = Callable[[Job], Record | None]
"""The record of a job, None if it has not run yet."""


class Plan:
    """The runs. What is reported depends on what the trials have found."""

    def __init__(self, protocol: Protocol, read: Read):
        self.protocol = protocol
        self._read = read
        self._chosen: dict[tuple[str, Teacher | None], Frozen] = {}

    def known(self, job: Job) -> Record:
        """Its record. Raises LookupError: it has not run."""
        record = self._read(job)
        if record is None:
            raise LookupError(f"{job.name} has not run")
        return record

    def trials(self, method: str, teacher: Teacher) -> list[Job]:
        """A method's trials beside a teacher."""
        own, points = self._own(method, teacher), self.protocol.methods[method].points
        return [Job(method, own, self.protocol.trial_seed, frozen(point)) for point in points]

    def chosen(self, method: str, teacher: Teacher) -> Frozen:
        """The settings of the best trial; of equal ones the first.

        Raises:
            LookupError: one has not run.
        """
        key = (method, self._own(method, teacher))
        if key not in self._chosen:
            trials = self.trials(method, teacher)
            self._chosen[key] = max(trials, key=lambda job: score(self.known(job))).settings
        return self._chosen[key]

    def finals(self, teacher: Teacher) -> dict[str, list[Job]]:
        """Method -> its reported runs beside a teacher, by seed; those of a method without a teacher are the
        same beside both, as far as their seeds are. Raises as `chosen`."""
        return {method: self.finals_of(method, teacher) for method in self.protocol.methods}

    def finals_of(self, method: str, teacher: Teacher) -> list[Job]:
        """The reported runs of one method. Raises as `chosen`."""
        seeds, settings = self.protocol.seeds_of(teacher), self.chosen(method, teacher)
        return [self._tested(method, teacher, seed, settings) for seed in seeds]

    def ablation(self, name: str, teacher: Teacher) -> dict[str, list[Job]]:
        """Variant -> its runs, by seed. Raises as `chosen`."""
        part = self.protocol.ablations[name]
        chosen = dict(self.chosen(part.method, teacher))
        return {
            variant: [
                self._tested(part.method, teacher, seed, tuple(sorted((chosen | dict(frozen(more))).items())))
                for seed in self.protocol.ablation_seeds
            ]
            for variant, more in part.variants.items()
        }

    def all_trials(self) -> list[Job]:
        """Of all methods beside both teachers, each once."""
        return _once(job for m in self.protocol.methods for t in TEACHERS for job in self.trials(m, t))

    def all_finals(self) -> list[Job]:
        """Likewise, seed by seed, so that what is there so far can be compared. Raises as `chosen`."""
        jobs = (job for t in TEACHERS for each in self.finals(t).values() for job in each)
        return _once(sorted(jobs, key=lambda job: job.seed))

    def all_ablations(self) -> list[Job]:
        """Each once. Raises as `chosen`."""
        return _once(
            job
            for name, part in self.protocol.ablations.items()
            for teacher in part.teachers
            for jobs in self.ablation(name, teacher).values()
            for job in jobs
        )

    def _tested(self, method: str, teacher: Teacher, seed: int, settings: Frozen) -> Job:
        own = self._own(method, teacher)
        beside = (own,) if own else tuple(t for t in TEACHERS if seed in self.protocol.seeds_of(t))
        return Job(method, own, seed, settings, frozen(self.protocol.test), beside)

    def _own(self, method: str, teacher: Teacher) -> Teacher | None:
        return teacher if self.protocol.methods[method].has_teacher else None


def score(record: Record) -> float:
    """What a trial is judged by: the mean accuracy of samples (a share) in its last validations."""
    return running_scores(record)[-1]


def running_scores(record: Record) -> list[float]:
    """After each validation, the mean of the last ones up to it, as far as there are so many."""
    values: list[Any] = record["validation"]["sampled/accuracy"]
    return [float(np.mean(values[max(0, i - LAST + 1) : i + 1])) for i in range(len(values))]


def _once(jobs: Iterable[Job]) -> list[Job]:
    return list(dict.fromkeys(jobs))
