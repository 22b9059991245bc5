"""Prompts to the keys and values that all completions of a prompt begin with.

Nothing of the vocabulary is computed here: the loop feeds a prompt's last token again, as the first step of
each of its completions, so that all tokens come out of one place.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdrl_jax.models.attention import ScoreRules, cached_attention
from kdrl_jax.models.cache import KVCache
from kdrl_jax.models.decoder import Decoder

PlannedAttend = Callable[..., tuple[jax.Array, KVCache]]
"""`AttendCached` with arrays before its own arguments that all layers share."""

CHUNK = 512
"""Positions of a prompt taken at once."""
TOKENS = 4096
"""Tokens taken at once, over some rows: enough to read each weight seldom, few enough to stay small."""
SCORES = 2**28
"""Bytes of attention scores at once, in float32, of one layer."""


def prefix_length(max_prompt_tokens: int) -> int:
    """Positions that a prompt's row has: whole chunks."""
    chunk = min(max_prompt_tokens, CHUNK)
    return -(-max_prompt_tokens // chunk) * chunk


def prefill(
    decoder: Decoder,
    tokens_PT: jax.Array,
    lengths_P: jax.Array,
    prefixes: KVCache,
    *,
    on_own_heads: Callable[[PlannedAttend], PlannedAttend] = lambda attend: attend,
    longest_anywhere: Callable[[jax.Array], jax.Array] = lambda longest: longest,
) -> KVCache:
    """Keys and values of the prompts, each computed once.

    Args:
        tokens_PT: int32, right-padded; what follows a prompt is computed too where it shares a chunk with
            it, and seen by no one.
        prefixes: an empty cache of P rows of `prefix_length` positions.
        on_own_heads: how attention is divided over `tensor`.
        longest_anywhere: the longest of a length here and on the shards that must step along.
    """
    num_prompts, width = tokens_PT.shape
    length = prefixes.length
    chunk = min(length, CHUNK)
    rows = prefill_rows(num_prompts, length, decoder.config.num_heads)
    tokens_PT = jnp.pad(tokens_PT, ((0, 0), (0, length - width)))
    attend = on_own_heads(functools.partial(_attend, chunk))

    def of_rows(i: jax.Array, prefixes: KVCache) -> KVCache:
        # The last rows may be some of those before them, computed again to the same.
        row = jnp.minimum(i * rows, num_prompts - rows)
        longest = longest_anywhere(jnp.max(jax.lax.dynamic_slice_in_dim(lengths_P, row, rows)))

        def of_chunk(j: jax.Array, prefixes: KVCache) -> KVCache:
            start = j * chunk
            tokens = jax.lax.dynamic_slice(tokens_PT, (row, start), (rows, chunk))
            positions = jnp.broadcast_to(start + jnp.arange(chunk), (rows, chunk))
            return decoder.extend(
                tokens, positions, prefixes, functools.partial(attend, (row, j, positions))
            )[1]

        with jax.named_scope("prefill_chunks"):
            return jax.lax.fori_loop(0, (longest + chunk - 1) // chunk, of_chunk, prefixes)

    return jax.lax.fori_loop(0, -(-num_prompts // rows), of_rows, prefixes)


def prefill_rows(num_prompts: int, length: int, num_heads: int) -> int:
    """Prompts taken at once: as many as `TOKENS` and `SCORES` allow."""
    chunk = min(length, CHUNK)
    return max(1, min(num_prompts, TOKENS // chunk, SCORES // (4 * chunk * length * num_heads)))


def _attend(
    chunk: int,
    plan: tuple[jax.Array, jax.Array, jax.Array],
    cache: KVCache,
    layer: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rules: ScoreRules,
) -> tuple[jax.Array, KVCache]:
    """Chunk j of some rows, from `row` on: over all chunks up to it."""
    row, j, positions_RC = plan
    cache = cache.write_block((layer, row, 0, j * chunk), k.swapaxes(1, 2), v.swapaxes(1, 2))
    rows = row + jnp.arange(q.shape[0])

    def within(size: int) -> jax.Array:
        return cached_attention(q, cache.read_rows(layer, rows, size), positions_RC, rules)

    sizes = range(chunk, cache.length + 1, chunk)
    return jax.lax.switch(j, [functools.partial(within, size) for size in sizes]), cache
