"""Packed rows on the devices: tokens, where they came from, and the only shift of the repository.

Completions are scored as lists of tokens [R, N], those of each packed row in front. Entry n of a list is
about one token; the state that predicts it stands at `predictors_RN`, which is computed here alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kdrl_jax import sharding
from kdrl_jax.models.layout import Layout
from kdrl_jax.scoring.packing import PackShape, Places


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Rollouts in packed rows, or some of these rows. R rows, T positions, N = T entries in a list."""

    tokens_RT: jax.Array
    """int32; 0 where there is none."""
    layout: Layout
    targets_RN: jax.Array
    """int32: the tokens of the lists."""
    predictors_RN: jax.Array
    """int32: position of the state that predicts the token: the one before it in its sequence."""
    rows_RN: jax.Array
    """int32: the token's row in the rollouts, and their number of rows where there is no token."""
    columns_RN: jax.Array
    """int32: its position in that row."""
    counts_R: jax.Array
    """int32: tokens in the list; they come first."""

    @property
    def is_token_RN(self) -> jax.Array:  # noqa: N802 - dimensions in names
        """bool: the entries of the lists that are a token."""
        return jnp.arange(self.targets_RN.shape[1]) < self.counts_R[:, None]

    def take(self, x: jax.Array) -> jax.Array:
        """Of the tokens of the lists, [R, N]: what is known of each position, [B, T], or of each row, [B], of
        the rollouts; 0 where there is no token."""
        index = (self.rows_RN, self.columns_RN)[: x.ndim]
        return x.at[index].get(mode="fill", fill_value=0)

    def put_back(self, x_RN: jax.Array, like_BT: jax.Array) -> jax.Array:
        """`take` undone: each value at its token in the rollouts, [B, T], in its type; 0 elsewhere."""
        zeros = jnp.zeros(like_BT.shape, x_RN.dtype)
        return zeros.at[self.rows_RN, self.columns_RN].set(x_RN, mode="drop")

    def predicting(self, hidden_RTD: jax.Array) -> jax.Array:
        """The hidden states [R, N, D] that predict the tokens of the lists. Only these ever meet the
        vocabulary; what predicts prompts never does."""
        return jnp.take_along_axis(hidden_RTD, self.predictors_RN[:, :, None], axis=1, mode="clip")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packs:
    """All packed rows of a minibatch, and which of them are in use."""

    rows: PackedRows
    bounds: jax.Array
    """As in `Places`: the last entry is the number of passes in use."""
    padding_frac: jax.Array
    """float32 scalar: share of the positions in these passes that hold no token."""


@functools.partial(jax.jit, static_argnames="shape")
def pack(
    tokens: jax.Array,
    prompt_lengths: jax.Array,
    lengths: jax.Array,
    rows_B: np.ndarray,
    places: Places,
    shape: PackShape,
) -> Packs:
    """Copies some rows of rollouts, prompt and completion side by side, to their places.

    Args:
        tokens: int32 [all rows, T].
        lengths: of all completions.
        rows_B: the rows that are taken; the packs count these from 0.
        places: of these, by `place` with the same shape.
    """
    tokens_BT, lengths_B = tokens[rows_B], lengths[rows_B]
    prompt_lengths_B = prompt_lengths[rows_B]
    b, t = tokens_BT.shape
    r, length = shape.num_rows, shape.length
    column = jnp.arange(t)
    prompt_length, row, owner = prompt_lengths_B[:, None], places.row_B[:, None], places.owner_B[:, None]
    in_prompt = column < prompt_length
    in_completion = ~in_prompt & (column < prompt_length + lengths_B[:, None])
    from_prompt, from_completion = (jnp.asarray(x)[:, None] for x in (places.prompt_B, places.completion_B))
    after = column - prompt_length
    at = jnp.where(in_prompt, from_prompt + column, from_completion + after)
    # A prompt that several share is written by the first of them.
    here = in_completion | (in_prompt & (owner == jnp.arange(b)[:, None]))
    to = (jnp.where(here, row, r), at)

    def spread(values: jax.Array, empty: jax.Array | int = 0) -> jax.Array:
        start = jnp.broadcast_to(jnp.asarray(empty, jnp.int32), (r, length))
        values = jnp.broadcast_to(values, (b, t)).astype(jnp.int32)
        return _on_rows(start.at[to].set(values, mode="drop"))

    position = jnp.arange(length)
    if shape.share_prompts:
        layout = Layout(
            spread(column),
            spread(jnp.where(in_prompt, from_prompt, from_completion), position),
            spread(from_prompt),
            spread(jnp.where(in_prompt, from_prompt, from_prompt + prompt_length)),
        )
    else:
        layout = Layout(spread(column), spread(from_prompt, position))
    # The shift: a completion's first token is predicted where its prompt ends.
    before = jnp.where(after == 0, from_prompt + prompt_length - 1, from_completion + after - 1)
    listed = (jnp.where(in_completion, row, r), places.before_B[:, None] + after)

    def listing(values: jax.Array, empty: int = 0) -> jax.Array:
        start = jnp.full((r, length), empty, jnp.int32)
        values = jnp.broadcast_to(values, (b, t)).astype(jnp.int32)
        return _on_rows(start.at[listed].set(values, mode="drop"))

    rows_RN = listing(jnp.arange(b)[:, None], b)
    packed = PackedRows(
        tokens_RT=spread(tokens_BT),
        layout=layout,
        targets_RN=listing(tokens_BT),
        predictors_RN=listing(before),
        rows_RN=rows_RN,
        columns_RN=listing(column),
        counts_R=jnp.sum(rows_RN < b, axis=1, dtype=jnp.int32),
    )
    room = places.bounds[-1] * shape.rows_per_pass * length
    filled = jnp.sum(here & (row < r))
    return Packs(packed, jnp.asarray(places.bounds), 1 - filled / jnp.maximum(room, 1))


def _on_rows(x: jax.Array) -> jax.Array:
    return sharding.constrain(x, "B T")
