"""Weights & Biases, by its own settings: WANDB_MODE=offline, WANDB_ENTITY, WANDB_BASE_URL, WANDB_API_KEY."""

import atexit
import contextlib
import os
import signal
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from kdrl_jax.paths import is_remote
from kdrl_jax.writers.base import ROLLOUT_COLUMNS, About, Status, rollout_cells


def check_login() -> None:
    """That there is a key to write with, unless nothing is sent. Asks neither the user nor the server.

    Raises:
        ValueError: there is none.
    """
    import wandb

    settings = wandb.setup().settings
    if settings.mode == "online" and not wandb.login(prompt=False, verify=False):
        raise ValueError(
            "log.writers names wandb, which knows no API key on this machine; run `wandb login`, or set "
            "WANDB_MODE=offline and send the run later by `wandb sync`"
        )


class WandbWriter:
    """One W&B run for all sessions of a run. Its x axis is `step`, not W&B's own count of calls."""

    # History there is only added to.
    rewrites = False

    def open(self, about: About) -> str:
        import wandb

        self._wandb = wandb
        # Its process is started first: hooks run backwards, so that this one comes before W&B's own.
        self._service = wandb.setup().ensure_service()
        atexit.register(self._leave)
        self._run = wandb.init(
            project=about.project,
            group=about.group,
            name=about.name,
            id=about.id or uuid.uuid4().hex[:12],
            config=about.config,
            resume="allow",
            # The run of a model that this one needs may still be closing.
            reinit="create_new",
            # Beside the run's other files; it cannot write to a bucket.
            dir=None if is_remote(about.run_dir) else str(about.run_dir),
            # The terminal is the run's own.
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        return str(self._run.id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        cells = [["" if x is None else str(x) for x in row] for row in rollout_cells(rows)]
        self._run.log({"rollouts": self._wandb.Table(list(ROLLOUT_COLUMNS), cells), "step": step})

    def alarm(self, step: int, name: str, says: str) -> None:
        self._run.alert(title=f"alarm {name}", text=f"step {step}: {says}")

    def close(self, status: Status) -> None:
        if status == "stopped":
            self._run.mark_preempting()  # shown as preempted, not as failed
        self._run.finish(exit_code=0 if status == "finished" else 1)
        atexit.unregister(self._leave)

    def _leave(self) -> None:
        """At the end of the process, if `close` is not done: the run has waited as long as it may, and W&B's
        own hook would wait for a server that does not answer, for minutes. What was not sent lies in
        `wandb/`, for `wandb sync`."""
        service: Any = self._service
        with contextlib.suppress(AttributeError, OSError):  # names of W&B's own, which may change
            if service.owns_service:
                service._cleanup()  # takes W&B's hook away
                pid = service._proc._process.pid
                # With what it has started itself; it leads a group of its own.
                if os.getpgid(pid) == pid:
                    os.killpg(pid, signal.SIGKILL)
