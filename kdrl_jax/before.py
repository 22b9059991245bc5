"""What can be known of a run, and of those that are trained first for it, before anything is loaded."""

from kdrl_jax import hosts
from kdrl_jax.config import Config, save_config
from kdrl_jax.paths import as_path, make_folder
from kdrl_jax.rewards.pool import RewardPool
from kdrl_jax.runs import check_same_run, check_settled, has_begun, is_complete, model_of, prerequisites
from kdrl_jax.setup import check_mesh
from kdrl_jax.writers import check_writers


def trained_first(config: Config, accept_changes: bool) -> list[Config]:
    """The runs that a run's models come from. If some are still to be trained, the config of a run that has
    not begun is written, so that its directory can be resumed from now on.

    Raises:
        ValueError, FileNotFoundError: a mistake in the config of the run, or of one of those.
    """
    needed = prerequisites(config)
    missing = {role: inner for role, inner in needed.items() if not is_complete(inner)}
    for role, inner in missing.items():
        try:
            _check(inner)
        except ValueError as error:
            run = model_of(config, role).run
            raise ValueError(f"{role}.run={run}, which is trained first: {error}") from error
    _check(config)
    begun = has_begun(config)
    for role, inner in needed.items():
        # What a run has begun to learn from stays as it is.
        if begun or role not in missing:
            check_settled(config, role, inner)
        else:
            check_same_run(inner, accept_changes)
    if missing and hosts.is_first():
        # Training itself would find out, but only after the others.
        RewardPool.of(config.reward).close()
        if not begun:
            make_folder(as_path(config.run_dir))
            save_config(config, config.run_dir)
    return list(needed.values())


def _check(config: Config) -> None:
    check_mesh(config)
    if hosts.is_first():
        check_writers(config)
