"""Where sequences lie in rows of tokens, and what each position therefore sees."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spans:
    """What the position i of a row sees: the keys [begins[i], i], and those of [prefix_begins[i],
    prefix_ends[i]), which lie before begins[i]. All int32 [B, T]."""

    begins_BT: jax.Array
    prefix_begins_BT: jax.Array | None = None
    """None: there are no prefixes."""
    prefix_ends_BT: jax.Array | None = None

    def see(self, keys: jax.Array) -> jax.Array:
        """bool [B, T, S]: whether each position sees each of the keys, int32 [S]."""
        at = jnp.arange(self.begins_BT.shape[1])[:, None]
        seen = (keys >= self.begins_BT[..., None]) & (keys <= at)
        if self.prefix_begins_BT is None or self.prefix_ends_BT is None:
            return seen
        return seen | ((keys >= self.prefix_begins_BT[..., None]) & (keys < self.prefix_ends_BT[..., None]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the pieces of a row's sequences lie. A piece is a run of positions; it is a whole sequence, or
    what follows a prefix that stands once for several sequences: a prompt, computed once for all its
    completions. All int32 [B, T]."""

    positions_BT: jax.Array
    """Of each token in its own sequence, from 0."""
    begins_BT: jax.Array
    """Where its piece begins. Padding sees itself alone, so that no softmax is over nothing."""
    prefix_begins_BT: jax.Array | None = None
    """Where the prefix of its piece begins, before the piece; None: every piece is whole."""
    prefix_ends_BT: jax.Array | None = None
    """Behind its last token. A piece without one has an empty one."""

    def spans(self, window: jax.Array | None) -> Spans:
        """What each token sees.

        Args:
            window: int32 scalar; tokens at least so far back in the sequence are not seen. None sees all.
        """
        begins, prefix_begins = self.begins_BT, self.prefix_begins_BT
        if window is not None:
            far = self.positions_BT - (window - 1)  # the first position of the sequence that is seen
            at = jnp.arange(begins.shape[1])
            begins = jnp.maximum(begins, at - (window - 1))
            if prefix_begins is not None:
                prefix_begins = prefix_begins + jnp.maximum(far, 0)
        return Spans(begins, prefix_begins, self.prefix_ends_BT)


def whole_rows(num: int, length: int) -> Layout:
    """Of rows that are one sequence each, padded on the right, where no real token sees padding."""
    positions = jnp.broadcast_to(jnp.arange(length), (num, length))
    return Layout(positions, jnp.zeros_like(positions))
