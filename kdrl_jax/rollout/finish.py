"""Why a completion ended, and what a stop text cuts off."""

import bisect
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from kdrl_jax import hosts
from kdrl_jax.types import Rollouts


def completion_ids(rollouts: Rollouts) -> list[np.ndarray]:
    """The completion tokens of each row that this process holds, on the host."""
    tokens, starts, lengths = (
        hosts.held(x) for x in (rollouts.tokens_BT, rollouts.prompt_lengths_B, rollouts.completion_lengths_B)
    )
    return [tokens[i, starts[i] : starts[i] + lengths[i]] for i in range(len(tokens))]


def finish_reason(ids: Sequence[int], ended: bool, end_ids: Sequence[int]) -> str:
    """`end` (its last token is an end token), `stop` (a stop text) or `length` (cut off)."""
    if not ended:
        return "length"
    return "end" if ids[-1] in end_ids else "stop"


def stop_length(
    ids: Sequence[int], decode: Callable[[Sequence[int]], str], stops: Sequence[str]
) -> int | None:
    """Tokens up to and including the one that completes the first stop text; None without one."""

    def has_stop(n: int) -> bool:
        text = decode(ids[:n])
        return any(stop in text for stop in stops)

    if not stops or not has_stop(len(ids)):
        return None
    return 1 + bisect.bisect_left(range(1, len(ids)), True, key=has_stop)


def cut_at_stops(
    rollouts: Rollouts,
    decode: Callable[[Sequence[int]], str],
    stops: Sequence[str],
    *,
    pad_id: int,
) -> Rollouts:
    """Completions without what follows a stop text; they have ended, and are not truncated."""
    if not stops:
        return rollouts
    arrays = (
        rollouts.tokens_BT,
        rollouts.sampler_logprobs_BT,
        rollouts.completion_lengths_B,
        rollouts.ended_B,
    )
    tokens, logprobs, lengths, ended = (np.array(hosts.held(x)) for x in arrays)
    starts = hosts.held(rollouts.prompt_lengths_B)
    for i, ids in enumerate(completion_ids(rollouts)):
        length = stop_length(ids.tolist(), decode, stops)
        if length is not None:
            lengths[i], ended[i] = length, True
            tokens[i, starts[i] + length :] = pad_id
            logprobs[i, starts[i] + length :] = 0
    return dataclasses.replace(
        rollouts,
        tokens_BT=hosts.put_back(tokens, rollouts.tokens_BT),
        completion_lengths_B=hosts.put_back(lengths, rollouts.completion_lengths_B),
        ended_B=hosts.put_back(ended, rollouts.ended_B),
        sampler_logprobs_BT=hosts.put_back(logprobs, rollouts.sampler_logprobs_BT),
    )
