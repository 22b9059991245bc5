"""Collectives of a compiled program, and how long the network needs for them.

The times are those of a ring over both directions of one dimension of the network, as in "How to Scale Your
Model" (jax-ml.github.io/scaling-book, chapter 3): with n chips and w bytes a second over a link in one
direction, an array of b bytes takes

    all-gather, reduce-scatter   (n - 1) / n * b / (2 w)     b of the whole array
    all-reduce                   twice that                  b of the array that each chip has
    all-to-all                   n / 4 * b / (2 w)           b of what each chip has
    collective-permute           b / w

and a microsecond for each hop to the chip that is farthest. Two chips have one link, w and not 2 w. Groups
along several dimensions of a torus can be quicker; groups along a line that does not close are slower.
"""

import dataclasses

from kdrl_jax.plan.chips import Chip
from kdrl_jax.plan.hlo import Computation, Instruction
from kdrl_jax.plan.work import Reader

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_HOP = 1e-6


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One collective, as one chip sees it."""

    kind: str
    bytes: float
    """Of the whole array that is gathered; for other kinds, of what the chip gives."""
    group_size: int
    channel: str
    """By which the parts of a spread collective are known."""
    starts: bool
    """Whether it goes on while other instructions run."""

    def seconds(self, chip: Chip) -> float:
        """By the formulas above."""
        n = self.group_size
        if n < 2:
            return 0.0
        if self.kind == "collective-permute":
            return self.bytes / chip.link + _HOP
        both = chip.link * min(n - 1, 2)
        if self.kind == "all-to-all":
            return n / 4 * self.bytes / both + n // 2 * _HOP
        once = (n - 1) / n * self.bytes / both + n // 2 * _HOP
        return 2 * once if self.kind == "all-reduce" else once


def transfers(reader: Reader, computation: Computation, instruction: Instruction) -> list[Transfer]:
    """The collectives that begin with an instruction: its own, or those that it fuses.

    The TPU compiler spreads a collective over a fusion that starts it, some that compute beside it and one
    that waits for it, and writes it in each: it counts where it starts.
    """
    if instruction.opcode == "async-start" and instruction.called is not None:
        called = reader.module.computations[instruction.called]
        inner = [(called, x) for x in called]
    else:
        inner = list(reader.all_in(computation, instruction))
    spread = any(x.attribute("custom_call_target") == "AsyncCollectiveStart" for _, x in inner)
    starts = spread or instruction.opcode.endswith("-start")
    return [
        _transfer(reader, where, x, starts)
        for where, x in inner
        if x.opcode.removesuffix("-start") in KINDS and not x.continues
    ]


def awaited(reader: Reader, computation: Computation, instruction: Instruction) -> list[str]:
    """Channels of spread collectives that an instruction waits for."""
    inner = list(reader.all_in(computation, instruction))
    if not any(x.attribute("custom_call_target") == "AsyncCollectiveDone" for _, x in inner):
        return []
    return [_channel(x) for _, x in inner if x.opcode in KINDS]


def _transfer(reader: Reader, computation: Computation, x: Instruction, starts: bool) -> Transfer:
    kind = x.opcode.removesuffix("-start")
    size = x.group_size or (2 if kind == "collective-permute" else reader.module.num_devices)
    given = sum(s.bytes for name in x.operands for s in computation.instructions[name].shapes)
    if kind == "all-reduce" and any(user.opcode == "dynamic-slice" for user in computation.users[x.name]):
        # In one fusion with the slice that it is cut to.
        kind = "reduce-scatter"
    return Transfer(kind, given * size if kind == "all-gather" else given, size, _channel(x), starts)


def _channel(x: Instruction) -> str:
    return x.attribute("channel_id") or x.name
