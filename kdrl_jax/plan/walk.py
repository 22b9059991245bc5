"""The walk through a compiled program that `cost` sums up: instruction by instruction, in the order of its
schedule."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from kdrl_jax.plan.chips import Chip
from kdrl_jax.plan.collectives import awaited, transfers
from kdrl_jax.plan.hlo import Computation, Instruction, Module
from kdrl_jax.plan.loops import find_loops
from kdrl_jax.plan.work import KERNEL, Reader

T = TypeVar("T")

KERNEL_SHARE = 0.5
"""Of the peak that a Pallas kernel reaches where operations bound it. A round figure, not a measurement."""


OTHER = "other"
"""The scope of what is in none that was asked for."""


@dataclasses.dataclass(frozen=True)
class KernelWork:
    """What one call of a Pallas kernel does."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Given:
    """What the text does not say."""

    loops: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """How often loops run whose count is known at run time only. A key is the loop's whole op_name, or a
    named scope that the loop stands in, inside of the loops around it."""
    branches: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    """How often each branch of a conditional is taken, in the order of `lax.switch`, or (false, true); keys
    as above."""
    kernels: Mapping[str, KernelWork] = dataclasses.field(default_factory=dict)
    """Work of one call of the kernels of a name, which may be a scope in their op_name."""


NOTHING = Given()


@dataclasses.dataclass(frozen=True)
class Step:
    """What one instruction does, and the seconds it takes by different accounts."""

    flops: float = 0.0
    kernel_flops: float = 0.0
    bytes: float = 0.0
    at_peak: float = 0.0
    """Its operations, at peak or at a kernel's share of it."""
    in_memory: float = 0.0
    """Its bytes."""
    compiler: float = 0.0
    """What the compiler expects; 0 where it says nothing."""
    kind: str = "memory"
    note: str = ""


def roofline(step: Step) -> float:
    """Seconds at peak, or at the memory's bandwidth."""
    return max(step.at_peak, step.in_memory)


def estimate(step: Step) -> float:
    """The same, but for products no less than the compiler expects."""
    return max(roofline(step), step.compiler if step.flops else 0.0)


def by_compiler(step: Step) -> float:
    """What the compiler expects, of whatever it says something."""
    return step.compiler or roofline(step)


Account = Callable[[Step], float]


@dataclasses.dataclass
class Tally:
    """Sums over a computation."""

    flops: float = 0.0
    kernel_flops: float = 0.0
    bytes: float = 0.0
    seconds: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    """By scope and kind."""
    collectives: dict[tuple[str, int], tuple[float, float, float]] = dataclasses.field(default_factory=dict)
    """By kind and size of the group: how many, bytes, seconds on the network."""
    uncounted: dict[str, None] = dataclasses.field(default_factory=dict)
    notes: dict[str, None] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> float:
        """Seconds."""
        return sum(self.seconds.values())

    def take(self, scope: str, kind: str, seconds: float) -> None:
        """Adds time, if there is any."""
        if seconds > 0:
            self.seconds[scope, kind] = self.seconds.get((scope, kind), 0.0) + seconds

    def move(self, key: tuple[str, int], count: float, size: float, seconds: float) -> None:
        """Adds collectives."""
        old = self.collectives.get(key, (0.0, 0.0, 0.0))
        self.collectives[key] = (old[0] + count, old[1] + size, old[2] + seconds)

    def add(self, other: "Tally", times: float) -> None:
        """Adds all of another one, so many times."""
        self.flops += times * other.flops
        self.kernel_flops += times * other.kernel_flops
        self.bytes += times * other.bytes
        for (scope, kind), seconds in other.seconds.items():
            self.take(scope, kind, times * seconds)
        for key, sums in other.collectives.items():
            count, size, seconds = (times * x for x in sums)
            self.move(key, count, size, seconds)
        self.uncounted |= other.uncounted
        self.notes |= other.notes


