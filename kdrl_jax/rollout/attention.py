"""Which attention the slots have, and its part on each device of `tensor`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from kdrl_jax.models.cache import KVCache
from kdrl_jax.models.decoder import AttendCached
from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.rollout.kernel import Kernel, block_size
from kdrl_jax.rollout.prefill import PlannedAttend
from kdrl_jax.rollout.settings import EngineSettings, cache_length
from kdrl_jax.rollout.windows import Windows


def heads_divide(config: DecoderConfig, mesh: Mesh) -> bool:
    """Whether a cache's heads lie over `tensor`; otherwise each device holds all of them."""
    return config.num_kv_heads % mesh.shape["tensor"] == 0


def attend_maker(
    settings: EngineSettings, slots: int, config: DecoderConfig, mesh: Mesh
) -> Callable[[jax.Array], AttendCached]:
    """The attention of one step of a shard, given its slots' positions.

    Args:
        slots: of the shard.
    """
    platform = mesh.devices.flat[0].platform
    attention, length = settings.attention, cache_length(settings)
    if attention == "auto":
        attention = "kernel" if platform == "tpu" else "windows"
    how: Any
    if attention == "windows":
        # On a CPU rows that share a window cost more to put side by side than they save.
        most = 1 if platform == "cpu" else max(slots // 4, 1)
        how = Windows(max(n for n in range(1, most + 1) if slots % n == 0), length)
    else:
        heads = config.num_kv_heads // (mesh.shape["tensor"] if heads_divide(config, mesh) else 1)
        block = block_size(length, heads, config.head_dim, settings.cache_dtype)
        how = Kernel(length, block, interpret=platform != "tpu")
    attend = on_own_heads(how.attend, config, mesh)
    return lambda positions_B: functools.partial(attend, how.plan(positions_B))


def on_own_heads(attend: PlannedAttend, config: DecoderConfig, mesh: Mesh) -> PlannedAttend:
    """The same, each device of `tensor` on its own with its own heads, or with all where they do not
    divide: the compiler would gather the cache for a write, and cannot divide a kernel."""
    divide = heads_divide(config, mesh)

    def divided(
        plan: Any, cache: KVCache, layer: jax.Array, q: jax.Array, *more: Any
    ) -> tuple[jax.Array, KVCache]:
        whole = PartitionSpec()
        heads = PartitionSpec(*[None] * (q.ndim - 2), "tensor") if divide else whole
        of_cache = jax.tree.map(lambda _: PartitionSpec(None, None, "tensor") if divide else whole, cache)
        # After q: k, v, and the rules of scores.
        return jax.shard_map(
            attend,
            in_specs=(whole, of_cache, whole, heads, heads, heads, whole),
            out_specs=(heads, of_cache),
            axis_names={"tensor"},
            check_vma=False,
        )(plan, cache, layer, q, *more)

    return divided
