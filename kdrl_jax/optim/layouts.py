"""Which dimensions of a parameter are layers, and which are the rows and columns of a layer's matrix."""

import dataclasses
import math
from typing import Any

import jax

from kdrl_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Layout:
    """The matrix that a parameter is, or the matrices of the layers that are stacked in it.

    Weights multiply from the right (x W), so that the dimensions read come before those written, and each
    side is one of the matrix: q [L, D, N, H] is L matrices of D rows and N·H columns.
    """

    letters: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    """The parameter's dimensions that make up each of a layer's own: two for a matrix, one for a vector."""

    @property
    def stacked(self) -> bool:
        """Whether the parameter's first dimension is layers."""
        return self.letters[0] == "L"

    @property
    def is_matrix(self) -> bool:
        return len(self.groups) == 2

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A layer's own shape: [rows, columns], or [size]."""
        return tuple(math.prod(shape[i] for i in group) for group in self.groups)

    def fold(self, x: jax.Array) -> jax.Array:
        """The parameter as [L, rows, columns] or [L, size]; without the L if it has none."""
        return x.reshape(x.shape[: self.stacked] + self.sizes(x.shape))


def layout(dims: str) -> Layout:
    """What the letters of a parameter (`Model.dims`) say.

    Raises:
        ValueError: they are no matrices and no vectors.
    """
    letters = tuple(dims.split())
    groups: list[tuple[int, ...]] = []
    for i, letter in enumerate(letters):
        if letter == "H" and i and letters[i - 1] in "NK":
            groups[-1] = (*groups[-1], i)  # heads and what is in them: one side of a matrix
        elif letter != "L":
            groups.append((i,))
    if len(groups) not in (1, 2):
        raise ValueError(f"dims {dims!r} describe neither a matrix nor a vector, once or per layer")
    return Layout(letters, tuple(groups))


def layouts(dims: Params) -> dict[str, Any]:
    """The layout of each parameter, in a tree like theirs."""
    return jax.tree.map(layout, dims)
