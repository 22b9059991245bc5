"""The text of a compiled program, read into computations and instructions.

`compiled.as_text()` is XLA's own format (openxla.org/xla/operation_semantics has the opcodes); on TPU it is
the program after scheduling, so that the order of instructions is the order they begin in. Attributes are
read when they are asked for: most of the text is never looked at.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0, "c64": 64, "c128": 128}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# What runs on a sparse core says so behind its end.
_END = re.compile(r'^\}(?:, execution_thread="\w+")?$')
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_LEAF = re.compile(r"\b([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array of a program."""

    dtype: str
    """As XLA calls it: f32, bf16, s8, pred."""
    dims: tuple[int, ...]
    layout: str = ""
    """What stands in braces: order of the dimensions, tiles, memory space."""

    @property
    def space(self) -> int:
        """Memory space; 0 is the chip's main memory, 1 on TPU the vector memory beside its units, and 5 the
        host's."""
        found = re.search(r"S\((\d+)\)", self.layout)
        return int(found.group(1)) if found else 0

    @property
    def bits(self) -> int:
        """Of an element."""
        known = _BITS.get(self.dtype)
        if known is not None:
            return known
        digits = re.match(r"[a-z]+(\d+)", self.dtype)
        return int(digits.group(1)) if digits else 0

    @property
    def bytes(self) -> float:
        """As it lies in memory, filled up to whole tiles."""
        order, _, rest = self.layout.partition(":")
        dims = list(self.dims)
        tile = re.match(r"T\(([\d,]+)\)", rest)
        if tile and dims and order:
            sizes = [int(x) for x in tile.group(1).split(",")]
            for axis, size in zip((int(x) for x in order.split(",")), reversed(sizes), strict=False):
                dims[axis] = -(-dims[axis] // size) * size
        return math.prod(dims) * self.bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    type_text: str
    operand_text: str
    """What stands in the parentheses: names, or the value of a constant, or the number of a parameter."""
    rest: str
    """The attributes."""

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Of the result; of a tuple's parts, nested ones too, in order."""
        return tuple(shapes_in(self.type_text))

    @functools.cached_property
    def parts(self) -> tuple[str, ...]:
        """The types of a tuple's parts; of anything else, its one type."""
        text = self.type_text
        return tuple(_split(text[1:-1])) if text.startswith("(") else (text,)

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions that it reads."""
        return tuple(re.findall(r"%([\w.\-]+)", self.operand_text))

    @property
    def number(self) -> int | None:
        """Of a parameter, or the value of a whole scalar constant."""
        return int(self.operand_text) if re.fullmatch(r"-?\d+", self.operand_text) else None

    def attribute(self, name: str) -> str | None:
        """A word, or what stands in braces or quotes."""
        found = re.search(rf"\b{name}=(?:\"([^\"]*)\"|\{{([^}}]*)\}}|%?([^\s,]+))", self.rest)
        return next((x for x in found.groups() if x is not None), None) if found else None

    @functools.cached_property
    def op_name(self) -> str:
        """The path of named scopes and primitives that jax gave it; empty where there is none."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return found.group(1) if found else ""

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        """The compiler's notes; empty where there are none or they are no object."""
        at = self.rest.find("backend_config={")
        if at < 0:
            return {}
        try:
            return json.JSONDecoder().raw_decode(self.rest, at + len("backend_config="))[0]
        except json.JSONDecodeError:
            return {}

    @property
    def cycles(self) -> float:
        """That the TPU compiler expects it to take; 0 where it says nothing."""
        return float(self.config.get("window_config", {}).get("estimated_cycles", 0))

    @functools.cached_property
    def continues(self) -> bool:
        """Whether it is a later part of a collective that the TPU compiler has spread over fusions."""
        spread = self.config.get("async_collective_fusion_config", {})
        return int(spread.get("flag_start", -1)) >= 0

    @property
    def called(self) -> str | None:
        """The computation of a fusion, a call or an asynchronous operation."""
        return self.attribute("calls") or self.attribute("to_apply")

    @property
    def branches(self) -> tuple[str, ...]:
        """The computations of a conditional, the first one for index 0 or false."""
        listed = self.attribute("branch_computations")
        if listed is not None:
            return tuple(x.strip().lstrip("%") for x in listed.split(","))
        pair = (self.attribute("false_computation"), self.attribute("true_computation"))
        return tuple(x for x in pair if x is not None)

    @property
    def group_size(self) -> int | None:
        """Devices that take part in a collective together; None where all do, or where pairs are listed."""
        text = self.rest
        if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
            return len(found.group(1).split(","))
        if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
            return int(found.group(2))
        if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=[^{]*)?\s*\{([^}]*)\}", text):
            sizes = dict(re.findall(r"'([^']+)'=(\d+)", found.group(1)))
            # 'a' is a whole axis; 'a':(m)n a part of one, of n devices.
            axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found.group(2))
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        return None


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of a program; its instructions in the order they stand in."""

    name: str
    instructions: Mapping[str, Instruction]
    root: Instruction

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @functools.cached_property
    def parameters(self) -> Mapping[int, Instruction]:
        """By their number."""
        return {i.number: i for i in self if i.opcode == "parameter" and i.number is not None}

    @functools.cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        """Those that read an instruction, by its name."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self:
            for name in dict.fromkeys(instruction.operands):
                found[name].append(instruction)
        return {name: tuple(x) for name, x in found.items()}


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    name: str
    computations: Mapping[str, Computation]
    entry: Computation
    num_devices: int
    """That run it together."""


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`.

    Raises:
        ValueError: when it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = name = ""
    lines: list[str] = []
    for line in text.splitlines():
        if not name:
            if header := _HEADER.match(line):
                name, lines = header.group(2), []
                entry = name if header.group(1) else entry
        elif _END.match(line):
            computations[name] = _computation(name, lines)
            name = ""
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:
            # The notes that a kernel carries may have lines of their own.
            lines[-1] += line
    if entry not in computations:
        raise ValueError(f"the program's text has no entry computation: {text[:80]!r}")
    first = text.partition("\n")[0]
    counts = re.findall(r"(?:replica_count|num_partitions)=(\d+)", first)
    title = re.match(r"HloModule ([^\s,]+)", first)
    return Module(
        title.group(1) if title else "", computations, computations[entry], math.prod(map(int, counts))
    )


def shapes_in(text: str) -> Iterator[Shape]:
    """All arrays that are named in a type."""
    for dtype, dims, layout in _LEAF.findall(text):
        sizes = tuple(int(x.strip().lstrip("<=")) for x in dims.split(",") if x.strip())
        yield Shape(dtype, sizes, layout)


def _computation(name: str, lines: list[str]) -> Computation:
    made = [_instruction(line) for line in lines]
    root = next(
        (i for i, line in zip(made, lines, strict=True) if line.lstrip().startswith("ROOT ")), made[-1]
    )
    return Computation(name, {i.name: i for i in made}, root)


def _instruction(line: str) -> Instruction:
    """Of a line: name = type opcode(operands), attributes."""
    begins = _INSTRUCTION.match(line)
    assert begins is not None
    name, text = begins.group(1), line[begins.end() :]
    at = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opens = text.index("(", at)
    closes = _closing(text, opens)
    return Instruction(name, text[at:opens].strip(), text[:at], text[opens + 1 : closes], text[closes + 1 :])


def _closing(text: str, at: int) -> int:
    """Where the parenthesis that opens at `at` closes."""
    depth = 0
    for found in re.compile(r'[()"]').finditer(text, at):
        depth += {"(": 1, ")": -1, '"': 0}[found.group()]
        if depth == 0:
            return found.start()
    return len(text)


def _split(text: str) -> list[str]:
    """At the commas that stand in no brackets."""
    parts, depth, start = [], 0, 0
    for found in re.finditer(r"[(){}\[\],]", text):
        char = found.group()
        if char == "," and depth == 0:
            parts.append(text[start : found.start()])
            start = found.end()
        elif char != ",":
            depth += 1 if char in "({[" else -1
    parts.append(text[start:])
    return [re.sub(r"/\*.*?\*/", "", part).strip() for part in parts]
