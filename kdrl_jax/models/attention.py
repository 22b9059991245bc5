"""Grouped-query attention in plain XLA: over whole rows, and of a few queries per row over a cache.

Both take what families differ in: the scale of the scores, a soft cap on them, and a sliding window.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kdrl_jax.models.cache import KVCache
from kdrl_jax.models.layout import Layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoreRules:
    """What families differ in, of how queries weigh keys."""

    window: jax.Array | None
    """int32 scalar; positions at least so far back are not seen. None sees all."""
    scale: float = dataclasses.field(metadata={"static": True})
    """Of the products."""
    softcap: float | None = dataclasses.field(metadata={"static": True})
    """Bound on |score|."""
    width: int | None = dataclasses.field(default=None, metadata={"static": True})
    """The only bounded value that `window` may have, where it is known beforehand."""


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Keeps |x| below `cap`, smoothly: cap * tanh(x / cap). None leaves x as it is."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def full_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, rules: ScoreRules, layout: Layout
) -> jax.Array:
    """Every position over the positions that it sees, with all scores at once; returns [B, T, N, H]."""
    b, t, n, h = q_BTNH.shape
    k = k_BTKH.shape[2]
    q = q_BTNH.reshape(b, t, k, n // k, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k_BTKH, preferred_element_type=jnp.float32) * rules.scale
    seen = layout.spans(rules.window).see(jnp.arange(t))[:, None, None]
    weights = _softmax(soft_cap(scores, rules.softcap), seen)
    return jnp.einsum("bkgts,bskh->btkgh", weights.astype(v_BTKH.dtype), v_BTKH).reshape(b, t, n, h)


def cached_attention(
    q_BCNH: jax.Array,
    cache: KVCache,
    positions_BC: jax.Array,
    rules: ScoreRules,
) -> jax.Array:
    """Some queries per row over one layer of a cache, each up to and including its own position; returns
    [B, C, N, H].

    Args:
        cache: without the dimension L; only so many positions of it as are to be read.
    """
    b, c, n, h = q_BCNH.shape
    k = cache.keys.shape[1]
    q = q_BCNH.reshape(b, c, k, n // k, h)
    keys, values = (x.astype(q.dtype) for x in (cache.keys, cache.values))
    scores = jnp.einsum("bckgh,bksh->bkgcs", q, keys, preferred_element_type=jnp.float32) * rules.scale
    if cache.key_scales is not None:
        # One scale per position leaves the product, which then reads 8 bits.
        scores = scores * cache.key_scales[:, :, None, None]
    back = positions_BC[:, :, None] - jnp.arange(keys.shape[2])
    weights = _softmax(soft_cap(scores, rules.softcap), _seen(back, rules.window)[:, None, None])
    if cache.value_scales is not None:
        weights = weights * cache.value_scales[:, :, None, None]
    out = jnp.einsum("bkgcs,bksh->bckgh", weights.astype(values.dtype), values)
    return out.reshape(b, c, n, h)


def _seen(back: jax.Array, window: jax.Array | None) -> jax.Array:
    """Whether a key `back` positions before the query is seen."""
    return (back >= 0) if window is None else (back >= 0) & (back < window)


def _softmax(scores: jax.Array, seen: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
