"""Rollouts in packed rows, for tests."""

import jax
import jax.numpy as jnp
import numpy as np

from kdrl_jax.models.layout import Layout
from kdrl_jax.scoring import PackShape, pack, passes_needed, place, score_rows


def shape_for(num_rows, longest, *, length=None, rows_per_pass=1, share=True, kinds=1):
    length = length or longest
    return PackShape(
        length, rows_per_pass, passes_needed(num_rows, longest, length, rows_per_pass, kinds), share
    )


def packed(tokens_BT, prompt_lengths_B, lengths_B, shape, group_size=1):
    """Packs of all rows."""
    prompt_lengths, lengths = np.asarray(prompt_lengths_B), np.asarray(lengths_B)
    rows = np.arange(len(lengths), dtype=np.int32)
    places = place(prompt_lengths, lengths, rows // group_size, shape)
    return pack(
        jnp.asarray(tokens_BT), jnp.asarray(prompt_lengths), jnp.asarray(lengths), rows, places, shape
    )


def score_rollouts(model, params, tokens_BT, starts_B, lengths_B, head, temperature=1.0):
    """Log-probabilities [B, T] of the completions, through packed rows; 0 elsewhere."""
    shape = shape_for(*tokens_BT.shape, share=False)
    rows = packed(tokens_BT, starts_B, lengths_B, shape).rows
    scores = score_rows(model, params, rows, temperature, head)
    return rows.put_back(scores.logprobs_RN, jnp.asarray(tokens_BT))


def layout_of(segment_ids_BT):
    """Of rows in which each sequence is a run of one id; 0 is padding."""
    ids = jnp.asarray(segment_ids_BT)
    at = jnp.arange(ids.shape[1])
    first = jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0
    begins = jax.lax.cummax(jnp.where(first, at, 0), axis=1)
    return Layout(at - begins, begins)
