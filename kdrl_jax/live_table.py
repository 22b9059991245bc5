"""What a terminal shows beneath the bar while a run goes on: its key numbers, and where they are going."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

MEAN_OF = 20
TREND_OF = 24
"""Steps."""
LEAST_WIDTH, LEAST_HEIGHT = 66, 20
"""Columns and lines of a terminal that has room for it, beside what scrolls above."""

# Metric, its name here, and how it is written.
_ROWS = (
    ("loss", "loss", ".4f"),
    ("reward/mean", "reward", ".3f"),
    ("reward/solved_frac", "solved", ".1%"),
    ("kd/reverse_kl", "KL to teacher", ".4f"),
    ("entropy", "entropy", ".4f"),
    ("completion/length_mean", "length", ",.1f"),
    ("completion/truncated_frac", "truncated", ".1%"),
    ("grad_norm", "gradient norm", ".3f"),
    ("tokens_per_second", "tokens/s", ",.0f"),
)
# The same, of an evaluation.
_EVALUATED = (
    ("greedy/accuracy", "greedy", ".1%"),
    ("sampled/accuracy", "sampled", ".1%"),
    ("teacher_reverse_kl", "KL to teacher", ".3f"),
)
_LABEL, _NUMBER = 14, 12
"""Columns."""
_PHASES = ("rollout", "reward", "teacher", "update")
_BLOCKS = "▁▂▃▄▅▆▇█"


class LiveTable:
    """Keeps the last numbers of each row, the last evaluation and the last alarm."""

    def __init__(self) -> None:
        self._recent: dict[str, deque[float | None]] = {key: deque(maxlen=TREND_OF) for key, _, _ in _ROWS}
        self._seconds: dict[str, float] = {}
        self._evaluation = self._alarm = ""

    def add(self, metrics: Mapping[str, Any]) -> None:
        """The metrics of a step. Those that it has none of, or none that is finite, leave a gap."""
        for key, recent in self._recent.items():
            value = metrics.get(key)
            recent.append(float(value) if value is not None and math.isfinite(value) else None)
        if "time/update" in metrics:
            self._seconds = {phase: float(metrics.get(f"time/{phase}", 0.0)) for phase in _PHASES}

    def evaluated(self, step: int, results: Mapping[str, Any]) -> None:
        """What an evaluation of the student has found, with 95 % intervals where there are some."""
        found = [
            f"{label} {_with_interval(key, form, results)}"
            for key, label, form in _EVALUATED
            if key in results
        ]
        self._evaluation = f"evaluated at step {step}: {', '.join(found)}" if found else ""

    def alarm(self, line: str) -> None:
        """An alarm, which stays until another takes its place."""
        self._alarm = line

    def render(self, *, ascii_only: bool = False) -> Text:
        """The table; a row for each metric that the run has."""
        head = f"{'':{_LABEL}}{'now':>{_NUMBER}}{f'mean of {MEAN_OF}':>{_NUMBER}}"
        lines = [Text(head if ascii_only else f"{head}  last {TREND_OF} steps", "dim")]
        for key, label, form in _ROWS:
            recent = list(self._recent[key])
            if known := [x for x in recent[-MEAN_OF:] if x is not None]:
                now = "-" if recent[-1] is None else format(recent[-1], form)
                mean = format(sum(known) / len(known), form)
                lines.append(Text(f"{label:{_LABEL}}{now:>{_NUMBER}}{mean:>{_NUMBER}}"))
                if not ascii_only:
                    lines[-1].append(f"  {sparkline(recent)}", "cyan")
        below = ((self._phases(), "dim"), (self._evaluation, ""), (self._alarm, "red"))
        lines += [Text(line, style) for line, style in below if line]
        table = Text("\n", no_wrap=True, overflow="ellipsis").join(lines)
        table.no_wrap, table.overflow = True, "ellipsis"
        return table

    def _phases(self) -> str:
        """How the time of the last iteration was spent."""
        total = sum(self._seconds.values())
        parts = [f"{phase} {seconds / total:.0%}" for phase, seconds in self._seconds.items() if total]
        return f"time: {', '.join(parts)} of {total:.3g} s" if parts else ""


def _with_interval(key: str, form: str, results: Mapping[str, Any]) -> str:
    interval = results.get(f"{key}_ci")
    of = "" if interval is None else f" [{format(interval[0], form)}, {format(interval[1], form)}]"
    return f"{format(results[key], form)}{of}"


def sparkline(values: Sequence[float | None]) -> str:
    """A block for each value, from the lowest to the highest of them; a space for none."""
    known = [x for x in values if x is not None]
    if not known:
        return " " * len(values)
    low, span = min(known), max(known) - min(known)
    if not span:
        return "".join(" " if x is None else _BLOCKS[3] for x in values)
    top = len(_BLOCKS) - 1
    return "".join(" " if x is None else _BLOCKS[round((x - low) / span * top)] for x in values)
