"""What goes into the vocabulary head's passes, and what they give."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from kdrl_jax.models.head import Head


@dataclasses.dataclass(frozen=True)
class HeadSettings:
    """Static settings of the chunked head. What may change between steps (the temperature) is not here."""

    num_tokens: int
    """Real tokens; the columns after them are padding of the vocabulary."""
    chunk: int
    """Tokens per pass through the head, on each device; at least one of every row. Memory alone depends
    on it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenScores:
    """About each token of some lists, [B, N], float32 unless said otherwise; None where not computed.

    The first three have a gradient, the others none. Without a teacher only the first two are there.
    """

    logprobs: jax.Array
    """Of the tokens themselves, nats."""
    entropy: jax.Array
    """Of the distribution the token was drawn from, nats."""
    divergence: jax.Array | None = None
    """The divergence asked for, of student and teacher where the token was drawn, nats."""
    reverse_kl: jax.Array | None = None
    """Exact KL(student || teacher) there, nats; for metrics."""
    same_top: jax.Array | None = None
    """bool: student and teacher have the same most likely token."""
    teacher_mass: jax.Array | None = None
    """The teacher's probability of the student's most likely token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TeacherStates:
    """What frozen models leave for the update, of packed rows, where it needs their distributions whole."""

    states: tuple[jax.Array, ...]
    """Each teacher's [R, N, D] that predict the tokens of the lists, D its own."""
    weights_RK: jax.Array | None = None
    """float32: as `TeacherSide.weights_BK`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TeacherSide:
    """The distribution to compare with: of one teacher, or of K mixed row by row. Nothing here has a
    gradient."""

    states: tuple[jax.Array, ...]
    """Each teacher's [B, N, D] that predict the tokens, D its own."""
    heads: tuple[Head, ...]
    weights_BK: jax.Array | None = None
    """What each teacher counts in a row: its distribution is sum_k w_k softmax_k. None with one teacher."""


TokenLoss = Callable[[TokenScores, Any], tuple[jax.Array, dict[str, jax.Array]]]
"""(scores of some tokens, the caller's inputs about them) -> (their part of the loss, sums for metrics)."""
