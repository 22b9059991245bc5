"""How far an evaluation of several models is: a bar on a terminal, a line now and then elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from kdrl_jax.progress import LINE_EVERY_S, Pace, duration


class EvalProgress:
    """Counts answers over all passes, and answers that are compared as if they were drawn."""

    def __init__(self, console: Console, total: int):
        self._console, self._total = console, total
        self._done, self._who = 0, ""
        # Of the pass that goes on: where it began.
        self._before = 0
        # The first batch compiles: the time left is counted from its end.
        self._pace = Pace()
        self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("evaluating", total=total)

    def __enter__(self) -> "EvalProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, who: str) -> None:
        """Another model."""
        self._who = who
        self.stage(f"evaluating {who}")

    def left_out(self, num: int) -> None:
        """So many answers will not come."""
        self._total -= num
        self._bar.update(self._task, total=self._total)

    def stage(self, text: str) -> None:
        """What is being done now; shown on a terminal only."""
        self._bar.update(self._task, description=text)

    def at(self, what: str, done: int, of: int) -> None:
        """Some answers of a pass are done; all of them at its end alone."""
        self._done, now = self._before + done, time.monotonic()
        if done == of:
            self._before = self._done
        text = f"evaluating {self._who}, {what}: {done} of {of}"
        self._bar.update(self._task, completed=self._done, description=text)
        left = self._pace.left(self._done, self._total)
        if not self._console.is_terminal and now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            self.note(text if left is None else f"{text}, {duration(left)} left")

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
