"""What a person sees while a run goes on: a live bar and table on a terminal, plain lines elsewhere."""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.status import Status
from rich.text import Text

from kdrl_jax.live_table import LEAST_HEIGHT, LEAST_WIDTH, TREND_OF, LiveTable

# Without a terminal (a log file, a notebook's shell cell), one line this often.
LINE_EVERY_S = 10.0
# The same within a step, of what takes so long.
STAGE_EVERY_S = 30.0
# A log file has no width; at the 80 columns that rich takes for it, tables cut their numbers.
WIDE = 240
REFRESHES = 4
"""Of a terminal, each second."""


class _Lasting(Console):
    """Goes on where its reader has gone (`| head`): what comes is for files."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # What is still buffered must find no pipe at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def make_console(*, quiet: bool = False, lasting: bool = False) -> Console:
    """Of stdout: a terminal only where a line can be written over. Notebooks ask programs for colours
    (FORCE_COLOR), which rich takes for one, and keep every line.

    Args:
        lasting: whether the program goes on where nobody reads it any more, instead of ending.
    """
    kind = _Lasting if lasting else Console
    console = kind(quiet=quiet)
    if console.file.isatty():
        return console
    return kind(quiet=quiet, force_terminal=False, width=max(console.width, WIDE))


class Pace:
    """How long a work of so many parts will still take, by what it has taken so far."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def left(self, done: int, of: int) -> float | None:
        """Seconds, by what was done since this was first asked; None before there is anything to go by."""
        now = time.monotonic()
        if self._first is None or done < self._first[0]:
            self._first = (done, now)
        since = done - self._first[0]
        return (of - done) * (now - self._first[1]) / since if since else None


class Work:
    """A work that is no run: on a terminal a line that is written over, elsewhere one now and then, and none
    for what is done before."""

    def __init__(self, console: Console, name: str):
        """Shows nothing before it is entered."""
        self._console, self._name = console, name
        self._status = Status("", console=console) if console.is_terminal else None
        self._last_line = time.monotonic()
        self._what, self._pace = "", Pace()

    def __enter__(self) -> "Work":
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def at(self, what: str, done: int = 0, of: int = 0) -> None:
        """What is being done, and how many of its parts are done, if it has some."""
        if what != self._what:
            self._what, self._pace = what, Pace()
        text = f"{self._name}: {what}{progress_words(done, of, self._pace)}"
        if self._status is not None:
            self._status.update(Text(text))
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def progress_words(done: int, of: int, pace: Pace) -> str:
    """`: 3 of 10, 0:07 left`; nothing of a work without parts."""
    if not of:
        return ""
    left = pace.left(done, of)
    return f": {done} of {of}" + ("" if left is None else f", {duration(left)} left")


class Reporter:
    """Shows the steps of one run: numbers, tokens per second and the time left.

    The time left is this session's mean time per step times the steps to go; the first step, which
    compiles, is left out of it.
    """

    def __init__(
        self,
        console: Console,
        name: str,
        first_step: int,
        num_steps: int,
        before: Sequence[Mapping[str, Any]] = (),
    ):
        """Shows nothing before it is entered.

        Args:
            before: the metrics of earlier steps, whose last ones the table begins with.
        """
        self._console = console
        self._name = name
        self._total = num_steps
        self._warm: tuple[int, float] | None = None
        self._last_line = 0.0
        self._table, self._stage = LiveTable(), ""
        self._what, self._pace, self._began = "", Pace(), time.monotonic()
        self._step = first_step
        self._done = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="progress", daemon=True)
        for metrics in before[-TREND_OF:]:
            self._table.add(metrics)
        self._progress = Progress(
            TextColumn("[bold]{task.fields[run]}[/]"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TimeElapsedColumn(),
            expand=True,
        )
        self._task = self._progress.add_task("", total=num_steps, completed=first_step, run=name, status="")
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(
                console=console,
                get_renderable=self._render,
                refresh_per_second=REFRESHES,
                transient=True,
                vertical_overflow="crop",
            )

    def __enter__(self) -> "Reporter":
        if self._live is not None:
            self._live.start()
            # It hides the cursor, which a process that is killed could not bring back.
            self._console.show_cursor(True)
        elif not self._console.quiet:
            self._beats.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        self._done.set()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(f"{self._name}: {text}", highlight=False, markup=False, soft_wrap=True)

    def alarm(self, text: str) -> None:
        """A line that stays, and is shown beneath the table too."""
        self.note(text)
        self._table.alarm(text)

    def evaluated(self, step: int, results: Mapping[str, Any]) -> None:
        """An evaluation, for the table."""
        self._table.evaluated(step, results)

    def stage(self, what: str, done: int = 0, of: int = 0, more: str = "") -> None:
        """What is being done now; without a terminal, where it takes long, a line now and then.

        Args:
            done, of: how many of its parts are done, if it has some.
            more: what else is known of it.
        """
        if what != self._what:
            self._what, self._pace, self._began = what, Pace(), time.monotonic()
        self._stage = f"{what}{progress_words(done, of, self._pace)}{more}"

    def _beat(self) -> None:
        """Without a terminal: a line about a stage that takes long, of which nobody may tell anything
        meanwhile (a program that is compiled, answers that are verified)."""
        while not self._done.wait(min(1.0, STAGE_EVERY_S / 4)):
            now = time.monotonic()
            if now - max(self._last_line, self._began) >= STAGE_EVERY_S and self._what:
                self._last_line = now
                took = duration(now - self._began)
                self.note(f"step {self._step}/{self._total}  {self._stage}, for {took} now")

    def step(self, metrics: dict[str, Any]) -> None:
        """Shows a finished step."""
        step, now = int(metrics["step"]), time.monotonic()
        if self._warm is None:
            self._warm = (step, now)
        self._table.add(metrics)
        self._step, self._what = step, ""
        left = f"{duration(self._left(step, now))} left"
        self._stage = text = "  ".join([*_numbers(metrics), left])
        self._progress.update(self._task, completed=step, status=left)
        is_last = step >= self._total
        if self._live is None and (is_last or now - self._last_line >= LINE_EVERY_S):
            self._last_line = now
            self.note(f"step {step}/{self._total}  {text}")

    def _render(self) -> RenderableType:
        """The bar and what is being done, and the table where there is room for it."""
        stage = Text(self._stage, style="dim", no_wrap=True, overflow="ellipsis")
        width, height = self._console.size
        parts: list[RenderableType] = [self._progress.get_renderable(), stage]
        if width >= LEAST_WIDTH and height >= LEAST_HEIGHT:
            parts.append(self._table.render(ascii_only=self._console.options.ascii_only))
        return Group(*parts)

    def _left(self, step: int, now: float) -> float | None:
        assert self._warm is not None
        done = step - self._warm[0]
        return (self._total - step) * (now - self._warm[1]) / done if done else None


def _numbers(metrics: Mapping[str, Any]) -> list[str]:
    """The few that one line has room for."""
    parts = [f"loss {metrics['loss']:.3f}"]
    for key, label in (
        ("reward/mean", "reward"),
        ("kd/reverse_kl", "kl"),
        ("completion/length_mean", "length"),
        ("tokens_per_second", "tok/s"),
    ):
        if metrics.get(key) is not None:
            parts.append(f"{label} {metrics[key]:.{0 if metrics[key] >= 100 else 3}f}")
    return parts


def duration(seconds: float | None) -> str:
    """As `0:07` or `1:02:03`; `?` for what is not known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
