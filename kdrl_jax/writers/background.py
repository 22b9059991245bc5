"""A writer at work in a thread of its own, so that the run neither waits for it nor fails with it."""

import dataclasses
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from kdrl_jax.paths import make_folder, write_whole
from kdrl_jax.writers.base import About, Status, Writer, plain_scalars

MOST_WAITING = 1000
"""Entries that wait for a slow writer before the oldest are left out."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Something to write."""

    kind: str
    """`metrics`, `evaluation`, `rollouts`, `alarm`, or the role of a teacher that was evaluated."""
    step: int
    load: Callable[[], Any]
    """Its values, as the run's own files have them; called in the writer's thread."""


class State:
    """What a run directory keeps about a writer between sessions: `writers/NAME.json`."""

    def __init__(self, run_dir: Path, name: str):
        self._file = run_dir / "writers" / f"{name}.json"
        self.id: str | None = None
        self.sent: dict[str, int] = {}
        """By kind, the last step that was written; of a session that was killed, that it began with."""
        self._was_killed = False
        if self._file.exists():
            kept = json.loads(self._file.read_text("utf-8"))
            self.id, self.sent, self._was_killed = kept["id"], kept["sent"], not kept["closed"]

    def save(self, *, closed: bool) -> None:
        make_folder(self._file.parent)
        kept = {"id": self.id, "closed": closed, "sent": self.sent}
        write_whole(self._file, json.dumps(kept, indent=2) + "\n")

    def settle(self, on_disk: Callable[[], Mapping[str, int]]) -> None:
        """Of a session that was killed: all that the run's files have counts as sent, since nothing later was
        given to the writer. Better a step that is missing there than one that is there twice. The first
        session after it has to ask, also without the writer: its own steps are missing there for certain.

        Args:
            on_disk: by kind, the last step in the run's files; asked only after a kill.
        """
        if self._was_killed:
            for kind, step in on_disk().items():
                self.sent[kind] = max(step, self.sent.get(kind, -1))
            self.save(closed=True)

    def held(self, next_step: int, *, rewrites: bool) -> dict[str, int]:
        """By kind, the last step that the writer has, or may have.

        Args:
            next_step: with `rewrites`, the writer has nothing of it and of later ones.
        """
        held = dict(self.sent)
        return {kind: min(step, next_step - 1) for kind, step in held.items()} if rewrites else held


class Background:
    """Writes entries in order. A failure is told once and counted; a writer that cannot be opened is given up
    for this session, and gets what it missed in the next."""

    def __init__(
        self,
        name: str,
        writer: Writer,
        about: About,
        *,
        backlog: Iterable[Entry],
        say: Callable[[str], None],
    ):
        """Starts the thread.

        Args:
            about: of the run; its `id` is replaced by the one that was kept.
            backlog: everything that the run's files have of the steps before; what the writer holds already
                is left out.
            say: takes lines for the user, in the writer's thread.
        """
        self.name, self._writer, self._about = name, writer, about
        self._backlog, self._say = backlog, say
        self._waiting: deque[Entry] = deque()
        self._changed = threading.Condition()
        self._status: Status | None = None
        self._is_open, self._gave_up = False, False
        self.num_failed = self.num_left_out = 0
        self._thread = threading.Thread(target=self._work, name=f"writer {name}", daemon=True)
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Takes an entry, at once."""
        with self._changed:
            if self._gave_up:
                return
            if len(self._waiting) >= MOST_WAITING:
                self._waiting.popleft()
                self.num_left_out += 1
                if self.num_left_out == 1:
                    self._tell("slower than the run: its oldest entries are left out there")
            self._waiting.append(entry)
            self._changed.notify()

    def end(self, status: Status) -> None:
        """No entry follows."""
        with self._changed:
            self._status = status
            self._changed.notify()

    def wait(self, seconds: float) -> None:
        """After `end`: until all is written, or so long."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._tell(f"not done after {seconds:.0f} s; what it has not taken yet is left out there")
        elif self.num_failed or self.num_left_out:
            self._tell(f"{self.num_failed} entries failed and {self.num_left_out} were left out, in all")

    def _tell(self, what: str) -> None:
        self._say(f"log.writers: {self.name}: {what} (metrics.jsonl has everything)")

    def _work(self) -> None:
        try:
            self._open()
        except Exception as error:  # each library has errors of its own
            with self._changed:
                self._gave_up = True
                self._waiting.clear()
            self._tell(f"could not be opened, and is not written to until the run is resumed: {_line(error)}")
            return
        for entry in self._backlog:
            self._write(entry)
        while (taken := self._take()) is not None:
            self._write(taken)
        assert self._status is not None
        try:
            self._writer.close(self._status)
            self._state.save(closed=True)
        except Exception as error:
            self._failed(error)

    def _open(self) -> None:
        self._state = state = State(self._about.run_dir, self.name)
        # Before anything is written: from here on a session that is killed may have written.
        state.id = self._writer.open(dataclasses.replace(self._about, id=state.id))
        self._held = state.held(self._about.first_step, rewrites=self._writer.rewrites)
        state.sent = dict(self._held)
        state.save(closed=False)

    def _take(self) -> Entry | None:
        """The next entry; None at the end."""
        with self._changed:
            while not self._waiting and self._status is None:
                self._changed.wait()
            return self._waiting.popleft() if self._waiting else None

    def _write(self, entry: Entry) -> None:
        kind, step = entry.kind, entry.step
        if step <= self._held.get(kind, -1):
            return
        try:
            values = entry.load()
            if kind == "rollouts":
                self._writer.rollouts(step, values)
            elif kind == "alarm":
                self._writer.alarm(step, values["name"], values["says"])
            elif kind == "metrics":
                self._writer.scalars(step, plain_scalars(values))
            else:
                who = "" if kind == "evaluation" else f"{kind}/"
                self._writer.scalars(step, plain_scalars(values, f"eval/{who}"))
        except Exception as error:
            self._failed(error)
        else:
            self._state.sent[kind] = max(step, self._state.sent.get(kind, -1))

    def _failed(self, error: Exception) -> None:
        self.num_failed += 1
        if self.num_failed == 1:
            self._tell(f"{_line(error)}; the run goes on, and later failures are counted")


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def wait_for_all(writers: Iterable[Background], status: Status, seconds: float) -> None:
    """Ends all of them, within so many seconds together."""
    writers = list(writers)
    for writer in writers:
        writer.end(status)
    until = time.monotonic() + seconds
    for writer in writers:
        writer.wait(max(until - time.monotonic(), 0.0))
