"""Attention of slots over their own cache rows as a kernel for TPUs, which reads what each row has filled
and no more, straight from the stacked cache.

The plain way for all platforms is `windows`; XLA for TPU lays a cache out anew for its gathers, and
copies it at both ends of every chunk. The kernel walks a list of (row, block of positions), as long as the
filled blocks are many, and keeps a running softmax over the blocks of a row (the online softmax of
arXiv 1805.02867, as in FlashAttention, arXiv 2205.14135).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kdrl_jax.models.attention import ScoreRules, soft_cap
from kdrl_jax.models.cache import KVCache

_LANES = 128
_BLOCKS = (512, 256, 128)
_VMEM = 8 * 2**20
"""Bytes of blocks that are held at once: keys and values, and of each the next while one is used."""
_LOWEST = -1e30


def block_size(length: int, num_kv_heads: int, head_dim: int, dtype: Any) -> int:
    """Positions to read at once: the most that divide the cache's length and fit the chip's near memory.

    Args:
        length: a multiple of 128, or below.
        num_kv_heads: on each device.
    """
    if length <= _LANES:
        return length
    # 8 bits are widened before they are multiplied.
    vector = -(-head_dim // _LANES) * _LANES * max(jnp.dtype(dtype).itemsize, 2)
    most = max(_VMEM // (4 * num_kv_heads * vector), _BLOCKS[-1])
    return next(size for size in _BLOCKS if length % size == 0 and size <= most)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Work:
    """What a step reads: W pieces, each a block of one row, row after row."""

    positions_B: jax.Array
    rows_W: jax.Array
    blocks_W: jax.Array
    """int32; entries from `num_pieces` on mean nothing."""
    num_pieces: jax.Array


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Attention block by block."""

    length: int
    """Positions of the cache."""
    block: int
    """Positions of a piece; it divides them."""
    interpret: bool
    """Runs the kernel as plain operations, on any platform."""

    def plan(self, positions_B: jax.Array) -> Work:
        """What all layers of a step share: each slot's new token is at its position."""
        b = positions_B.shape[0]
        blocks_B = positions_B // self.block + 1
        most = b * (self.length // self.block)
        rows_W = jnp.repeat(jnp.arange(b, dtype=jnp.int32), blocks_B, total_repeat_length=most)
        before_B = jnp.cumsum(blocks_B) - blocks_B
        blocks_W = jnp.minimum(jnp.arange(most) - before_B[rows_W], blocks_B[rows_W] - 1)
        return Work(positions_B, rows_W, blocks_W.astype(jnp.int32), jnp.sum(blocks_B))

    def attend(
        self,
        plan: Work,
        cache: KVCache,
        layer: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        rules: ScoreRules,
    ) -> tuple[jax.Array, KVCache]:
        """As `AttendCached` says."""
        cache = cache.write_columns(layer, plan.positions_B, k, v)
        (b, n, h), num_kv = q.shape, k.shape[1]
        per_kv, block = n // num_kv, self.block
        sees = jnp.int32(jnp.iinfo(jnp.int32).max) if rules.window is None else rules.window
        # Read ahead of the kernel, to say what it is given.
        scalars = (layer.astype(jnp.int32)[None], sees[None], plan.positions_B, plan.rows_W, plan.blocks_W)

        def held(w: jax.Array, *scalars: Any) -> tuple[Any, ...]:
            layer, sees, positions, rows, blocks = scalars
            # Blocks that a sliding layer does not see are its first one again, which is not read twice.
            at = jnp.maximum(blocks[w], _first_block(positions[rows[w]], sees[0], block))
            return layer[0], rows[w], 0, at, 0

        def of_row(w: jax.Array, *scalars: Any) -> tuple[Any, ...]:
            return scalars[3][w], 0, 0, 0

        per_row = pl.BlockSpec((1, num_kv, per_kv, h), of_row)
        per_block = pl.BlockSpec((1, 1, num_kv, block, h), held)
        per_scale = pl.BlockSpec((1, 1, num_kv, block), lambda *a: held(*a)[:4])
        arrays = jax.tree.leaves(cache)  # keys, values, and their scales where there are some
        running = [pltpu.VMEM((num_kv, per_kv, width), jnp.float32) for width in (_LANES, _LANES, h)]
        out = pl.pallas_call(
            functools.partial(_kernel, block=block, scale=rules.scale, softcap=rules.softcap),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(plan.num_pieces,),
                in_specs=[per_row, per_block, per_block, *[per_scale] * (len(arrays) - 2)],
                out_specs=per_row,
                scratch_shapes=running,
            ),
            out_shape=jax.ShapeDtypeStruct((b, num_kv, per_kv, h), q.dtype),
            interpret=self.interpret,
            name="slots_attention",
        )(*scalars, q.reshape(b, num_kv, per_kv, h), *arrays)
        return out.reshape(q.shape), cache


def _first_block(position: jax.Array, sees: jax.Array, block: int) -> jax.Array:
    """The first block that holds a position which is seen."""
    return jnp.maximum(position - sees + 1, 0) // block


def _kernel(
    layer_ref: Any,
    sees_ref: Any,
    positions_ref: Any,
    rows_ref: Any,
    blocks_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    block: int,
    scale: float,
    softcap: float | None,
) -> None:
    """One piece of work: refs of the scalars, of what `attend` gives, of the output, and of the running
    maximum, sum and product of the row's softmax."""
    *scale_refs, out_ref, max_ref, sum_ref, acc_ref = refs
    del layer_ref  # read by the index maps alone
    w = pl.program_id(0)
    position = positions_ref[rows_ref[w]]
    at = blocks_ref[w]

    @pl.when(at == 0)
    def _begin() -> None:
        max_ref[...] = jnp.full_like(max_ref, _LOWEST)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(at >= _first_block(position, sees_ref[0], block))
    def _add() -> None:
        q = q_ref[0]
        keys, values = (ref[0, 0].astype(q.dtype) for ref in (k_ref, v_ref))
        scores = jnp.einsum("kgh,ksh->kgs", q, keys, preferred_element_type=jnp.float32) * scale
        if scale_refs:
            scores = scores * scale_refs[0][0, 0][:, None]
        back = position - at * block - jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
        scores = jnp.where((back >= 0) & (back < sees_ref[0]), soft_cap(scores, softcap), _LOWEST)
        old = max_ref[:, :, :1]
        new = jnp.maximum(old, jnp.max(scores, axis=-1, keepdims=True))
        kept, weights = jnp.exp(old - new), jnp.exp(scores - new)
        total = kept * sum_ref[:, :, :1] + jnp.sum(weights, axis=-1, keepdims=True)
        if scale_refs:
            weights = weights * scale_refs[1][0, 0][:, None]
        added = jnp.einsum(
            "kgs,ksh->kgh", weights.astype(q.dtype), values, preferred_element_type=jnp.float32
        )
        acc_ref[...] = kept * acc_ref[...] + added
        max_ref[...] = jnp.broadcast_to(new, max_ref.shape)
        sum_ref[...] = jnp.broadcast_to(total, sum_ref.shape)

    @pl.when(at == position // block)
    def _end() -> None:
        out_ref[0] = (acc_ref[...] / sum_ref[:, :, :1]).astype(out_ref.dtype)
