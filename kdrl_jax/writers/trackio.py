"""trackio: a local database (`trackio show`), by its own settings: TRACKIO_DIR, TRACKIO_SPACE_ID."""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from kdrl_jax.writers.base import ROLLOUT_COLUMNS, About, Status, rollout_cells


class TrackioWriter:
    """One trackio run for all sessions of a run."""

    # What it has of a step is only added to.
    rewrites = False

    def open(self, about: About) -> str:
        import trackio

        self._trackio = trackio
        # trackio finds a run by its name, which others of the project may have too.
        name = about.id or f"{about.name}-{uuid.uuid4().hex[:6]}"
        self._run = trackio.init(
            about.project, name=name, group=about.group, config=about.config, resume="allow", embed=False
        )
        return name

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        cells = [dict(zip(ROLLOUT_COLUMNS, row, strict=True)) for row in rollout_cells(rows)]
        self._run.log({"rollouts": self._trackio.Table(data=cells)}, step=step)

    def alarm(self, step: int, name: str, says: str) -> None:
        self._run.alert(title=f"alarm {name}", text=says, step=step)

    def close(self, status: Status) -> None:
        self._run.finish()
