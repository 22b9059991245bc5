"""Where questions come from, as sequences of rows: stored (see `stored`) or made up when asked for."""

from collections import Counter
from typing import Protocol

from kdrl_jax.config.data import (
    ArrayRecordSourceConfig,
    GymSourceConfig,
    HubSourceConfig,
    JsonlSourceConfig,
    ParquetSourceConfig,
    SourceConfig,
    TaskSourceConfig,
)
from kdrl_jax.data.gym import GymSource
from kdrl_jax.data.rows import BadRows, Row
from kdrl_jax.data.stored import open_array_record, open_hub, open_jsonl, open_parquet
from kdrl_jax.data.tasks import task_row


class Source(Protocol):
    """Rows by index. Negative indices and slices are not supported."""

    name: str
    """For logs: the file's name, or `task/split`. May be changed to tell sources apart."""
    in_memory: bool
    """Whether the rows lie in memory; or else they are made up one by one."""
    num_checked: int
    """How many of the first rows are looked at when a run starts: all in memory, some of those made up."""
    may_change: bool
    """Whether the same config may give other rows another time: a file or a library was changed."""
    bad: BadRows
    """Rows that were left out; who uses a row adds it if it is of no use."""
    left_out: Counter[str]
    """Reason -> rows that the config does not want, beside these."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def place(self, index: int) -> str:
        """Where a row is, for error messages: `gsm8k.jsonl:17`, `chain_sum/train row 17`."""


def open_source(config: SourceConfig, needs_completion: bool) -> Source:
    """Opens a source; what is stored is read and checked whole.

    Args:
        config: files, a data set of the hub, a task or a generator.
        needs_completion: whether every row must have a completion to imitate (SFT).

    Raises:
        FileNotFoundError: no such file.
        ImportError: the library for such sources is not installed; it says how to.
        ValueError: a malformed row, with file, line and field; no rows; no completions where they are
            needed; a task whose split is empty; a data set or generator that cannot be had.
    """
    if isinstance(config, TaskSourceConfig):
        return TaskSource(config)
    if isinstance(config, GymSourceConfig):
        if needs_completion:
            raise ValueError(
                f"reasoning-gym's {config.task}: rollout.source=dataset imitates completions, and its "
                "questions have none"
            )
        return GymSource(config)
    if needs_completion and config.completion_field is None:
        address = config.name if isinstance(config, HubSourceConfig) else config.path
        raise ValueError(
            f"{address}: rollout.source=dataset imitates completions, but this source names no field for "
            "them; set completion_field"
        )
    match config:
        case JsonlSourceConfig():
            return open_jsonl(config)
        case ParquetSourceConfig():
            return open_parquet(config)
        case ArrayRecordSourceConfig():
            return open_array_record(config)
        case HubSourceConfig():
            return open_hub(config)


TASK_ROWS_CHECKED = 1000


class TaskSource:
    """Rows of a procedural task, made when asked for."""

    in_memory = False
    may_change = False

    def __init__(self, config: TaskSourceConfig):
        self._config = config
        self.bad = BadRows(0)
        self.left_out: Counter[str] = Counter()
        self.num_checked = min(config.size, TASK_ROWS_CHECKED)
        self.name = config.label or f"{config.task}/{config.split}"
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
