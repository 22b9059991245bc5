"""Causal grouped-query attention in plain XLA: over whole rows, and one query per row over a cache.

Both take what families differ in: the scale of the scores, a soft cap on them, and a sliding window.
Whole rows may hold several segments, which do not see each other.
"""

import jax
import jax.numpy as jnp


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Keeps |x| below `cap`, smoothly: cap * tanh(x / cap). None leaves x as it is."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def segment_positions(segment_ids_BT: jax.Array) -> jax.Array:
    """Positions [B, T] counted from each segment's first token; a segment is a run of one id."""
    at = jnp.arange(segment_ids_BT.shape[1])
    begins = jnp.diff(segment_ids_BT, axis=1, prepend=segment_ids_BT[:, :1]) != 0
    return at - jax.lax.cummax(jnp.where(begins, at, 0), axis=1)


def full_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    window: jax.Array | None,
    segment_ids_BT: jax.Array | None = None,
) -> jax.Array:
    """Every position over the positions up to it; returns [B, T, N, H].

    Args:
        window: int32 scalar; positions at least so far back are not seen. None sees all.
        segment_ids_BT: only positions of the same id are seen. Padding (0) sees padding, its own position
            at least, so that no softmax is over nothing. None is one segment.
    """
    if softcap is None and window is None and segment_ids_BT is None:
        return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True, scale=scale)
    b, t, n, h = q_BTNH.shape
    k = k_BTKH.shape[2]
    q = q_BTNH.reshape(b, t, k, n // k, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k_BTKH, preferred_element_type=jnp.float32) * scale
    back = jnp.arange(t)[:, None] - jnp.arange(t)[None, :]
    scores = soft_cap(scores, softcap)
    seen = _seen(back, window)
    if segment_ids_BT is not None:
        seen = (seen & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]))[:, None, None]
    weights = _softmax(scores, seen)
    return jnp.einsum("bkgts,bskh->btkgh", weights.astype(v_BTKH.dtype), v_BTKH).reshape(b, t, n, h)


def cached_attention(
    q_BNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    pos_B: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    window: jax.Array | None,
) -> jax.Array:
    """One query per row over the cache up to and including its own position; returns [B, N, H]."""
    b, n, h = q_BNH.shape
    k = k_BKSH.shape[1]
    q = q_BNH.reshape(b, k, n // k, h)
    scores = jnp.einsum("bkgh,bksh->bkgs", q, k_BKSH, preferred_element_type=jnp.float32) * scale
    back = pos_B[:, None] - jnp.arange(k_BKSH.shape[2])[None, :]
    weights = _softmax(soft_cap(scores, softcap), _seen(back, window)[:, None, None, :])
    return jnp.einsum("bkgs,bksh->bkgh", weights.astype(v_BKSH.dtype), v_BKSH).reshape(b, n, h)


def _seen(back: jax.Array, window: jax.Array | None) -> jax.Array:
    """Whether a key `back` positions before the query is seen."""
    return (back >= 0) if window is None else (back >= 0) & (back < window)


def _softmax(scores: jax.Array, seen: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
