"""Scoring answers in worker processes, with a time limit for each answer.

    with RewardPool(["numeric", "format"], num_workers=2, time_limit_s=2.0) as pool:
        scored = pool.score(questions, completions, answers)

An answer is scored once. A worker that is late or dies is replaced; its answer scores 0 and says why in
`error`, so that failures can be counted apart from wrong answers.
"""

import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kdrl_jax.rewards.process import WorkerDiedError, WorkerProcess

if TYPE_CHECKING:
    from kdrl_jax.config import RewardConfig

MAX_TIME_LIMIT_S = 86_400.0
"""A day: beyond any answer, and short enough for every system's timers."""
_JOIN_LIMIT_S = 10.0


@dataclass(frozen=True)
class Scored:
    """The verdict on one answer."""

    scores: dict[str, float]
    """One finite score per function, by its name; 0 of one that failed, and of all if the verifier did or no
    answer came in time."""
    error: str | None
    """What failed (`timeout after 2.0 s`, `TypeError: ... (in numeric)`), or None."""
    said: str | None = None
    """The completion's final answer in one spelling, if it was asked for and there is one."""


def function_names(verifier: str, shaping: Iterable[str]) -> list[str]:
    """The functions that a run scores with, each once, the verifier first."""
    return list(dict.fromkeys([verifier, *shaping]))


def total(scored: Scored, verifier: str, shaping: Mapping[str, float]) -> float:
    """The reward: the verifier's score plus the weighted scores of the shaping functions."""
    return scored.scores[verifier] + sum(weight * scored.scores[name] for name, weight in shaping.items())


def is_correct(scored: Scored, verifier: str) -> bool:
    """Whether the verifier scored 1 or more, whatever shaping functions did."""
    return scored.scores[verifier] >= 1.0


class _Batch:
    """The answers of one `submit`, gathered in order as they are scored in any order."""

    def __init__(self, size: int) -> None:
        self.future: Future[list[Scored]] = Future()
        self.future.set_running_or_notify_cancel()  # from here on nobody can cancel it under a worker's feet
        self._results: list[Scored | None] = [None] * size
        self._missing = size
        self._lock = threading.Lock()
        if size == 0:
            self.future.set_result([])

    def put(self, index: int, scored: Scored) -> None:
        with self._lock:
            self._results[index] = scored
            self._missing -= 1
            if self._missing == 0 and not self.future.done():
                self.future.set_result([scored for scored in self._results if scored is not None])

    def abandon(self) -> None:
        with self._lock:
            if not self.future.done():
                self.future.set_exception(
                    RuntimeError("the reward pool was closed before this batch was scored")
                )


@dataclass(frozen=True)
class _Job:
    batch: _Batch
    index: int
    request: dict[str, Any]


class _Slot:
    """A worker process, replaced whenever it fails. Owned by one thread; `stop` may come from another."""

    def __init__(self, functions: Sequence[str], time_limit_s: float, pattern: str | None) -> None:
        self._functions, self._pattern = functions, pattern
        self._time_limit_s = time_limit_s
        self._lock = threading.RLock()  # re-entered if garbage collection closes the pool in here
        self._process: WorkerProcess | None = None
        self.stopped = False

    def start(self) -> WorkerProcess:
        """The worker, started if there is none. It may still be importing."""
        with self._lock:
            if self.stopped:
                raise WorkerDiedError("the reward pool is closed")
            if self._process is None:
                self._process = WorkerProcess(self._functions, self._pattern)
            return self._process

    def stop(self) -> None:
        """Ends the worker for good; whoever waits for it sees it die."""
        with self._lock:
            self.stopped = True
            if self._process is not None:
                self._process.kill()

    def discard(self) -> None:
        """Ends the worker and forgets it."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.close()

    def score(self, request: dict[str, Any]) -> Scored:
        """Scores one answer, whatever happens to the worker."""
        try:
            process = self.start()
            process.wait_ready()  # not counted: only a replaced worker is still starting here
            reply = process.ask(request, self._time_limit_s)
            return Scored(reply["scores"], reply.get("error"), reply.get("said"))
        except TimeoutError:
            return self._failed(f"timeout after {self._time_limit_s} s")
        except WorkerDiedError as error:
            return self._failed(str(error))
        except Exception as error:
            # Whatever it is, this thread must live on: a batch waits for every one of its answers.
            return self._failed(f"reward worker failed: {type(error).__name__}: {error}")

    def _failed(self, error: str) -> Scored:
        self.discard()
        with contextlib.suppress(OSError, WorkerDiedError):
            self.start()  # imports while other work goes on; trouble, if any, shows at the next answer
        return Scored(dict.fromkeys(self._functions, 0.0), error)


_Jobs = queue.SimpleQueue["_Job | None"]


def _serve(slot: _Slot, jobs: _Jobs) -> None:
    """A thread's life: score what comes until None comes."""
    while (job := jobs.get()) is not None:
        scored = slot.score(job.request)
        if slot.stopped:
            job.batch.abandon()
        else:
            job.batch.put(job.index, scored)
    slot.discard()


