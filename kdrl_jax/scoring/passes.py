"""Passes over slices of the completion tokens, on every device over its own rows.

A pass sees a few tokens of each row and all of the vocabulary, so that no array is as large as
[B, N, V]. On the mesh of `jax.set_mesh` each device of `data` and `fsdp` loops over its own rows, with a
kernel gathered once before the loop and its gradient reduced once after it; `tensor`, over which the
vocabulary lies, stays with the compiler.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from kdrl_jax import sharding
from kdrl_jax.models.head import Head
from kdrl_jax.scoring.types import HeadSettings, TeacherSide
from kdrl_jax.sharding import ROWS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """All that a pass reads; of whole rows, or of a slice of their tokens."""

    states: jax.Array
    """The student's, [B, N, D]."""
    head: Head
    targets: jax.Array
    """int32 [B, N]: the tokens themselves."""
    temperature: jax.Array
    """float32, scalar or [B]."""
    counts_B: jax.Array | None
    """int32: only the first tokens of a row, so many, are looked at; None: all."""
    inputs: Any
    """The caller's: arrays [B, N, ...] are sliced, arrays [B] and scalars given whole."""
    teacher: TeacherSide | None

    def slice(self, start: jax.Array | int, size: int) -> "Operands":
        """Tokens [start, start + size) of every row."""

        def cut(x: jax.Array) -> jax.Array:
            return x if x.ndim < 2 else jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

        teacher = self.teacher
        if teacher is not None:
            teacher = dataclasses.replace(teacher, states=tuple(map(cut, teacher.states)))
        inputs = jax.tree.map(cut, self.inputs)
        return dataclasses.replace(
            self, states=cut(self.states), targets=cut(self.targets), inputs=inputs, teacher=teacher
        )

    def with_heads(self, change: Callable[[Head, jax.Array], Any]) -> "Operands":
        """Each head changed, given the states it meets."""
        teacher = self.teacher
        if teacher is not None:
            heads = tuple(map(change, teacher.heads, teacher.states))
            teacher = dataclasses.replace(teacher, heads=heads)
        return dataclasses.replace(self, head=change(self.head, self.states), teacher=teacher)

    @property
    def num_shared_columns(self) -> int:
        """Columns that all heads have; each model pads the one vocabulary its own way."""
        heads = [self.head, *(self.teacher.heads if self.teacher is not None else ())]
        return min(h.num_columns for h in heads)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pieces:
    """What is computed over some tokens."""

    sums: Any
    """Scalars, added up over slices and devices."""
    kernel_gradient: jax.Array | None
    """Like the student's kernel, added up too; None where there is none."""
    joined: Any
    """Arrays [B, N, ...] about the tokens, put side by side."""


Pass = Callable[[Operands], Pieces]


