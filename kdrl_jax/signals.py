"""What Ctrl-C and SIGTERM mean: to save and end, or just to end."""

import os
import signal
import sys
import threading
from types import FrameType


class StopRequest:
    """Ctrl-C and SIGTERM ask the run to save and end; a second one ends it at once."""

    def __init__(self, says: str = "saving after what is running now") -> None:
        """Nothing happens before `install`.

        Args:
            says: what will be done about it.
        """
        self.signal: int | None = None
        self._says = says

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        name = signal.Signals(number).name
        # os.write, because a signal may arrive in the middle of a print.
        os.write(2, f"\n{name}: {self._says}; once more ends at once\n".encode())

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def status(self) -> int:
        """The exit status of what has ended on request; of another host, if not of this one."""
        return 128 + (self.signal or signal.SIGTERM)


class Ended(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during a command that keeps nothing of what it has begun."""

    def __init__(self, number: int):
        self.signal = number


def end_on_signals() -> None:
    """Lets Ctrl-C and SIGTERM raise `Ended` wherever the program is."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Ended(number)

    def unraisable(what: "sys.UnraisableHookArgs") -> None:
        # Raised in a callback of the garbage collector, it ended nothing: once more, elsewhere.
        if isinstance(what.exc_value, Ended):
            again = (threading.main_thread().ident, what.exc_value.signal)
            threading.Timer(0.01, signal.pthread_kill, again).start()
        else:
            sys.__unraisablehook__(what)

    sys.unraisablehook = unraisable
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
