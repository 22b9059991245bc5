"""Runs that go wrong, noticed by their metrics: each alarm has a name, a value and a threshold."""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kdrl_jax.config import AlarmsConfig

LEAST_SOLVED = 0.05
"""A share of solved questions below this cannot collapse."""
MOSTLY_SOLVED = 0.8
"""With this share of them solved, a student may be as sure as it likes."""
FALLING = 0.9
"""A distance to the teacher that falls to this share from one window to the next is on its way."""
_KEYS = (
    "reward/solved_frac",
    "completion/length_mean",
    "completion/truncated_frac",
    "entropy",
    "kd/reverse_kl",
)


@dataclass(frozen=True)
class Alarm:
    """A measure that has passed its threshold."""

    name: str
    """As its setting is called."""
    value: float
    threshold: float
    says: str

    def __str__(self) -> str:
        return f"alarm {self.name}: {self.says} (alarms.{self.name})"


class Alarms:
    """Looks at one step after the other. What it says follows from the metrics alone, so that a resumed run,
    which shows it those of the file first, is told what it would have been told."""

    def __init__(self, config: AlarmsConfig):
        self._config = config
        self._recent: dict[str, deque[float]] = {key: deque(maxlen=2 * config.window) for key in _KEYS}
        self._first: dict[str, float] = {}
        self._best_solved = 0.0
        self._raised: set[str] = set()

    def at(self, metrics: Mapping[str, Any]) -> list[Alarm]:
        """The alarms that a step raises."""
        for key in _KEYS:
            # What is not finite is null in the file.
            if metrics.get(key) is not None and math.isfinite(metrics[key]):
                self._recent[key].append(float(metrics[key]))
                if len(self._recent[key]) == self._config.window:
                    self._first[key] = self._mean(key)
        if "reward/solved_frac" in self._first:
            self._best_solved = max(self._best_solved, self._mean("reward/solved_frac"))
        found = list(self._passed())
        new = [alarm for alarm in found if alarm.name not in self._raised]
        self._raised = {alarm.name for alarm in found}
        return new

    def _mean(self, key: str, ago: int = 0) -> float:
        """Over the last window, or over the one that ended `ago` steps before."""
        recent, window = list(self._recent[key]), self._config.window
        part = recent[len(recent) - ago - window : len(recent) - ago]
        return sum(part) / len(part)

    def _now(self, key: str) -> float | None:
        """The mean over the last window, once there is one after the first."""
        return self._mean(key) if len(self._recent[key]) > self._config.window else None

    def _passed(self) -> Iterator[Alarm]:
        c = self._config
        solved = self._now("reward/solved_frac")
        if c.reward_collapse is not None and solved is not None and self._best_solved >= LEAST_SOLVED:
            limit = c.reward_collapse * self._best_solved
            if solved < limit:
                says = f"{solved:.1%} are solved, below {limit:.1%}, and {self._best_solved:.1%} were"
                yield Alarm("reward_collapse", solved, limit, says)
        length, cut_off = self._now("completion/length_mean"), self._now("completion/truncated_frac")
        if c.length_blow_up is not None and length is not None and cut_off is not None:
            limit = c.length_blow_up * self._first["completion/length_mean"]
            if length > limit and cut_off > self._first["completion/truncated_frac"]:
                says = (
                    f"completions have {length:.0f} tokens, above {limit:.0f}, and {cut_off:.0%} are cut off"
                )
                yield Alarm("length_blow_up", length, limit, says)
        entropy = self._now("entropy")
        if c.entropy_collapse is not None and entropy is not None:
            limit = c.entropy_collapse * self._first["entropy"]
            if entropy < limit and (solved is None or solved < MOSTLY_SOLVED):
                yield Alarm(
                    "entropy_collapse", entropy, limit, f"{entropy:.3g} nats a token, below {limit:.3g}"
                )
        # Two whole windows, of which the second is to be better.
        if c.teacher_mismatch is not None and len(self._recent["kd/reverse_kl"]) == 2 * c.window:
            gap, before = self._mean("kd/reverse_kl"), self._mean("kd/reverse_kl", ago=c.window)
            if gap > c.teacher_mismatch and gap >= FALLING * before:
                says = (
                    f"the teacher is {gap:.2f} nats a token away, above {c.teacher_mismatch:g}, and not "
                    "nearer than before; does it read the same tokens, and the same chat template?"
                )
                yield Alarm("teacher_mismatch", gap, c.teacher_mismatch, says)
