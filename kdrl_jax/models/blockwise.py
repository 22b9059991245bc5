"""Attention in plain XLA whose memory grows with T, not with its square.

Queries and keys are cut into blocks. A block of queries visits only the blocks of keys of which it sees any
key, one after another, with a running softmax (FlashAttention, arXiv 2205.14135 and 2307.08691): where rows
hold many sequences, that is a small part of them. The backward pass visits the same pairs and computes
their scores again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kdrl_jax.models.layout import Spans

OUTPUT, LOGSUMEXP = "attention_output", "attention_logsumexp"
"""Names, for rematerialisation, of what the backward pass reads beside q, k and v."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def blockwise_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    spans: Spans,
    scale: float,
    softcap: float | None,
    block: int,
) -> jax.Array:
    """Each position over the keys of its spans; returns [B, T, N, H].

    Args:
        scale, softcap: of the scores, as in `ScoreRules`.
        block: positions of a block; it divides T.
    """
    return _forward(q_BTNH, k_BTKH, v_BTKH, spans, scale, softcap, block)[0]


def _fwd(
    q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans, scale: float, softcap: float | None, block: int
) -> tuple[jax.Array, tuple[Any, ...]]:
    out, logsumexp = _forward(q, k, v, spans, scale, softcap, block)
    out, logsumexp = checkpoint_name(out, OUTPUT), checkpoint_name(logsumexp, LOGSUMEXP)
    return out, (q, k, v, spans, out, logsumexp)


