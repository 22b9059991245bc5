"""The decode loop of one shard: its slots work through its queue of rows, with no word from the host."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdrl_jax.models.cache import KVCache
from kdrl_jax.models.decoder import AttendCached, Decoder
from kdrl_jax.models.head import head_logits
from kdrl_jax.rollout.queue import take_rows
from kdrl_jax.rollout.sampling import row_keys, sample
from kdrl_jax.rollout.settings import Carry, EngineSettings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Call:
    """What differs between calls of one program."""

    key: jax.Array
    """The key that all rows' keys are derived from."""
    temperature: jax.Array
    """float32 scalar."""
    max_new_tokens: jax.Array
    """int32 scalar, at most the settings'."""


def decode_steps(
    decoder: Decoder,
    settings: EngineSettings,
    call: Call,
    carry: Carry,
    make_attend: Callable[[jax.Array], AttendCached],
    anywhere: Callable[[jax.Array], jax.Array],
) -> Carry:
    """At most `settings.decode_chunk` steps, fewer when queue and slots are empty.

    Args:
        carry: the part of one shard.
        make_attend: the attention of one step, given each slot's position.
        anywhere: whether a flag is set on any shard that must step along with this one.
    """
    num_rows = carry.counts_B.shape[0]
    last = carry.steps + settings.decode_chunk

    def goes_on(carry: Carry) -> jax.Array:
        works = (carry.row_of_slot < num_rows).any() | (carry.next_row[0] < num_rows)
        return anywhere(works) & (carry.steps < last).all()

    def step(carry: Carry) -> Carry:
        return _step(decoder, settings, call, _refill(settings, carry), make_attend)

    with jax.named_scope("decode_steps"):
        return jax.lax.while_loop(goes_on, step, carry)


def _refill(settings: EngineSettings, carry: Carry) -> Carry:
    """Idle slots take the next rows, with the keys and values of their prompts."""
    num_rows, num_slots = carry.counts_B.shape[0], carry.row_of_slot.shape[0]
    row_of_slot, next_row, taken = take_rows(carry.row_of_slot, carry.next_row[0], num_rows)
    slots = jnp.nonzero(taken, size=num_slots, fill_value=0)[0]

    def copy(i: jax.Array, cache: KVCache) -> KVCache:
        return cache.copy_row(slots[i], carry.prefixes, row_of_slot[slots[i]] // settings.group_size)

    # A loop of as many turns as slots were refilled, mostly none: neither a copy nor a read of the cache.
    with jax.named_scope("refill"):
        cache = jax.lax.fori_loop(0, jnp.sum(taken), copy, carry.cache)
    return dataclasses.replace(carry, cache=cache, row_of_slot=row_of_slot, next_row=next_row[None])


def _step(
    decoder: Decoder,
    settings: EngineSettings,
    call: Call,
    carry: Carry,
    make_attend: Callable[[jax.Array], AttendCached],
) -> Carry:
    """One more token in every slot that works."""
    num_rows = carry.counts_B.shape[0]
    works = carry.row_of_slot < num_rows
    row = jnp.where(works, carry.row_of_slot, 0)
    prompt, counts = row // settings.group_size, carry.counts_B[row]
    # The newest token of a row is not in the cache yet; at first it is the last of the prompt. An idle slot
    # stands at 0, and what it writes there is overwritten by the row that it takes.
    at = jnp.where(works, carry.prompt_lengths_P[prompt] + counts - 1, 0)
    hidden, cache = decoder.extend(carry.tokens_BT[row, at], at, carry.cache, make_attend(at))
    logits = head_logits(
        hidden, decoder.output_head(), num_tokens=settings.num_tokens, temperature=call.temperature
    )
    keys = row_keys(call.key, carry.draws_P[prompt], row % settings.group_size)
    token, logprob = sample(logits, keys, counts, settings.sampler, settings.end_ids)
    ends = jnp.isin(token, jnp.asarray(settings.end_ids, jnp.int32)) | (counts + 1 >= call.max_new_tokens)
    # Out of bounds and dropped for an idle slot.
    row = carry.row_of_slot
    return dataclasses.replace(
        carry,
        tokens_BT=carry.tokens_BT.at[row, at + 1].set(token, mode="drop"),
        logprobs_BT=carry.logprobs_BT.at[row, at + 1].set(logprob, mode="drop"),
        counts_B=carry.counts_B.at[row].add(1, mode="drop"),
        cache=cache,
        row_of_slot=jnp.where(works & ~ends, row, num_rows),
        steps=carry.steps + 1,
    )
