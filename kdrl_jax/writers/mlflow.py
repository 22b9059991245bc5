"""MLflow, by its own setting MLFLOW_TRACKING_URI; without it, in a database of the working directory
(`mlflow ui`)."""

import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from kdrl_jax.writers.base import ROLLOUT_COLUMNS, About, Status, rollout_cells

_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MlflowWriter:
    """One MLflow run for all sessions of a run."""

    # Numbers there are only added to.
    rewrites = False

    def open(self, about: About) -> str:
        # It tells each change that it makes to its tables.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        from mlflow import MlflowClient

        self._client = client = MlflowClient()
        if about.id is not None:
            client.update_run(about.id, status="RUNNING")
            self._id = about.id
        else:
            experiment = client.get_experiment_by_name(about.project)
            number = (
                client.create_experiment(about.project) if experiment is None else experiment.experiment_id
            )
            tags = {} if about.group is None else {"group": about.group}
            self._id = str(client.create_run(number, run_name=about.name, tags=tags).info.run_id)
        # Not as parameters, which may not change when a run goes on.
        client.log_dict(self._id, about.config, "config.yaml")
        return self._id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [Metric(_name(name), value, now, step) for name, value in values.items()]
        for start in range(0, len(metrics), 1000):  # it takes no more at once
            self._client.log_batch(self._id, metrics=metrics[start : start + 1000])

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        table = {"columns": list(ROLLOUT_COLUMNS), "data": rollout_cells(rows)}
        text = json.dumps(table, ensure_ascii=False)
        self._client.log_text(self._id, text, f"rollouts/step_{step:06d}.json")

    def alarm(self, step: int, name: str, says: str) -> None:
        self._client.set_tag(self._id, f"alarm/{name}", f"step {step}: {says}")

    def close(self, status: Status) -> None:
        self._client.set_terminated(self._id, _STATUS[status])


def _name(name: str) -> str:
    """As MLflow allows it: `pass@4` becomes `pass_at_4`."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"), flags=re.ASCII)
