"""Fingerprints of arrays: equal for equal bits, wherever these lie.

A checkpoint holds one of each of its arrays, taken on the devices before anything is written. Taken again
from what was read, they show damage that the file format does not (a flipped bit in an uncompressed chunk,
the chunk of another checkpoint), and whether what was written is what the state was.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdrl_jax import hosts
from kdrl_jax.sharding import move

_UINTS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
# Odd multipliers of 32-bit mixers: of Murmur3's finaliser, of xxHash, of the golden ratio.
_SEEDS = (0x9E3779B1, 0x85EBCA77)


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, `layers.attn.q`; of such a mapping, itself."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def fingerprints(tree: Any) -> dict[str, str]:
    """By the name of each leaf, 64 bits in hexadecimal digits that follow from its bits and their number.

    The sums below are of whole numbers modulo 2**32, so that no order and no division over devices changes
    them; each element is mixed with its place by a function that maps no two values to one, so that a change
    of one element always shows, and any other with a probability of 1 - 2**-64.
    """
    named = by_name(tree)
    parked = {path for path, x in named.items() if x.sharding.memory_kind == "pinned_host"}
    on_device = [path for path in named if path not in parked]
    sums = dict(zip(on_device, _sums([named[path] for path in on_device]), strict=True))
    for path in parked:  # one by one, since they may have no room beside each other
        sums[path] = jax.block_until_ready(_sums([move(named[path], "device")])[0])
    known = hosts.whole(sums)
    return {path: "".join(f"{int(part):08x}" for part in known[path]) for path in named}


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_sum(x) for x in leaves]


def _sum(x: jax.Array) -> jax.Array:
    """uint32 [2]."""
    bits = _bits(x)
    place = jnp.zeros(x.shape, jnp.uint32)
    stride = 1
    for dim in reversed(range(x.ndim)):
        at = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        place += at * np.uint32(stride % 2**32)
        stride *= x.shape[dim]
    length = np.uint32(stride % 2**32)
    return jnp.stack(
        [jnp.sum(_mix(bits ^ _mix(place + length, seed), seed), dtype=jnp.uint32) for seed in _SEEDS]
    )


def _bits(x: jax.Array) -> jax.Array:
    """uint32, of the shape of x."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, _UINTS[x.dtype.itemsize]).astype(jnp.uint32)


def _mix(x: jax.Array, seed: int) -> jax.Array:
    """A permutation of the 32-bit numbers that spreads every bit, made like Murmur3's finaliser."""
    x = (x ^ (x >> 16)) * np.uint32(seed)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
