"""Which checkpoints of a run are evaluated, and their parameters."""

from pathlib import Path

from kdrl_jax import hosts
from kdrl_jax.checkpoint import Checkpoints, best_steps
from kdrl_jax.config import Config, EvalOptions
from kdrl_jax.paths import as_path
from kdrl_jax.record import read_accuracies
from kdrl_jax.setup import Setup
from kdrl_jax.types import Params, TrainingError


def choose_steps(config: Config, options: EvalOptions) -> list[int]:
    """Those that are asked for, the same on all hosts.

    Raises:
        ValueError: a run without such a checkpoint.
        TrainingError: hosts see different checkpoints.
    """
    run_dir = as_path(config.run_dir)
    chosen = _chosen(config, options, run_dir, _steps(run_dir))
    summary = f"{len(chosen)} checkpoints from {chosen[0]} to {chosen[-1]}, {sum(chosen)} together"
    if hosts.text_of_first(summary) != summary:
        raise TrainingError(
            f"this host sees {summary}, the first one others: the shared file system lags; start again in a "
            "moment"
        )
    return chosen


def _steps(run_dir: Path) -> list[int]:
    checkpoints = Checkpoints(run_dir)
    try:
        return checkpoints.steps
    finally:
        checkpoints.close()


def _chosen(config: Config, options: EvalOptions, run_dir: Path, there: list[int]) -> list[int]:
    place = f"{run_dir}/checkpoints"
    if not there:
        raise ValueError(f"{place} holds no complete checkpoint; train the run first")
    if options.steps == "last":
        return there[-1:]
    if options.steps == "all":
        return there
    if options.steps == "best":
        found = best_steps(there, read_accuracies(config, run_dir, there[-1]), 1)
        if not found:
            raise ValueError(
                f"steps=best: training evaluated no checkpoint in {place} with these settings (data.eval, "
                "eval.*); leave out overrides, or name a step"
            )
        return found
    if missing := [step for step in options.steps if step not in there]:
        raise ValueError(
            f"steps={missing[0]}: {place} holds no such checkpoint; there are {', '.join(map(str, there))}"
        )
    return list(options.steps)


def student_params(setup: Setup, step: int | None) -> Params:
    """The student's, at a checkpoint of its run; None is as the config starts it. Raises as
    `Checkpoints.restore_params`."""
    if step is None:
        return setup.student_params(setup.init_trainable())
    checkpoints = Checkpoints(setup.config.run_dir)
    try:
        return setup.student_params(checkpoints.restore_params(setup.abstract_state().params, step))
    finally:
        checkpoints.close()