def _shut_down(
    owner_pid: int,
    slots: list[_Slot],
    jobs: _Jobs,
    jobs_lock: threading.Lock,
    threads: list[threading.Thread],
) -> None:
    """Ends all workers and threads. Knows nothing of the pool object, so that it can outlive it."""
    if os.getpid() != owner_pid:
        return  # a forked child must not end its parent's workers
    for slot in slots:
        slot.stop()
    with jobs_lock:  # a job queued behind the last None would never be scored nor abandoned
        for _ in threads:
            jobs.put(None)
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(_JOIN_LIMIT_S)


class RewardPool:
    """`num_workers` processes that score answers with the functions of the given names.

    Constructing it starts the processes and waits until they have imported the functions. Use it as a context
    manager, or call `close`; a pool that is forgotten, or alive when the interpreter ends, is closed as well.

    Args:
        functions: Names for `functions.resolve`, each run on every answer; repeated names run once.
        num_workers: Processes, each with a thread that feeds it; at least 1.
        time_limit_s: Seconds one answer may take over all functions, starting a process not counted.
        pattern: What the function `regex` looks for.

    Raises:
        ValueError: if a function does not resolve, in one line, or if an argument is out of range.
    """

    def __init__(
        self, functions: Sequence[str], num_workers: int, time_limit_s: float, pattern: str | None = None
    ) -> None:
        names = list(dict.fromkeys(functions))
        if isinstance(functions, str) or not names:
            raise ValueError(f"functions={functions!r}: give a list of at least one reward function's name")
        if num_workers < 1:
            raise ValueError(f"num_workers={num_workers}; use 1 or more")
        if not 0 < time_limit_s <= MAX_TIME_LIMIT_S:
            raise ValueError(f"time_limit_s={time_limit_s}; use more than 0 and at most {MAX_TIME_LIMIT_S} s")
        self._jobs: _Jobs = queue.SimpleQueue()
        self._jobs_lock = threading.Lock()
        slots = [_Slot(names, float(time_limit_s), pattern) for _ in range(num_workers)]
        try:
            workers = [slot.start() for slot in slots]  # all first, so that they import at the same time
            for worker in workers:
                worker.wait_ready()
        except BaseException:
            for slot in slots:
                slot.discard()
            raise
        threads = [
            threading.Thread(target=_serve, args=(slot, self._jobs), name=f"reward-{i}", daemon=True)
            for i, slot in enumerate(slots)
        ]
        self._close = weakref.finalize(
            self, _shut_down, os.getpid(), slots, self._jobs, self._jobs_lock, threads
        )
        for thread in threads:
            thread.start()

    @classmethod
    def of(cls, config: "RewardConfig") -> "RewardPool":
        """As the settings have it."""
        names = function_names(config.verifier, config.shaping)
        return cls(names, config.num_workers, config.time_limit_s, config.pattern)

    def submit(
        self,
        questions: Sequence[str],
        completions: Sequence[str],
        answers: Sequence[str],
        *,
        only: str | None = None,
        read_by: str | None = None,
    ) -> Future[list[Scored]]:
        """Starts scoring and returns at once; the future holds what `score` returns. It cannot be cancelled.

        Args:
            only: the one of the pool's functions that is asked; None for all.
            read_by: the one of the pool's functions whose `votes.answer_reader` also reads the completions'
                final answers, in the same time; it must have one. None: they are not read.

        Raises:
            ValueError: if the three differ in length.
            TypeError: if one of them holds something other than text.
            RuntimeError: if the pool is closed; the future raises it if the pool is closed meanwhile.
        """
        if not len(questions) == len(completions) == len(answers):
            raise ValueError(
                f"{len(questions)} questions, {len(completions)} completions and {len(answers)} answers; "
                "give one of each per row"
            )
        batch = _Batch(len(completions))
        jobs = []
        for index, texts in enumerate(zip(questions, completions, answers, strict=True)):
            request = dict(zip(("question", "completion", "answer"), texts, strict=True))
            for field, text in request.items():
                if not isinstance(text, str):
                    raise TypeError(f"{field} {index} is a {type(text).__name__}, not text")
            asked = {name: f for name, f in (("only", only), ("read_by", read_by)) if f is not None}
            jobs.append(_Job(batch, index, {"id": index, **request, **asked}))
        with self._jobs_lock:
            if not self._close.alive:
                raise RuntimeError("the reward pool is closed")
            for job in jobs:
                self._jobs.put(job)
        return batch.future

    def score(
        self,
        questions: Sequence[str],
        completions: Sequence[str],
        answers: Sequence[str],
        *,
        only: str | None = None,
        read_by: str | None = None,
    ) -> list[Scored]:
        """One `Scored` per row of question, completion and gold answer, in order. Takes what `submit` takes,
        and raises as it does."""
        return self.submit(questions, completions, answers, only=only, read_by=read_by).result()

    def close(self) -> None:
        """Ends all processes at once; batches not yet scored raise RuntimeError. May be called again."""
        self._close()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
