"""The writers that a config asks for."""

import importlib.util
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kdrl_jax.config import Config
from kdrl_jax.types import Metrics
from kdrl_jax.writers.background import Background, Entry, wait_for_all
from kdrl_jax.writers.base import About, Status, Writer
from kdrl_jax.writers.history import entries, settle
from kdrl_jax.writers.mlflow import MlflowWriter
from kdrl_jax.writers.tensorboard import TensorBoardWriter
from kdrl_jax.writers.trackio import TrackioWriter
from kdrl_jax.writers.wandb import WandbWriter, check_login

_WRITERS: dict[str, Callable[[], Writer]] = {
    "tensorboard": TensorBoardWriter,
    "wandb": WandbWriter,
    "trackio": TrackioWriter,
    "mlflow": MlflowWriter,
}
# The modules that each needs, which an extra of its name installs.
_NEEDS = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
}
CLOSE_WITHIN_S = 10.0
"""Seconds that all writers together may take at the end; a run that is being taken away has 30."""


def check_writers(config: Config) -> None:
    """That everything is there which the writers need, before anything is trained.

    Raises:
        ImportError: a library is not installed.
        ValueError: W&B does not know who is writing.
    """
    for name in config.log.writers:
        if missing := [module for module in _NEEDS[name] if importlib.util.find_spec(module) is None]:
            raise ImportError(
                f"log.writers names {name}, but {', '.join(missing)} is not installed: pip install "
                f"'kdrl_jax[{name}]', or leave it out of log.writers"
            )
    if "wandb" in config.log.writers:
        check_login()


class RunWriters:
    """All writers of a run; without any it does nothing."""

    def __init__(self, config: Config, run_dir: Path):
        """Settles what a killed session has left, before this one writes to the run directory."""
        self._config, self._run_dir = config, run_dir
        settle(run_dir)
        self._writers: list[Background] = []
        self._notes: deque[str] = deque()

    def open(self, before: Sequence[Metrics], first_step: int, last_eval: int) -> None:
        """Starts them.

        Args:
            before: the metrics of the steps before.
            first_step: the step that comes next.
            last_eval: the step of the last evaluation; -1 for none.
        """
        c = self._config
        about = About(
            name=c.name,
            project=c.log.project,
            group=c.log.group,
            config=c.model_dump(mode="json"),
            run_dir=self._run_dir,
            first_step=first_step,
            id=None,
        )
        backlog = entries(self._run_dir, before, first_step, last_eval) if c.log.writers else []
        for name in c.log.writers:
            writer, say = _WRITERS[name](), self._notes.append
            self._writers.append(Background(name, writer, about, backlog=backlog, say=say))

    def put(self, kind: str, step: int, load: Callable[[], Any]) -> None:
        """Hands an entry to all of them, at once; see `Entry`."""
        for writer in self._writers:
            writer.put(Entry(kind, step, load))

    def notes(self) -> list[str]:
        """Lines for the user that have come since this was last asked."""
        return [self._notes.popleft() for _ in range(len(self._notes))]

    def close(self, status: Status) -> None:
        """Waits a little for what they have not written yet."""
        wait_for_all(self._writers, status, CLOSE_WITHIN_S)
        self._writers.clear()
