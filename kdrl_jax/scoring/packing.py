"""Which packed row each completion goes to, decided on the host from lengths alone.

A packed row is filled with whole completions, each behind its prompt. Completions of one prompt that share a
row may share the prompt too: it then stands there once. Rows are filled one after another, with the largest
completion that fits of a prompt that is there already, or else with the one that leaves least room; so
that no row is closed while anything fits.
"""

import bisect
import dataclasses
from collections.abc import Sequence

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class PackShape:
    """Static shape of packed rows."""

    length: int
    """Positions of a row."""
    rows_per_pass: int
    """Rows that one pass through a model takes, over all devices."""
    max_passes: int
    """Room for so many passes; see `passes_needed`."""
    share_prompts: bool
    """Whether completions of one prompt share it."""

    @property
    def num_rows(self) -> int:
        return self.rows_per_pass * self.max_passes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where the rows of some rollouts lie in packed rows, all int32; without a completion, nowhere."""

    row_B: np.ndarray
    """The packed row; `PackShape.num_rows` for nowhere."""
    prompt_B: np.ndarray
    """Where its prompt begins there."""
    completion_B: np.ndarray
    """Where its completion begins there."""
    before_B: np.ndarray
    """Tokens of other completions that are scored before its own in that packed row."""
    owner_B: np.ndarray
    """The first row of the rollouts whose prompt stands at the same place."""
    bounds: np.ndarray
    """[kinds + 1]: the passes [bounds[i], bounds[i + 1]) hold the rows of kind i, those from the last on
    hold nothing."""


def passes_needed(num_rows: int, longest: int, length: int, rows_per_pass: int, kinds: int = 1) -> int:
    """Passes that are enough whatever the lengths, since a row that is closed holds at least as many
    completions as of the longest would fit. Each further kind may leave a row and a pass unfilled.

    Args:
        num_rows: of the rollouts.
        longest: a prompt and its completion, at most `length`.
    """
    rows = -(-num_rows // (length // longest)) + kinds - 1
    return -(-rows // rows_per_pass) + kinds - 1


def place(
    prompt_lengths_B: np.ndarray,
    lengths_B: np.ndarray,
    prompts_B: np.ndarray,
    shape: PackShape,
    kinds_B: np.ndarray | None = None,
    num_kinds: int = 1,
) -> Places:
    """Finds a place for every row with a completion.

    Args:
        lengths_B: of completions; rows with 0 are left out.
        prompts_B: which prompt each row has: equal numbers are equal prompts.
        kinds_B: rows of different kinds (int, below num_kinds) share no pass, so that another model may score
            each kind; None is one kind.

    Raises:
        ValueError: a row is longer than a packed row.
    """
    too_long = np.flatnonzero(prompt_lengths_B + lengths_B > shape.length)
    if len(too_long):
        b = int(too_long[0])
        raise ValueError(
            f"row {b} has {int(prompt_lengths_B[b] + lengths_B[b])} tokens; a packed row has {shape.length}"
        )
    num = len(lengths_B)
    kinds = np.zeros(num, int) if kinds_B is None else kinds_B
    nowhere, zeros = np.full(num, shape.num_rows, np.int32), np.zeros(num, np.int32)
    out = Places(
        row_B=nowhere,
        prompt_B=zeros.copy(),
        completion_B=zeros.copy(),
        before_B=zeros.copy(),
        owner_B=zeros.copy(),
        bounds=np.zeros(num_kinds + 1, np.int32),
    )
    first = 0
    for kind in range(num_kinds):
        mine = np.flatnonzero((kinds == kind) & (lengths_B > 0))
        if shape.share_prompts:
            rows = _fill(prompt_lengths_B, lengths_B, prompts_B, mine, shape.length)
        else:
            rows = _fill(zeros, prompt_lengths_B + lengths_B, zeros, mine, shape.length)
        owned_by = prompts_B if shape.share_prompts else np.arange(num)
        for number, members in enumerate(rows):
            row = _spread(first * shape.rows_per_pass + number, shape)
            _write(out, row, members, owned_by, prompt_lengths_B, lengths_B)
        first += -(-len(rows) // shape.rows_per_pass)
        out.bounds[kind + 1] = first
    assert first <= shape.max_passes, (first, shape)
    return out


def _spread(number: int, shape: PackShape) -> int:
    """The packed row that is the number-th in the order of passes: a pass takes every max_passes-th row, so
    that each device's rows are split evenly and none moves."""
    of_pass, within = divmod(number, shape.rows_per_pass)
    return within * shape.max_passes + of_pass


def _write(
    out: Places,
    row: int,
    members: Sequence[int],
    owned_by: np.ndarray,
    prompt_lengths: np.ndarray,
    lengths: np.ndarray,
) -> None:
    at = before = 0
    owners: dict[int, int] = {}
    for b in members:
        owner = owners.setdefault(int(owned_by[b]), b)
        if owner == b:
            out.prompt_B[b] = at
            at += int(prompt_lengths[b])
        out.row_B[b], out.owner_B[b], out.prompt_B[b] = row, owner, out.prompt_B[owner]
        out.completion_B[b], out.before_B[b] = at, before
        at += int(lengths[b])
        before += int(lengths[b])


def _fill(
    shared: np.ndarray, lengths: np.ndarray, groups: np.ndarray, rows: np.ndarray, room: int
) -> list[list[int]]:
    """The members of each packed row, those of one group side by side.

    Args:
        shared: positions that the first member of a group takes beside its own, in each packed row.
    """
    waiting: dict[int, list[tuple[int, int]]] = {}  # the longest first
    for b in rows[np.argsort(-lengths[rows], kind="stable")]:
        waiting.setdefault(int(groups[b]), []).append((-int(lengths[b]), int(b)))

    def largest(group: int, room: int, first: bool) -> tuple[int, int, int] | None:
        """(positions, group, index) of the longest of a group that fits."""
        members = waiting[group]
        extra = int(shared[members[0][1]]) if first else 0
        i = bisect.bisect_left(members, (extra - room,))
        return (extra - members[i][0], group, i) if i < len(members) else None

    filled = []
    while waiting:
        here: dict[int, list[int]] = {}
        left = room
        while True:
            options = [largest(group, left, False) for group in here if group in waiting]
            if not any(options):
                options = [largest(group, left, True) for group in waiting if group not in here]
            best = max(filter(None, options), key=lambda option: option[0], default=None)
            if best is None:
                break
            cost, group, i = best
            left -= cost
            here.setdefault(group, []).append(waiting[group].pop(i)[1])
            if not waiting[group]:
                del waiting[group]
        filled.append([b for members in here.values() for b in members])
    return filled
