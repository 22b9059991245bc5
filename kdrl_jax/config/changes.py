"""Which settings may change while a run goes on."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from kdrl_jax.config.errors import show
from kdrl_jax.config.load import differences

FREE = (
    "name",
    "cache_dir",
    "deterministic",
    "plan.*",
    "alarms.*",
    "log.*",
    "checkpoint.*",
    "eval.*",
    "data.eval",
    "mesh.*",
    "train.num_steps",
    "train.pack_length",
    "train.microbatch_rows",
    "train.share_prompts",
    "train.attention",
    "train.remat",
    "train.park_*",
    "train.head_chunk",
    "train.diagnostics_every",
    "train.max_skipped_updates",
    "rollout.decode_chunk",
    "rollout.slots_per_device",
    "rollout.attention",
    "reward.num_workers",
)
"""Patterns of settings that change how long a run is, how fast, what is measured of it and where it lies, but
none of its updates beyond rounding."""


@dataclass(frozen=True)
class Change:
    """A setting that is another one than it was."""

    key: str
    before: Any
    now: Any

    @property
    def is_free(self) -> bool:
        """Whether the run means the same with it."""
        return any(fnmatchcase(self.key, pattern) for pattern in FREE)

    def __str__(self) -> str:
        return f"{self.key} was {show(self.before)}, is {show(self.now)}"


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Between two dumped configs; where the run lies is none of them."""
    return [Change(*found) for found in differences(before, now) if found[0] != "log.dir"]
