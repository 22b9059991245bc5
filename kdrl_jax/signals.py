"""What Ctrl-C and SIGTERM mean: to save and end, or just to end."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class StopRequest:
    """Ctrl-C and SIGTERM ask the run to save and end; a second one ends it at once.

    They are heard by a thread of their own, since the main one may be compiling for minutes.
    """

    def __init__(self, says: str = "saving after what is running now", within_s: float | None = None) -> None:
        """Nothing happens before `install`.

        Args:
            says: what will be done about it.
            within_s: seconds after a SIGTERM in which it must have been done; then the process ends.
        """
        self.signal: int | None = None
        self._says, self._within_s = says, within_s
        self._receive, self._send = -1, -1
        self._timer: threading.Timer | None = None
        self._before: dict[int, Any] = {}
        self._pipe_before = -1
        self._noticed = False
        self.tell = _say
        """Takes lines for the user, in any thread; by default they go straight to the terminal."""

    def install(self) -> None:
        """From now on signals are heard, until `close`. Only from the main thread."""
        self._receive, self._send = os.pipe()
        os.set_blocking(self._send, False)
        self._pipe_before = signal.set_wakeup_fd(self._send, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, some time after the number was written to the pipe."""
        if signal.set_wakeup_fd(self._send, warn_on_full_buffer=False) != self._send:
            os.write(self._send, bytes([number]))  # another library had its own pipe in place of this one

    def _listen(self) -> None:
        while number := os.read(self._receive, 1):
            if number[0] in self._before:  # all signals that Python handles are written there
                self.ask(number[0])
        os.close(self._receive)

    def ask(self, number: int, notice: bool = False) -> None:
        """What a signal does.

        Args:
            notice: it has not come yet, but its platform says that it will.
        """
        if self.signal is not None:
            if notice:
                return
            if self._noticed:  # the signal that was announced
                self._noticed = False
                return
            os._exit(128 + number)
        self.signal, self._noticed = number, notice
        limit = ""
        if number == signal.SIGTERM and self._within_s is not None:
            self._timer = threading.Timer(self._within_s, self._late)
            self._timer.daemon = True
            self._timer.start()
            limit = f", within {self._within_s:g} s"
        self.tell(f"{signal.Signals(number).name}: {self._says}{limit}; once more ends at once")

    def _late(self) -> None:
        # What speaks may have nobody who listens, and wait for them.
        threading.Timer(1.0, os._exit, (self.status,)).start()
        self.tell(
            f"{self._within_s:g} s are over, and what was running then is still running: ending now; "
            "the same command goes on from the newest checkpoint"
        )
        os._exit(self.status)

    def __call__(self) -> bool:
        return self.signal is not None

    def close(self) -> None:
        """Signals mean what they meant before."""
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._send >= 0:
            signal.set_wakeup_fd(self._pipe_before)
            os.close(self._send)
            self._send = -1

    @property
    def status(self) -> int:
        """The exit status of what has ended on request; of another host, if not of this one."""
        return 128 + (self.signal or signal.SIGTERM)


def _say(line: str) -> None:
    # Not by print, which the main thread may be in the middle of. The terminal may be gone.
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())


class Ended(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during a command that keeps nothing of what it has begun."""

    def __init__(self, number: int):
        self.signal = number


@contextlib.contextmanager
def end_on_signals() -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM raise `Ended` wherever the program is, until the block ends."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Ended(number)

    before = sys.unraisablehook

    def unraisable(what: "sys.UnraisableHookArgs") -> None:
        # Raised in a callback of the garbage collector, it ended nothing: once more, elsewhere.
        if isinstance(what.exc_value, Ended):
            again = (threading.main_thread().ident, what.exc_value.signal)
            threading.Timer(0.01, signal.pthread_kill, again).start()
        else:
            before(what)

    sys.unraisablehook = unraisable
    handlers = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook = before
