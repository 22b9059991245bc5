"""Attention of packed rows by JAX's splash kernels for TPUs.

They see one run of positions alone: prompts cannot stand once for several completions.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from kdrl_jax.models.attention import ScoreRules
from kdrl_jax.models.blockwise import OUTPUT
from kdrl_jax.models.layout import Layout

BLOCKS = (1024, 512, 256, 128)
"""Sizes of a block that are tried, the first that divides T is taken."""

COMPUTE_BLOCK = 512
"""Keys of a block that are multiplied at once."""


def splash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    rules: ScoreRules,
    layout: Layout,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Every position over the positions of its piece up to itself; returns [B, T, N, H].

    Args:
        layout: without prefixes; T a multiple of 128.
        interpret: run without a TPU, slowly.
    """
    assert layout.prefix_begins_BT is None, "splash attention sees no prefixes"
    t, n = q_BTNH.shape[1:3]
    q = (q_BTNH.astype(jnp.float32) * rules.scale).astype(q_BTNH.dtype)
    # A piece is known by where it begins. 8 bits more than needed would not be faster.
    ids = kernels.SegmentIds(layout.begins_BT, layout.begins_BT)

    def attend(mask: Any) -> Callable[..., jax.Array]:
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * n),
            block_sizes=_block_sizes(t),
            attn_logits_soft_cap=rules.softcap,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=OUTPUT,
            interpret=interpret,
        )
        return jax.vmap(kernel)

    operands = (*(jnp.moveaxis(x, 2, 1) for x in (q, k_BTKH, v_BTKH)), ids)
    causal = attend(masks.CausalMask((t, t)))
    if rules.window is None or rules.width is None:
        out = causal(*operands)
    else:
        local = attend(masks.LocalMask((t, t), window_size=(rules.width - 1, 0), offset=0))
        out = jax.lax.cond(rules.window == rules.width, local, causal, *operands)
    return jnp.moveaxis(out, 1, 2)


@functools.cache
def _block_sizes(length: int) -> kernels.BlockSizes:
    block = next((size for size in BLOCKS if length % size == 0), None)
    if block is None:
        raise ValueError(f"splash attention takes rows of a multiple of {BLOCKS[-1]} positions, not {length}")
    compute = min(block, COMPUTE_BLOCK)
    return kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
    )
