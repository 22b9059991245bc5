"""Where questions come from: JSON Lines files and procedural tasks, as sequences of rows."""

import dataclasses
import json
import math
from typing import Any, Protocol

from kdrl_jax.config.data import JsonlSourceConfig, SourceConfig, TaskSourceConfig
from kdrl_jax.data.tasks import task_row
from kdrl_jax.paths import absolute, as_path, check_bucket, open_text


@dataclasses.dataclass(frozen=True)
class Row:
    """One question."""

    question: str
    answer: str
    """The gold answer as the data has it; a verifier extracts what it needs."""
    completion: str | None
    """A completion to imitate, where the source has them."""
    source: str
    """Name of the source, for logs."""


class Source(Protocol):
    """Rows by index. Negative indices and slices are not supported."""

    name: str
    """For logs: the file's name, or `task/split`. May be changed to tell sources apart."""
    in_memory: bool
    """Whether the rows lie in memory (they are not made up one by one), so that all can be looked at."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def place(self, index: int) -> str:
        """Where a row is, for error messages: `gsm8k.jsonl:17`, `chain_sum/train row 17`."""


def open_source(config: SourceConfig, needs_completion: bool) -> Source:
    """Opens a source; a file is read and checked whole.

    Args:
        config: a file or a task.
        needs_completion: whether every row must have a completion to imitate (SFT).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a malformed row, with file, line and field; no rows; no completions where they are
            needed; a task whose split is empty.
    """
    if isinstance(config, TaskSourceConfig):
        return TaskSource(config)
    if needs_completion and config.completion_field is None:
        raise ValueError(
            f"{config.path}: rollout.source=dataset imitates completions, but this source names no field for "
            "them; set completion_field"
        )
    return JsonlSource(config)


class TaskSource:
    """Rows of a procedural task, made when asked for."""

    in_memory = False

    def __init__(self, config: TaskSourceConfig):
        self._config = config
        self.name = f"{config.task}/{config.split}"
        self[0]  # An impossible split is reported now, not in the middle of a run.

    def __len__(self) -> int:
        return self._config.size

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = task_row(self._config, index)
        return Row(row.question, row.answer, row.completion, self.name)

    def place(self, index: int) -> str:
        """See `Source.place`."""
        return f"{self.name} row {index}"


class JsonlSource:
    """Rows of a JSON Lines file, held in memory. Fields other than the named ones are ignored."""

    in_memory = True

    def __init__(self, config: JsonlSourceConfig):
        check_bucket(config.path)
        path = as_path(config.path)
        if not path.is_file():
            raise FileNotFoundError(
                f"data file {config.path}: no such file (looked at {absolute(path)}); paths in "
                "data.train and data.eval are relative to the working directory"
            )
        self.name = path.name
        self._path = config.path
        self._rows: list[Row] = []
        self._lines: list[int] = []
        try:
            with open_text(path) as file:
                for number, line in enumerate(file, 1):
                    if config.first is not None and len(self._rows) == config.first:
                        break
                    # Blank lines are what is left at the end of many files.
                    if line.strip():
                        self._rows.append(self._parse(line, number, config))
                        self._lines.append(number)
        except UnicodeDecodeError as error:
            raise ValueError(f"{config.path}: not UTF-8 text ({error}); convert it first") from None
        if not self._rows:
            raise ValueError(f"{config.path}: holds no rows; expected one JSON object per line")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        if index < 0:
            raise IndexError(f"row {index} of {len(self)}")
        return dataclasses.replace(self._rows[index], source=self.name)

    def place(self, index: int) -> str:
        """See `Source.place`."""
        return f"{self._path}:{self._lines[index]}"

    def _parse(self, line: str, number: int, config: JsonlSourceConfig) -> Row:
        place = f"{self._path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{place}: not JSON ({error.msg}, column {error.colno}); expected one JSON object per line"
            ) from None
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits; deep nesting
            raise ValueError(f"{place}: not usable JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected a JSON object, got {_short(row)}")
        completion = config.completion_field
        return Row(
            question=_text(row, "question_field", config.question_field, place),
            answer=_text(row, "answer_field", config.answer_field, place, number_ok=True),
            completion=None if completion is None else _text(row, "completion_field", completion, place),
            source=self.name,
        )


def _text(row: dict[str, Any], setting: str, field: str, place: str, number_ok: bool = False) -> str:
    if field not in row:
        raise ValueError(
            f"{place}: no field {field!r} ({setting}); the row has {sorted(row)[:12]}. "
            f"Set {setting} or mend the row"
        )
    value = row[field]
    if number_ok and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{place}: field {field!r} ({setting}) must be text, got {_short(value)}")
    if not value.strip():
        raise ValueError(f"{place}: field {field!r} ({setting}) is empty")
    # A lone surrogate ("\ud800") is valid JSON but no text: no tokenizer takes it.
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{place}: field {field!r} ({setting}) holds half a surrogate pair") from None
    return value


def _short(value: Any) -> str:
    shown = json.dumps(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
