"""What single instructions compute and move."""

import dataclasses
import functools
import math
from collections.abc import Iterator

from kdrl_jax.plan.hlo import Computation, Instruction, Module, shapes_in

KERNEL = "tpu_custom_call"
"""Target of the custom calls that Pallas kernels become."""

_NOTHING_MOVES = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"),
    *("replica-id", "while", "conditional", "call", "opt-barrier", "add-dependency", "domain"),
)
_FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast", "ShardBarrier")
_SAME_PLACE = ("bitcast", "reshape", "transpose", "convert", "copy")
"""In a fusion, which computes no more elements of these than are asked for."""
_CUTS = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads the work of a program's instructions."""

    module: Module

    def inside(self, instruction: Instruction) -> Computation | None:
        """The computation of a fusion."""
        if instruction.opcode != "fusion":
            return None
        return self.module.computations[instruction.called or ""]

    def all_in(
        self, computation: Computation, instruction: Instruction
    ) -> Iterator[tuple[Computation, Instruction]]:
        """The instruction, or those that it fuses, and where each stands."""
        called = self.inside(instruction)
        if called is None:
            yield computation, instruction
            return
        for inner in called:
            yield from self.all_in(called, inner)

    def operations(self, computation: Computation, instruction: Instruction) -> tuple[float, float]:
        """Operations of products (of floats, of 8-bit integers); an addition and a multiplication are two."""
        floats = integers = 0.0
        for where, inner in self.all_in(computation, instruction):
            if inner.opcode not in ("dot", "convolution"):
                continue
            count = (_of_dot if inner.opcode == "dot" else _of_convolution)(where, inner)
            types = {s.dtype for x in inner.operands[:2] for s in where.instructions[x].shapes}
            if types <= {"s8", "u8", "s4", "u4"}:
                integers += count
            else:
                floats += count
        return floats, integers

    def traffic(self, computation: Computation, instruction: Instruction) -> float:
        """Bytes that an instruction reads from and writes to the main memory.

        A slice out of an array is what is read of it, inside a fusion too; an update in place is what is
        written. Arrays in other memories (the vector memory, the host's) are not counted.
        """
        if instruction.opcode in _NOTHING_MOVES or instruction.opcode.endswith(("-done", "-update")):
            return 0.0
        if instruction.attribute("custom_call_target") in _FREE_TARGETS:
            return 0.0
        if instruction.opcode in ("copy-start", "slice-start"):
            # (destination, source, context), or ((source), destination, context): the destination twice,
            # as the source is no larger where it is read.
            return self._copied(computation, instruction)
        called = self.inside(instruction)
        read = 0.0
        names = instruction.operands if called is not None else dict.fromkeys(instruction.operands)
        for number, name in enumerate(names):
            operand = computation.instructions[name]
            whole = sum(s.bytes for s in operand.shapes if s.space == 0)
            if not whole:
                continue
            if called is not None:
                parameter = called.parameters[number]
                read += min(self._read(called, parameter, parameter), whole)
            else:
                read += min(_read_by(operand, instruction, operand), whole)
        if instruction.opcode.endswith("-start"):
            # The type holds the operands again.
            return read + max((s.bytes for s in instruction.shapes if s.space == 0), default=0.0)
        return read + self._written(computation, instruction)

    def _copied(self, computation: Computation, instruction: Instruction) -> float:
        shapes = instruction.shapes
        to, source = (shapes[0], shapes[1]) if instruction.opcode == "copy-start" else (shapes[1], shapes[0])
        return to.bytes * ((to.space == 0) + (source.space == 0))

    def _read(self, computation: Computation, value: Instruction, source: Instruction) -> float:
        """Bytes that a fused computation reads of one of its parameters, by way of what it makes of it."""
        if value is computation.root and value is not source:
            return sum(s.bytes for s in source.shapes)
        total = 0.0
        for user in computation.users[value.name]:
            if user.opcode in _SAME_PLACE:
                total += self._read(computation, user, source)
            elif user.opcode == "fusion" and value is source:
                called = self.module.computations[user.called or ""]
                for number, name in enumerate(user.operands):
                    if name == value.name:
                        parameter = called.parameters[number]
                        total += self._read(called, parameter, parameter)
            else:
                total += _read_by(value, user, source)
        return total

    def _written(self, computation: Computation, instruction: Instruction) -> float:
        called = self.inside(instruction)
        if called is None:
            if all(s.space != 0 for s in instruction.shapes):
                return 0.0
            return self._result(computation, instruction, instruction.type_text)
        root = called.root
        if root.opcode != "tuple":
            return self._result(called, root, instruction.type_text)
        parts = zip(root.operands, instruction.parts, strict=True)
        return sum(self._result(called, called.instructions[name], part) for name, part in parts)

    def _result(self, computation: Computation, value: Instruction, type_text: str) -> float:
        """Bytes written of a result of this type that is computed as `value`."""
        shapes = [s for s in shapes_in(type_text) if s.space == 0]
        if not shapes:
            return 0.0
        if value.opcode == "bitcast":
            return self._result(computation, computation.instructions[value.operands[0]], type_text)
        if value.opcode == "fusion":
            called = self.module.computations[value.called or ""]
            return self._result(called, called.root, type_text)
        if value.opcode in ("dynamic-update-slice", "scatter"):
            updates = value.operands[1:2] if value.opcode != "scatter" else value.operands[-1:]
            return sum(s.bytes for name in updates for s in computation.instructions[name].shapes)
        if value.attribute("custom_call_target") == "AsyncCollectiveStart":
            # (operand, result, ...): the result is filled by and by.
            result = value.shapes[1] if len(value.shapes) > 1 else shapes[0]
            return result.bytes if result.space == 0 else 0.0
        if value.opcode == "parameter" or value.continues or _ends(value):
            return 0.0
        return sum(s.bytes for s in shapes)


