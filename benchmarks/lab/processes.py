"""Processes of `kdrl_jax.main`, which end when the lab does."""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path


class JobError(Exception):
    """A run has failed, or was stopped; one line that says where to look."""


class Processes:
    """Those at work. Each has a session of its own, so that Ctrl-C reaches the lab alone, which ends them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._at_work: set[subprocess.Popen[bytes]] = set()
        self._is_stopped = False

    def run(self, words: Sequence[str], log: Path, core: int | None) -> None:
        """`python -m kdrl_jax.main`, until its end, with its output in `log`.txt.

        Args:
            core: to run on alone; None for all.

        Raises:
            JobError: it failed, or `stop` was called before its end.
        """
        path = log.with_name(f"{log.name}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        if core is not None:
            # Of this thread, and so of what it starts: two runs that share their cores slow each other down.
            os.sched_setaffinity(0, {core})
        # Several may share a GPU: none takes its memory beforehand.
        env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        with path.open("a") as out, self._lock:
            if self._is_stopped:
                raise JobError(f"{log}: not begun, since the lab is stopping")
            process = subprocess.Popen(
                [sys.executable, "-m", "kdrl_jax.main", *words],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=env,
                start_new_session=True,
            )
            self._at_work.add(process)
        status = process.wait()
        with self._lock:
            self._at_work.remove(process)
        if status or self._is_stopped:
            lines = path.read_text(errors="replace").strip().splitlines()
            last = lines[-1] if lines else "no word"
            raise JobError(f"{log}: ended with status {status}: {last} (see {path})")

    def stop(self) -> None:
        """Ends those at work; none is begun any more."""
        with self._lock:
            self._is_stopped = True
            for process in self._at_work:
                process.terminate()
