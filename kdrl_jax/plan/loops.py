"""How often the loops of a compiled program run."""

import dataclasses
import math
from collections.abc import Mapping

from kdrl_jax.plan.hlo import Computation, Instruction, Module

_SAME = ("copy", "bitcast", "reshape", "convert", "copy-done", "copy-start", "opt-barrier")
"""Opcodes that give on a whole number as it is."""

_Value = tuple[Computation, Instruction]
"""An instruction and where it stands."""


@dataclasses.dataclass(frozen=True)
class Loops:
    """The loops of a program and where they stand."""

    module: Module
    callers: Mapping[str, _Value]
    """By the name of a body or condition."""

    def trip_count(self, loop: Instruction) -> int | None:
        """How often a `while` runs; None where that is known at run time only.

        XLA says it on CPU. On TPU it says nothing, and the count is read off a condition that compares a
        counter, which each turn adds a constant to, with a bound that no turn changes; all must lead back to
        constants. A condition of several parts gives none: it may end a loop early.
        """
        known = loop.config.get("known_trip_count", {}).get("n")
        if known is not None:
            return int(known)
        condition, body = (self.module.computations[loop.attribute(x) or ""] for x in ("condition", "body"))
        compare, operands = self._open(condition, _origin(condition, condition.root))
        if compare.opcode != "compare" or compare.attribute("direction") not in ("LT", "GT"):
            return None
        counter, bound = operands if compare.attribute("direction") == "LT" else reversed(operands)
        index = _place(*counter)
        if index is None:
            return None
        start, step, end = self._initial(loop, index), self._step(body, index), self.constant(*bound)
        if start is None or end is None or step is None or step < 1:
            return None
        return max(math.ceil((end - start) / step), 0)

    def constant(self, computation: Computation, value: Instruction) -> int | None:
        """The whole number that a value always is."""
        value = _origin(computation, value)
        if value.opcode == "constant":
            return value.number
        if value.opcode != "get-tuple-element":
            return None
        index = int(value.attribute("index") or 0)
        source = _origin(computation, computation.instructions[value.operands[0]])
        if source.opcode == "tuple":
            return self.constant(computation, computation.instructions[source.operands[index]])
        if source.opcode == "while":
            return self._unchanged(source, index)
        if source.opcode == "parameter" and computation.name in self.callers:
            return self._unchanged(self.callers[computation.name][1], index)
        return None

    def _unchanged(self, loop: Instruction, index: int) -> int | None:
        """A part of what a loop carries, if no turn changes it."""
        body = self.module.computations[loop.attribute("body") or ""]
        kept = _carried(body, index)
        same = kept is not None and _place(body, kept) == index
        return self._initial(loop, index) if same else None

    def _initial(self, loop: Instruction, index: int) -> int | None:
        """What a part is before the first turn."""
        computation, _ = self.callers[loop.attribute("body") or ""]
        carried = computation.instructions[loop.operands[0]]
        if carried.opcode != "tuple":
            return None
        return self.constant(computation, computation.instructions[carried.operands[index]])

    def _step(self, body: Computation, index: int) -> int | None:
        """What each turn adds to a part."""
        new = _carried(body, index)
        if new is None:
            return None
        add, operands = self._open(body, new)
        if add.opcode != "add":
            return None
        others = [value for value in operands if _place(*value) != index]
        return self.constant(*others[0]) if len(others) == 1 else None

    def _open(self, computation: Computation, value: Instruction) -> tuple[Instruction, list[_Value]]:
        """An instruction and its operands; of a fusion, those of what it ends with."""
        if value.opcode != "fusion":
            return value, [(computation, computation.instructions[x]) for x in value.operands]
        called = self.module.computations[value.called or ""]
        found = []
        for name in called.root.operands:
            operand = called.instructions[name]
            outer = operand.opcode == "parameter" and operand.number is not None
            found.append(
                (computation, computation.instructions[value.operands[operand.number or 0]])
                if outer
                else (called, operand)
            )
        return called.root, found


def find_loops(module: Module) -> Loops:
    """The loops of a program."""
    callers = {}
    for computation in module.computations.values():
        for instruction in computation:
            if instruction.opcode == "while":
                for name in ("body", "condition"):
                    callers[instruction.attribute(name) or ""] = (computation, instruction)
    return Loops(module, callers)


def _origin(computation: Computation, value: Instruction) -> Instruction:
    while value.opcode in _SAME:
        value = computation.instructions[value.operands[0]]
    return value


def _carried(body: Computation, index: int) -> Instruction | None:
    """What a turn leaves in a place of the tuple that the loop carries."""
    if body.root.opcode != "tuple":
        return None
    return _origin(body, body.instructions[body.root.operands[index]])


def _place(computation: Computation, value: Instruction) -> int | None:
    """Which part of the tuple that a loop carries a value is."""
    value = _origin(computation, value)
    if value.opcode != "get-tuple-element":
        return None
    carries = computation.instructions[value.operands[0]].opcode == "parameter"
    return int(value.attribute("index") or 0) if carries else None