def run(one_pass: Pass, operands: Operands, settings: HeadSettings) -> Pieces:
    """`one_pass` over the tokens that count, `settings.chunk` at a time on each device; a device whose rows
    have few is done the sooner. About the others nothing is summed, and what is joined is 0, or what a pass
    gives of them that began with one that counts.

    Rows that do not divide over the devices (none in training) are left to the compiler, which may move
    kernels in every pass.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    if not mesh.empty and mesh.shape["tensor"] > 1:
        # Cut apart at the same columns: then no device asks another for columns inside the loop.
        width = operands.num_shared_columns
        operands = operands.with_heads(lambda head, _: _first_columns(head, width))
    operands = operands.with_heads(_lighter)
    if shards == 1 or operands.targets.shape[0] % shards:
        return _in_slices(one_pass, operands, settings.chunk)

    def longest(counts_B: jax.Array) -> jax.Array:
        most = jnp.max(counts_B)
        # With `tensor`, devices talk in the loop: all of them run it as often.
        return most if mesh.shape["tensor"] == 1 else jax.lax.pmax(most, ROWS)

    def on_device(operands: Operands) -> Pieces:
        pieces = _in_slices(one_pass, operands, settings.chunk, longest)
        sums = jax.lax.psum(pieces.sums, ROWS)
        # Summed outside: in here, where the compiler has the vocabulary, it would gather all of it first.
        of_each = jax.tree.map(lambda x: x[None], pieces.kernel_gradient)
        return Pieces(sums, of_each, pieces.joined)

    rows, whole = PartitionSpec(ROWS), PartitionSpec()
    specs = jax.tree.map(lambda x: rows if x.ndim else whole, operands)
    specs = specs.with_heads(lambda head, _: jax.tree.map(lambda _: whole, head))
    pieces = jax.shard_map(
        on_device,
        in_specs=(specs,),
        out_specs=Pieces(whole, rows, rows),  # type: ignore[arg-type]
        axis_names=set(ROWS),
        check_vma=False,  # nothing is differentiated through here: gradients are pieces
    )(operands)
    if pieces.kernel_gradient is None:
        return pieces
    return dataclasses.replace(
        pieces, kernel_gradient=_summed(pieces.kernel_gradient, operands.head.dims, mesh)
    )


def _summed(of_each: jax.Array, dims: str, mesh: AbstractMesh) -> jax.Array:
    """The kernel's gradient summed over the devices of the rows (the first dimension), each left with
    the part that it has of the kernel."""
    place = sharding.spec(dims, of_each.shape[1:], mesh)

    def on_device(x: jax.Array) -> jax.Array:
        if "fsdp" not in place:
            return jax.lax.psum(x[0], ROWS)
        axis = place.index("fsdp")
        part = jax.lax.psum_scatter(x[0], "fsdp", scatter_dimension=axis, tiled=True)
        return jax.lax.psum(part, "data")

    whole = (None if axis == "fsdp" else axis for axis in place)
    return jax.shard_map(on_device, in_specs=PartitionSpec(ROWS, *whole), out_specs=place, check_vma=False)(
        of_each
    )


def _in_slices(
    one_pass: Pass, operands: Operands, chunk: int, longest: Callable[[jax.Array], jax.Array] = jnp.max
) -> Pieces:
    """`one_pass` over the tokens of these rows, at most `chunk` of them at a time (but one of each row).

    Args:
        longest: of counts, the one that decides how often the loop runs.
    """
    b, n = operands.targets.shape
    size = slice_size(n, chunk // b)
    if size == n:
        return one_pass(operands)

    def step(number: jax.Array, total: Pieces) -> Pieces:
        start = number * size
        new = one_pass(operands.slice(start, size))
        add = functools.partial(jax.tree.map, jnp.add)
        return Pieces(
            add(total.sums, new.sums),
            add(total.kernel_gradient, new.kernel_gradient),
            jax.tree.map(
                lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, axis=1),
                total.joined,
                new.joined,
            ),
        )

    of_slice = jax.eval_shape(lambda: one_pass(operands.slice(0, size)))
    joined = jax.tree.map(lambda x: jnp.zeros((b, n, *x.shape[2:]), x.dtype), of_slice.joined)
    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype))
    total = Pieces(zeros(of_slice.sums), zeros(of_slice.kernel_gradient), joined)
    slices: jax.Array | int = n // size
    if operands.counts_B is not None:
        slices = (longest(operands.counts_B) + size - 1) // size
    with jax.named_scope("head_chunks"):
        return jax.lax.fori_loop(0, slices, step, total)


def slice_size(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most` (at least 1): a last slice of another size would be the
    whole program once more."""
    return next(size for size in range(max(1, min(n, most)), 0, -1) if n % size == 0)


def _lighter(head: Head, states: jax.Array) -> Head:
    """With the kernel in the type it meets the states in, once for all passes, where that is smaller."""
    if head.kernel.dtype.itemsize <= states.dtype.itemsize:
        return head
    return dataclasses.replace(head, kernel=head.kernel.astype(states.dtype))


def _first_columns(head: Head, num: int) -> Head:
    if head.num_columns == num:
        return head
    kernel = head.kernel[:num] if head.tied else head.kernel[:, :num]
    return dataclasses.replace(
        head, kernel=kernel, scale_V=None if head.scale_V is None else head.scale_V[:num]
    )
