"""What an engine is compiled for, and the state of its loop."""

import dataclasses
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kdrl_jax.models.cache import KVCache
from kdrl_jax.rollout.prefill import prefix_length
from kdrl_jax.rollout.sampling import SamplerSettings
from kdrl_jax.rollout.windows import SMALLEST

CacheType = Literal["float32", "bfloat16", "int8"]
Attention = Literal["auto", "windows", "kernel"]


def cache_type(setting: str, compute_dtype: Any, mesh: Mesh) -> CacheType:
    """The type of `rollout.cache_dtype`."""
    if setting == "auto":
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        setting = jnp.dtype(compute_dtype).name if on_cpu else "bfloat16"
    return cast(CacheType, setting)


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """Static shape and rules of an engine."""

    num_prompts: int
    """P: prompts per call."""
    group_size: int
    """G: completions per prompt."""
    max_prompt_tokens: int
    max_new_tokens: int
    num_tokens: int
    """Real tokens of the vocabulary."""
    end_ids: tuple[int, ...]
    pad_id: int
    decode_chunk: int
    """Decode steps between two words with the host."""
    sampler: SamplerSettings
    slots: int | None = None
    """Completions that each shard works on at once; None is chosen at the first call, from free memory."""
    cache_dtype: CacheType = "float32"
    """How keys and values are held."""
    attention: Attention = "auto"
    """How slots read the cache; `auto` is the kernel on TPUs."""


def cache_length(settings: EngineSettings) -> int:
    """Positions of a slot: of the longest row but its last token, and of a prefix, in whole windows and in
    blocks that the kernel can read many of at once."""
    longest = settings.max_prompt_tokens + settings.max_new_tokens - 1
    longest = max(longest, prefix_length(settings.max_prompt_tokens))
    step = SMALLEST if longest <= 128 else 128 if longest <= 4096 else 512
    return -(-longest // step) * step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """The state of the decode loop. Prompts, rows and slots lie over `data` and `fsdp`, and each of these
    shards has a queue of its own: its rows are those of its prompts."""

    tokens_BT: jax.Array
    """int32: prompt and completion of each row, then padding."""
    logprobs_BT: jax.Array
    counts_B: jax.Array
    """int32: completion tokens so far."""
    prompt_lengths_P: jax.Array
    draws_P: jax.Array
    prefixes: KVCache
    """Keys and values of the prompts, [L, P, K, T, H]."""
    cache: KVCache
    """Of the slots, [L, slots, K, S, H]."""
    row_of_slot: jax.Array
    """int32: the row of its shard that each slot works on; the number of rows when it is idle."""
    next_row: jax.Array
    """int32, one per shard: the first row that no slot has taken."""
    steps: jax.Array
    """int32, one per shard: decode steps so far."""
