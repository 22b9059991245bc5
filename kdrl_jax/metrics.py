"""`metrics.jsonl`: one JSON object per optimizer step, appended, and cut back on resume."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdrl_jax.types import Metrics

FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends to a run's `metrics.jsonl`, one whole line at a time."""

    def __init__(self, run_dir: str | Path, first_step: int):
        """Drops lines of steps from `first_step` on: a resumed run writes them again."""
        self._path = Path(run_dir) / FILE
        kept = [m for m in read_metrics(run_dir) if m["step"] < first_step]
        write_atomically(self._path, "".join(_line(m) for m in kept))
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Writes one step's scalars; a value that is not finite is written as null."""
        self._file.write(_line(metrics))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(run_dir: str | Path) -> list[Metrics]:
    """All whole lines of a run's metrics. A last line cut off by a crash is left out."""
    path = Path(run_dir) / FILE
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _line(metrics: Mapping[str, Any]) -> str:
    plain = {k: _plain(v) for k, v in metrics.items()}
    return json.dumps(plain) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, str) or value is None:
        return value
    number = value.item() if hasattr(value, "item") else value
    return None if isinstance(number, float) and not math.isfinite(number) else number


def write_atomically(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def repeated_ngram_frac(completions: Sequence[np.ndarray], n: int = 4) -> float:
    """Share of n-grams that occurred before in the same completion, over all completions (0 to 1)."""
    repeated = total = 0
    for ids in completions:
        grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / total if total else 0.0


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a file of JSON lines whole, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
