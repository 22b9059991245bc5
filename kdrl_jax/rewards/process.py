"""One worker process, seen from the process that asks it."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

START_LIMIT_S = 30.0
"""Seconds a worker may take to start, imports of the user's modules included."""
_MAX_REPLY_BYTES = 1 << 20
_REAP_LIMIT_S = 5.0


class WorkerDiedError(Exception):
    """The worker ended, or stopped speaking the protocol, without answering."""


class WorkerProcess:
    """`python -m kdrl_jax.rewards.worker [--pattern=P] FUNCTION...` in a process group of its own.

    Only the owning thread may call `wait_ready`, `ask` and `close`; `kill` may be called from any thread.
    """

    def __init__(self, functions: Sequence[str], pattern: str | None = None) -> None:
        package_parent = str(Path(__file__).resolve().parents[2])
        path = os.environ.get("PYTHONPATH")
        env = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{package_parent}" if path else package_parent}
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            # One answer needs one core; thread pools of user libraries would fight over the host.
            env.setdefault(variable, "1")
        options = [] if pattern is None else [f"--pattern={pattern}"]
        # A session of its own: Ctrl-C does not reach it, and `kill` ends what its functions started, too.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kdrl_jax.rewards.worker", *options, *functions],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=env,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._stdin, False)
        os.set_blocking(self._stdout, False)
        self._kill_lock = threading.RLock()  # re-entered if garbage collection closes a pool in here
        self._start_deadline = time.monotonic() + START_LIMIT_S
        self._ready = False

    def wait_ready(self) -> None:
        """Waits until the functions are imported; returns at once when they are.

        Raises:
            ValueError: with the worker's own words if a function does not resolve, or if it does not start.
        """
        if self._ready:
            return
        try:
            reply = self._read_line(self._start_deadline)
        except TimeoutError:
            raise ValueError(f"importing the reward functions took more than {START_LIMIT_S} s") from None
        except WorkerDiedError as error:
            raise ValueError(f"the reward worker ended while it imported the functions: {error}") from None
        if "error" in reply:
            raise ValueError(reply["error"])
        self._ready = True

    def ask(self, request: dict[str, Any], time_limit_s: float) -> dict[str, Any]:
        """Sends a request and waits for its reply, both within `time_limit_s` seconds.

        Raises:
            TimeoutError: the worker is late. It must be closed: its reply may still come.
            WorkerDiedError: the worker is gone; the text says how it ended.
        """
        deadline = time.monotonic() + time_limit_s
        self._write(json.dumps(request | {"limit_s": time_limit_s}).encode() + b"\n", deadline)
        reply = self._read_line(deadline)
        if reply.get("id") != request["id"]:
            raise WorkerDiedError(f"worker answered request {reply.get('id')!r} instead of {request['id']!r}")
        return reply

    def kill(self) -> None:
        """Ends the process and what it started, at once and for good. May be called again."""
        with self._kill_lock:
            # Until it is waited for, the process keeps its number, so the group is certainly this worker's.
            if self._process.returncode is not None:
                return
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_REAP_LIMIT_S)

    def close(self) -> None:
        """Kills the process and closes its pipes."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _wait_for(self, fd: int, event: int, deadline: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(fd, event)
            # At least one look, so that a reply already there is taken even at the deadline.
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError

    def _write(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            self._wait_for(self._stdin, selectors.EVENT_WRITE, deadline)
            try:
                view = view[os.write(self._stdin, view) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise WorkerDiedError(self._obituary()) from None

    def _read_line(self, deadline: float) -> dict[str, Any]:
        data = b""
        while not data.endswith(b"\n"):
            self._wait_for(self._stdout, selectors.EVENT_READ, deadline)
            try:
                part = os.read(self._stdout, 65536)
            except BlockingIOError:
                continue
            if not part:
                raise WorkerDiedError(self._obituary())
            data += part
            if len(data) > _MAX_REPLY_BYTES:
                raise WorkerDiedError(f"worker sent more than {_MAX_REPLY_BYTES} bytes for one answer")
        try:
            reply = json.loads(data)
        except ValueError:
            raise WorkerDiedError(f"worker sent no JSON: {data[:80]!r}") from None
        if not isinstance(reply, dict):
            raise WorkerDiedError(f"worker sent no JSON object: {data[:80]!r}")
        return reply

    def _obituary(self) -> str:
        self.kill()
        status = self._process.returncode
        if status is not None and status < 0:
            return f"worker died of signal {-status} ({signal.Signals(-status).name})"
        return f"worker died with exit status {status}"
