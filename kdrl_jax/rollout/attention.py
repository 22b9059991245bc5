"""Which attention the slots have, and its part on each device of `tensor`."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.sharding import Mesh, PartitionSpec

from kdrl_jax.models.cache import KVCache
from kdrl_jax.models.decoder import AttendCached
from kdrl_jax.rollout.kernel import Kernel
from kdrl_jax.rollout.windows import Windows

Attention = Literal["auto", "windows", "kernel"]


def heads_divide(num_kv_heads: int, mesh: Mesh) -> bool:
    """Whether a cache's heads lie over `tensor`; otherwise each device holds all of them."""
    return num_kv_heads % mesh.shape["tensor"] == 0


def attend_maker(
    attention: Attention, slots: int, length: int, num_kv_heads: int, mesh: Mesh
) -> Callable[[jax.Array], AttendCached]:
    """The attention of one step of a shard, given its slots' positions.

    Args:
        slots: of the shard.
        length: of the cache.

    Raises:
        ValueError: the kernel, where it cannot run.
    """
    platform = mesh.devices.flat[0].platform
    divide = heads_divide(num_kv_heads, mesh)
    if attention == "auto":
        attention = "kernel" if platform == "tpu" and divide else "windows"
    how: Any
    if attention == "windows":
        # On a CPU rows that share a window cost more to put side by side than they save.
        group = 1 if platform == "cpu" else max(slots // 4, 1)
        how = Windows(math.gcd(slots, group), length)
    elif divide:
        how = Kernel(length, interpret=platform != "tpu")
    else:
        raise ValueError(
            f"rollout.attention=kernel needs kv heads that divide over mesh.tensor={mesh.shape['tensor']}, "
            f"and the model has {num_kv_heads}; use rollout.attention=windows"
        )
    attend = _of_heads(how.attend) if divide else how.attend
    return lambda positions_B: functools.partial(attend, how.plan(positions_B))


def _of_heads(attend: Callable[..., tuple[jax.Array, KVCache]]) -> Callable[..., tuple[jax.Array, KVCache]]:
    """The same, with the heads of each device of `tensor` on their own: the compiler would gather the
    cache for a write, and cannot divide a kernel."""

    def divided(
        plan: Any,
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
        heads, whole = PartitionSpec(None, "tensor"), PartitionSpec()
        of_cache = jax.tree.map(lambda _: PartitionSpec(None, None, "tensor"), cache)

        def local(
            plan: Any, cache: KVCache, layer: jax.Array, window: jax.Array | None, *qkv: jax.Array
        ) -> tuple[jax.Array, KVCache]:
            return attend(plan, cache, layer, *qkv, window=window, scale=scale, softcap=softcap)

        return jax.shard_map(
            local,
            in_specs=(whole, of_cache, whole, whole, heads, heads, heads),
            out_specs=(heads, of_cache),
            axis_names={"tensor"},
            check_vma=False,
        )(plan, cache, layer, window, q, k, v)

    return divided
