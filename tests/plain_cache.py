"""Attention over a cache in the plainest way: every row reads all positions that there are."""

import jax.numpy as jnp

from kdrl_jax.models.attention import cached_attention
from kdrl_jax.models.cache import empty_cache


def attend_plainly(positions):
    """`AttendCached` for new tokens at `positions`: [B] anywhere, or [B, C] from 0 on."""

    def attend(cache, layer, q, k, v, rules):
        if positions.ndim == 1:
            cache = cache.write_columns(layer, positions, k, v)
            held = cache.read_rows(layer, jnp.arange(len(positions)), cache.length)
            return cached_attention(q[:, None], held, positions[:, None], rules)[:, 0], cache
        cache = cache.write_block((layer, 0, 0, 0), k.swapaxes(1, 2), v.swapaxes(1, 2))
        held = cache.read_rows(layer, jnp.arange(len(positions)), cache.length)
        return cached_attention(q, held, positions, rules), cache

    return attend


def prefill(decoder, tokens_BT, lengths_B, length, dtype=jnp.float32):
    """Hidden states [B, D] of each row's last token, and a cache of `length` positions with the rows."""
    b, t = tokens_BT.shape
    positions = jnp.broadcast_to(jnp.arange(t), (b, t))
    cache = empty_cache(decoder.config, b, length, dtype)
    x, cache = decoder.extend(tokens_BT, positions, cache, attend_plainly(positions))
    return jnp.take_along_axis(x, (lengths_B - 1)[:, None, None], axis=1)[:, 0], cache


def decode(decoder, tokens_B, positions_B, cache):
    """Hidden states [B, D] of one more token of each row, and the cache."""
    return decoder.extend(tokens_B, positions_B, cache, attend_plainly(positions_B))
