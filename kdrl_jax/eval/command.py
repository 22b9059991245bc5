"""The `eval` command: accuracy (and agreement with the teacher) of a run's checkpoints, side by side, or of
the student as a config starts it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console

from kdrl_jax import hosts
from kdrl_jax.checkpoint import MisfitError
from kdrl_jax.config import Config, EvalConfig, EvalOptions
from kdrl_jax.config.evaluation import model_digest
from kdrl_jax.eval.checkpoints import choose_steps, student_params
from kdrl_jax.eval.progress import EvalProgress
from kdrl_jax.eval.results_file import ResultsFile
from kdrl_jax.eval.table import results_lines
from kdrl_jax.evaluate import Evaluation, Evaluator, Results
from kdrl_jax.held_out import make_evaluator
from kdrl_jax.paths import as_path
from kdrl_jax.record import read_teacher
from kdrl_jax.rewards.pool import RewardPool
from kdrl_jax.rollout.engine import Stopped
from kdrl_jax.setup import Setup, make_setup
from kdrl_jax.statistics import difference_interval
from kdrl_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Column:
    """What was found of one model."""

    title: str
    name: str
    """In the file of results."""
    results: Results
    """With `step`, of a student."""
    found: Evaluation
    is_student: bool


def evaluate(
    config: Config, options: EvalOptions, console: Console, should_stop: Callable[[], bool], *, is_run: bool
) -> bool:
    """Prints a table of results. Writes those of each model as soon as they are there, to a file named by the
    settings, and answers to read in `samples/`.

    Returns:
        False if it was asked to stop before all was done.

    Raises:
        ValueError: no held-out questions, or a run without such a checkpoint.
        OSError: the folder of results cannot be written; before anything is loaded.
        TrainingError: hosts see different checkpoints.
    """
    if not config.data.eval:
        raise ValueError("data.eval names no source; add held-out questions to evaluate on")
    if not is_run and options.steps != "last":
        raise ValueError("steps= names checkpoints of a run; give the run's directory")
    if options.with_teacher and not config.all_teachers:
        raise ValueError("with_teacher=true evaluates the teacher, and the config has none; leave it out")
    folder = as_path(options.out) if options.out else as_path(config.run_dir) / "eval" if is_run else None
    file = None if folder is None else ResultsFile(folder, config, is_run=is_run)
    steps: Sequence[int | None] = choose_steps(config, options) if is_run else [None]
    should_stop = hosts.agreed(should_stop)
    columns: list[Column] = []
    is_stopped = False
    with contextlib.ExitStack() as stack:
        with console.status("loading the models"):
            needs_teacher = options.with_teacher or config.eval.agreement
            setup = make_setup(config, needed=list(config.all_teachers) if needs_teacher else [])
            pool = stack.enter_context(RewardPool.of(config.reward))
            evaluator = make_evaluator(setup, pool)
        for line in (*setup.notes, *evaluator.notes):
            _say(console, line)
        total = _num_answers(config, options, len(steps)) * len(evaluator.prompts.questions)
        with EvalProgress(console, total) as progress:
            try:
                for column in _columns(setup, options, steps, evaluator, progress, should_stop):
                    columns.append(column)
                    if file is not None:
                        file.add(column.name, column.results, column.found.samples, _changes(columns))
            except Stopped:
                is_stopped = True
            except Exception:
                if columns and file is not None:
                    progress.note(f"results of what was done before: {file.path}")
                raise
    known: dict[str, Results] = {}
    if is_run and not options.with_teacher:
        run_dir = as_path(config.run_dir)
        found = {f"{role}, in training": read_teacher(config, run_dir, role) for role in config.all_teachers}
        known = {title: results for title, results in found.items() if results is not None}
    if columns:
        shown = known | {column.title: column.results for column in columns}
        for line in results_lines(shown, _changes(columns), console.width if console.is_terminal else None):
            _say(console, line)
        if file is not None:
            _say(console, f"results: {file.path}")
    if is_stopped:
        done = ", ".join(column.title for column in columns)
        _say(console, f"stopped; done before that: {done}" if done else "stopped; nothing was written")
    return not is_stopped


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _num_answers(config: Config, options: EvalOptions, num_students: int) -> int:
    """To each question, as `EvalProgress` counts them."""
    e, num_teachers = config.eval, len(config.all_teachers) if options.with_teacher else 0
    # Those that the teacher is compared on are among its own, if these are asked for.
    compared_on = e.agreement and not (num_teachers and e.greedy)
    return num_students * _of_student(e) + num_teachers * (e.greedy + e.num_samples) + compared_on


def _of_student(e: EvalConfig) -> int:
    return e.greedy + e.num_samples + e.agreement


def _columns(
    setup: Setup,
    options: EvalOptions,
    steps: Sequence[int | None],
    evaluator: Evaluator,
    progress: EvalProgress,
    should_stop: Callable[[], bool],
) -> Iterator[Column]:
    """Evaluates one model after another.

    Raises:
        Stopped: asked to.
        ValueError: no checkpoint could be read; of several, one that cannot is noted and left out.
    """
    config = setup.config

    def measure(who: str, model: Any, params: Params) -> Evaluation:
        progress.begin(who)
        return evaluator.accuracy(model, params, on_step=progress.at, should_stop=should_stop)

    for role, teacher in setup.teachers.items() if options.with_teacher else ():
        found = measure(role, teacher.model, teacher.on_device())
        results = {"settings": model_digest(config, role)} | found.results
        yield Column(role, role, results, found, is_student=False)
    num_left_out = 0
    for step in steps:
        if should_stop():
            raise Stopped
        progress.stage("loading the student" if step is None else f"reading checkpoint {step}")
        try:
            params = student_params(setup, step)
        except MisfitError:  # so would the others
            raise
        except ValueError as error:
            num_left_out += 1
            # Other hosts may have read their parts of it well, and wait for this one.
            if num_left_out == len(steps) or hosts.num_processes() > 1:
                raise
            progress.note(f"step {step} is left out: {error}")
            progress.left_out(_of_student(config.eval) * len(evaluator.prompts.questions))
            continue
        title = "student" if step is None else f"step {step}"
        found = measure(title, setup.student, params)
        of_student: Results = {"step": step, "settings": model_digest(config, "student")} | found.results
        if config.eval.agreement:
            of_student |= evaluator.agreement(params, on_step=progress.at, should_stop=should_stop)
        del params  # before the next ones come
        name = "student" if step is None else f"step_{step:06d}"
        yield Column(title, name, of_student, found, is_student=True)


def _changes(columns: list[Column]) -> dict[str, Any]:
    """From the first student to the last, if there are several: differences of accuracies on the same
    questions."""
    students = [column for column in columns if column.is_student]
    if len(students) < 2:
        return {}
    first, last = students[0], students[-1]
    out: dict[str, Any] = {"from_step": first.results["step"], "to_step": last.results["step"]}
    for key, theirs_P in first.found.accuracy_P.items():
        ours_P = last.found.accuracy_P[key]
        out[key] = float(ours_P.mean() - theirs_P.mean())
        out[f"{key}_ci"] = list(difference_interval(ours_P, theirs_P))
    return out
