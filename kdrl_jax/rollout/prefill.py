"""Prompts to the keys and values that all completions of a prompt begin with.

Nothing of the vocabulary is computed here: the loop feeds a prompt's last token again, as the first step of
each of its completions, so that all tokens come out of one place.
"""

import math

import jax
import jax.numpy as jnp

from kdrl_jax.models.attention import cached_attention
from kdrl_jax.models.cache import KVCache
from kdrl_jax.models.decoder import AttendCached, Decoder

CHUNK = 512
"""Positions of a prompt taken at once."""
TOKENS = 4096
"""Tokens taken at once, over some rows: enough to read each weight seldom, few enough to stay small."""


def prefix_length(max_prompt_tokens: int) -> int:
    """Positions that a prompt's row has: whole chunks."""
    chunk = min(max_prompt_tokens, CHUNK)
    return -(-max_prompt_tokens // chunk) * chunk


def prefill(decoder: Decoder, tokens_PT: jax.Array, lengths_P: jax.Array, prefixes: KVCache) -> KVCache:
    """Keys and values of the prompts, each computed once.

    Args:
        tokens_PT: int32, right-padded; what follows a prompt is computed too where it shares a chunk with
            it, and seen by no one.
        prefixes: an empty cache of P rows of `prefix_length` positions.
    """
    num_prompts, width = tokens_PT.shape
    length = prefixes.length
    chunk = min(length, CHUNK)
    # A divisor, so that no row is taken twice.
    rows = math.gcd(num_prompts, 1 << (max(TOKENS // chunk, 1).bit_length() - 1))
    tokens_PT = jnp.pad(tokens_PT, ((0, 0), (0, length - width)))

    def of_rows(i: jax.Array, prefixes: KVCache) -> KVCache:
        row = i * rows
        longest = jnp.max(jax.lax.dynamic_slice_in_dim(lengths_P, row, rows))

        def of_chunk(j: jax.Array, prefixes: KVCache) -> KVCache:
            start = j * chunk
            tokens = jax.lax.dynamic_slice(tokens_PT, (row, start), (rows, chunk))
            positions = jnp.broadcast_to(start + jnp.arange(chunk), (rows, chunk))
            return decoder.extend(tokens, positions, prefixes, _attend(row, start, positions))[1]

        return jax.lax.fori_loop(0, (longest + chunk - 1) // chunk, of_chunk, prefixes)

    return jax.lax.fori_loop(0, num_prompts // rows, of_rows, prefixes)


def _attend(row: jax.Array, start: jax.Array, positions_RC: jax.Array) -> AttendCached:
    def attend(
        cache: KVCache,
        layer: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        window: jax.Array | None,
        scale: float,
        softcap: float | None,
    ) -> tuple[jax.Array, KVCache]:
        cache = cache.write_block((layer, row, 0, start), k.swapaxes(1, 2), v.swapaxes(1, 2))
        held = cache.read_rows(layer, row + jnp.arange(q.shape[0]), cache.length)
        out = cached_attention(q, held, positions_RC, window=window, scale=scale, softcap=softcap)
        return out, cache

    return attend
