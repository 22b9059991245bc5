"""Which runs the lab consists of, and what was chosen from its trials."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.lab.jobs import Frozen, Job, frozen
from benchmarks.lab.protocol import TEACHERS, Protocol
from benchmarks.lab.records import Record

LAST = 3
"""Evaluations that a trial is judged by."""

Read = Callable[[Job], Record | None]
"""The record of a job, None if it has not run yet."""


class Plan:
    """The runs, stage by stage: those of a later one depend on what earlier ones have found."""

    def __init__(self, protocol: Protocol, read: Read):
        self.protocol = protocol
        self._read = read

    def first_trials(self) -> list[Job]:
        """Of methods whose grids are all."""
        return self._trials(first=True)

    def later_trials(self) -> list[Job]:
        """Of those that build on others'. Raises LookupError: the first trials are not whole."""
        return self._trials(first=False)

    def _trials(self, first: bool) -> list[Job]:
        return [
            job
            for name, method in self.protocol.methods.items()
            if (method.at_best_of is None) == first
            for teacher in self._teachers(name)
            for job in self.trials(name, teacher)
        ]

    def trials(self, method: str, teacher: str | None) -> list[Job]:
        """A method's trials with a teacher; None for one without.

        Raises:
            LookupError: those that they build on are not whole.
        """
        part, seed = self.protocol.methods[method], self.protocol.trial_seed
        base = {} if part.at_best_of is None else dict(self.chosen(part.at_best_of, teacher))
        return [Job(method, teacher, seed, _merged(base, frozen(point))) for point in part.grid]

    def ranked(self, method: str, teacher: str | None) -> list[Job]:
        """A method's trials, the best first; of equal ones the earlier.

        Raises:
            LookupError: one has not run.
        """
        own = self._own(method, teacher)
        return sorted(self.trials(method, own), key=lambda job: -score(self._known(job)))

    def chosen(self, method: str, teacher: str | None) -> Frozen:
        """The settings of the best trial."""
        return self.ranked(method, teacher)[0].settings

    def finals(self, teacher: str) -> dict[str, list[Job]]:
        """Method -> its reported runs beside a teacher, by seed; those of a method without a teacher are the
        same beside both, as far as their seeds are."""
        return {
            method: [
                self._tested(method, teacher, seed, self.chosen(method, teacher))
                for seed in self.protocol.seeds_of(teacher)
            ]
            for method in self.protocol.methods
        }

    def ablation(self, name: str, teacher: str) -> dict[str, list[Job]]:
        """Variant -> its runs, by seed."""
        part = self.protocol.ablations[name]
        chosen = dict(self.chosen(part.method, teacher))
        return {
            variant: [
                self._tested(part.method, teacher, seed, _merged(chosen, frozen(more)))
                for seed in self.protocol.ablation_seeds
            ]
            for variant, more in part.variants.items()
        }

    def all_finals(self) -> list[Job]:
        """Of all methods beside both teachers, each once."""
        return _once(job for t in TEACHERS for jobs in self.finals(t).values() for job in jobs)

    def all_ablations(self) -> list[Job]:
        """Each once."""
        return _once(
            job
            for name, part in self.protocol.ablations.items()
            for teacher in part.teachers
            for jobs in self.ablation(name, teacher).values()
            for job in jobs
        )

    def _tested(self, method: str, teacher: str, seed: int, settings: Frozen) -> Job:
        own = self._own(method, teacher)
        beside = (own,) if own else tuple(t for t in TEACHERS if seed in self.protocol.seeds_of(t))
        return Job(method, own, seed, settings, frozen(self.protocol.test), beside)

    def _own(self, method: str, teacher: str | None) -> str | None:
        return teacher if self.protocol.methods[method].has_teacher else None

    def _teachers(self, method: str) -> Sequence[str | None]:
        return TEACHERS if self.protocol.methods[method].has_teacher else (None,)

    def _known(self, job: Job) -> Record:
        record = self._read(job)
        if record is None:
            raise LookupError(f"{job.name} has not run")
        return record


def score(record: Record) -> float:
    """What a trial is judged by: the mean accuracy of samples in its last evaluations."""
    values: list[Any] = record["validation"]["sampled/accuracy"][-LAST:]
    return float(np.mean(values))


def _merged(base: dict[str, str], more: Frozen) -> Frozen:
    return tuple(sorted((base | dict(more)).items()))


def _once(jobs: Iterator[Job]) -> list[Job]:
    return list(dict.fromkeys(jobs))