def _ends(instruction: Instruction) -> bool:
    """Whether it only waits for a collective that was spread over fusions."""
    return instruction.attribute("custom_call_target") == "AsyncCollectiveDone"


def _read_by(value: Instruction, user: Instruction, source: Instruction) -> float:
    """Bytes of `source` that an instruction reads by reading `value`, which has the same elements."""
    is_first = user.operands[0] == value.name
    if user.opcode in _CUTS and is_first:
        return sum(s.bytes for s in user.shapes) * source.shapes[0].bits / max(user.shapes[0].bits, 1)
    if user.opcode in ("dynamic-update-slice", "scatter") and is_first:
        return 0.0
    # What is only handed through, and a collective that read it before.
    if (user.opcode == "tuple" and value is source) or user.continues or _ends(user):
        return 0.0
    return sum(s.bytes for s in source.shapes)


def _of_dot(computation: Computation, dot: Instruction) -> float:
    """2 * elements of the result * elements summed over."""
    left = computation.instructions[dot.operands[0]].shapes[0].dims
    axes = dot.attribute("lhs_contracting_dims") or ""
    summed = math.prod(left[int(axis)] for axis in axes.split(",") if axis)
    return 2.0 * math.prod(dot.shapes[0].dims) * summed


def _of_convolution(computation: Computation, convolution: Instruction) -> float:
    """2 * products that are not with padding or with the zeros of a dilation.

    TPU writes all dots so; a batch dimension becomes one of space, dilated so that each meets its own.
    """
    left, right = (computation.instructions[name].shapes[0].dims for name in convolution.operands[:2])
    out = convolution.shapes[0].dims
    labels, out_labels = (convolution.attribute("dim_labels") or "").split("->")
    left_labels, right_labels = labels.split("_")
    window = dict(part.split("=") for part in (convolution.attribute("window") or "").split())
    groups = int(convolution.attribute("batch_group_count") or 1)
    count = 2.0 * left[left_labels.index("b")] / groups
    count *= right[right_labels.index("i")] * right[right_labels.index("o")]
    spatial = [label for label in out_labels if label not in "bf"]
    for label in spatial:
        at = int(label)

        def of(name: str, default: str, at: int = at) -> str:
            return window[name].split("x")[at] if name in window else default

        count *= _meetings(
            left[left_labels.index(label)],
            right[right_labels.index(label)],
            out[out_labels.index(label)],
            int(of("stride", "1")),
            int(of("pad", "0_0").split("_")[0]),
            int(of("lhs_dilate", "1")),
            int(of("rhs_dilate", "1")),
        )
    return count


@functools.lru_cache(maxsize=4096)
def _meetings(
    size: int, kernel: int, out: int, stride: int, pad: int, left_dilate: int, right_dilate: int
) -> int:
    """Pairs of a result and an element of the kernel, along one dimension, that meet an element of the left
    operand."""
    total = 0
    for k in range(kernel):
        # Element o of the result meets o * stride + shift of the dilated left operand.
        shift = k * right_dilate - pad
        first = max(-(-(0 - shift) // stride), 0)
        last = min(((size - 1) * left_dilate - shift) // stride, out - 1)
        if left_dilate == 1:
            total += max(last - first + 1, 0)
        else:
            total += sum((o * stride + shift) % left_dilate == 0 for o in range(first, last + 1))
    return total
