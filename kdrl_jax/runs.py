"""Run directories: whether one is done, goes on with the same settings, or needs other runs first."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdrl_jax import hosts
from kdrl_jax.config import Change, Config, ModelConfig, changes, load_config, load_run_config
from kdrl_jax.metrics import read_json, read_metrics
from kdrl_jax.paths import as_path, make_folder
from kdrl_jax.types import TrainingError

Role = str
"""A model's place in a config: `student`, `teacher` or `teachers.NAME`, `reference`."""


def roles(config: Config) -> dict[Role, ModelConfig]:
    """The models of a config, the student first."""
    found: dict[Role, ModelConfig] = {"student": config.student} | config.all_teachers
    return found if config.reference is None else found | {"reference": config.reference}


def model_of(config: Config, role: Role) -> ModelConfig:
    """The model in a role, which the config must have."""
    return roles(config)[role]


def _directory(config: Config, role: Role) -> Path:
    """Where the run that a role's model comes from lives, if it is trained for this run."""
    return as_path(config.run_dir).joinpath(*role.split("."))


def is_complete(config: Config) -> bool:
    """Whether the run has been trained to its last step and evaluated."""
    done = as_path(config.run_dir) / "done.json"
    return done.exists() and read_json(done)["step"] >= config.train.num_steps


def has_begun(config: Config) -> bool:
    """Whether the run has left anything that it goes on from."""
    folder = as_path(config.run_dir)
    if not (folder / "config.yaml").exists():
        return False
    saved = folder / "checkpoints"
    return bool(read_metrics(config.run_dir)) or (saved.is_dir() and any(saved.iterdir()))


def prerequisites(config: Config) -> dict[Role, Config]:
    """The runs that must be trained first, by the role of the model that comes from each. They take this
    run's seed and mesh, which is the machine's, and live inside its directory, in `<run>/student`,
    `<run>/teacher`, `<run>/teachers/NAME` or `<run>/reference`."""
    found = {}
    for role, model in roles(config).items():
        if model.run is None or as_path(model.run).is_dir():
            continue
        directory = _directory(config, role)
        # Without the file it came from, a run that was started goes on as it was.
        source = model.run if as_path(model.run).exists() else directory / "config.yaml"
        if not as_path(source).is_file():
            raise FileNotFoundError(f"{role}.run={model.run}: no such config file or run directory")
        fixed = {"seed": config.seed, "mesh": config.mesh.model_dump(), "log": {"dir": str(directory)}}
        found[role] = load_config(source, fixed=fixed)
    return found


def run_of(config: Config, role: Role) -> Path | None:
    """The run directory that a model with `run` comes from: the one named, or inside this run."""
    model = roles(config).get(role)
    if model is None or model.run is None:
        return None
    named = as_path(model.run)
    return named if named.is_dir() else _directory(config, role)


def check_changes(
    config: Config,
    before: dict[str, Any],
    accept: bool,
    accepted: Sequence[Change] = (),
) -> list[Change]:
    """What a run goes on with that it did not have before.

    Args:
        before: the settings it had, dumped.
        accept: whether all of them may have changed.
        accepted: those that may.

    Raises:
        ValueError: some give its updates another meaning.
    """
    found = changes(before, config.model_dump(mode="json"))
    if refused := [x for x in found if not (accept or x.is_free or x in accepted)]:
        raise ValueError(
            f"{_other_settings(config, refused)}; undo that, choose another log.dir, or go on with these by "
            "--accept-changes"
        )
    return found


def check_same_run(config: Config, accept: bool = False) -> None:
    """`check_changes` from what the run directory says, if the run has begun: before, nothing depends on it.
    Raises as that."""
    if has_begun(config):
        check_changes(config, load_run_config(config.run_dir).model_dump(mode="json"), accept)


def check_settled(config: Config, role: Role, inner: Config) -> None:
    """That a run which will not be trained again is the one that a role's model is to come from.

    Args:
        inner: as `prerequisites` has it.

    Raises:
        ValueError: it was trained with other settings.
    """
    if not has_begun(inner):
        return
    found = changes(load_run_config(inner.run_dir).model_dump(mode="json"), inner.model_dump(mode="json"))
    if refused := [x for x in found if not x.is_free or x.key == "train.num_steps"]:
        raise ValueError(
            f"{role}.run={model_of(config, role).run}: {_other_settings(inner, refused)}, and is not "
            f"trained again; undo that, give {role}.run={inner.run_dir} to take it as it is, or choose "
            "another log.dir"
        )


def _other_settings(config: Config, changed: Sequence[Change]) -> str:
    more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
    return f"{config.run_dir} was trained with other settings ({'; '.join(map(str, changed[:5]))}{more})"


def check_shared(run_dir: Path) -> None:
    """Makes the directory of a run, which all hosts of a job must see: each writes its part of a checkpoint.

    Raises:
        ValueError: some do not see what the first one has written.
    """
    if hosts.is_first():
        make_folder(run_dir)
    if hosts.num_processes() == 1:
        return
    mark = run_dir / ".shared"
    if hosts.is_first():
        mark.write_text("")
    hosts.wait_for_all("shared run directory: written")
    blind, num = int(hosts.total(np.array(not mark.exists()))), hosts.num_processes()
    if hosts.is_first():
        mark.unlink(missing_ok=True)
    if blind:
        raise ValueError(
            f"log.dir={run_dir} is not one folder to all hosts ({blind} of {num} do not see it); give a "
            "bucket (gs://BUCKET/RUN) or a shared file system"
        )


def check_same_step(step: int | None) -> None:
    """All hosts go on from one checkpoint.

    Raises:
        TrainingError: they see different newest ones.
    """
    number = 0 if step is None else step + 1
    others = int(hosts.total(np.array(number)))
    if others != number * hosts.num_processes():
        raise TrainingError(
            f"this host sees {step} as the newest checkpoint, others another: the shared file system lags; "
            "start again in a moment"
        )
