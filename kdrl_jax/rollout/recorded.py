"""Rollouts that were not sampled here: completions of a dataset, for SFT and supervised KD."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from kdrl_jax import hosts
from kdrl_jax.types import Prompts, Rollouts


def from_completions(
    prompts: Prompts,
    completion_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    pad_id: int,
    share: hosts.Share,
    mesh: Mesh,
) -> Rollouts:
    """Rows of prompt and given completion, laid out as the engine lays out sampled ones.

    Args:
        completion_ids: one per prompt, end token included; cut at `max_new_tokens`, and then counted as
            truncated like a sampled one.
        share: which rows of the batch these are.
    """
    b, width = prompts.tokens_PT.shape
    tokens = np.full((b, width + max_new_tokens), pad_id, np.int32)
    lengths = np.zeros(b, np.int32)
    ended = np.zeros(b, bool)
    for i, ids in enumerate(completion_ids):
        start, kept = int(prompts.lengths_P[i]), list(ids[:max_new_tokens])
        tokens[i, :start] = prompts.tokens_PT[i, :start]
        tokens[i, start : start + len(kept)] = kept
        lengths[i], ended[i] = len(kept), kept[-1] in end_ids
    arrays = (tokens, prompts.lengths_P, lengths, ended, np.zeros(tokens.shape, np.float32))
    return Rollouts(*(hosts.put(x, share, mesh) for x in arrays))
