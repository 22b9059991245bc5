"""What a person sees while a run goes on: a live bar on a terminal, plain lines elsewhere."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# Without a terminal (a log file, a notebook's shell cell), one line this often.
LINE_EVERY_S = 10.0


def make_console(*, quiet: bool = False) -> Console:
    """Of stdout: a terminal only where a line can be written over. Notebooks ask programs for colours
    (FORCE_COLOR), which rich takes for one, and keep every line."""
    console = Console(quiet=quiet)
    return console if console.file.isatty() else Console(quiet=quiet, force_terminal=False)


class Reporter:
    """Shows the steps of one run: numbers, tokens per second and the time left.

    The time left is this session's mean time per step times the steps to go; the first step, which
    compiles, is left out of it.
    """

    def __init__(self, console: Console, name: str, first_step: int, num_steps: int):
        self._console = console
        self._name = name
        self._first, self._total = first_step, num_steps
        self._live = console.is_terminal
        self._warm: tuple[int, float] | None = None
        self._last_line = 0.0
        self._progress = Progress(
            TextColumn("[bold]{task.fields[run]}[/]"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not self._live,
            transient=True,
        )
        self._task = self._progress.add_task("", total=num_steps, completed=first_step, run=name, status="")

    def __enter__(self) -> "Reporter":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(f"{self._name}: {text}", highlight=False, markup=False, soft_wrap=True)

    def stage(self, text: str) -> None:
        """What is being done now; shown on a terminal only."""
        self._progress.update(self._task, status=text)

    def step(self, metrics: dict[str, Any]) -> None:
        """Shows a finished step."""
        step, now = int(metrics["step"]), time.monotonic()
        if self._warm is None:
            self._warm = (step, now)
        parts = [f"loss {metrics['loss']:.3f}"]
        for key, label in (
            ("reward/mean", "reward"),
            ("kd/reverse_kl", "kl"),
            ("completion/length_mean", "length"),
            ("tokens_per_second", "tok/s"),
        ):
            if metrics.get(key) is not None:
                parts.append(f"{label} {metrics[key]:.{0 if metrics[key] >= 100 else 3}f}")
        parts.append(f"{_duration(self._left(step, now))} left")
        text = "  ".join(parts)
        self._progress.update(self._task, completed=step, status=text)
        is_last = step >= self._total
        if not self._live and (is_last or now - self._last_line >= LINE_EVERY_S):
            self._last_line = now
            self.note(f"step {step}/{self._total}  {text}")

    def _left(self, step: int, now: float) -> float | None:
        assert self._warm is not None
        done = step - self._warm[0]
        return (self._total - step) * (now - self._warm[1]) / done if done else None


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