def _query_blocks(x: jax.Array, heads: int, block: int) -> jax.Array:
    """[B, T, N, ...] to [B * T / block, K, G * block, ...]: all queries that read the same keys."""
    b, t, n = x.shape[:3]
    x = x.reshape(b, t // block, block, heads, n // heads, *x.shape[3:])
    x = jnp.moveaxis(x, 2, 4)
    return x.reshape(b * (t // block), heads, n // heads * block, *x.shape[5:])


def _from_blocks(x: jax.Array, shape: tuple[int, ...], block: int) -> jax.Array:
    """`_query_blocks` undone."""
    b, t, n = shape[:3]
    heads = x.shape[1]
    x = x.reshape(b, t // block, heads, n // heads, block, *x.shape[3:])
    return jnp.moveaxis(x, 4, 2).reshape(shape)


def _visits(spans: Spans, block: int) -> tuple[jax.Array, jax.Array, Spans]:
    """For each block of queries, of all rows: the blocks of keys to visit, first those (int32 [Q, T /
    block]); how many they are [Q]; and the spans of its queries [Q, block]."""
    b, t = spans.begins_BT.shape
    first = jnp.arange(t // block) * block
    last = first + block - 1
    at = jnp.arange(t)[:, None]
    seen = (spans.begins_BT[..., None] <= last) & (first <= at)
    if spans.prefix_begins_BT is not None and spans.prefix_ends_BT is not None:
        begins, ends = spans.prefix_begins_BT[..., None], spans.prefix_ends_BT[..., None]
        seen |= (begins <= last) & (first < ends) & (begins < ends)
    seen = seen.reshape(b * (t // block), block, t // block).any(1)
    order = jnp.argsort(~seen, axis=1, stable=True).astype(jnp.int32)
    cut = jax.tree.map(lambda x: x.reshape(-1, block), spans)
    return order, seen.sum(1), cut


def _block_of(x_BKTH: jax.Array, row: jax.Array, number: jax.Array, block: int) -> jax.Array:
    """[K, block, H] of one row."""
    _, heads, _, width = x_BKTH.shape
    start = (row, 0, number * block, 0)
    return jax.lax.dynamic_slice(x_BKTH, start, (1, heads, block, width))[0]


def _scores(
    q: jax.Array, k: jax.Array, seen: jax.Array, scale: float, softcap: float | None
) -> tuple[jax.Array, jax.Array | None]:
    """Masked scores [K, G * block, block] in float32, and the derivative of the soft cap there."""
    scores = jnp.einsum("kqh,ksh->kqs", q, k, preferred_element_type=jnp.float32) * scale
    slope = None
    if softcap is not None:
        bounded = jnp.tanh(scores / softcap)
        scores, slope = bounded * softcap, 1 - bounded * bounded
    groups = scores.shape[1] // seen.shape[0]
    return jnp.where(jnp.tile(seen, (groups, 1)), scores, -jnp.inf), slope


def _see(spans: Spans, first_query: jax.Array, first_key: jax.Array, block: int) -> jax.Array:
    """bool [block, block]: whether the queries of a block, whose spans these are, see the keys of another."""
    keys = first_key + jnp.arange(block)
    seen = (keys >= spans.begins_BT[:, None]) & (keys <= (first_query + jnp.arange(block))[:, None])
    if spans.prefix_begins_BT is None or spans.prefix_ends_BT is None:
        return seen
    return seen | ((keys >= spans.prefix_begins_BT[:, None]) & (keys < spans.prefix_ends_BT[:, None]))


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, spans: Spans, scale: float, softcap: float | None, block: int
) -> tuple[jax.Array, jax.Array]:
    """[B, T, N, H], and the log of each softmax's sum, float32 [B, T, N]."""
    heads, blocks = k.shape[2], q.shape[1] // block
    order, counts, cut = _visits(spans, block)
    keys, values = (jnp.moveaxis(x, 1, 2) for x in (k, v))

    def of_block(_: None, inputs: tuple) -> tuple[None, tuple[jax.Array, jax.Array]]:
        number, q, order, count, spans = inputs
        row, first_query = number // blocks, number % blocks * block

        def visit(n: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            highest, total, out = carry
            k, v = (_block_of(x, row, order[n], block) for x in (keys, values))
            seen = _see(spans, first_query, order[n] * block, block)
            scores, _ = _scores(q, k, seen, scale, softcap)
            higher = jnp.maximum(highest, scores.max(-1))
            # Where nothing has been seen yet there is nothing to scale.
            finite = jnp.where(jnp.isfinite(higher), higher, 0.0)
            weights = jnp.exp(scores - finite[..., None])
            keep = jnp.exp(highest - finite)
            new = jnp.einsum("kqs,ksh->kqh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return higher, total * keep + weights.sum(-1), out * keep[..., None] + new

        shape = q.shape[:2]
        start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros(q.shape, jnp.float32))
        highest, total, out = jax.lax.fori_loop(0, count, visit, start)
        return None, ((out / total[..., None]).astype(q.dtype), highest + jnp.log(total))

    number = jnp.arange(order.shape[0])
    inputs = (number, _query_blocks(q, heads, block), order, counts, cut)
    _, (out, logsumexp) = jax.lax.scan(of_block, None, inputs)
    return _from_blocks(out, q.shape, block), _from_blocks(logsumexp, q.shape[:3], block)


def _bwd(scale: float, softcap: float | None, block: int, kept: tuple, d_out: jax.Array) -> tuple:
    q, k, v, spans, out, logsumexp = kept
    heads, blocks = k.shape[2], q.shape[1] // block
    order, counts, cut = _visits(spans, block)
    keys, values = (jnp.moveaxis(x, 1, 2) for x in (k, v))
    # What the softmax takes off every score's derivative.
    common = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def of_block(carry: tuple[jax.Array, jax.Array], inputs: tuple) -> tuple:
        number, q, d_out, logsumexp, common, order, count, spans = inputs
        row, first_query = number // blocks, number % blocks * block

        def visit(n: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_keys, d_values, d_q = carry
            k, v = (_block_of(x, row, order[n], block) for x in (keys, values))
            seen = _see(spans, first_query, order[n] * block, block)
            scores, slope = _scores(q, k, seen, scale, softcap)
            weights = jnp.exp(scores - logsumexp[..., None])
            d_v = jnp.einsum(
                "kqs,kqh->ksh", weights.astype(d_out.dtype), d_out, preferred_element_type=jnp.float32
            )
            d_weights = jnp.einsum("kqh,ksh->kqs", d_out, v, preferred_element_type=jnp.float32)
            d_scores = weights * (d_weights - common[..., None]) * scale
            if slope is not None:
                d_scores = d_scores * slope
            d_scores = d_scores.astype(q.dtype)
            d_q = d_q + jnp.einsum("kqs,ksh->kqh", d_scores, k, preferred_element_type=jnp.float32)
            d_k = jnp.einsum("kqs,kqh->ksh", d_scores, q, preferred_element_type=jnp.float32)

            def add(total: jax.Array, part: jax.Array) -> jax.Array:
                start = (row, 0, order[n] * block, 0)
                old = jax.lax.dynamic_slice(total, start, (1, *part.shape))
                return jax.lax.dynamic_update_slice(total, old + part, start)

            return add(d_keys, d_k), add(d_values, d_v), d_q

        start = (*carry, jnp.zeros(q.shape, jnp.float32))
        d_keys, d_values, d_q = jax.lax.fori_loop(0, count, visit, start)
        return (d_keys, d_values), d_q.astype(q.dtype)

    number = jnp.arange(order.shape[0])
    of_queries = (_query_blocks(x, heads, block) for x in (q, d_out, logsumexp, common))
    zeros = jnp.zeros(keys.shape, jnp.float32)
    d_q: jax.Array
    (d_keys, d_values), d_q = jax.lax.scan(
        of_block, (zeros, zeros), (number, *of_queries, order, counts, cut)
    )
    d_k, d_v = (jnp.moveaxis(x, 2, 1).astype(k.dtype) for x in (d_keys, d_values))
    return _from_blocks(d_q, q.shape, block), d_k, d_v, None


blockwise_attention.defvjp(_fwd, _bwd)
