"""The `eval` command: accuracy (and agreement with the teacher) of a run's newest checkpoint, or of the
student as a config starts it."""

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from kdrl_jax import hosts
from kdrl_jax.checkpoint import Checkpoints
from kdrl_jax.config import Config
from kdrl_jax.evaluate import Evaluator, Results
from kdrl_jax.metrics import write_json
from kdrl_jax.paths import as_path
from kdrl_jax.rewards.pool import RewardPool
from kdrl_jax.rollout.engine import Stopped
from kdrl_jax.setup import Setup, make_setup
from kdrl_jax.types import Params


def evaluate(config: Config, console: Console, should_stop: Callable[[], bool], *, is_run: bool) -> bool:
    """Prints a table of results, and writes `eval/eval.json` into the directory of a run.

    Returns:
        False if it was asked to stop before it was done.

    Raises:
        ValueError: no held-out questions, or a run without a checkpoint.
    """
    if not config.data.eval:
        raise ValueError("data.eval names no source; add held-out questions to evaluate on")
    should_stop = hosts.agreed(should_stop)
    setup = make_setup(config)
    for line in setup.notes:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    params, step = _params(setup, config.run_dir if is_run else None)
    c = config
    with (
        RewardPool(
            [c.reward.verifier, *c.reward.shaping], c.reward.num_workers, c.reward.time_limit_s
        ) as pool,
        console.status("evaluating") as status,
    ):
        evaluator = Evaluator(
            config,
            tokenizer=setup.tokenizer,
            mesh=setup.mesh,
            head=setup.head,
            student=setup.student,
            teacher=setup.teacher,
            make_engine=setup.engine,
            pool=pool,
        )
        for source, count in evaluator.dropped.items():
            if count:
                console.print(f"{source}: {count} held-out prompts too long, left out", highlight=False)
        try:
            results = evaluator.accuracy(
                setup.student,
                params,
                on_step=lambda what, n, of: status.update(f"evaluating, {what}: {n} of {of}"),
                should_stop=should_stop,
            )
            if config.eval.agreement:
                status.update("comparing with the teacher")
                results |= evaluator.agreement(params, should_stop=should_stop)
        except Stopped:
            console.print("stopped; nothing was written")
            return False
    console.print(_table(results, step))
    if is_run and hosts.is_first():
        write_json(as_path(config.run_dir) / "eval" / "eval.json", {"step": step} | results)
    return True


def _params(setup: Setup, run_dir: str | None) -> tuple[Params, int | None]:
    if run_dir is None:
        return setup.student_params(setup.init_trainable()), None
    checkpoints = Checkpoints(run_dir)
    try:
        trained = checkpoints.restore_params(setup.abstract_state().params)
        return setup.student_params(trained), checkpoints.latest_step
    finally:
        checkpoints.close()


def _table(results: Results, step: int | None) -> Table:
    table = Table(title="student as configured" if step is None else f"student at step {step}")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in results.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    return table
