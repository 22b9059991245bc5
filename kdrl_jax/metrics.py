"""What is measured: numbers of an iteration, its clock, and the files they are written to."""

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdrl_jax.paths import as_path, is_remote, make_folder, write_whole
from kdrl_jax.types import Metrics

FILE = "metrics.jsonl"
ALARMS = "alarms.jsonl"
REWRITE_S = 10.0
"""Seconds between two versions of the file in a bucket; they take one a second."""


class MetricsWriter:
    """Appends to a run's `metrics.jsonl`, one whole line at a time."""

    def __init__(self, run_dir: str | Path, before: Sequence[Mapping[str, Any]] = ()):
        """Begins the file anew, with the steps before: a resumed run writes the others again."""
        self._path = as_path(run_dir) / FILE
        self._lines = [_line(m) for m in before]
        self._write_whole()
        self._file = None
        if not is_remote(self._path):
            self._file = self._path.open("a", encoding="utf-8")
            self._lines.clear()

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Writes one step's scalars; a value that is not finite is written as null. In a bucket, where a file
        is written anew for every change, a step is written at most `REWRITE_S` later."""
        if self._file is not None:
            self._file.write(_line(metrics))
            self._file.flush()
            return
        self._lines.append(_line(metrics))
        self._is_behind = True
        if time.monotonic() - self._written >= REWRITE_S:
            self.flush()

    def flush(self) -> None:
        """Everything that was given is in the file."""
        if self._is_behind:
            self._write_whole()

    def _write_whole(self) -> None:
        write_whole(self._path, "".join(self._lines))
        self._is_behind, self._written = False, time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


def read_metrics(run_dir: str | Path) -> list[Metrics]:
    """All whole lines of a run's metrics."""
    return read_jsonl(as_path(run_dir) / FILE)


def files_of_steps(folder: Path, ending: str) -> dict[int, Path]:
    """Step -> `step_N.ENDING`, in order; other files there are nobody's business."""
    found = {}
    for path in folder.glob(f"step_*.{ending}") if folder.is_dir() else ():
        if number := re.fullmatch(r"step_(\d+)", path.stem):
            found[int(number[1])] = path
    return dict(sorted(found.items()))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file, none if it is not there. A last line cut off by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    # Not `splitlines`, which also splits at U+2028, within texts.
    for line in path.read_bytes().decode("utf-8", "replace").split("\n")[:-1]:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _line(metrics: Mapping[str, Any]) -> str:
    return as_json({k: v.item() if hasattr(v, "item") else v for k, v in metrics.items()}) + "\n"


def as_json(value: Any, **how: Any) -> str:
    """The JSON of a value; what is not finite is null, which every reader takes.

    Args:
        how: to write it, as `json.dumps` has it.
    """
    try:
        return json.dumps(value, allow_nan=False, **how)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **how)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole, making its folder; what is not finite as null."""
    make_folder(path.parent)
    write_whole(path, as_json(value, indent=2) + "\n")


def repeated_ngrams(completions: Sequence[np.ndarray], n: int = 4) -> tuple[int, int]:
    """Of all completions, the n-grams that occurred before in the same one, and all n-grams."""
    repeated = total = 0
    for ids in completions:
        if len(ids) >= n:
            grams = np.lib.stride_tricks.sliding_window_view(ids, n)
            total += len(grams)
            repeated += len(grams) - len(np.unique(grams, axis=0))
    return repeated, total


def share_of(part: Any, total: Any) -> float:
    """part / total, and 0 of nothing."""
    return float(part) / float(total) if total else 0.0


def completion_metrics(lengths: np.ndarray, ended: np.ndarray, repeats: Sequence[int]) -> Metrics:
    """Lengths, truncation and repetition (`repeated_ngrams`) of an iteration's completions."""
    return {
        "completion/length_mean": float(np.mean(lengths)),
        "completion/truncated_frac": 1.0 - float(np.mean(ended)),
        "completion/repeated_4gram_frac": share_of(*repeats),
    }


def reward_metrics(rewards_B: np.ndarray, correct_B: np.ndarray, num_errors: int, group_size: int) -> Metrics:
    """Rewards of an iteration; groups with unequal rewards are the only ones with an RL gradient."""
    rewards_PG = rewards_B.reshape(-1, group_size)
    # As `objective.advantages.has_signal` has it.
    differ_P = np.ptp(rewards_PG, axis=1) > 1e-6 * np.maximum(np.abs(rewards_PG).max(axis=1), 1.0)
    return {
        "reward/mean": float(rewards_B.mean()),
        "reward/solved_frac": float(correct_B.mean()),
        "reward/mixed_groups_frac": float(differ_P.mean()),
        "reward/errors": num_errors,
    }


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a file of JSON lines whole, making its folder; what is not finite as null."""
    make_folder(path.parent)
    write_whole(path, "".join(as_json(r, ensure_ascii=False) + "\n" for r in rows))


def read_json(path: Path) -> Any:
    """Raises ValueError: it holds no JSON, with its name."""
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON, or not all of it ({error}); restore it, or remove it") from error


class Compiles:
    """Counts the programs that are compiled in this process, from when it is made."""

    def __init__(self) -> None:
        self._count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, *_: Any, **__: Any) -> None:
        self._count += event == "/jax/core/compile/backend_compile_duration"

    def take(self) -> int:
        """How many since this was last asked."""
        count, self._count = self._count, 0
        return count

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)


@dataclasses.dataclass
class Clock:
    """Wall-clock seconds of an iteration's stages, as the host waits for them; what is not waited for is
    `_hidden`. Diagnostics are no part of the throughput."""

    laps: dict[str, float] = dataclasses.field(default_factory=dict)
    _last: float = dataclasses.field(default_factory=time.monotonic)

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now

    def in_background(self, name: str, work: Future[Any] | None) -> Callable[[], None]:
        """Watches work that begins now; the function returned is called when the host begins to wait for
        it, and counts the seconds in which it ran until then."""
        if work is None:
            return lambda: None
        start, ends = time.monotonic(), [math.inf]
        work.add_done_callback(lambda _: ends.__setitem__(0, time.monotonic()))

        def waits() -> None:
            self.laps[name] = self.laps.get(name, 0.0) + min(ends[0], time.monotonic()) - start

        return waits

    def summary(self, num_tokens: int) -> Metrics:
        """The laps, and completion tokens per second over all of them."""
        seconds = sum(
            v for k, v in self.laps.items() if k != "time/diagnostics" and not k.endswith("_hidden")
        )
        return self.laps | {"tokens_per_second": num_tokens / max(seconds, 1e-9)}