@dataclasses.dataclass
class _Clock:
    """Seconds since a computation began, at which each of these is free."""

    now: float = 0.0
    network: float = 0.0
    memory: float = 0.0
    ends: dict[str, tuple[float, str]] = dataclasses.field(default_factory=dict)
    """When what was started ends, and of what kind it is; by the starting instruction or the channel."""


class Walk:
    """Walks a program of one chip."""

    def __init__(self, module: Module, chip: Chip, given: Given, scopes: Sequence[str]):
        self.module, self.chip, self.given, self.scopes = module, chip, given, scopes
        self.reader, self.loops = Reader(module), find_loops(module)
        self._steps: dict[tuple[str, str], Step] = {}
        self._tallies: dict[tuple[Account, str, str], Tally] = {}

    def program(self, account: Account) -> Tally:
        """All of the program."""
        return self._computation(self.module.entry.name, "", account)

    def _computation(self, name: str, around: str, account: Account) -> Tally:
        """A computation once; `around` is the op_name of the instruction that runs it."""
        key = (account, name, around)
        if key in self._tallies:
            return self._tallies[key]
        tally, clock = Tally(), _Clock()
        computation = self.module.computations[name]
        for instruction in computation:
            scope = self._scope(computation, instruction, around)
            inner = self._inner(instruction, instruction.op_name or around, tally, account)
            for times, other in inner:
                tally.add(other, times)
                clock.now += times * other.total
            if not inner:
                self._simple(computation, instruction, scope, tally, clock, account)
        # What was started is part of the time, whoever waits for it.
        scope = self._scope(computation, computation.root, around)
        tally.take(scope, "memory", clock.memory - clock.now)
        tally.take(scope, "collective", clock.network - max(clock.now, clock.memory))
        self._tallies[key] = tally
        return tally

    def _inner(
        self, instruction: Instruction, name: str, tally: Tally, account: Account
    ) -> list[tuple[float, Tally]]:
        """The computations that an instruction runs, and how often."""
        if instruction.opcode == "while":
            times: float | None = self.loops.trip_count(instruction)
            if times is None:
                times = _matching(self.given.loops, instruction.op_name)
            if times is None:
                tally.uncounted[instruction.op_name or instruction.name] = None
                times = 1
            parts = (instruction.attribute("body"), instruction.attribute("condition"))
            return [(times, self._computation(part or "", name, account)) for part in parts]
        if instruction.opcode == "conditional":
            inner = [self._computation(branch, name, account) for branch in instruction.branches]
            weights = _matching(self.given.branches, instruction.op_name)
            if weights is None:
                tally.notes[f"{name or instruction.name}: counted as its most expensive branch"] = None
                return [(1.0, max(inner, key=lambda x: x.total))]
            if len(weights) != len(inner):
                raise ValueError(
                    f"{name}: weights {tuple(weights)} are given for a conditional of {len(inner)} branches"
                )
            return list(zip(weights, inner, strict=True))
        if instruction.opcode == "call" and instruction.called is not None:
            return [(1.0, self._computation(instruction.called, name, account))]
        return []

    def _simple(
        self,
        computation: Computation,
        instruction: Instruction,
        scope: str,
        tally: Tally,
        clock: _Clock,
        account: Account,
    ) -> None:
        """An instruction that runs no computation of its own."""
        for key in [*instruction.operands, *awaited(self.reader, computation, instruction)]:
            if instruction.opcode.endswith("-done") or key not in instruction.operands:
                end, kind = clock.ends.pop(key, (0.0, ""))
                tally.take(scope, kind, end - clock.now)
                clock.now = max(clock.now, end)
        step = self._step(computation, instruction)
        tally.flops += step.flops
        tally.kernel_flops += step.kernel_flops
        tally.bytes += step.bytes
        if step.note:
            tally.notes[step.note] = None
        clock.memory = max(clock.memory, clock.now) + step.in_memory
        moved = transfers(self.reader, computation, instruction)
        for transfer in moved:
            seconds = transfer.seconds(self.chip)
            tally.move((transfer.kind, transfer.group_size), 1, transfer.bytes, seconds)
            begins = max(clock.network, clock.now)
            clock.network = begins + seconds
            if transfer.starts:
                key = instruction.name if instruction.opcode.endswith("-start") else transfer.channel
                clock.ends[key] = (clock.network, "collective")
            else:
                tally.take(scope, "collective", clock.network - clock.now)
                clock.now = clock.network
        if instruction.opcode in ("copy-start", "slice-start"):
            clock.ends[instruction.name] = (clock.memory, "memory")
        elif not moved:
            seconds = account(step)
            tally.take(scope, step.kind, seconds)
            clock.now += seconds

    def _step(self, computation: Computation, instruction: Instruction) -> Step:
        key = (computation.name, instruction.name)
        if key not in self._steps:
            self._steps[key] = self._read(computation, instruction)
        return self._steps[key]

    def _read(self, computation: Computation, instruction: Instruction) -> Step:
        kernel = self._kernel(computation, instruction)
        if kernel is not None:
            return kernel
        floats, integers = self.reader.operations(computation, instruction)
        size = self.reader.traffic(computation, instruction)
        at_peak = floats / self.chip.flops + integers / self.chip.int8_ops
        in_memory = size / self.chip.bandwidth
        return Step(
            flops=floats + integers,
            bytes=size,
            at_peak=at_peak,
            in_memory=in_memory,
            compiler=instruction.cycles / self.chip.clock,
            kind="compute" if at_peak > in_memory else "memory",
        )

    def _kernel(self, computation: Computation, instruction: Instruction) -> Step | None:
        """Of a Pallas kernel, alone or in a fusion."""
        kernels = [
            inner
            for _, inner in self.reader.all_in(computation, instruction)
            if inner.attribute("custom_call_target") == KERNEL
        ]
        if not kernels:
            return None
        kernel, note = kernels[0], ""
        work = _matching(self.given.kernels, kernel.op_name, whole=True)
        if work is None:
            told = kernel.config.get("custom_call_config", {}).get("cost_estimate")
            if told is not None:
                work = KernelWork(float(told["flops"]), float(told["bytes_accessed"]))
        if work is None:
            work = KernelWork(0.0, self.reader.traffic(computation, instruction))
            note = (
                f"{kernel.op_name or kernel.name}: no estimate of its work; taken as its operands and results"
            )
        at_peak = work.flops / (self.chip.flops * KERNEL_SHARE)
        return Step(
            kernel_flops=work.flops,
            bytes=work.bytes,
            at_peak=at_peak,
            in_memory=work.bytes / self.chip.bandwidth,
            kind="pallas",
            note=note,
        )

    def _scope(self, computation: Computation, instruction: Instruction, around: str) -> str:
        """The first of the scopes that an instruction stands in."""
        name = instruction.op_name
        if not name and instruction.opcode == "fusion":
            inner = (x.op_name for _, x in self.reader.all_in(computation, instruction))
            name = next(filter(None, inner), "")
        return next((scope for scope in self.scopes if _stands_in(name or around, scope)), OTHER)


def _matching(given: Mapping[str, T], op_name: str, whole: bool = False) -> T | None:
    """What is given for an op_name, or for a scope in it; only one inside of the loops around, unless
    `whole`."""
    if op_name in given:
        return given[op_name]
    inside = op_name if whole else op_name.rpartition("/while/body/")[2]
    return next((value for key, value in given.items() if _stands_in(inside, key)), None)


@functools.lru_cache(maxsize=1 << 16)
def _stands_in(op_name: str, scope: str) -> bool:
    """Whether a scope is a part of the path, be it in the brackets of a transformation."""
    return re.search(rf"(?<![\w.\-]){re.escape(scope)}(?![\w.\-])", op_name) is not None
