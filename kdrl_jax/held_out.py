"""Evaluations of a run: when they are due, of whom, and that they are written down."""

from collections.abc import Callable, Sequence
from typing import Any

from kdrl_jax.evaluate import Evaluation, Evaluator, OnStep, Results
from kdrl_jax.progress import Reporter
from kdrl_jax.record import Record
from kdrl_jax.rewards.pool import RewardPool
from kdrl_jax.setup import Setup
from kdrl_jax.types import Params


def make_evaluator(setup: Setup, pool: RewardPool) -> Evaluator:
    """Of a run's student and teacher; reads the held-out prompts."""
    return Evaluator(
        setup.config,
        tokenizer=setup.tokenizer,
        mesh=setup.mesh,
        head=setup.head,
        student=setup.student,
        teacher=setup.teacher,
        make_engine=setup.engine,
        pool=pool,
    )


class HeldOut:
    """Of the student before the first step, every so often and after the last; of its teachers once."""

    def __init__(self, setup: Setup, pool: RewardPool, should_stop: Callable[[], bool]):
        """Reads the held-out prompts, if the config names some."""
        c = setup.config
        self._setup, self._config, self._should_stop = setup, c, should_stop
        self.last_step = -1
        """The student's last evaluation; -1 for none."""
        self._evaluator = make_evaluator(setup, pool) if c.data.eval else None

    @property
    def notes(self) -> list[str]:
        """Lines on what was left out."""
        return [] if self._evaluator is None else self._evaluator.notes

    def is_due(self, step: int) -> bool:
        """Before a step; once per step."""
        c = self._config
        every, last = c.eval.every, step >= c.train.num_steps
        due = step == 0 or last or (every and crossed(step - c.train.updates_per_iteration, step, every))
        return self._evaluator is not None and bool(due) and self.last_step != step

    def evaluate_if_due(self, step: int, params: Params, record: Record, reporter: Reporter) -> None:
        """Raises Stopped: when asked to stop meanwhile; nothing is written then."""
        if not self.is_due(step):
            return
        assert self._evaluator is not None
        s = self._setup
        for role, teacher in s.teachers.items():
            if not record.has_teacher(role):
                found = self._accuracy(role, teacher.model, teacher.on_device(), reporter)
                record.teacher(role, found.results, found.samples)
        found = self._accuracy("student", s.student, params, reporter)
        results = found.results
        if self._config.eval.agreement:
            reporter.stage("comparing with the teacher")
            on_step = self._on_step("student", reporter)
            results |= self._evaluator.agreement(params, on_step=on_step, should_stop=self._should_stop)
        record.evaluation(step, results, found.samples)
        self.last_step = step
        reporter.note(f"step {step} evaluated: {summary_line(results)}")
        reporter.evaluated(step, results)

    def _accuracy(self, who: str, model: Any, params: Params, reporter: Reporter) -> Evaluation:
        assert self._evaluator is not None
        reporter.stage(f"evaluating {who}")
        return self._evaluator.accuracy(
            model,
            params,
            on_step=self._on_step(who, reporter),
            should_stop=self._should_stop,
        )

    def _on_step(self, who: str, reporter: Reporter) -> OnStep:
        return lambda what, n, of: reporter.stage(f"evaluating {who}, {what}", n, of)


def summary_line(results: Results) -> str:
    """The headline numbers of an evaluation; in brackets the 95 % interval, in percent."""
    parts = [
        f"{k.split('/')[0]} {v:.1%} ({_percent(results[f'{k}_ci'])})"
        for k, v in results.items()
        if k.endswith("/accuracy")
    ]
    if "teacher_reverse_kl" in results:
        parts.append(f"KL to the teacher {results['teacher_reverse_kl']:.3f}")
        parts.append(f"same top token {results['teacher_top_agreement']:.1%}")
    return ", ".join(parts)


def _percent(interval: Sequence[float]) -> str:
    return "–".join(f"{100 * end:.1f}" for end in interval)


def crossed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return after // every > before // every
